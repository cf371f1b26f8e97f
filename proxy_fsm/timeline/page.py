"""A run as one page that replays it: opened from disk, without a network, used with keyboard or pointer."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from proxy_fsm.scene import COLOURS, STATE_COLOURS

if TYPE_CHECKING:
    from proxy_fsm.timeline.run import Event, Run

__all__ = ["page"]

#: Characters that could end a script element or are special in HTML: escaped, they are the same JSON.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def page(run: Run) -> str:
    """Return the page.

    What was recorded is data in it, never HTML and never a script: the policy allows its one script by its hash, and
    nothing else may run or be loaded.
    """
    here = files("proxy_fsm.timeline")
    script = (here / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    phases = any(track.phases for track in run.tracks)
    parts = {
        "TITLE": escape(run.title),
        "POLICY": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        "STYLE": _colours() + (here / "page.css").read_text(encoding="utf-8"),
        "DIAGRAM": (here / ("phases.svg" if phases else "lifecycle.svg")).read_text(encoding="utf-8"),
        "DATA": json.dumps(_data(run), ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES),
        "SCRIPT": script,
    }
    # Piece by piece, so that no placeholder is replaced inside what was filled in.
    template = (here / "page.html").read_text(encoding="utf-8")
    pieces = []
    for at, piece in enumerate(template.split("%%")):
        pieces.append(parts[piece] if at % 2 else piece)
    return "".join(pieces)


def _colours() -> str:
    light, dark = (" ".join(f"--{name}: {pair[at]};" for name, pair in COLOURS.items()) for at in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def _data(run: Run) -> dict[str, Any]:
    events: list[tuple[Event, int]] = [(event, -1) for event in run.events]
    for at, track in enumerate(run.tracks):
        events += [(event, at) for event in track.events]
    events.sort(key=lambda pair: (pair[0].at_s, pair[0].line))
    return {
        "began": run.began.isoformat(sep=" ", timespec="seconds"),
        "duration": _rounded(run.duration_s),
        "colours": STATE_COLOURS,
        "tracks": [
            {
                "id": track.proxy_id,
                "session": track.session,
                "ending": track.ending,
                "hint": track.hint,
                "failed": track.reason is not None and not track.reason.clean,
                "stays": [[str(stay.state), _rounded(stay.begin_s), _rounded(stay.end_s)] for stay in track.stays],
                "phases": [
                    [str(stay.state), _rounded(stay.begin_s), _rounded(stay.end_s), str(stay.phase)]
                    for stay in track.phases
                ],
                "flows": [
                    [_rounded(flow.begin_s), _rounded(flow.end_s), round(flow.to_agent), round(flow.from_agent)]
                    for flow in track.flows
                ],
            }
            for track in run.tracks
        ],
        "events": [
            [
                _rounded(event.at_s),
                at,
                event.name,
                event.level,
                event.words,
                _change(event) if at >= 0 else 0,
            ]
            for event, at in events
        ],
    }


def _change(event: Event) -> list[str] | str | int:
    """Return the states of a change of state, and the path of the phase of a change of phase."""
    if event.name == "proxy.transition":
        return [event.fields["source"], event.fields["dest"]]
    return f"{event.fields['state']}/{event.fields['phase']}" if event.name == "proxy.phase" else 0


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
