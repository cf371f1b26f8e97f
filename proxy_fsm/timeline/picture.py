"""A run over time: states, events, and bytes per second, proxies one below the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy_fsm.scene import Box, Group, Line, Scene, Text, shortened, width_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy_fsm.timeline.run import Event, Flow, Run, Stay, Track

__all__ = ["run_scene"]

_WIDTH, _LEFT, _RIGHT = 1000.0, 92.0, 92.0
_TOP, _BOTTOM = 66.0, 52.0
_BAND, _PHASES, _EVENTS, _FLOW = 26.0, 16.0, 18.0, 34.0
_FINAL_WIDTH = 72.0
#: More proxies than this are drawn without their phases, events and bytes.
_IN_FULL = 12
_SMALL, _NORMAL = 11.0, 13.0
_LEGEND = "events: blue, a change of state · grey, others · ochre, a warning · red, an error"


def run_scene(run: Run) -> Scene:
    """Return the picture of a run."""
    in_full = len(run.tracks) <= _IN_FULL
    phases = _PHASES if in_full and any(track.phases for track in run.tracks) else 0.0
    each = 2 * _NORMAL + _BAND + phases + 22 + (_EVENTS + 2 * _FLOW + 26 if in_full else 0)
    scene = Scene(_WIDTH, _TOP + each * len(run.tracks) + _BOTTOM, f"{run.title}: {_endings(run)}")
    began = run.began.isoformat(sep=" ", timespec="seconds")
    scene.groups.append(
        Group(
            (
                Text(_WIDTH / 2, 26, shortened(run.title, _WIDTH - 40, 15, bold=True), "name", 15),
                Text(_WIDTH / 2, 45, f"began {began}, took {_seconds(run.duration_s)}", "caption", _SMALL),
            )
        )
    )
    scale = _Scale(run)
    scene.groups.append(Group(tuple(_grid(scale, scene.height - _BOTTOM))))
    if in_full:
        scene.groups.append(Group((Text(_WIDTH / 2, scene.height - 8, _LEGEND, "caption", _SMALL),)))
    for at, track in enumerate(run.tracks):
        scene.groups.extend(_track_groups(track, scale, _TOP + at * each, in_full=in_full, phases=phases))
    return scene


def _endings(run: Run) -> str:
    return "; ".join(track.ending for track in run.tracks)


class _Scale:
    """Maps times to positions, and places the marks of the time axis."""

    def __init__(self, run: Run) -> None:
        self.duration_s = max(run.duration_s, 1e-3)
        rough = self.duration_s / 8
        power = 10.0 ** _floor_log10(rough)
        self.step_s = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)

    def x(self, at_s: float) -> float:
        share = min(max(at_s / self.duration_s, 0.0), 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def marks(self) -> Iterator[tuple[float, str]]:
        digits = max(0, -_floor_log10(self.step_s))
        for at in range(int(self.duration_s / self.step_s + 1e-9) + 1):
            yield self.x(at * self.step_s), f"{at * self.step_s:.{digits}f} s"


def _floor_log10(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def _grid(scale: _Scale, bottom: float) -> Iterator[Line | Text]:
    for x, words in scale.marks():
        yield Line(((x, _TOP - 6), (x, bottom)), "grid")
        yield Text(x, bottom + 18, words, "caption", _SMALL)


def _track_groups(track: Track, scale: _Scale, top: float, *, in_full: bool, phases: float) -> Iterator[Group]:
    failed = track.reason is not None and not track.reason.clean
    size = _NORMAL
    heading = shortened(f"{track.session} ({track.proxy_id})", _WIDTH / 3, size, bold=True)
    ending_x = _LEFT + width_of(heading, size, bold=True) + 14
    ending = shortened(track.ending, _WIDTH - ending_x - 8, size, bold=failed)
    yield Group(
        (
            Text(_LEFT, top + size, heading, "name", size, "start"),
            Text(ending_x, top + size, ending, "fault" if failed else "plain", size, "start"),
        )
    )
    y = top + 1.6 * size
    yield Group((_row_name("states", y + _BAND / 2),))
    for stay in track.stays:
        yield _stay_group(stay, scale, y, _BAND)
    y += _BAND
    if phases:
        yield Group((_row_name("phases", y + phases / 2),))
        for stay in track.phases:
            yield _stay_group(stay, scale, y, phases)
    y += phases + 14
    times = " · ".join(
        f"{stay.state} {_seconds(stay.end_s - stay.begin_s)}" for stay in track.stays if not stay.state.is_final
    )
    yield Group((Text(_LEFT, y, times, "caption", _SMALL, "start"),))
    if in_full:
        y += 8
        yield Group((_row_name("events", y + _EVENTS / 2), *_ticks(track.events, scale, y)))
        yield from _flow_groups(track.flows, scale, y + _EVENTS + 8)


def _row_name(words: str, y: float) -> Text:
    return Text(12, y + 4, words, "caption", _SMALL, "start")


def _stay_group(stay: Stay, scale: _Scale, y: float, high: float) -> Group:
    begin, end = scale.x(stay.begin_s), scale.x(stay.end_s)
    if stay.state.is_final:
        end = begin + _FINAL_WIDTH
    end = max(end, begin + (2 if stay.phase is None else 1))
    items: list[Box | Line | Text] = [Box(begin, y, end - begin, high, f"is-{stay.state}", 2)]
    name, path, kind, size = str(stay.state), str(stay.state), "name", _SMALL
    if stay.phase is not None:
        name, path, kind, size = str(stay.phase), f"{stay.state}/{stay.phase}", "plain", 10.0
    if width_of(name, size, bold=kind == "name") + 6 <= end - begin:
        items.append(Text((begin + end) / 2, y + high / 2 + 4, name, kind, size))
    return Group(tuple(items), title=f"{path}: {_seconds(stay.end_s - stay.begin_s)}")


_LEVELS = {"warning": "tick-warning", "error": "tick-error", "critical": "tick-error"}


def _ticks(events: tuple[Event, ...], scale: _Scale, y: float) -> Iterator[Line]:
    """Draw at most one line per unit of width: that of the most important event."""
    loudest: dict[int, str] = {}
    kinds = ["tick", "tick-change", "tick-warning", "tick-error"]
    for event in events:
        x = round(scale.x(event.at_s))
        kind = _LEVELS.get(event.level, "tick-change" if event.name == "proxy.transition" else "tick")
        loudest[x] = max(kind, loudest.get(x, "tick"), key=kinds.index)
    for x, kind in sorted(loudest.items()):
        yield Line(((x, y + (6 if kind == "tick" else 0)), (x, y + _EVENTS)), kind)


def _flow_groups(flows: tuple[Flow, ...], scale: _Scale, y: float) -> Iterator[Group]:
    middle = y + _FLOW
    most = max((max(flow.to_agent, flow.from_agent) for flow in flows), default=0.0)
    items: list[Line | Text | Box] = [
        _row_name("to agent", middle - _FLOW / 2),
        _row_name("from agent", middle + _FLOW / 2),
    ]
    if most > 0:
        for kind, rates, side in (
            ("flow-to", [flow.to_agent for flow in flows], -1),
            ("flow-from", [flow.from_agent for flow in flows], 1),
        ):
            points: list[tuple[float, float]] = []
            for flow, rate in zip(flows, rates, strict=True):
                begin, end, edge = scale.x(flow.begin_s), scale.x(flow.end_s), middle + side * rate / most * _FLOW
                points += [(begin, middle), (begin, edge), (end, edge), (end, middle)]
            items.append(Line(tuple(points), kind))
    items.append(Line(((_LEFT, middle), (_WIDTH - _RIGHT, middle)), "grid"))
    words = f"max {_rate(most)}" if most > 0 else "no bytes"
    items.append(Text(_WIDTH - _RIGHT + 6, middle + 4, words, "caption", 10, "start"))
    yield Group(tuple(items))


def _rate(value: float) -> str:
    for unit in ("B/s", "kB/s", "MB/s"):
        if value < 1000:  # noqa: PLR2004 - the next unit
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} GB/s"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 100 else f"{value:,.0f} s"  # noqa: PLR2004 - milliseconds no longer matter
