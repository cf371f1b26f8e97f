"""The results as a table, as JSON, and as plots."""

from __future__ import annotations

import importlib
import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.contenders import CONTENDERS, OURS, REFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Measure(NamedTuple):
    """One row of a table: the key of its values, its title, its unit and whether more is better."""

    key: str
    title: str
    unit: str
    more_is_better: bool
    digits: int = 0


RELAY = (
    Measure("down_mb_s", "down", "MB/s", more_is_better=True),
    Measure("up_mb_s", "up", "MB/s", more_is_better=True),
    Measure("both_mb_s", "both ways at once, sum", "MB/s", more_is_better=True),
    Measure("rtt_p50_us", "64 bytes there and back, p50", "µs", more_is_better=False),
    Measure("rtt_p99_us", "64 bytes there and back, p99", "µs", more_is_better=False),
    Measure("rtt_bulk_p50_us", "the same beside a bulk download, p50", "µs", more_is_better=False),
    Measure("rtt_bulk_p99_us", "the same beside a bulk download, p99", "µs", more_is_better=False),
    Measure("connections_s", "connections opened one after another", "1/s", more_is_better=True),
    Measure("down_cpu_s_gib", "processor time of the client, down", "s/GiB", more_is_better=False, digits=2),
    Measure("up_cpu_s_gib", "processor time of the client, up", "s/GiB", more_is_better=False, digits=2),
    Measure("slow_reader_mib", "memory gained by a reader of 1 MiB/s", "MiB", more_is_better=False, digits=1),
    Measure("peak_mib", "peak memory with it", "MiB", more_is_better=False, digits=1),
    *(
        measure
        for ms in (20, 100)
        for measure in (
            Measure(f"down_{ms}ms_mb_s", f"down at {ms} ms round trip", "MB/s", more_is_better=True, digits=1),
            Measure(f"up_{ms}ms_mb_s", f"up at {ms} ms round trip", "MB/s", more_is_better=True, digits=1),
            Measure(f"rtt_{ms}ms_p50_us", f"64 bytes at {ms} ms, p50", "µs", more_is_better=False),
        )
    ),
)
#: The costs of one proxy: key, title, and number of decimals.
COSTS = (
    ("threads", "threads", 1),
    ("kib", "resident memory, KiB", 0),
    ("descriptors", "descriptors", 1),
    ("wake_ups_s", "wake-ups a second, idle", 2),
    ("start_ms", "start, all at once, ms", 1),
    ("stop_ms", "stop, all at once, ms", 1),
)


@dataclass
class Results:
    """All results of a run.

    Attributes:
        environment: Where and when, by name.
        rounds: The number of rounds of tunnel measurements.
        values: By contender and measurement, one value per round; None for a round without one.
        troubles: By contender and measurement, why there is none.
        versions: Of the contenders.
        sessions: Times of real sessions in milliseconds, or why there are none.
        costs: By number of proxies, the cost of each, or why it is unknown.
        micro: Microseconds of small operations.
    """

    environment: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    values: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    troubles: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    sessions: dict[str, list[float]] | str = "not measured"
    costs: dict[str, dict[str, float] | str] = field(default_factory=dict)
    micro: dict[str, float] | str = "not measured"

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def median(self, name: str, key: str) -> float | None:
        """Return the median over the rounds; None without a value."""
        values = [value for value in self.values.get(name, {}).get(key, []) if value is not None]
        return statistics.median(values) if values else None

    def ratio(self, name: str, key: str, to: str = REFERENCE) -> float | None:
        """Return the median of the ratios to another contender in the same round; None without a ratio."""
        ratios = self.ratios(name, key, to)
        return statistics.median(ratios) if ratios else None

    def ratios(self, name: str, key: str, to: str = REFERENCE) -> list[float]:
        """Return the ratio to another contender in each round with values of both."""
        own, other = (self.values.get(each, {}).get(key, []) for each in (name, to))
        return [value / base for value, base in zip(own, other, strict=False) if value is not None and base]


