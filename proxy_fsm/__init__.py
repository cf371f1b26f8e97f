"""Remote-desktop proxies as explicit state machines over paramiko: tunnel, proxy program, exact status of both."""

from __future__ import annotations

from proxy_fsm.backends import Backend, BackendContext, CommandBackend, KDriveBackend, NX3Backend
from proxy_fsm.errors import (
    BackendError,
    InvalidSession,
    InvalidTransition,
    ProxyEnded,
    ProxyFailed,
    ProxyFsmError,
    ProxyStopped,
    ServerError,
)
from proxy_fsm.evidence import Evidence
from proxy_fsm.lifecycle import Lifecycle
from proxy_fsm.proxy import Proxy
from proxy_fsm.reasons import EndReason, ServerReason
from proxy_fsm.session import (
    ListedSession,
    SessionInfo,
    SessionStatus,
    parse_agent_output,
    parse_resume_output,
    parse_session_list,
)
from proxy_fsm.ssh import fast_transport
from proxy_fsm.states import PHASES, TRANSITIONS, Phase, PhaseTransition, PhaseTrigger, State, Transition, Trigger
from proxy_fsm.status import Link, ProxyStatus, Timeouts, TransitionRecord, TunnelStats
from proxy_fsm.workers.checks import check_preflight, run_checks
from proxy_fsm.x11 import DisplayError, open_display

__version__ = "0.1.0"

__all__ = [
    "PHASES",
    "TRANSITIONS",
    "Backend",
    "BackendContext",
    "BackendError",
    "CommandBackend",
    "DisplayError",
    "EndReason",
    "Evidence",
    "InvalidSession",
    "InvalidTransition",
    "KDriveBackend",
    "Lifecycle",
    "Link",
    "ListedSession",
    "NX3Backend",
    "Phase",
    "PhaseTransition",
    "PhaseTrigger",
    "Proxy",
    "ProxyEnded",
    "ProxyFailed",
    "ProxyFsmError",
    "ProxyStatus",
    "ProxyStopped",
    "ServerError",
    "ServerReason",
    "SessionInfo",
    "SessionStatus",
    "State",
    "Timeouts",
    "Transition",
    "TransitionRecord",
    "Trigger",
    "TunnelStats",
    "check_preflight",
    "fast_transport",
    "open_display",
    "parse_agent_output",
    "parse_resume_output",
    "parse_session_list",
    "run_checks",
]
