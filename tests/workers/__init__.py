"""Channels that cannot harm their transport, transports for speed, and what of paramiko they are built on."""
