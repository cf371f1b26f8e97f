"""The page that replays a run, in a real browser: it renders, follows the scrubber, and stays fluid."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from proxy_fsm import State, scene, timeline
from tests.test_timeline import HOSTILE, event, in_order, life, phased, recorded, tunnel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from selenium.webdriver import Chrome

WAIT_S = 30
#: Margins of the time axis in the lanes: row names on the left, a final state on the right.
NAMES, FINAL = 56, 64

#: Sets the scrubber as a pointer would.
SCRUB = "const s = document.getElementById('scrubber'); s.value = arguments[0]; s.dispatchEvent(new Event('input'));"


class Page:
    """The page as a user sees and operates it."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def script(self, code: str, *arguments: object) -> Any:
        return self.browser.execute_script(code, *arguments)

    def scrub(self, index: int) -> None:
        self.script(SCRUB, index)

    def press(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.browser).send_keys(key).perform()

    @property
    def states(self) -> list[str]:
        """The highlighted states."""
        found = "[...document.querySelectorAll('#machine .state.current')].map(g => g.dataset.state)"
        return list(self.script(f"return {found}"))

    @property
    def phases(self) -> list[str]:
        """The highlighted phases."""
        found = "[...document.querySelectorAll('#machine .phase.current')].map(g => g.dataset.phase)"
        return list(self.script(f"return {found}"))

    @property
    def taken(self) -> set[str]:
        """The highlighted transitions, as source and destination."""
        found = "[...document.querySelectorAll('#machine .taken')].map(g => g.dataset.from + ' ' + g.dataset.to)"
        return set(self.script(f"return {found}"))

    @property
    def position(self) -> int:
        return int(self.script("return document.getElementById('scrubber').value"))

    @property
    def lane_width(self) -> float:
        """The width of the run in the lanes, in pixels."""
        return float(self.script("return document.getElementById('canvas').clientWidth")) - NAMES - FINAL

    def text(self, name: str) -> str:
        return self.browser.find_element(By.ID, name).text


def console(browser: Chrome) -> list[Any]:
    """Return the browser's console messages since the last call."""
    return list(browser.get_log("browser"))  # type: ignore[no-untyped-call]


