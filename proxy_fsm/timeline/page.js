"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const el = (id) => document.getElementById(id);
  const make = (tag, kind, text) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const events = data.events.map(([at, track, name, level, words, change]) => (
    typeof change === "string" ? { at, track, name, level, words, phase: change }
      : { at, track, name, level, words, change }));
  const tracks = data.tracks.map((track) => ({
    ...track,
    stays: track.stays.map(([state, begin, end]) => ({ state, begin, end })),
    phases: track.phases.map(([state, begin, end, phase]) => ({ state, begin, end, phase })),
    flows: track.flows.map(([begin, end, to, from]) => ({ begin, end, to, from })),
  }));
  const duration = Math.max(data.duration, 1e-3);
  const ROW = 26, BAND = 26, TICKS = 16, FLOW = 26, HEAD = 30, NAMES = 56, FINAL = 64, PHASE = 18;
  const SPEEDS = [0.1, 0.25, 0.5, 1, 2, 5, 10, 60, 600, 3600];
  const compact = tracks.length > 12;
  const STEPS = !compact && tracks.some((track) => track.phases.length) ? PHASE : 0;
  const LANE = HEAD + BAND + STEPS + (compact ? 8 : 10 + TICKS + 6 + 2 * FLOW + 14);
  const AXIS = 26;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const seconds = (s) => (duration < 100 ? s.toFixed(3) : s.toFixed(1)) + " s";
  const rate = (value) => {
    for (const unit of ["B/s", "kB/s", "MB/s"]) {
      if (value < 1000) return Number(value.toPrecision(3)) + " " + unit;
      value /= 1000;
    }
    return Number(value.toPrecision(3)) + " GB/s";
  };

  // ---- state and phase at an event ----
  const changes = tracks.map(() => []), moves = tracks.map(() => []);
  events.forEach((event, index) => {
    if (event.change) changes[event.track].push(index);
    if (event.phase) moves[event.track].push(index);
  });
  /** The number of values in a sorted list that are not above a limit. */
  const countUpTo = (list, limit, value) => {
    let low = 0, high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (value(list[middle]) <= limit) low = middle + 1; else high = middle;
    }
    return low;
  };
  let position = 0, chosen = 0;
  const stateOf = (track, index) => {
    const made = countUpTo(changes[track], index, (at) => at);
    return { stay: tracks[track].stays[made], made };
  };
  /** The events up to one of them that entered a phase, in order. */
  const phasesUpTo = (track, index) => (
    moves[track].slice(0, countUpTo(moves[track], index, (at) => at)).map((at) => events[at]));
  const stateIn = (path) => path.split("/")[0];

  // ---- the diagram ----
  const states = new Map(), arrows = new Map();
  for (const group of document.querySelectorAll("#machine [data-state]")) states.set(group.dataset.state, group);
  for (const group of document.querySelectorAll("#machine [data-phase]")) states.set(group.dataset.phase, group);
  for (const group of document.querySelectorAll("#machine .arrow")) {
    arrows.set(group.dataset.from + " " + group.dataset.to, group);
  }
  const mark = (group, kind, on) => { if (group && group.classList.contains(kind) !== on) group.classList.toggle(kind, on); };
  const showDiagram = () => {
    const { stay: { state, begin }, made } = stateOf(chosen, position);
    const visited = new Set(), taken = new Set();
    for (const at of changes[chosen].slice(0, made)) {
      const [source, dest] = events[at].change;
      visited.add(source).add(dest);
      taken.add(source + " " + dest);
    }
    const entered = phasesUpTo(chosen, position), last = entered.at(-1);
    const phase = last && stateIn(last.phase) === state ? last.phase : "";
    entered.forEach(({ phase: path }, at) => {
      visited.add(path);
      if (at && stateIn(entered[at - 1].phase) === stateIn(path)) taken.add(entered[at - 1].phase + " " + path);
    });
    for (const [name, group] of states) {
      const here = name === state || name === phase;
      mark(group, "current", here);
      mark(group, "visited", visited.has(name));
      if (here) group.setAttribute("aria-current", "step"); else group.removeAttribute("aria-current");
    }
    for (const [name, group] of arrows) mark(group, "taken", taken.has(name));
    const words = tracks[chosen].session + ": " + state + " since " + seconds(begin)
      + (phase ? ", " + phase.slice(state.length + 1) + " since " + seconds(last.at) : "");
    if (el("where").textContent !== words) el("where").textContent = words;
  };

  // ---- the list of events: only the visible rows exist ----
  const list = el("events"), rows = el("rows"), lines = [];
  el("filler").style.height = events.length * ROW + "px";
  const visibleRows = Math.ceil(312 / ROW) + 2;
  for (let at = 0; at < Math.min(visibleRows, events.length); at += 1) {
    const line = make("li");
    line.append(make("span", "at"), make("span", "name"), make("span", "words"));
    line.addEventListener("click", () => move(Number(line.dataset.index)));
    rows.append(line);
    lines.push(line);
  }
  let shownFrom = -1, shownMark = -1;
  const showList = () => {
    const from = Math.max(0, Math.min(Math.floor(list.scrollTop / ROW), events.length - lines.length));
    if (from === shownFrom && shownMark === position) return;
    if (from !== shownFrom) rows.style.transform = "translateY(" + from * ROW + "px)";
    lines.forEach((line, at) => {
      const index = from + at, event = events[index];
      if (from !== shownFrom) {
        line.dataset.index = index;
        const cells = line.children;
        cells[0].textContent = seconds(event.at);
        cells[1].textContent = event.name;
        cells[2].textContent = (tracks.length > 1 && event.track >= 0 ? tracks[event.track].session + ": " : "") + event.words;
        line.title = event.words;
      }
      const kind = (index === position ? "current " : "") + (event.level === "critical" ? "error" : event.level);
      if (line.className !== kind) line.className = kind;
    });
    shownFrom = from;
    shownMark = position;
  };
  list.addEventListener("scroll", () => showList());
  const follow = () => {
    const top = position * ROW, height = list.clientHeight;
    if (top < list.scrollTop + ROW || top + 2 * ROW > list.scrollTop + height) list.scrollTop = top - height / 2;
  };

  // ---- the lanes ----
  const canvas = el("canvas"), playhead = el("playhead");
  let width = 0;
  const room = () => width - NAMES - FINAL;
  const x = (at) => NAMES + Math.min(Math.max(at / duration, 0), 1) * room();
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawLanes = () => {
    width = canvas.clientWidth;
    const height = tracks.length * LANE + AXIS, ratio = Math.min(window.devicePixelRatio || 1, 16000 / height);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = height + "px";
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "12px 'DejaVu Sans', Verdana, Arial, sans-serif";
    const ink = colour("--ink"), faint = colour("--faint"), line = colour("--grid");
    drawAxis(pen, height, faint, line);
    tracks.forEach((track, at) => {
      let y = at * LANE + HEAD;
      const name = (words, middle) => {
        pen.fillStyle = faint;
        pen.textAlign = "left";
        pen.fillText(words, 0, middle + 4);
      };
      name("states", y + BAND / 2);
      for (const stay of track.stays) drawStay(pen, stay, y, BAND, ink, faint);
      y += BAND;
      if (STEPS) {
        name("phases", y + STEPS / 2);
        for (const stay of track.phases) drawStay(pen, stay, y, STEPS, ink, faint);
        y += STEPS;
      }
      if (compact) return;
      y += 10;
      name("events", y + TICKS / 2);
      drawTicks(pen, at, y);
      name("bytes", y + TICKS + 6 + FLOW);
      drawFlows(pen, track.flows, y + TICKS + 6 + FLOW, faint, line);
    });
  };
  const drawStay = (pen, { state, begin, end, phase }, y, high, ink, faint) => {
    const final = state === "stopped" || state === "failed", words = phase || state;
    const left = x(begin), wide = final ? FINAL : Math.max(x(end) - left, phase ? 1 : 2);
    pen.fillStyle = data.colours[state][dark.matches ? 1 : 0];
    pen.fillRect(left, y, wide, high);
    pen.strokeStyle = faint;
    pen.lineWidth = 0.6;
    pen.strokeRect(left, y, wide, high);
    if (pen.measureText(words).width + 6 < wide) {
      pen.fillStyle = ink;
      pen.textAlign = "center";
      pen.fillText(words, left + wide / 2, y + high / 2 + 4);
    }
  };
  const drawAxis = (pen, height, faint, line) => {
    const rough = duration / 8, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (let at = 0; at * step <= duration * 1.000001; at += 1) {
      const left = x(at * step);
      pen.fillStyle = line;
      pen.fillRect(left, 0, 1, height - AXIS + 4);
      pen.fillStyle = faint;
      pen.textAlign = "center";
      pen.fillText((at * step).toFixed(digits) + " s", left, height - 6);
    }
  };
  const drawTicks = (pen, track, y) => {
    const kinds = { info: "--faint", debug: "--grid", warning: "--warning", error: "--fault", critical: "--fault" };
    const drawn = new Set();
    for (const event of events) {
      if (event.track !== track) continue;
      const kind = event.change ? "--accent" : kinds[event.level] || "--faint", left = Math.round(x(event.at));
      if (drawn.has(kind + left)) continue;
      drawn.add(kind + left);
      pen.fillStyle = colour(kind);
      const tall = event.change || kind === "--fault" || kind === "--warning";
      pen.fillRect(left, tall ? y : y + 6, tall ? 2 : 1, tall ? TICKS : TICKS - 6);
    }
  };
  const drawFlows = (pen, flows, middle, faint, line) => {
    const most = flows.reduce((highest, flow) => Math.max(highest, flow.to, flow.from), 1);
    for (const { begin, end, to, from } of flows) {
      const left = x(begin), wide = Math.max(x(end) - left, 1);
      pen.fillStyle = colour("--to-agent");
      pen.fillRect(left, middle - to / most * FLOW, wide, to / most * FLOW);
      pen.fillStyle = colour("--from-agent");
      pen.fillRect(left, middle, wide, from / most * FLOW);
    }
    pen.fillStyle = line;
    pen.fillRect(NAMES, middle, room(), 1);
    if (flows.length) {
      pen.fillStyle = faint;
      pen.textAlign = "right";
      pen.fillText("max " + rate(most), width - 2, middle - 6);
    }
  };

  // ---- navigation ----
  const following = el("following");
  following.hidden = following.parentElement.hidden = tracks.length === 1;
  const scrubber = el("scrubber");
  scrubber.max = Math.max(events.length - 1, 0);
  const placeHead = (at) => { playhead.style.transform = "translateX(" + x(at) + "px)"; };
  const move = (index) => {
    position = Math.min(Math.max(index, 0), events.length - 1);
    const event = events[position];
    if (Number(scrubber.value) !== position) scrubber.value = position;
    if (following.checked && event.track >= 0 && event.track !== chosen) choose(event.track);
    const who = tracks.length > 1 && event.track >= 0 ? tracks[event.track].session + ", " : "";
    const place = "event " + (position + 1) + " of " + events.length;
    const words = seconds(event.at) + ", " + who + event.name + (event.words ? ": " + event.words : "");
    scrubber.setAttribute("aria-valuetext", place + ": " + words);
    el("now").textContent = place + " · " + words;
    placeHead(event.at);
    showDiagram();
    follow();
    showList();
  };
  const radios = [];
  const choose = (track) => {
    chosen = track;
    radios[track].checked = true;
    showDiagram();
  };
  tracks.forEach((track, at) => {
    const label = make("label", track.failed ? "failed" : ""), radio = make("input");
    radio.type = "radio";
    radio.name = "proxy";
    radio.hidden = tracks.length === 1;
    radio.addEventListener("change", () => { following.checked = false; choose(at); });
    label.append(radio, make("b", "", track.session + " (" + track.id + ")"), make("span", "ending", track.ending));
    label.style.top = at * LANE + 2 + "px";
    label.title = track.hint ? track.ending + " " + track.hint : track.ending;
    el("choices").append(label);
    radios.push(radio);
  });

  let playing = 0, clock = 0, before = 0;
  const playButton = el("play"), speed = el("speed");
  for (const factor of SPEEDS) {
    const option = make("option", "", factor + "×");
    option.value = factor;
    speed.append(option);
  }
  // Plays the whole run in 15 s at most, where a speed allows it.
  speed.value = SPEEDS.find((factor) => duration / factor <= 15) || SPEEDS.at(-1);
  const pause = () => {
    cancelAnimationFrame(playing);
    playing = 0;
    playButton.textContent = "Play";
    playButton.setAttribute("aria-pressed", "false");
  };
  const tick = (now) => {
    clock += (now - before) / 1000 * Number(speed.value);
    before = now;
    const reached = countUpTo(events, clock, (event) => event.at) - 1;
    if (reached > position) move(reached);
    placeHead(Math.min(clock, duration));
    if (position >= events.length - 1) pause(); else playing = requestAnimationFrame(tick);
  };
  const play = () => {
    if (position >= events.length - 1) move(0);
    clock = events[position].at;
    before = performance.now();
    playButton.textContent = "Pause";
    playButton.setAttribute("aria-pressed", "true");
    playing = requestAnimationFrame(tick);
  };
  const go = (index) => { if (playing) pause(); move(index); };
  const toggle = () => { if (playing) pause(); else play(); };
  playButton.addEventListener("click", toggle);
  el("first").addEventListener("click", () => go(0));
  el("last").addEventListener("click", () => go(events.length - 1));
  el("back").addEventListener("click", () => go(position - 1));
  el("next").addEventListener("click", () => go(position + 1));
  scrubber.addEventListener("input", () => go(Number(scrubber.value)));
  const goToPointer = (pointer) => {
    const at = (pointer.clientX - canvas.getBoundingClientRect().left - NAMES) / room() * duration;
    go(Math.max(countUpTo(events, at, (event) => event.at) - 1, 0));
  };
  let held = null;  // the pointer that drags, also outside the lanes
  canvas.addEventListener("pointerdown", (pointer) => {
    if (pointer.button !== 0) return;
    pointer.preventDefault();  // select no text while dragging
    held = pointer.pointerId;
    goToPointer(pointer);
  });
  addEventListener("pointermove", (pointer) => { if (pointer.pointerId === held) goToPointer(pointer); });
  for (const end of ["pointerup", "pointercancel"]) {
    addEventListener(end, (pointer) => { if (pointer.pointerId === held) held = null; });
  }
  const tenth = () => Math.max(1, Math.round(events.length / 10));
  const keys = {
    ArrowLeft: () => go(position - 1), ArrowRight: () => go(position + 1), Home: () => go(0),
    End: () => go(events.length - 1), PageUp: () => go(position - tenth()), PageDown: () => go(position + tenth()),
    " ": toggle,
  };
  document.addEventListener("keydown", (press) => {
    if (press.ctrlKey || press.altKey || press.metaKey || !(press.key in keys)) return;
    // The focused element may use the key itself.
    const { tagName, type } = press.target, isSpace = press.key === " ";
    if (tagName === "SELECT" || (isSpace && (tagName === "BUTTON" || type === "checkbox" || type === "radio"))) return;
    if (type === "radio" && press.key.startsWith("Arrow")) return;
    press.preventDefault();
    keys[press.key]();
  });

  el("summary").textContent = "began " + data.began + ", took " + seconds(data.duration) + ", " + events.length + " events";
  el("legend").append(
    "Events:", make("i", "change"), "a change of state", make("i", "other"), "others", make("i", "warning"), "a warning",
    make("i", "error"), "an error", make("br"), "Bytes per second:", make("i", "to"), "to the agent", make("i", "from"),
    "from the agent");
  el("legend").hidden = compact;
  const redraw = () => { drawLanes(); placeHead(events[position].at); };
  new ResizeObserver(() => { if (canvas.clientWidth !== width) redraw(); }).observe(canvas);
  dark.addEventListener("change", redraw);
  chosen = 0;
  radios[0].checked = true;
  redraw();
  move(0);
})();
