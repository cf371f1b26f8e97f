"""Reads what ``proxy-fsm run`` and ``demo`` print with ``--log-format json``: one event per line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from proxy_fsm.reasons import EndReason
from proxy_fsm.states import PHASES, TRANSITIONS, Phase, State
from proxy_fsm.text import printable
from proxy_fsm.timeline.run import Event, Flow, Run, Stay, TimelineError, Track

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import tzinfo

__all__ = ["read"]

_REASONS = {str(reason): reason for reason in EndReason}
#: Where triggers lead.
_LEADS = {(str(row.trigger), str(row.source)): row.dest for row in TRANSITIONS if row.dest is not None}
#: Each state with two of its phases of which the second may follow the first.
_MOVES = {(str(row.state), str(row.phase), str(row.dest)) for row in PHASES}
#: The states, in the only order in which a proxy is in them.
_ORDER = [*map(str, State)]
_TOTALS = ("bytes_to_agent", "bytes_from_agent")


@dataclass(slots=True)
class _Line:
    """A line that is an event."""

    number: int
    at_s: float
    zone: tzinfo
    data: dict[str, Any]

    @property
    def is_change(self) -> bool:
        return isinstance(self.data.get("proxy_id"), str) and self.data["event"] == "proxy.transition"


@dataclass(slots=True)
class _Draft:
    """A proxy, while its lines are read."""

    lines: list[_Line] = field(default_factory=list)
    transitions: list[_Line] = field(default_factory=list)
    phases: list[_Line] = field(default_factory=list)


def read(lines: Iterable[bytes], name: str = "The record") -> Run:
    """Read a run.

    Args:
        lines: Its lines, as they are in the file; empty ones are skipped.
        name: What to call it in messages: the file's name.

    Raises:
        TimelineError: A line is not an event, is cut short, or does not follow from those before it; or no change of
            state is recorded.
    """
    parsed = [_parsed(number, raw, name) for number, raw in enumerate(lines, 1) if raw.strip()]
    drafts: dict[str, _Draft] = {}
    others = []
    for line in parsed:
        proxy_id = line.data.get("proxy_id")
        if not isinstance(proxy_id, str):
            others.append(line)
            continue
        draft = drafts.setdefault(proxy_id, _Draft())
        draft.lines.append(line)
        if line.is_change:
            _check_transition(line, draft.transitions, proxy_id, name)
            draft.transitions.append(line)
        elif line.data["event"] == "proxy.phase":
            _check_phase(line, draft.phases, proxy_id, name)
            draft.phases.append(line)
    drafts = {proxy_id: draft for proxy_id, draft in drafts.items() if draft.transitions}
    if not drafts:
        raise TimelineError(
            f"{name} tells of no change of state: record a run with proxy-fsm run --log-format json, "
            "and keep its standard output."
        )
    _correct_clock(parsed, set(drafts))
    first = {proxy_id: draft.transitions[0] for proxy_id, draft in drafts.items()}
    origin = min([line.at_s for line in parsed] + [line.at_s - line.data["elapsed_s"] for line in first.values()])
    end_s = max(line.at_s for line in parsed) - origin
    tracks = [
        _track(proxy_id, drafts[proxy_id], origin, end_s, name)
        for proxy_id in sorted(drafts, key=lambda proxy_id: first[proxy_id].number)
    ]
    try:
        began = datetime.fromtimestamp(origin, parsed[0].zone)
    except (ValueError, OverflowError, OSError) as error:
        number = min(line.number for line in first.values())
        raise TimelineError(
            f"{name}, line {number} has a change of state at a time before the year 1 or after the year 9999: "
            "its 'timestamp' is wrong.",
            number,
        ) from error
    return Run(
        began,
        end_s,
        tuple(tracks),
        tuple(_event(line, origin) for line in others),
    )


def _parsed(number: int, raw: bytes, name: str) -> _Line:
    where = f"{name}, line {number}"
    try:
        data = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        if not raw.endswith(b"\n"):
            raise TimelineError(
                f"{where} is cut short: remove that line, and what precedes it can be drawn.", number
            ) from error
        if isinstance(error, UnicodeDecodeError):
            raise TimelineError(
                f"{where} is not UTF-8: the file is damaged, or is not a record of events.", number
            ) from error
        raise TimelineError(f"{where} is no JSON: {error}.", number) from error
    if not isinstance(data, dict) or not isinstance(data.get("event"), str):
        raise TimelineError(f"{where} is no event: it must be a JSON object with an 'event'.", number)
    try:
        at = datetime.fromisoformat(data["timestamp"])
        at_s = at.timestamp()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TimelineError(f"{where} has no 'timestamp' in ISO 8601.", number) from error
    if at.tzinfo is None:
        raise TimelineError(f"{where} has a 'timestamp' without a time zone.", number)
    return _Line(number, at_s, at.tzinfo, data)


def _correct_clock(lines: list[_Line], proxies: set[str]) -> None:
    """Correct for a system clock that was set during the run, as far as possible.

    A proxy's changes of state are as far apart as the monotonic clock measured; what lies between two of them in the
    record stays between them.
    """
    placed: dict[str | None, float] = {}
    latest = -math.inf
    owned = [(line, line.data.get("proxy_id")) for line in lines]
    owned = [(line, owner if isinstance(owner, str) and owner in proxies else None) for line, owner in owned]
    # Changes: as far apart as measured
    for line, owner in owned:
        if line.is_change:
            if owner in placed:
                line.at_s = placed[owner] + line.data["elapsed_s"]
            else:
                line.at_s = max(line.at_s, latest)
            placed[owner] = line.at_s
            latest = max(latest, line.at_s)
    # Backwards: nothing is later than the change after it
    after: dict[str | None, float] = {}
    for line, owner in reversed(owned):
        if line.is_change:
            after[owner] = line.at_s
            after[None] = min(line.at_s, after.get(None, math.inf))
        else:
            line.at_s = min(line.at_s, after.get(owner, math.inf))
    # Forwards: nothing is earlier than the change before it
    before: dict[str | None, float] = {}
    changed_s = -math.inf
    for line, owner in owned:
        if line.is_change:
            changed_s = max(changed_s, line.at_s)
            before[None] = max(before.get(None, -math.inf), line.at_s)
        else:
            line.at_s = max(line.at_s, before.get(owner, changed_s))
        before[owner] = line.at_s


def _check_transition(line: _Line, before: list[_Line], proxy_id: str, name: str) -> None:
    data, where = line.data, f"{name}, line {line.number}"
    for key in ("source", "dest"):
        if not isinstance(data.get(key), str) or data[key] not in set(State):
            raise TimelineError(f"{where} has no valid state as '{key}': {data.get(key)!r}.", line.number)
    if not isinstance(data.get("trigger"), str):
        raise TimelineError(f"{where} has no 'trigger'.", line.number)
    _number_of(line, "elapsed_s", name, below=1e9)  # about 32 years
    expected = before[-1].data["sequence"] + 1 if before else 1
    if data.get("sequence") != expected:
        raise TimelineError(
            f"{where} has change {data.get('sequence')!r:.40} of proxy {printable(proxy_id)} where change {expected} "
            "is expected: lines are missing before it.",
            line.number,
        )
    if before and before[-1].data["dest"] != data["source"]:
        raise TimelineError(
            f"{where} leaves state {data['source']}, but proxy {printable(proxy_id)} was in {before[-1].data['dest']}.",
            line.number,
        )
    if _LEADS.get((data["trigger"], data["source"])) != data["dest"]:
        raise TimelineError(
            f"{where} goes from {data['source']} to {data['dest']} by {printable(data['trigger']):.40}, which the "
            "lifecycle does not allow: the file is damaged, or from another version.",
            line.number,
        )


def _check_phase(line: _Line, before: list[_Line], proxy_id: str, name: str) -> None:
    data, where = line.data, f"{name}, line {line.number}"
    state = data.get("state")
    if not isinstance(state, str) or state not in set(State):
        raise TimelineError(f"{where} has no valid state as 'state': {state!r:.40}.", line.number)
    phases = (None, *map(str, State(state).phases))
    for key, known in (("phase", phases[1:]), ("previous", phases)):
        if data.get(key) not in known:
            raise TimelineError(
                f"{where} has no valid phase of {state} as '{key}': {data.get(key)!r:.40}.", line.number
            )
    _number_of(line, "elapsed_s", name, below=1e9)
    phase, previous = data["phase"], data.get("previous")
    last_state, last = (before[-1].data["state"], before[-1].data["phase"]) if before else (state, previous)
    if last_state == state and last != previous:
        raise TimelineError(
            f"{where} enters phase {phase} from {previous or 'none'}, but proxy {printable(proxy_id)} was in {last}: "
            "lines are missing before it.",
            line.number,
        )
    if _ORDER.index(state) < _ORDER.index(last_state):
        raise TimelineError(f"{where} has a phase of {state}, after one of {last_state}.", line.number)
    if previous is not None and (state, previous, phase) not in _MOVES:
        raise TimelineError(
            f"{where} goes from {previous} to {phase}, which the lifecycle does not allow: the file is damaged, or "
            "from another version.",
            line.number,
        )


def _number_of(line: _Line, key: str, name: str, *, below: float = 1e18) -> float:
    """Return a number of a line that cannot be negative."""
    value = line.data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        raise TimelineError(
            f"{name}, line {line.number} has no number from 0 to below {below:g} as '{key}': {value!r:.40}.",
            line.number,
        )
    return value


def _event(line: _Line, origin: float) -> Event:
    data = line.data
    fields = {key: value for key, value in data.items() if key not in {"event", "level", "timestamp"}}
    name, level = printable(data["event"]), printable(str(data.get("level", "info")))
    return Event(line.at_s - origin, name, level, fields, line.number)


def _track(proxy_id: str, draft: _Draft, origin: float, end_s: float, name: str) -> Track:
    first, last = draft.transitions[0], draft.transitions[-1]
    begin_s = max(first.at_s - origin - first.data["elapsed_s"], 0.0)
    stays = []
    for line in draft.transitions:
        at_s = line.at_s - origin
        stays.append(Stay(State(line.data["source"]), begin_s, at_s))
        begin_s = at_s
    stays.append(Stay(State(last.data["dest"]), begin_s, end_s))
    phases = _phases(draft.phases, {stay.state: stay for stay in stays}, origin, name)
    reason = last.data.get("reason") if stays[-1].state.is_final else None
    if reason is not None and (not isinstance(reason, str) or reason not in _REASONS):
        raise TimelineError(f"{name}, line {last.number} has no valid reason as 'reason': {reason!r:.40}.", last.number)
    return Track(
        proxy_id=printable(proxy_id),
        session=printable(str(first.data.get("session", ""))),
        stays=tuple(stays),
        events=tuple(_event(line, origin) for line in draft.lines),
        flows=_flows(draft.lines, origin, name),
        reason=None if reason is None else _REASONS[reason],
        detail=printable(str(last.data.get("detail") or "")),
        hint=printable(str(last.data.get("hint") or "")),
        phases=phases,
    )


def _phases(lines: list[_Line], stays: dict[State, Stay], origin: float, name: str) -> tuple[Stay, ...]:
    """Return the phases within the states; a proxy is in each state only once.

    They are as long as the monotonic clock measured. If the record of a state's phases begins late, the first is the
    phase that the first recorded change left.
    """
    found: list[Stay] = []
    for line in lines:
        state, elapsed_s = State(line.data["state"]), line.data["elapsed_s"]
        if (around := stays.get(state)) is None:
            raise TimelineError(
                f"{name}, line {line.number} has a phase of {state}, a state its proxy was never in.", line.number
            )
        begin_s = around.begin_s
        if (previous := line.data.get("previous")) is not None:
            if not found or found[-1].state is not state:
                left_s = min(max(line.at_s - origin, around.begin_s), around.end_s)
                found.append(Stay(state, max(left_s - elapsed_s, around.begin_s), left_s, Phase(previous)))
            begin_s = min(found[-1].begin_s + elapsed_s, around.end_s)
            found[-1] = replace(found[-1], end_s=begin_s)
        found.append(Stay(state, begin_s, around.end_s, Phase(line.data["phase"])))
    return tuple(found)


def _flows(lines: list[_Line], origin: float, name: str) -> tuple[Flow, ...]:
    """Return the averages between samples (``tunnel.stats``), and what the ends of connections add to them."""
    flows: list[Flow] = []
    seen, closed, sampled_s = (0.0, 0.0), (0.0, 0.0), None
    apart: list[Flow] = []
    for line in lines:
        at_s = line.at_s - origin
        if line.data["event"] == "tunnel.stats":
            now = (_number_of(line, _TOTALS[0], name), _number_of(line, _TOTALS[1], name))
            if now[0] < seen[0] or now[1] < seen[1]:
                raise TimelineError(f"{name}, line {line.number} has totals below those before it.", line.number)
            begin_s = max(at_s - _number_of(line, "interval_s", name), sampled_s or 0.0)
            flows.append(_flow(begin_s, at_s, now[0] - seen[0], now[1] - seen[1]))
            seen, sampled_s = now, at_s
        elif line.data["event"] == "tunnel.closed":
            carried = (_number_of(line, _TOTALS[0], name), _number_of(line, _TOTALS[1], name))
            closed = (closed[0] + carried[0], closed[1] + carried[1])
            apart.append(_flow(max(at_s - _number_of(line, "duration_s", name), 0.0), at_s, *carried))
    if sampled_s is None:
        return _summed(apart)
    rest = (closed[0] - seen[0], closed[1] - seen[1])
    if apart and min(rest) >= 0 and max(rest) > 0 and apart[-1].end_s > sampled_s:
        flows.append(_flow(sampled_s, apart[-1].end_s, *rest))
    return _summed(flows)


def _flow(begin_s: float, end_s: float, to_agent: float, from_agent: float) -> Flow:
    took_s = max(end_s - begin_s, 1e-3)  # finer differences are not measured
    return Flow(begin_s, begin_s + took_s, to_agent / took_s, from_agent / took_s)


def _summed(flows: list[Flow]) -> tuple[Flow, ...]:
    """Return the sums of flows that may overlap."""
    edges = [(flow.end_s, -1, flow.to_agent, flow.from_agent) for flow in flows]
    edges += [(flow.begin_s, 1, flow.to_agent, flow.from_agent) for flow in flows]
    sums: list[Flow] = []
    open_, before_s, to_agent, from_agent = 0, 0.0, 0.0, 0.0
    for at_s, step, to_step, from_step in sorted(edges):  # at the same time, what ends comes before what begins
        if open_ and at_s > before_s:
            sums.append(Flow(before_s, at_s, to_agent, from_agent))
        open_ += step
        # A remainder from rounding is not traffic.
        to_agent = max(to_agent + step * to_step, 0.0) if open_ else 0.0
        from_agent = max(from_agent + step * from_step, 0.0) if open_ else 0.0
        before_s = at_s
    return tuple(sums)
