"""The messages of a run: a sequence diagram of its first proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from proxy_fsm.diagram.text import mermaid_text
from proxy_fsm.scene import Box, Group, Line, Scene, Text, shortened, width_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy_fsm.timeline.run import Event, Run, Track

__all__ = ["sequence_mermaid", "sequence_scene"]

#: The participants: short name, and what each is.
_PARTICIPANTS = {
    "client": "your program",
    "engine": "proxy_fsm",
    "tunnel": "tunnel",
    "proxy": "proxy program",
    "agent": "agent",
}
#: The participant that observed the cause, by its reason; for all others it is the engine itself.
_OBSERVERS = {
    "agent_unreachable": "tunnel",
    "forwarding_denied": "tunnel",
    "negotiation_failed": "proxy",
    "peer_lost": "proxy",
    "proxy_exited": "proxy",
    "proxy_killed": "proxy",
    "session_ended": "agent",
    "session_suspended": "agent",
    "session_taken_over": "agent",
    "session_terminated": "agent",
    "transport_lost": "tunnel",
    "transport_silent": "tunnel",
    "viewer_closed": "proxy",
}


class _Message(NamedTuple):
    """An arrow between two participants; a note over one, if both are the same."""

    at_s: float
    source: str
    dest: str
    words: str
    is_answer: bool = False
    kind: str = "plain"


def _messages(track: Track) -> Iterator[_Message]:
    for event in track.events:
        if event.name == "proxy.transition":
            yield from _messages_of_transition(event)
        else:
            yield from _messages_of_event(event)


def _messages_of_transition(event: Event) -> Iterator[_Message]:
    fields, at_s = event.fields, event.at_s
    trigger, dest, reason = fields["trigger"], fields["dest"], fields.get("reason")
    if trigger in {"start", "stop"}:
        yield _Message(at_s, "client", "engine", f"{trigger}()")
    elif trigger in {"fault_found", "session_ended"}:
        observer = _OBSERVERS.get(str(reason), "engine")
        if observer != "engine":
            yield _Message(at_s, observer, "engine", f"{trigger} ({reason})", is_answer=True)
    elif trigger == "tunnel_opened":
        yield _Message(at_s, "tunnel", "engine", trigger, is_answer=True)
    elif trigger == "proxy_ready":
        yield _Message(at_s, "proxy", "engine", trigger, is_answer=True)
    ending = f" ({reason})" if dest in {"stopped", "failed"} and reason else ""
    yield _Message(at_s, "engine", "engine", f"{dest}{ending}", kind="fault" if dest == "failed" else "name")
    if ending:
        yield _Message(at_s, "engine", "client", dest, is_answer=True)


def _messages_of_event(event: Event) -> Iterator[_Message]:
    fields, at_s = event.fields, event.at_s
    match event.name:
        case "proxy.phase":
            yield _Message(at_s, "engine", "engine", str(fields["phase"]))
        case "tunnel.listening":
            yield _Message(at_s, "engine", "tunnel", "listen")
        case "process.spawned":
            program = str(fields.get("executable", "")).rpartition("/")[2]
            yield _Message(at_s, "engine", "proxy", shortened(f"spawn {program}".strip(), 1.8 * _COLUMN, _SIZE))
        case "tunnel.connected":
            yield _Message(at_s, "proxy", "tunnel", "connect")
            yield _Message(at_s, "tunnel", "agent", "open channel")
        case "tunnel.closed":
            carried = fields["bytes_to_agent"] + fields["bytes_from_agent"]
            yield _Message(at_s, "tunnel", "engine", f"closed, {carried:,} bytes", is_answer=True)
        case "process.exited":
            number, code = fields.get("signal"), fields.get("exit_code")
            how = f"ended by signal {number}" if number is not None else f"exited with {code}"
            yield _Message(at_s, "proxy", "engine", how, is_answer=True)
        case "tunnel.refused" | "tunnel.rejected" | "link.silent" | "link.restored":
            yield _Message(at_s, "tunnel", "engine", event.name, is_answer=True)


def _stamp(message: _Message) -> str:
    return f"{message.at_s:.3f} s"


def sequence_mermaid(run: Run) -> str:
    """Return the sequence diagram of a run's first proxy in Mermaid's language, with the run's seconds."""
    track = run.tracks[0]
    lines = ["sequenceDiagram"]
    lines += [f"    participant {name} as {words}" for name, words in _PARTICIPANTS.items()]
    for message in _messages(track):
        words = mermaid_text(message.words)
        if message.source == message.dest:
            lines.append(f"    Note over {message.source}: {words}")
        else:
            arrow = "-->>" if message.is_answer else "->>"
            lines.append(f"    {message.source}{arrow}{message.dest}: {words} ({_stamp(message)})")
    return "\n".join(lines) + "\n"


_COLUMN, _ROW, _TOP, _SIZE = 168.0, 30.0, 84.0, 12.0
_TIME_WIDTH = 70.0


def sequence_scene(run: Run) -> Scene:
    """Return the sequence diagram of a run's first proxy as a picture."""
    track = run.tracks[0]
    messages = list(_messages(track))
    columns = {name: _TIME_WIDTH + _COLUMN * (at + 0.5) for at, name in enumerate(_PARTICIPANTS)}
    height = _TOP + _ROW * (len(messages) + 1)
    scene = Scene(_TIME_WIDTH + _COLUMN * len(_PARTICIPANTS), height, f"{run.title} – {track.ending}")
    scene.groups.append(Group((Text(scene.width / 2, 26, shortened(scene.title, scene.width - 20, 14), "plain", 14),)))
    for name, words in _PARTICIPANTS.items():
        x, wide = columns[name], width_of(words, _SIZE, bold=True) + 20
        scene.groups.append(
            Group(
                (
                    Line(((x, _TOP - 14), (x, height - 10)), "aside"),
                    Box(x - wide / 2, _TOP - 40, wide, 26, radius=5),
                    Text(x, _TOP - 22.5, words, "name", _SIZE),
                )
            )
        )
    stamp = ""
    for at, message in enumerate(messages):
        y = _TOP + _ROW * (at + 0.75)
        new = _stamp(message)
        if new != stamp:
            scene.groups.append(Group((Text(10, y, new, "caption", 11, "start"),)))
        stamp = new
        scene.groups.append(_message_group(message, columns, y))
    return scene


def _message_group(message: _Message, columns: dict[str, float], y: float) -> Group:
    begin, end = columns[message.source], columns[message.dest]
    if begin == end:
        wide = width_of(message.words, _SIZE, bold=True) + 18
        box = Box(begin - wide / 2, y - 16, wide, 23, "note", 3)
        return Group((box, Text(begin, y, message.words, message.kind, _SIZE)))
    side = 1 if end > begin else -1
    line = Line(((begin, y), (end - 8 * side, y)), "dashes" if message.is_answer else "line", tip=(end - side, y))
    wide = width_of(message.words, _SIZE) + 8
    middle = (begin + end) / 2
    # Without it, the lines of other participants would cross the words.
    ground = Box(middle - wide / 2, y - 17, wide, 14, "paper", 0)
    return Group((ground, line, Text(middle, y - 6, message.words, "plain", _SIZE)))
