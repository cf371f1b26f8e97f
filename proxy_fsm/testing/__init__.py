"""What programs test their own use of proxies with: an SSH server, stand-ins, scripted programs."""

from proxy_fsm.testing.ssh_server import CommandHandler, Forwarding, LoopbackSSHServer

__all__ = ["CommandHandler", "Forwarding", "LoopbackSSHServer"]
