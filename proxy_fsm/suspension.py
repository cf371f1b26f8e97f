"""What a wait that ends far too late means: this process was suspended, by Ctrl-Z, a debugger or a busy machine.

Nobody else is to blame for that time: the server, the agent and the proxy program went on, and what they sent meanwhile
is still unread.
"""

from __future__ import annotations

__all__ = ["excused_s"]

#: Less is mere scheduling, in seconds.
_SCHEDULING_S = 0.1
#: How long the other threads may take to read what has arrived meanwhile, in seconds.
_CATCH_UP_S = 1.0


def excused_s(late_s: float) -> float:
    """Return how much time does not count against anybody, after a wait that ended late.

    Args:
        late_s: By how much, in seconds; negative if it ended early.
    """
    return late_s + min(late_s, _CATCH_UP_S) if late_s > _SCHEDULING_S else 0.0
