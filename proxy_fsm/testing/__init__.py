"""Test tools for programs that embed proxies.

Faked proxies, an SSH server with injectable faults, scripted programs and stand-ins; the modules ``machine`` and
``strategies`` need hypothesis.
"""

from proxy_fsm.testing.fakes import FakedProxy, FakeProcess, FakeTransport, FakeTunnel
from proxy_fsm.testing.scripted import Gate, ScriptedProxy
from proxy_fsm.testing.ssh_server import CommandHandler, Forwarding, LoopbackSSHServer

__all__ = [
    "CommandHandler",
    "FakeProcess",
    "FakeTransport",
    "FakeTunnel",
    "FakedProxy",
    "Forwarding",
    "Gate",
    "LoopbackSSHServer",
    "ScriptedProxy",
]