def write(results: Results, directory: Path) -> None:
    """Write ``results.json``, ``table.md`` and the plots into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(results), indent=1, ensure_ascii=False)
    (directory / "results.json").write_text(f"{text}\n", encoding="utf-8")
    (directory / "table.md").write_text(table(results), encoding="utf-8")
    plot(results, directory)


def table(results: Results) -> str:
    """Return the results as Markdown."""
    parts = ["# Results\n", *(f"- {name}: {value}" for name, value in results.environment.items())]
    parts += [f"- {name}: {version}" for name, version in results.versions.items() if version]
    parts += ["", *_relay(results), "", *_goals(results), "", *_sessions(results), "", *_costs(results), ""]
    if isinstance(results.micro, str):
        parts += ["## Small operations", "", f"Not measured: {results.micro}"]
    else:
        parts += ["## Small operations", "", "| | µs |", "|---|---:|"]
        parts += [
            f"| a transition of the bare machine | {results.micro['transition_bare_us']:.1f} |",
            f"| a transition with record, status and log event (filtered) | {results.micro['transition_us']:.1f} |",
            f"| `ok()` | {results.micro['ok_us']:.2f} |",
        ]
    return "\n".join(parts) + "\n"


def _relay(results: Results) -> list[str]:
    names = [name for name in CONTENDERS if name in results.values or name in results.troubles]
    lines = [
        f"## Tunnels: medians of {results.rounds} rounds, and the median ratio to `{REFERENCE}` in the same round",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for measure in RELAY:
        if any(results.median(name, measure.key) is not None for name in names):
            cells = [_cell(results, name, measure) for name in names]
            lines.append(f"| {measure.title}, {measure.unit} | {' | '.join(cells)} |")
    if troubles := [
        f"- {name}, {what}: {' '.join(why.split())}"
        for name, found in results.troubles.items()
        for what, why in found.items()
    ]:
        lines += ["", "Measurements that failed, in some or all rounds:", "", *troubles]
    return lines


def _cell(results: Results, name: str, measure: Measure) -> str:
    median, ratio = results.median(name, measure.key), results.ratio(name, measure.key)
    if median is None:
        return "failed" if results.troubles.get(name) and CONTENDERS[name].tunnels else "–"
    times = "" if ratio is None or name == REFERENCE else f" ({ratio:.2f}×)"
    return f"{median:,.{measure.digits}f}{times}"


class Limit(NamedTuple):
    """A goal with an absolute limit: its title, maximum, unit, measured value, and number of decimals."""

    title: str
    most: int
    unit: str
    found: float
    digits: int = 1


class Goal(NamedTuple):
    """A goal relative to another contender: which measurement, and the factor that it must reach or not exceed."""

    title: str
    key: str
    to: str
    times: float
    at_least: bool


GOALS = (
    Goal("down, to `ssh -L`", "down_mb_s", REFERENCE, 1.0, at_least=True),
    Goal("up, to `ssh -L`", "up_mb_s", REFERENCE, 1.0, at_least=True),
    Goal("both ways, to `ssh -L`", "both_mb_s", REFERENCE, 1.0, at_least=True),
    Goal("round trip p50, to `ssh -L`", "rtt_p50_us", REFERENCE, 1.0, at_least=False),
    Goal("round trip p99, to `ssh -L`", "rtt_p99_us", REFERENCE, 1.0, at_least=False),
    Goal("down, to sshtunnel", "down_mb_s", "sshtunnel", 2.0, at_least=True),
    Goal("up, to sshtunnel", "up_mb_s", "sshtunnel", 2.0, at_least=True),
    Goal("down, to asyncssh", "down_mb_s", "asyncssh", 1.3, at_least=True),
    Goal("up, to asyncssh", "up_mb_s", "asyncssh", 1.3, at_least=True),
    Goal("down at 100 ms, to `ssh -L`", "down_100ms_mb_s", REFERENCE, 2.0, at_least=True),
    Goal("up at 100 ms, to `ssh -L`", "up_100ms_mb_s", REFERENCE, 2.0, at_least=True),
)


def _goals(results: Results) -> list[str]:
    lines = ["## The goals", "", "| | goal | measured | |", "|---|---:|---:|---|"]
    for goal in GOALS:
        ratios = results.ratios(OURS, goal.key, goal.to)
        limit = f"{'≥' if goal.at_least else '≤'} {goal.times:.1f}×"
        if not ratios:
            lines.append(f"| {goal.title} | {limit} | – | not measured |")
            continue
        met = {ratio >= goal.times if goal.at_least else ratio <= goal.times for ratio in ratios}
        spread = f"rounds disagree: {min(ratios):.2f} to {max(ratios):.2f}"
        verdict = spread if len(met) > 1 else "met" if met == {True} else "**not met**"
        lines.append(f"| {goal.title} | {limit} | {statistics.median(ratios):.2f}× | {verdict} |")
    for title, most, unit, found, digits in _limits(results):
        verdict = "met" if found <= most else "**not met**"
        lines.append(f"| {title} | ≤ {most:,} {unit} | {found:,.{digits}f} {unit} | {verdict} |")
    return lines


def _limits(results: Results) -> Iterator[Limit]:
    """Yield the goals with absolute limits, as far as they were measured."""
    if not isinstance(results.sessions, str):
        ours, by_hand, after_exit = (
            statistics.median(results.sessions[f"{what}_ms"])
            for what in ("start_ours", "start_by_hand", "stop_after_exit")
        )
        yield Limit("start, longer than by hand", 10, "ms", ours - by_hand)
        yield Limit("stop, after nxproxy's exit", 20, "ms", after_exit)
    for count, cost in results.costs.items():
        if not isinstance(cost, str):
            yield Limit(f"a proxy's memory, {count} in one process", 1024, "KiB", cost["kib"], digits=0)
            yield Limit(f"a proxy's threads, {count} in one process", 5, "threads", cost["threads"])
            yield Limit(f"a proxy, idle, {count} in one process", 0, "wake-ups/s", cost["wake_ups_s"], digits=3)
    if not isinstance(results.micro, str):
        yield Limit("a transition, log event included (filtered)", 60, "µs", results.micro["transition_us"])


def _sessions(results: Results) -> list[str]:
    lines = ["## Real sessions: nxproxy run by this package, and by hand through an open `ssh -L`", ""]
    if isinstance(results.sessions, str):
        return [*lines, f"Not measured: {results.sessions}"]
    count = len(results.sessions["start_ours_ms"])
    lines += [f"Medians of {count} each, alternating.", "", "| | proxy_fsm, ms | by hand, ms | difference, ms |"]
    lines += ["|---|---:|---:|---:|"]
    for what, title in (("start", "start to running"), ("stop", "stop")):
        ours, by_hand = (statistics.median(results.sessions[f"{what}_{who}_ms"]) for who in ("ours", "by_hand"))
        lines.append(f"| {title} | {ours:.0f} | {by_hand:.0f} | {ours - by_hand:+.0f} |")
    after_exit = statistics.median(results.sessions["stop_after_exit_ms"])
    lines.append(f"| of the stop, after nxproxy's exit | {after_exit:.1f} | | |")
    return lines


def _costs(results: Results) -> list[str]:
    lines = ["## Cost of one running proxy, by the number of proxies in the process", ""]
    if not results.costs:
        return [*lines, "Not measured."]
    lines += [f"| | {' | '.join(results.costs)} |", f"|---|{'---:|' * len(results.costs)}"]
    for key, title, digits in COSTS:
        cells = [f"{cost[key]:,.{digits}f}" if isinstance(cost, dict) else "failed" for cost in results.costs.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [f"\n{count} proxies: {cost}" for count, cost in results.costs.items() if isinstance(cost, str)]
    return lines


_PLOTS = {
    "throughput": ("Throughput on one machine, MB/s (more is better)", ("down_mb_s", "up_mb_s", "both_mb_s")),
    "round-trip": (
        "64 bytes there and back, µs (less is better)",
        ("rtt_p50_us", "rtt_p99_us", "rtt_bulk_p50_us", "rtt_bulk_p99_us"),
    ),
    "long-line": (
        "Throughput over a long line, MB/s (more is better)",
        ("down_20ms_mb_s", "up_20ms_mb_s", "down_100ms_mb_s", "up_100ms_mb_s"),
    ),
    "cost": ("Processor time of the client, s/GiB (less is better)", ("down_cpu_s_gib", "up_cpu_s_gib")),
    "memory": ("Memory gained by a reader of 1 MiB/s, MiB (less is better)", ("slow_reader_mib",)),
}


def plot(results: Results, directory: Path) -> None:
    """Plot the tunnel measurements; the same results give the same bytes."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "proxy_fsm", "svg.fonttype": "none", "font.size": 9})
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    titles = {measure.key: measure.title for measure in RELAY}
    for name, (title, keys) in _PLOTS.items():
        contenders = [each for each in CONTENDERS if each in results.values and CONTENDERS[each].tunnels]
        figure, axes = pyplot.subplots(1, len(keys), figsize=(3.2 * len(keys) + 1.6, 3), sharey=True, squeeze=False)
        for key, axis in zip(keys, axes[0], strict=True):
            medians = [results.median(each, key) for each in contenders]
            colours = ["#c44e52" if each.startswith(OURS) else "#4c72b0" for each in contenders]
            bars = axis.barh(contenders, [median or 0 for median in medians], color=colours)
            axis.bar_label(bars, ["–" if each is None else f"{each:,.3g}" for each in medians], padding=2)
            axis.set_title(titles[key], fontsize=9)
            axis.margins(x=0.25)
            if not axis.yaxis_inverted():
                axis.invert_yaxis()
        figure.suptitle(title)
        figure.tight_layout()
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    _plot_costs(results, directory, pyplot)


def _plot_costs(results: Results, directory: Path, pyplot: Any) -> None:
    known = {int(count): cost for count, cost in results.costs.items() if isinstance(cost, dict)}
    keys = COSTS[:3]
    figure, axes = pyplot.subplots(1, len(keys), figsize=(9, 2.6))
    for (key, title, _), axis in zip(keys, axes, strict=True):
        axis.plot(list(known), [cost[key] for cost in known.values()], marker="o", color="#c44e52")
        axis.set_xscale("log")
        axis.set_xticks(list(known), [str(count) for count in known])
        axis.set_ylim(bottom=0)
        axis.set_title(f"{title}, a proxy", fontsize=9)
        axis.set_xlabel("proxies in the process")
    figure.tight_layout()
    figure.savefig(directory / "proxies.svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
