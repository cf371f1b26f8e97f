"""The exceptions of this package.

::

    ProxyFsmError
    ├── InvalidTransition      an order that the lifecycle's table refuses in this state
    ├── InvalidSession         a field of a session cannot be used (also a ValueError)
    ├── DiagramError           a picture cannot be drawn (also a ValueError)
    ├── BackendError           a backend cannot continue; carries reason, detail and hint
    ├── ServerError            an X2Go server did not do what it was asked for; carries reason, detail and hint
    └── ProxyEnded
        ├── ProxyFailed        the engine ended with a fault; carries the status
        └── ProxyStopped       the engine ended cleanly while a caller waited for RUNNING; carries the status

Every message is a whole sentence that says what to do; what a program needs is in attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy_fsm.reasons import EndReason, ServerReason
    from proxy_fsm.states import State
    from proxy_fsm.status import ProxyStatus

__all__ = [
    "BackendError",
    "DiagramError",
    "InvalidSession",
    "InvalidTransition",
    "ProxyEnded",
    "ProxyFailed",
    "ProxyFsmError",
    "ProxyStopped",
    "ServerError",
]


class ProxyFsmError(Exception):
    """Base class of all errors that this package defines."""


class InvalidTransition(ProxyFsmError):  # noqa: N818 - the contract's name
    """The lifecycle's table refuses this trigger in this state; the state is unchanged.

    Attributes:
        trigger: The trigger's name.
        state: The state in which it was refused.
    """

    def __init__(self, trigger: str, state: State) -> None:
        self.trigger = trigger
        self.state = state
        super().__init__(
            f"'{trigger}' is refused in state '{state}'. A proxy is used once: make a new Proxy for a new attempt."
            if trigger == "start"
            else f"'{trigger}' is refused in state '{state}'. See proxy_fsm.TRANSITIONS for what each state accepts."
        )

    def __reduce__(self) -> tuple[type[InvalidTransition], tuple[str, State]]:
        return type(self), (self.trigger, self.state)


class InvalidSession(ProxyFsmError, ValueError):  # noqa: N818 - the contract's name
    """A field of a session cannot be used.

    Attributes:
        field: The name of the field.
        problem: What is wrong with it, without the value where that is a secret.
    """

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        self.problem = problem
        super().__init__(f"The session's {field} cannot be used: {problem}")

    def __reduce__(self) -> tuple[type[InvalidSession], tuple[str, str]]:
        return type(self), (self.field, self.problem)


class DiagramError(ProxyFsmError, ValueError):
    """A picture cannot be drawn; the message says why, and what to do."""


class BackendError(ProxyFsmError):
    """A backend cannot continue.

    Attributes:
        reason: The EndReason that the engine will end with.
        detail: One human-readable sentence: what happened.
        hint: What to do about it, or None for the reason's own hint.
    """

    def __init__(self, reason: EndReason, detail: str, hint: str | None = None) -> None:
        self.reason = reason
        self.detail = detail
        self.hint = hint
        super().__init__(detail if hint is None else f"{detail} {hint}")

    def __reduce__(self) -> tuple[type[BackendError], tuple[EndReason, str, str | None]]:
        return type(self), (self.reason, self.detail, self.hint)


class ServerError(ProxyFsmError):
    """An X2Go server did not do what it was asked for.

    Attributes:
        reason: Why, as a `ServerReason`.
        detail: One human-readable sentence: what happened. What the server printed is quoted in it, without cookies.
        hint: What to do about it.
        exit_status: That of the server's command; None if there was none.
    """

    def __init__(
        self, reason: ServerReason, detail: str, hint: str | None = None, *, exit_status: int | None = None
    ) -> None:
        self.reason = reason
        self.detail = detail
        self.hint = reason.hint if hint is None else hint
        self.exit_status = exit_status
        super().__init__(f"{detail} {self.hint}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.reason, self.detail, self.hint), {"exit_status": self.exit_status}


class ProxyEnded(ProxyFsmError):  # noqa: N818 - the contract names both of its subclasses so
    """The engine reached a final state while a caller was waiting for RUNNING.

    Attributes:
        status: The ProxyStatus at its end.
    """

    def __init__(self, status: ProxyStatus) -> None:
        self.status = status
        message = f"The proxy of session {status.session} is {status.state}"
        if status.reason is not None:
            message += f" ({status.reason})"
        message += f": {status.detail}" if status.detail else "."
        super().__init__(f"{message} {status.hint}" if status.hint else message)

    def __reduce__(self) -> tuple[type[ProxyEnded], tuple[ProxyStatus]]:
        return type(self), (self.status,)


class ProxyFailed(ProxyEnded):
    """The engine ended with a fault: see ``status.reason``, ``status.detail`` and ``status.hint``."""


class ProxyStopped(ProxyEnded):
    """The engine ended cleanly before it was running, or while a caller was waiting for that."""
