"""A run is drawn as it was recorded, and a broken record is refused with the number of its line."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from proxy_fsm import EndReason, State, scene, timeline
from proxy_fsm.diagram import DiagramError
from proxy_fsm.timeline import Flow, TimelineError

RUNS = Path(__file__).parent.parent / "diagrams" / "runs"
SVG = "{http://www.w3.org/2000/svg}"
BEGAN = datetime(2026, 11, 22, 12, tzinfo=UTC)
LIFE = [
    ("start", "idle", "tunnelling"),
    ("tunnel_opened", "tunnelling", "spawning"),
    ("proxy_ready", "spawning", "running"),
    ("stop", "running", "stopping"),
    ("closed_cleanly", "stopping", "stopped"),
]


def event(at_s: float, name: str, **fields: Any) -> bytes:
    stamp = (BEGAN + timedelta(seconds=at_s)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return json.dumps({"event": name, "level": "info", "timestamp": stamp} | fields).encode() + b"\n"


def life(proxy_id: str = "aa", begin_s: float = 1.0, *, upto: int = 5, session: str = "desk") -> list[bytes]:
    """Return the changes of a healthy proxy, a second apart, the first after a second of idling."""
    return [
        event(
            begin_s + at,
            "proxy.transition",
            proxy_id=proxy_id,
            session=session,
            trigger=trigger,
            source=source,
            dest=dest,
            reason="stop_requested" if at >= 3 else None,
            detail="It was asked to stop." if at >= 3 else "",
            elapsed_s=1.0,
            sequence=at + 1,
        )
        for at, (trigger, source, dest) in enumerate(LIFE[:upto])
    ]


#: Phases of that life: when each begins, its state, its name, the previous one and how long that took.
PHASES = [
    (1.0, "tunnelling", "checking", None, 0.0),
    (1.6, "tunnelling", "binding", "checking", 0.6),
    (2.0, "spawning", "launching", None, 0.0),
    (2.1, "spawning", "connecting", "launching", 0.1),
    (2.5, "spawning", "negotiating", "connecting", 0.4),
    (3.0, "running", "established", None, 0.0),
    (4.0, "stopping", "terminating", None, 0.0),
    (4.7, "stopping", "draining", "terminating", 0.7),
]


def phase(at_s: float, state: str, name: object, previous: object, elapsed_s: object, **fields: Any) -> bytes:
    common = {"proxy_id": "aa", "session": "desk", "level": "debug"} | fields
    return event(at_s, "proxy.phase", state=state, phase=name, previous=previous, elapsed_s=elapsed_s, **common)


def phased(**fields: Any) -> list[bytes]:
    """Return the life with its phases, each published after the change of state that led to it."""
    lines = [(json.loads(line)["timestamp"], 0, line) for line in life()]
    lines += [(json.loads(line)["timestamp"], 1, line) for line in (phase(*row, **fields) for row in PHASES)]
    return [line for *_, line in sorted(lines)]


def tunnel(at_s: float, name: str, to_agent: object, from_agent: int, **fields: Any) -> bytes:
    return event(
        at_s,
        f"tunnel.{name}",
        proxy_id="aa",
        session="desk",
        bytes_to_agent=to_agent,
        bytes_from_agent=from_agent,
        **fields,
    )


def in_order(*lines: bytes) -> list[bytes]:
    return sorted(lines, key=lambda line: json.loads(line)["timestamp"])


def recorded(name: str) -> timeline.Run:
    with (RUNS / f"{name}.jsonl").open("rb") as lines:
        return timeline.read(lines, name)


def drawn(run: timeline.Run) -> ET.Element:
    return ET.fromstring(str(timeline.draw(run, "svg")))  # noqa: S314 - we have written it


def words(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


class TestReading:
    def test_states_have_their_times(self) -> None:
        (track,) = timeline.read(life()).tracks
        assert [(str(stay.state), stay.begin_s, stay.end_s) for stay in track.stays] == [
            ("idle", 0, 1),
            ("tunnelling", 1, 2),
            ("spawning", 2, 3),
            ("running", 3, 4),
            ("stopping", 4, 5),
            ("stopped", 5, 5),
        ]
        assert (track.reason, track.detail) == (EndReason.STOP_REQUESTED, "It was asked to stop.")

    def test_incomplete_record_is_drawn_to_its_end(self) -> None:
        run = timeline.read([*life(upto=3), event(9, "demo.note")])
        assert run.tracks[0].state is State.RUNNING
        assert run.tracks[0].stays[-1].end_s == 9
        assert run.tracks[0].reason is None
        assert run.tracks[0].ending == "still running where the record ends"

    def test_events_are_assigned_to_their_proxy_or_to_none(self) -> None:
        lines = in_order(*life("aa"), *life("bb", 1.5, session="other"), event(0.5, "demo.began", programs="real"))
        run = timeline.read([*lines, event(9, "tunnel.listening", proxy_id="cc")])
        assert [track.proxy_id for track in run.tracks] == ["aa", "bb"]
        assert [len(track.events) for track in run.tracks] == [5, 5]
        assert [each.words for each in run.events] == ["programs real"]
        assert run.title == "Sessions desk, other"
        assert timeline.read([line for at in range(5) for line in life(f"{at}", 1, session=f"s{at}")]).title == (
            "Sessions s0, s1, s2 and 2 more"
        )

    @pytest.mark.parametrize("hour", [11, 13])
    def test_clock_change_does_not_affect_times_of_states(self, hour: int) -> None:
        """They are measured with the monotonic clock; events without such a time stay between their neighbours."""
        notes = [event(at, "note", proxy_id="aa") for at in (2.5, 3.5, 5.5)]
        others = [event(2.6, "demo.note"), event(5.7, "demo.note")]
        lines = in_order(*life(), *life("bb", 3.2, session="other"), *notes, *others)
        lines = [line.replace(b"T12:", f"T{hour}:".encode()) if at >= 3 else line for at, line in enumerate(lines)]
        run = timeline.read(lines)
        assert [stay.begin_s for stay in run.tracks[0].stays] == pytest.approx([0, 1, 2, 3, 4, 5], abs=1e-5)
        assert [stay.end_s - stay.begin_s for stay in run.tracks[1].stays[:5]] == pytest.approx([1.0] * 5, abs=1e-5)
        for track in run.tracks:
            assert [each.at_s for each in track.events] == sorted(each.at_s for each in track.events)
            ends = [each.at_s for each in track.events if each.name == "proxy.transition"]
            assert ends == [stay.end_s for stay in track.stays[:5]]
        assert all(each.at_s >= 0 for each in (*run.events, *run.tracks[0].events, *run.tracks[1].events))
        if hour == 11:
            assert run.duration_s < 10

    def test_byte_order_mark_is_skipped_only_at_the_beginning(self) -> None:
        mark = b"\xef\xbb\xbf"
        assert timeline.read([mark + life()[0], *life()[1:]]) == timeline.read(life())
        with pytest.raises(TimelineError, match="line 2 is no JSON"):
            timeline.read([life()[0], mark + life()[1]])

    def test_empty_lines_are_skipped_and_counted(self) -> None:
        with pytest.raises(TimelineError, match="line 7"):
            timeline.read([b"\n", *life(), b"{}\n"])
        assert timeline.read([b"\n", *life(), b"  \n"]).tracks[0].events[0].line == 2

    def test_recorded_runs_have_their_reasons(self) -> None:
        assert recorded("healthy").tracks[0].reason is EndReason.STOP_REQUESTED
        (fault,) = recorded("fault").tracks
        assert (fault.reason, fault.state) == (EndReason.PEER_LOST, State.FAILED)
        assert fault.hint.startswith("Ask the server")
        assert "cookie" not in (RUNS / "fault.jsonl").read_text() + (RUNS / "healthy.jsonl").read_text()


class TestPhases:
    def test_phases_have_their_times(self) -> None:
        (track,) = timeline.read(phased()).tracks
        assert [(str(each.state), str(each.phase), each.begin_s, each.end_s) for each in track.phases] == [
            ("tunnelling", "checking", 1.0, 1.6),
            ("tunnelling", "binding", 1.6, 2.0),
            ("spawning", "launching", 2.0, 2.1),
            ("spawning", "connecting", 2.1, 2.5),
            ("spawning", "negotiating", 2.5, 3.0),
            ("running", "established", 3.0, 4.0),
            ("stopping", "terminating", 4.0, 4.7),
            ("stopping", "draining", 4.7, 5.0),
        ]

    def test_phases_fill_their_states(self) -> None:
        (track,) = timeline.read(phased()).tracks
        for stay in track.stays:
            inside = [each for each in track.phases if each.state is stay.state]
            if stay.state.phases:
                assert (inside[0].begin_s, inside[-1].end_s) == (stay.begin_s, stay.end_s)

    def test_states_are_the_same_with_and_without_phases(self) -> None:
        assert timeline.read(phased()).tracks[0].stays == timeline.read(life()).tracks[0].stays

    def test_clock_change_does_not_affect_times_of_phases(self) -> None:
        lines = [line.replace(b"T12:", b"T13:") if b"draining" in line else line for line in phased()]
        assert timeline.read(lines).tracks[0].phases == timeline.read(phased()).tracks[0].phases

    def test_phase_ends_with_its_state_at_the_latest(self) -> None:
        lines = [
            *life(),
            phase(4.0, "stopping", "terminating", None, 0),
            phase(4.5, "stopping", "draining", "terminating", 99),
        ]
        (track,) = timeline.read(lines).tracks
        assert [(each.begin_s, each.end_s) for each in track.phases] == [(4, 5), (5, 5)]

    def test_phase_before_the_first_recorded_one_is_known(self) -> None:
        lines = in_order(*life(), phase(2.5, "spawning", "negotiating", "connecting", 0.3))
        (track,) = timeline.read(lines).tracks
        shown = [(str(each.phase), each.begin_s, each.end_s) for each in track.phases]
        assert shown == [("connecting", pytest.approx(2.2), 2.5), ("negotiating", 2.5, 3)]

    def test_phase_of_an_incomplete_record_lasts_to_its_end(self) -> None:
        lines = [*life(upto=3), phase(3.0, "running", "established", None, 0), event(9, "note", proxy_id="aa")]
        assert timeline.read(lines).tracks[0].phases[-1].end_s == 9

    def test_phase_published_before_its_change_of_state_is_drawn(self) -> None:
        lines = [*life(upto=1), phase(2.0, "spawning", "launching", None, 0), *life()[1:]]
        (stay,) = timeline.read(lines).tracks[0].phases
        assert (stay.begin_s, stay.end_s) == (2, 3)

    def test_phases_of_several_proxies_are_kept_apart(self) -> None:
        others = [phase(*row, proxy_id="bb") for row in PHASES]
        run = timeline.read(in_order(*phased(), *life("bb"), *others))
        assert run.tracks[0].phases == run.tracks[1].phases

    def test_null_previous_phase_may_be_omitted(self) -> None:
        lines = phased()
        fields = [{k: v for k, v in json.loads(line).items() if (k, v) != ("previous", None)} for line in lines]
        again = [json.dumps(each).encode() + b"\n" for each in fields]
        assert timeline.read(again).tracks[0].phases == timeline.read(lines).tracks[0].phases

    def test_picture_has_a_band_of_phases_under_the_states(self) -> None:
        root = drawn(timeline.read(phased()))
        bands = [each for each in root.iter(f"{SVG}rect") if each.get("class", "").startswith("is-")]
        (thick, thin) = sorted({float(each.get("height", 0)) for each in bands}, reverse=True)
        spots = {
            high: [
                (each.get("class"), float(each.get("x", 0))) for each in bands if float(each.get("height", 0)) == high
            ]
            for high in (thick, thin)
        }
        assert (len(spots[thick]), len(spots[thin])) == (6, 8)
        assert {spot for spot in spots[thick] if spot[0] not in {"is-idle", "is-stopped"}} <= set(spots[thin])
        assert {"phases", "checking", "established", "terminating"} <= set(words(root))
        assert "stopping/draining: 0.300 s" in [title.text for title in root.iter(f"{SVG}title")]

    def test_picture_without_phases_has_no_row_for_them(self) -> None:
        assert "phases" not in words(drawn(timeline.read(life())))

    def test_picture_of_many_proxies_leaves_phases_out(self) -> None:
        lines = [line for at in range(13) for line in life(f"p{at}")]
        lines += [phase(*row, proxy_id="p0") for row in PHASES]
        assert "phases" not in words(drawn(timeline.read(lines)))

    def test_sequence_has_phases_as_notes(self) -> None:
        shown = [line.strip() for line in timeline.sequence_mermaid(timeline.read(phased())).splitlines()]
        at = shown.index("Note over engine: stopping")
        assert shown[at + 1 : at + 3] == ["Note over engine: terminating", "Note over engine: draining"]

    def test_page_has_the_nested_diagram_if_phases_were_recorded(self) -> None:
        assert [
            'data-phase="stopping/draining"' in str(timeline.draw(timeline.read(lines), "html"))
            for lines in (phased(), life())
        ] == [True, False]

    def test_page_has_the_path_of_each_phase(self) -> None:
        page = str(timeline.draw(timeline.read(phased()), "html"))
        data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
        changes = [each for each in data["events"] if each[2] == "proxy.phase"]
        assert changes[-1][4:] == ["stopping: terminating → draining", "stopping/draining"]
        assert changes[0][4:] == ["tunnelling: checking", "tunnelling/checking"]
        assert data["tracks"][0]["phases"][-1] == ["stopping", 4.7, 5.0, "draining"]

    @pytest.mark.parametrize("name", ["proxy.phase", "proxy.transition"])
    def test_change_without_proxy_id_is_an_ordinary_event(self, name: str) -> None:
        run = timeline.read([*life(), event(9, name, phase="x")])
        for picture in ("svg", "html", "mermaid"):
            assert timeline.draw(run, picture)


class TestFlows:
    def test_flows_are_averages_between_samples_with_a_remainder(self) -> None:
        run = timeline.read(
            in_order(
                *life(),
                tunnel(3, "stats", 100, 0, interval_s=1.0),
                tunnel(3.5, "stats", 300, 1000, interval_s=0.5),
                tunnel(4.5, "closed", 310, 1000, duration_s=2.4),
            )
        )
        assert run.tracks[0].flows == (Flow(2, 3, 100, 0), Flow(3, 3.5, 400, 2000), Flow(3.5, 4.5, 10, 0))

    def test_flows_without_samples_are_averages_of_connections(self) -> None:
        closed = [tunnel(4, "closed", 200, 50, duration_s=2.0), tunnel(4.5, "closed", 10, 0, duration_s=0.5)]
        run = timeline.read(in_order(*life(), *closed))
        assert run.tracks[0].flows == (Flow(2, 4, 100, 25), Flow(4, 4.5, 20, 0))

    def test_flows_of_simultaneous_connections_are_summed(self) -> None:
        """In the picture and in the page, which have the same flows."""
        closed = [tunnel(3, "closed", 4000, 1000, duration_s=2.0), tunnel(4, "closed", 6000, 8000, duration_s=2.0)]
        run = timeline.read(in_order(*life(), *closed))
        assert run.tracks[0].flows == (Flow(1, 2, 2000, 500), Flow(2, 3, 5000, 4500), Flow(3, 4, 3000, 4000))
        assert "max 5 kB/s" in words(drawn(run))
        page = str(timeline.draw(run, "html"))
        data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
        assert [flow[2:] for flow in data["tracks"][0]["flows"]] == [[2000, 500], [5000, 4500], [3000, 4000]]

    @given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(0, 10**9), st.integers(0, 10**9))))
    def test_flows_stay_in_their_row_and_preserve_totals(self, ends: list[tuple[float, float, int, int]]) -> None:
        closed = [tunnel(at_s, "closed", to, back, duration_s=took_s) for at_s, took_s, to, back in ends]
        run = timeline.read(in_order(*life(), *closed, event(12, "end")))
        flows = run.tracks[0].flows
        assert all(one.end_s <= other.begin_s for one, other in pairwise(flows))
        sums = [
            sum((flow.end_s - flow.begin_s) * rate for flow, rate in zip(flows, rates, strict=True))
            for rates in ([flow.to_agent for flow in flows], [flow.from_agent for flow in flows])
        ]
        assert sums == pytest.approx([sum(each[2] for each in ends), sum(each[3] for each in ends)], rel=1e-6, abs=1)
        items = [item for group in timeline.picture.run_scene(run).groups for item in group.items]
        (middle,) = {t.y - 4 for t in items if isinstance(t, scene.Text) and re.match("max|no bytes", t.words)}
        for line in (each for each in items if isinstance(each, scene.Line) and each.kind.startswith("flow")):
            high = timeline.picture._FLOW * (-1 if line.kind == "flow-to" else 1)
            assert all(-1e-9 <= (y - middle) / high <= 1 + 1e-9 for _, y in line.points)

    @pytest.mark.parametrize(
        ("carried", "said"), [(700, "700 B/s"), (2_500, "2.5 kB/s"), (31_400_000, "31.4 MB/s"), (4 * 10**9, "4 GB/s")]
    )
    def test_flows_are_labelled_in_a_suitable_unit(self, carried: int, said: str) -> None:
        run = timeline.read(in_order(*life(), tunnel(3, "stats", 0, carried, interval_s=1.0)))
        assert f"max {said}" in words(drawn(run))

    def test_run_without_traffic_has_no_flows(self) -> None:
        run = timeline.read(life())
        assert run.tracks[0].flows == ()
        assert "no bytes" in words(drawn(run))


def changed(at: int, **fields: Any) -> list[bytes]:
    lines = life()
    lines[at] = json.dumps(json.loads(lines[at]) | fields).encode() + b"\n"
    return lines


BROKEN = [
    ("no JSON", [*life()[:2], b"{'event': 1}\n"], 3, "line 3 is no JSON: Expecting property name"),
    ("cut short", [*life()[:2], life()[2][:40]], 3, "line 3 is cut short: remove that line"),
    ("cut inside a character", [*life()[:2], '{"event": "ä'.encode()[:-1]], 3, "line 3 is cut short: remove that line"),
    ("deep", [b"[" * 100_000 + b"\n"], 1, "line 1 is no JSON"),
    ("long number", [b'{"event": ' + b"1" * 5000 + b"}\n"], 1, "line 1 is no JSON"),
    ("not UTF-8", [*life(), b'{"event": "\xff"}\n'], 6, "line 6 is not UTF-8"),
    ("binary", [b"\x89PNG\r\n", b"\x1a\n"], 1, "line 1 is not UTF-8"),
    ("no object", [b"[1]\n"], 1, "line 1 is no event"),
    ("no event", [b'{"timestamp": "2026-11-22T12:00:00Z"}\n'], 1, "line 1 is no event"),
    ("event no text", [b'{"event": 3}\n'], 1, "line 1 is no event"),
    ("no timestamp", [b'{"event": "x"}\n'], 1, "line 1 has no 'timestamp'"),
    ("odd timestamp", changed(1, timestamp="yesterday"), 2, "line 2 has no 'timestamp' in ISO 8601"),
    ("timestamp no text", changed(1, timestamp=3), 2, "line 2 has no 'timestamp'"),
    ("no zone", changed(1, timestamp="2026-11-22T12:00:02"), 2, "line 2 has a 'timestamp' without a time zone"),
    ("odd state", changed(1, dest="flying"), 2, "line 2 has no valid state as 'dest': 'flying'"),
    ("state no text", changed(1, source=["idle"]), 2, "line 2 has no valid state as 'source'"),
    ("no trigger", changed(0, trigger=None), 1, "line 1 has no 'trigger'"),
    ("time below 0", changed(0, elapsed_s=-1), 1, r"line 1 has no number from 0 to below 1e\+09 as 'elapsed_s': -1"),
    ("time no number", changed(0, elapsed_s=True), 1, "line 1 has no number"),
    ("time NaN", changed(0, elapsed_s=float("nan")), 1, "line 1 has no number"),
    ("time too large", changed(0, elapsed_s=1e300), 1, "line 1 has no number"),
    ("time before all dates", changed(0, elapsed_s=1e11), 1, "line 1 has no number"),
    (
        "before the first year",
        changed(0, timestamp="0001-01-01T00:00:30Z", elapsed_s=60),
        1,
        "line 1 has a change of state at a time before the year 1 or after the year 9999",
    ),
    (
        "before the first year by its zone",
        changed(0, timestamp="0001-01-01T00:00:01+14:00"),
        1,
        "line 1 has a change of state at a time",
    ),
    (
        "after the last year",
        [line.replace(b"2026-11-22T12:00", b"9999-12-31T23:59").replace(b"Z", b"-14:00") for line in life()],
        1,
        "line 1 has a change of state at a time",
    ),
    ("first missing", life()[1:], 1, "line 1 has change 2 of proxy aa where change 1 is expected: lines are missing"),
    ("one missing", [*life()[:2], *life()[3:]], 3, "line 3 has change 4 of proxy aa where change 3 is expected"),
    ("twice", [life()[0], life()[0]], 2, "line 2 has change 1 of proxy aa where change 2 is expected"),
    (
        "odd trigger",
        changed(2, trigger="bogus"),
        3,
        "line 3 goes from spawning to running by bogus, which the lifecycle",
    ),
    ("odd way", changed(0, dest="running"), 1, "line 1 goes from idle to running by start, which the lifecycle"),
    (
        "on after the end",
        [
            *life(),
            changed(4, trigger="stop", source="stopped", dest="idle", sequence=6)[4],
        ],
        6,
        "line 6 goes from stopped to idle by stop, which the lifecycle",
    ),
    ("gap", changed(1, source="running"), 2, "line 2 leaves state running, but proxy aa was in tunnelling"),
    ("odd reason", changed(4, reason="tired"), 5, "line 5 has no valid reason as 'reason': 'tired'"),
    ("reason no text", changed(4, reason=["x"]), 5, "line 5 has no valid reason"),
    (
        "bytes no number",
        [*life(), tunnel(9, "closed", "x", 1, duration_s=1)],
        6,
        "line 6 has no number.*bytes_to_agent",
    ),
    (
        "fewer bytes",
        [*life(), tunnel(9, "stats", 9, 9, interval_s=1), tunnel(9, "stats", 8, 9, interval_s=1)],
        7,
        "line 7 has totals below those before it",
    ),
    (
        "phase of no state",
        [*life(), phase(3, "flying", "checking", None, 0)],
        6,
        "line 6 has no valid state as 'state': 'flying'",
    ),
    ("phase of a list", [*life(), phase(3, ["running"], "x", None, 0)], 6, "line 6 has no valid state as 'state'"),  # type: ignore[arg-type]
    (
        "phase of another state",
        [*life(), phase(3, "running", "checking", None, 0)],
        6,
        "line 6 has no valid phase of running as 'phase': 'checking'",
    ),
    ("phase of idle", [*life(), phase(0, "idle", "checking", None, 0)], 6, "line 6 has no valid phase of idle"),
    ("phase missing", [*life(), phase(3, "running", None, None, 0)], 6, "line 6 has no valid phase of running"),
    ("phase a list", [*life(), phase(3, "running", ["x"], None, 0)], 6, "line 6 has no valid phase of running"),
    (
        "odd previous phase",
        [*life(), phase(3, "running", "verifying", "binding", 0)],
        6,
        "line 6 has no valid phase of running as 'previous': 'binding'",
    ),
    (
        "phase without time",
        [*life(), phase(3, "running", "verifying", "established", None)],
        6,
        "line 6 has no number from 0",
    ),
    (
        "phase missing before",
        [*life(), phase(2, "spawning", "launching", None, 0), phase(2.5, "spawning", "negotiating", "connecting", 0.1)],
        7,
        "line 7 enters phase negotiating from connecting, but proxy aa was in launching: lines are missing",
    ),
    (
        "phase entered twice",
        [*life(), phase(2, "spawning", "launching", None, 0), phase(2, "spawning", "launching", None, 0)],
        7,
        "line 7 enters phase launching from none, but proxy aa was in launching",
    ),
    (
        "odd move",
        [*life(), phase(2, "spawning", "negotiating", "launching", 0)],
        6,
        "line 6 goes from launching to negotiating, which the lifecycle does not allow",
    ),
    (
        "phase of a state before",
        [*life(), phase(3, "running", "established", None, 0), phase(3, "spawning", "launching", None, 0)],
        7,
        "line 7 has a phase of spawning, after one of running",
    ),
    (
        "phase of a state never reached",
        [*life(upto=2), phase(3, "running", "established", None, 0)],
        3,
        "line 3 has a phase of running, a state its proxy was never in",
    ),
    ("empty", [], None, "tells of no change of state: record a run with proxy-fsm run --log-format json"),
    ("nothing of it", [event(0, "demo.began")], None, "tells of no change of state"),
]


class TestBrokenRecords:
    @pytest.mark.parametrize(
        ("lines", "number", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
    )
    def test_broken_record_is_refused_with_the_line_number(
        self, lines: list[bytes], number: int | None, message: str
    ) -> None:
        with pytest.raises(TimelineError, match=message) as caught:
            timeline.read(lines, "events.jsonl")
        assert caught.value.line == number
        text = str(caught.value)
        assert text.startswith("events.jsonl")
        assert text.endswith(".")
        assert len(text) < 250
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
        assert (str(again), again.line) == (text, number)

    @given(st.integers(0, 10_000), st.binary(max_size=8))
    def test_damaged_record_is_refused_or_drawn(self, at: int, put: bytes) -> None:
        """Whatever is cut out of a record or inserted, the only error is a `TimelineError`."""
        whole = b"".join([*phased(), tunnel(9, "stats", 100, 0, interval_s=1.0)])
        at %= len(whole)
        damaged = io.BytesIO(whole[:at] + put + whole[at + len(put) + 1 :])
        try:
            run = timeline.read(damaged, "x")
        except TimelineError as error:
            assert error.line is None or error.line >= 1  # noqa: PT017 - it may come or not
        else:
            for picture in ("svg", "html", "mermaid"):
                assert timeline.draw(run, picture)


class TestPicture:
    def test_picture_has_each_state_at_its_time(self) -> None:
        root = drawn(timeline.read(life()))
        bands = [
            (each.get("class", "")[3:], float(each.get("x", 0)), float(each.get("width", 0)))
            for each in root.iter(f"{SVG}rect")
            if each.get("class", "").startswith("is-")
        ]
        assert [name for name, _, _ in bands] == [str(stay.state) for stay in timeline.read(life()).tracks[0].stays]
        wide = {name: width for name, _, width in bands}
        assert wide["idle"] == pytest.approx(wide["running"], abs=0.02)
        assert all(one[1] + one[2] == pytest.approx(other[1], abs=0.02) for one, other in pairwise(bands))

    def test_picture_has_a_legend_if_it_has_ticks(self) -> None:
        few, many = (timeline.read([line for at in range(count) for line in life(f"p{at}")]) for count in (1, 40))
        said = [any("a change of state" in line for line in words(drawn(run))) for run in (few, many)]
        assert said == [True, False]

    def test_picture_names_the_ending_and_the_time_in_each_state(self) -> None:
        shown = words(drawn(recorded("fault")))
        assert "failed: peer_lost – nxproxy lost the agent, while the SSH connection lives." in shown
        assert any(re.fullmatch(r"idle 0\.\d+ s · tunnelling .* · stopping 0\.\d+ s", line) for line in shown)
        assert any(line.startswith("max 85.3 kB/s") for line in shown)

    def test_picture_stacks_proxies_and_omits_details_of_many(self) -> None:
        few, many = (
            timeline.read([line for at in range(count) for line in life(f"p{at}", session=f"s{at}")])
            for count in (3, 40)
        )
        tops = [
            float(t.get("y", 0)) for t in drawn(few).iter(f"{SVG}text") if re.fullmatch(r"s\d \(p\d\)", t.text or "")
        ]
        assert len(tops) == 3
        assert tops == sorted(tops)
        assert min(b - a for a, b in pairwise(tops)) > 100
        assert "events" in words(drawn(few))
        assert "events" not in words(drawn(many))
        assert sum(line == "states" for line in words(drawn(many))) == 40

    def test_picture_has_no_text_beyond_its_edges(self) -> None:
        """Judged by the estimated widths, which are those of a wide font."""
        lines = in_order(*life("aa", session="a session of a very long name " * 9), *life("bb", 1.5, upto=2))
        lines.append(event(3, "process.spawned", proxy_id="aa", executable="/bin/" + "w" * 250))
        for run in (recorded("fault"), timeline.read(lines)):
            for whole in (timeline.picture.run_scene(run), timeline.sequence.sequence_scene(run)):
                for text in (each for group in whole.groups for each in group.items if isinstance(each, scene.Text)):
                    wide = scene.width_of(text.words, text.size, bold=text.kind in {"name", "fault"})
                    left = text.x - wide / 2 if text.anchor == "middle" else text.x
                    assert left >= 0, text
                    assert left + wide <= whole.width, text

    def test_picture_of_very_many_events_stays_small(self) -> None:
        noise = [event(1 + at * 4 / 10_000, "process.output", proxy_id="aa", line="x") for at in range(10_000)]
        run = timeline.read(in_order(*life(), *noise))
        assert len(str(timeline.draw(run, "svg"))) < 200_000

    def test_png_is_light_and_dark(self) -> None:
        for theme, ground in (("light", (255, 255, 255)), ("dark", (13, 17, 23))):
            picture = Image.open(io.BytesIO(timeline.draw(recorded("fault"), "png", theme=theme)))  # type: ignore[arg-type]
            assert picture.convert("RGB").getpixel((2, 2)) == ground
            assert picture.width == 2000

    def test_picture_too_large_for_png_is_refused(self) -> None:
        run = timeline.read([line for at in range(800) for line in life(f"p{at}")])
        with pytest.raises(DiagramError, match="too large for PNG: draw SVG"):
            timeline.draw(run, "png")

    def test_only_png_needs_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("matplotlib", "pygraphviz"):
            monkeypatch.setitem(sys.modules, name, None)
        for picture in timeline.FORMATS:
            if picture != "png":
                assert timeline.draw(recorded("fault"), picture)
        with pytest.raises(DiagramError, match="pip install"):
            timeline.draw(recorded("fault"), "png")

    @pytest.mark.parametrize("picture", ["html", "mermaid"])
    def test_page_and_mermaid_refuse_a_theme(self, picture: timeline.Format) -> None:
        with pytest.raises(TimelineError, match=r"^The page and the sequence .*: leave the theme out\.$"):
            timeline.draw(recorded("fault"), picture, theme="dark")

    def test_unknown_format_is_refused(self) -> None:
        with pytest.raises(TimelineError, match="no format 'gif'; there are svg"):
            timeline.draw(recorded("fault"), "gif")  # type: ignore[arg-type]

    @pytest.mark.parametrize("duration_s", [0.0, 1e-6, 0.02, 7.0, 95.0, 3600.0, 1e6])
    def test_time_axis_has_round_marks(self, duration_s: float) -> None:
        run = timeline.read([*life(upto=1), event(1 + duration_s, "end")])
        marks = [line for line in words(drawn(run)) if re.fullmatch(r"[\d.]+ s", line)]
        assert 2 <= len(marks) <= 11
        assert len(set(marks)) == len(marks)
        assert marks[0] in {"0 s", "0.0 s", "0.00 s", "0.000 s"}


class TestSequence:
    def test_sequence_of_a_healthy_run(self) -> None:
        lines = [line.strip() for line in timeline.sequence_mermaid(recorded("healthy")).splitlines()]
        assert lines[0] == "sequenceDiagram"
        shown = [re.sub(r" \([\d.]+ s\)$", "", line) for line in lines if not line.startswith("participant")]
        assert shown[1:3] == ["client->>engine: start()", "Note over engine: tunnelling"]
        for expected in (
            "engine->>proxy: spawn nxproxy",
            "tunnel->>agent: open channel",
            "proxy-->>engine: proxy_ready",
        ):
            assert expected in shown
        assert shown[-2:] == ["Note over engine: stopped (stop_requested)", "engine-->>client: stopped"]
        assert shown.index("proxy-->>engine: proxy_ready") < shown.index("client->>engine: stop()")

    def test_sequence_of_a_fault_names_its_observer(self) -> None:
        shown = timeline.sequence_mermaid(recorded("fault"))
        assert "proxy-->>engine: fault_found (peer_lost) (" in shown
        assert "Note over engine: failed (peer_lost)" in shown

    def test_fault_found_by_the_engine_is_only_a_note(self) -> None:
        lines = changed(3, trigger="fault_found", reason="display_lost")
        lines.insert(3, event(3.5, "link.silent", proxy_id="aa", silent_s=15))
        shown = timeline.sequence_mermaid(timeline.read(lines))
        assert "fault_found" not in shown
        assert "tunnel-->>engine: link.silent" in shown

    def test_sequence_picture_has_the_same_words(self) -> None:
        run = recorded("fault")
        root = ET.fromstring(str(timeline.draw(run, "svg", view="sequence")))  # noqa: S314
        shown = set(words(root))
        messages = re.findall(r": (.*?)(?: \([\d.]+ s\))?$", timeline.sequence_mermaid(run), re.MULTILINE)
        assert len(messages) > 15
        assert set(messages) <= shown
        for theme, ground in (("light", (255, 255, 255)), ("dark", (13, 17, 23))):
            png = timeline.draw(run, "png", view="sequence", theme=theme)  # type: ignore[arg-type]
            assert Image.open(io.BytesIO(png)).convert("RGB").getpixel((2, 2)) == ground  # type: ignore[arg-type]

    def test_sequence_has_the_times_of_the_run(self) -> None:
        """So that an event of one picture can be found in the other."""
        run = recorded("fault")
        (started,) = (each.at_s for each in run.tracks[0].events if each.fields.get("trigger") == "start")
        assert started > 0.05
        assert f"client->>engine: start() ({started:.3f} s)" in timeline.sequence_mermaid(run)
        assert f"{started:.3f} s" in words(ET.fromstring(str(timeline.draw(run, "svg", view="sequence"))))  # noqa: S314

    def test_unsupported_views_are_refused(self) -> None:
        run = recorded("fault")
        assert timeline.draw(run, "mermaid", view="sequence") == timeline.draw(run, "mermaid")
        with pytest.raises(TimelineError, match="page has no sequence diagram: draw that as SVG"):
            timeline.draw(run, "html", view="sequence")
        with pytest.raises(TimelineError, match="no view 'above'; there are run, sequence"):
            timeline.draw(run, "svg", view="above")  # type: ignore[arg-type]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> %%DATA%% \u2028 \x1b[2J"


class TestPage:
    def test_page_loads_nothing(self) -> None:
        page = str(timeline.draw(recorded("healthy"), "html"))
        assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:,)""", page)
        assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", page)
        assert re.findall(r"https?://[^\"' ]*", page) == ["http://www.w3.org/2000/svg"]
        assert "default-src 'none'" in page

    def test_page_contains_the_record_as_data_only(self) -> None:
        lines = [line for at in ("aa", HOSTILE) for line in life(at, session=HOSTILE)]
        lines.append(event(9, HOSTILE, detail=HOSTILE, level=HOSTILE, proxy_id="aa", **{HOSTILE: HOSTILE}))
        page = str(timeline.draw(timeline.read(lines), "html"))
        assert page.count("<script") == 2
        assert page.count("</script") == 2
        assert "<img" not in page
        assert "\u2028" not in page
        data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
        assert "</script><script>alert(1)" in data["tracks"][0]["session"]
        assert any("onerror=alert(2)" in each[2] for each in data["events"])
        root = ET.fromstring(str(timeline.draw(timeline.read(lines), "svg")))  # noqa: S314
        assert not list(root.iter(f"{SVG}script"))
        assert any("<script>alert(1)" in line for line in words(root))

    def test_lone_surrogates_are_escaped(self) -> None:
        lines = [*life(), event(9, "half \ud800", level="\udc00", detail="\ud83d", proxy_id="aa")]
        for picture in ("svg", "html", "mermaid"):
            str(timeline.draw(timeline.read(lines), picture)).encode()
        assert "half \\\\ud800" in str(timeline.draw(timeline.read(lines), "html"))

    def test_page_has_each_event_once_in_order(self) -> None:
        page = str(timeline.draw(recorded("fault"), "html"))
        data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
        names = [json.loads(line)["event"] for line in (RUNS / "fault.jsonl").read_text().splitlines()]
        assert [each[2] for each in data["events"]] == names
        assert [each[0] for each in data["events"]] == sorted(each[0] for each in data["events"])
