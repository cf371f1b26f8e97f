"""Channels that cannot harm their transport, transports for speed, and the parts of paramiko that they rely on."""
