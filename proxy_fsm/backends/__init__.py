"""What differs from one proxy program to the next."""

from __future__ import annotations

from proxy_fsm.backends.base import Backend, BackendContext, CommandBackend, find_program
from proxy_fsm.backends.kdrive import KDriveBackend
from proxy_fsm.backends.nx3 import NX3Backend

__all__ = ["Backend", "BackendContext", "CommandBackend", "KDriveBackend", "NX3Backend", "find_program"]