@pytest.fixture
def opened(browser: Chrome, tmp_path: Path) -> Iterator[Callable[[timeline.Run], Page]]:
    """A function that opens a run from disk; at the end the browser's console must be empty."""
    browser.get("about:blank")
    console(browser)

    def open_page(run: timeline.Run) -> Page:
        file = tmp_path / "run.html"
        file.write_text(str(timeline.draw(run, "html")), encoding="utf-8")
        browser.get(file.as_uri())
        return Page(browser)

    yield open_page
    assert console(browser) == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def events_of(name: str) -> list[dict[str, Any]]:
    """Return the events of a recorded run."""
    lines = (Path(__file__).parents[2] / "diagrams/runs" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def transitions(name: str) -> list[tuple[int, str]]:
    """Return the indexes of the events that change the state, with the new state."""
    return [(at, event["dest"]) for at, event in enumerate(events_of(name)) if event["event"] == "proxy.transition"]


@pytest.mark.parametrize("name", ["healthy", "fault"])
def test_scrubber_moves_the_highlighted_state(opened: Callable[[timeline.Run], Page], name: str) -> None:
    page = opened(recorded(name))
    assert page.states == ["idle"]
    assert page.taken == set()
    path = set()
    before = "idle"
    for at, state in transitions(name):
        page.scrub(at - 1)
        assert page.states == [before]
        page.scrub(at)
        path.add(f"{before} {state}")
        assert page.states == [state]
        assert {each for each in page.taken if "/" not in each} == path  # those of phases have a test of their own
        assert f"demo: {state}" in page.text("where")
        before = state
    page.scrub(0)
    assert page.states == ["idle"]


def test_scrubber_moves_the_highlighted_phase(opened: Callable[[timeline.Run], Page]) -> None:
    lines = phased()
    page = opened(timeline.read(lines))
    state: str = "idle"
    phase: list[str] = []
    for at, record in enumerate(map(json.loads, lines)):
        if record["event"] == "proxy.transition":
            state, phase = record["dest"], []
        else:
            phase = [f"{state}/{record['phase']}"]
        page.scrub(at)
        assert (page.states, page.phases) == ([state], phase)
    page.scrub(len(lines) - 2)
    assert page.text("where") == "desk: stopping since 4.000 s, draining since 4.700 s"
    assert "stopping/terminating stopping/draining" in page.taken
    assert "stopping/terminating stopping/killing" not in page.taken


def test_phases_are_painted_under_the_states(opened: Callable[[timeline.Run], Page]) -> None:
    page = opened(timeline.read(phased()))
    for at, state in enumerate(list(State)[:5]):
        wanted = tuple(bytes.fromhex(scene.STATE_COLOURS[state][0][1:]))
        under = partial(is_painted, page, NAMES + (at + 0.05) / 5 * page.lane_width, 61)
        assert under(wanted, page.browser) is bool(state.phases)


def test_keyboard_controls_the_scrubber(opened: Callable[[timeline.Run], Page]) -> None:
    page = opened(recorded("healthy"))
    last = int(page.script("return document.getElementById('scrubber').max"))
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.position == 2
    page.press(Keys.ARROW_LEFT)
    assert page.position == 1
    assert page.states == ["tunnelling"]
    page.press(Keys.END)
    assert (page.position, page.states) == (last, ["stopped"])
    page.press(Keys.ARROW_RIGHT)
    assert page.position == last
    page.press(Keys.HOME)
    assert (page.position, page.states) == (0, ["idle"])
    page.press(Keys.PAGE_DOWN)
    assert 0 < page.position < last
    page.press(Keys.PAGE_UP)
    assert page.position == 0
    page.script("document.getElementById('scrubber').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page.position == 1  # moved once, and not again by the slider itself


def test_space_plays_to_the_end_and_pauses(opened: Callable[[timeline.Run], Page]) -> None:
    page = opened(recorded("fault"))
    page.press(Keys.SPACE)
    assert page.text("play") == "Pause"
    page.press(Keys.SPACE)
    assert page.text("play") == "Play"
    paused = page.position
    page.script("document.getElementById('speed').value = 10")
    page.press(Keys.SPACE)
    WebDriverWait(page.browser, WAIT_S).until(lambda _: page.states == ["failed"])
    WebDriverWait(page.browser, WAIT_S).until(lambda _: page.text("play") == "Play")
    assert page.position > paused


def test_controls_have_names_and_a_visible_focus(opened: Callable[[timeline.Run], Page]) -> None:
    page = opened(recorded("healthy"))
    for control in page.browser.find_elements(
        By.CSS_SELECTOR, "button, input:not([hidden]), select, canvas, svg, #events"
    ):
        assert control.accessible_name, control.get_attribute("outerHTML")
    seen = []
    for _ in range(9):
        page.press(Keys.TAB)
        seen.append(page.script("return document.activeElement.id"))
        style = page.script(
            "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
        )
        assert style == "solid3px"
        if seen[-1] == "events":
            break
    assert {"play", "next", "speed", "scrubber", "events"} <= set(seen)
    (running,) = (at for at, state in transitions("healthy") if state == State.RUNNING)
    page.scrub(running)
    announced = page.browser.find_element(By.ID, "scrubber").get_attribute("aria-valuetext")
    events = len(events_of("healthy"))
    assert str(announced).startswith(f"event {running + 1} of {events}: ")
    assert page.text("now").startswith(f"event {running + 1} of {events} · ")
    assert "spawning → running" in str(announced)


def test_several_proxies_are_stacked_and_one_is_shown_in_the_diagram(opened: Callable[[timeline.Run], Page]) -> None:
    run = timeline.read(in_order(*life("aa", 1, session="one"), *life("bb", 1.5, session="two", upto=3)))
    page = opened(run)
    radios = page.browser.find_elements(By.CSS_SELECTOR, "#choices input")
    assert len(radios) == 2
    tops = [radio.location["y"] for radio in radios]
    assert tops[1] > tops[0] + 60
    page.scrub(1)
    assert page.text("where").startswith("two: tunnelling")
    page.press(Keys.END)
    assert page.text("where").startswith("one: stopped")
    radios[1].click()
    assert page.states == ["running"]
    page.press(Keys.HOME)
    assert page.text("where").startswith("two: idle")  # a manual choice is kept


def painted(page: Page, x: float, y: float) -> tuple[int, ...]:
    """Return the colour at a position of the lanes, in pixels of the page."""
    code = """
    const c = document.getElementById('canvas'), r = c.width / c.clientWidth;
    const pen = new OffscreenCanvas(c.width, c.height).getContext('2d', { willReadFrequently: true });
    pen.drawImage(c, 0, 0);
    return [...pen.getImageData(arguments[0] * r, arguments[1] * r, 1, 1).data].slice(0, 3);
    """
    return tuple(page.script(code, x, y))


def is_painted(page: Page, x: float, y: float, wanted: tuple[int, ...], _browser: Chrome) -> bool:
    return painted(page, x, y) == wanted


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lanes_are_painted_in_light_and_dark(opened: Callable[[timeline.Run], Page], theme: str) -> None:
    try:
        page = opened(timeline.read(in_order(*life(), tunnel(4.4, "stats", 10, 99, interval_s=1.9))))
        emulated = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        width = page.lane_width
        for at, state in enumerate(list(State)[:5]):
            colour = scene.STATE_COLOURS[state][theme == "dark"]
            wanted = tuple(bytes.fromhex(colour[1:]))
            state_is_painted = partial(is_painted, page, NAMES + (at + 0.1) / 5 * width, 35, wanted)
            WebDriverWait(page.browser, WAIT_S).until(state_is_painted)
        ground = page.script("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(13, 17, 23)" if theme == "dark" else "rgb(255, 255, 255)")
        page.scrub(2)
        head = page.browser.find_element(By.ID, "playhead").rect["x"]
        left = page.browser.find_element(By.ID, "canvas").rect["x"]
        assert head - left == pytest.approx(NAMES + 3 / 5 * width, abs=2)
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_lanes_can_be_dragged_to_a_time(opened: Callable[[timeline.Run], Page]) -> None:
    page = opened(timeline.read([*life(), event(6, "note", proxy_id="aa")]))
    canvas = page.browser.find_element(By.ID, "canvas")
    second = page.lane_width / 6
    middle = NAMES + 3 * second - canvas.rect["width"] / 2  # relative to the lanes' centre, as selenium counts

    def pointer() -> ActionChains:
        return ActionChains(page.browser)

    pointer().move_to_element_with_offset(canvas, round(middle + 0.5 * second), 0).perform()
    assert page.position == 0  # the pointer only hovers
    pointer().click_and_hold().perform()
    assert (page.position, page.states) == (2, ["running"])
    pointer().move_by_offset(round(second), 0).perform()
    assert (page.position, page.states) == (3, ["stopping"])
    pointer().move_by_offset(round(-4 * second), 0).perform()
    assert page.position == 0
    pointer().release().move_by_offset(round(2 * second), 0).perform()
    assert page.position == 0


def test_ticks_and_colours_are_explained(opened: Callable[[timeline.Run], Page]) -> None:
    page = opened(recorded("fault"))
    for words in ("a change of state", "others", "a warning", "an error", "to the agent", "from the agent"):
        assert words in page.text("legend")
    kinds = page.script(
        "return [...document.querySelectorAll('#legend i')].map(i => getComputedStyle(i).backgroundColor)"
    )
    assert len(set(kinds)) == len(kinds) == 6


def test_recorded_markup_is_shown_and_never_executed(opened: Callable[[timeline.Run], Page]) -> None:
    lines = life("aa", session=HOSTILE)
    lines.append(event(9, HOSTILE, detail=HOSTILE, level="error", proxy_id="aa"))
    page = opened(timeline.read(lines))
    page.press(Keys.END)
    assert "<img src=x onerror=alert(2)>" in page.text("now")
    assert "</script><script>alert(1)" in page.browser.title
    assert page.script("return document.images.length") == 0
    assert page.script("return document.scripts.length") == 2


def test_ten_thousand_events_stay_fluid(opened: Callable[[timeline.Run], Page]) -> None:
    """The work of a step does not grow with the run: few elements exist, and a step changes few of them."""
    noise = [event(1 + at * 4 / 10_000, "process.output", proxy_id="aa", line=f"line {at}") for at in range(10_000)]
    page = opened(timeline.read(in_order(*life(), *noise)))
    assert page.script("return document.querySelectorAll('*').length") < 400
    measured = page.script(
        SCRUB.replace("arguments[0]", "0")
        + """
        let changes = 0;
        const watch = new MutationObserver((list) => { changes += list.length; });
        watch.observe(document.body, { attributes: true, childList: true, characterData: true, subtree: true });
        const pen = CanvasRenderingContext2D.prototype, fill = pen.fillRect;
        let fills = 0;
        pen.fillRect = function (...a) { fills += 1; return fill.apply(this, a); };
        const began = performance.now();
        for (let step = 1; step <= 100; step += 1) {
          s.value = step * 99;
          s.dispatchEvent(new Event("input"));
          document.body.getBoundingClientRect();
        }
        const took = performance.now() - began;
        changes += watch.takeRecords().length;
        pen.fillRect = fill;
        return { changes, fills, took };
        """
    )
    assert measured["changes"] / 100 < 150
    assert measured["fills"] == 0
    assert measured["took"] < 10_000
    assert page.position == 9900
    assert page.script("return document.querySelectorAll('*').length") < 400
    shown = page.script("return document.querySelector('#rows .current').textContent")
    assert page.text("now").split("· ")[1].split(",")[0] in shown


def test_hundreds_of_thousands_of_flows_are_painted(opened: Callable[[timeline.Run], Page]) -> None:
    run = timeline.read(in_order(*life(), tunnel(3, "stats", 10, 99, interval_s=1.0)))
    (track,) = run.tracks
    page = opened(replace(run, tracks=(replace(track, flows=track.flows * 200_000),)))
    page.press(Keys.END)  # the page opens, and the console stays empty
    assert page.states == ["stopped"]


def test_list_shows_the_visible_rows_and_handles_clicks(opened: Callable[[timeline.Run], Page]) -> None:
    noise = [event(1 + at * 4 / 500, "process.output", proxy_id="aa", line=f"line {at}") for at in range(500)]
    page = opened(timeline.read(in_order(*life(), *noise)))
    page.script("document.getElementById('events').scrollTop = 26 * 300")
    WebDriverWait(page.browser, WAIT_S).until(
        lambda _: page.script("return document.querySelector('#rows li').dataset.index") == "300"
    )
    page.script("document.querySelectorAll('#rows li')[2].click()")
    assert page.position == 302


def test_time_to_write_the_page_is_bounded() -> None:
    """A run of 10,000 events is read and written within 20 s."""
    noise = [event(1 + at * 4 / 10_000, "process.output", proxy_id="aa", line="x") for at in range(10_000)]
    lines = in_order(*life(), *noise)
    began = time.monotonic()
    timeline.draw(timeline.read(lines), "html")
    assert time.monotonic() - began < 20
