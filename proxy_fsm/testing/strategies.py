"""Hypothesis strategies for everything that a client may have to handle.

Needs the extra ``testing``.
"""

from __future__ import annotations

import string
from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from proxy_fsm.reasons import EndReason, is_retryable
from proxy_fsm.session import SessionInfo
from proxy_fsm.states import TRANSITIONS, State, Transition, Trigger
from proxy_fsm.status import ProxyStatus, TransitionRecord

__all__ = ["histories", "sessions", "statuses", "transition_sequences", "triggers"]

_MOVES = {state: tuple(row for row in TRANSITIONS if row.source is state and row.dest is not None) for state in State}
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def triggers() -> st.SearchStrategy[Trigger]:
    """Any trigger, whether the table accepts it or not."""
    return st.sampled_from(Trigger)


@st.composite
def transition_sequences(draw: st.DrawFn, *, complete: bool | None = None) -> tuple[Transition, ...]:
    """Every path through the lifecycle that the table allows, from ``idle``: each row starts where the last one ended.

    Args:
        draw: Passed by hypothesis.
        complete: True for paths that reach a final state, False for those that do not; by default both.
    """
    rows: list[Transition] = []
    state = State.IDLE
    while not state.is_final:
        moves = [row for row in _MOVES[state] if complete is not False or not (row.dest or state).is_final]
        if not moves or (complete is not True and draw(st.booleans())):
            break
        rows.append(draw(st.sampled_from(moves)))
        state = rows[-1].dest or state
    return tuple(rows)


@st.composite
def histories(draw: st.DrawFn, *, complete: bool | None = None) -> tuple[TransitionRecord, ...]:
    """Records that subscribers may receive: gapless, the reason from ``stopping`` on, and the final state it implies.

    Args:
        draw: Passed by hypothesis.
        complete: As in `transition_sequences`.
    """
    rows = draw(transition_sequences(complete=complete))
    clean = not any(row.trigger is Trigger.FAULT_FOUND for row in rows)
    reason = draw(st.sampled_from([reason for reason in EndReason if reason.clean is clean]))
    if rows and rows[-1].source is State.STOPPING:
        rows = (*rows[:-1], next(row for row in _MOVES[State.STOPPING] if (row.dest is State.STOPPED) is clean))
    session, proxy_id = draw(sessions()).name, draw(st.text("0123456789abcdef", min_size=8, max_size=8))
    at, records = _EPOCH, []
    for sequence, row in enumerate(rows, start=1):
        elapsed_s = draw(st.floats(0, 3600))
        at += timedelta(seconds=elapsed_s)
        dest = row.dest or row.source
        ending = dest is State.STOPPING or dest.is_final
        records.append(
            TransitionRecord(
                proxy_id=proxy_id,
                session=session,
                trigger=row.trigger,
                source=row.source,
                dest=dest,
                reason=reason if ending else None,
                detail=f"It ends: {reason}." if ending else "",
                at=at,
                elapsed_s=elapsed_s,
                sequence=sequence,
            )
        )
    return tuple(records)


@st.composite
def statuses(draw: st.DrawFn) -> ProxyStatus:
    """Any self-consistent status that a proxy may have."""
    history = draw(histories())
    last = history[-1] if history else None
    state, reason = (last.dest, last.reason) if last is not None else (State.IDLE, None)
    return ProxyStatus(
        id=last.proxy_id if last is not None else "00000000",
        session=last.session if last is not None else draw(sessions()).name,
        state=state,
        since=last.at if last is not None else _EPOCH,
        reason=reason,
        detail=last.detail if last is not None else "",
        hint=reason.hint if reason is not None else None,
        retryable=is_retryable(
            reason,
            channel_opened=draw(st.booleans()),
            running_s=next((record.elapsed_s for record in history if record.source is State.RUNNING), None),
            resumed=draw(st.booleans()),
        )
        if state.is_final and reason is not None
        else None,
        output_tail=tuple(draw(st.lists(st.text(string.printable[:95]), max_size=5))),
        history=history,
    )


@st.composite
def sessions(draw: st.DrawFn) -> SessionInfo:
    """Any session that X2Go may have, with its cookie."""
    user = draw(st.from_regex(r"[a-z][a-z0-9_-]{0,15}", fullmatch=True))
    display = draw(st.integers(50, 10000))
    kind = draw(st.sampled_from("DRSP"))
    command = draw(st.from_regex(r"[A-Za-z0-9-]{1,12}", fullmatch=True))
    return SessionInfo(
        name=f"{user}-{display}-{draw(st.integers(10**9, 2 * 10**9))}_st{kind}{command}_dp24",
        cookie=draw(st.text("0123456789abcdef", min_size=32, max_size=32)),
        graphics_port=draw(st.integers(1024, 65535)),
        display=display,
    )
