"""``proxy-fsm demo``: the whole lifecycle on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from proxy_fsm import Proxy, ProxyStatus, State, TransitionRecord, fast_transport
from proxy_fsm.cli import setups
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.sampling import sampled
from proxy_fsm.cli.verb import UsageError, run_verb
from proxy_fsm.testing import LoopbackSSHServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["demo"]

_PAINT_TIMEOUT_S = 15.0
_POLL_S = 0.1
_REFRESHES_PER_S = 10


def demo(
    *,
    output: Path = Path("demo-output"),
    seconds: float = 3.0,
    stand_ins: bool = False,
    keep: bool = False,
    log_format: LogFormat = LogFormat.CONSOLE,
) -> int:
    """Run the whole lifecycle on this machine: an embedded SSH server, an agent and a proxy.

    It uses the real nxagent, nxproxy and Xvfb (and xauth) if all of them are installed, otherwise stand-ins written in
    Python, and says which. It takes a few seconds, ends everything that it started, and leaves its events
    (events.jsonl), the proxy's log and, with the real programs, a screenshot of the remote desktop (session.png).

    Args:
        output: Directory for these files; those of an earlier demo are replaced.
        seconds: How long the session runs.
        stand_ins: Use the stand-ins even if the real programs are installed.
        keep: Keep the working directory too, with the logs of the X server and the agent, and say where it is.
        log_format: ``json`` writes events on standard output, and nothing else.
    """
    out = Output(log_format, console_level=logging.ERROR)
    return run_verb(out, _Demo(out, output, seconds, with_stand_ins=stand_ins, keep=keep).run)


class _Demo:
    def __init__(self, output: Output, folder: Path, seconds: float, *, with_stand_ins: bool, keep: bool) -> None:
        self._output = output
        self._folder = folder
        self._seconds = seconds
        self._with_stand_ins = with_stand_ins
        self._keep = keep
        self._console = Console(quiet=output.is_json)

    def run(self, interrupts: Interrupts) -> int:
        """Run a session, report how it went, and return the exit status."""
        if not math.isfinite(self._seconds) or self._seconds < 0:
            raise UsageError("--seconds must be a finite number, 0 or more.")
        try:
            self._prepare_folder()
        except OSError as error:
            raise UsageError(f"{self._folder} cannot be written to: {error.strerror or error}.") from error
        with contextlib.ExitStack() as stack:
            setup = stack.enter_context(self._set_up(interrupts))
            server = stack.enter_context(LoopbackSSHServer())
            client = stack.enter_context(contextlib.closing(server.connect(transport_factory=fast_transport)))
            transport = client.get_transport()
            assert transport is not None  # noqa: S101 - it is connected
            proxy = Proxy(
                setup.session,
                transport,
                backend=setup.backend,
                sessions_root=self._sessions,
                environ=setup.environ,
                logger=self._output.log,
            )
            stack.callback(proxy.close)
            with self._shown(proxy), sampled(proxy, self._output):
                screenshot = self._run_session(proxy, setup, interrupts)
        return self._report(proxy.status(), screenshot)

    def _prepare_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in (self._screenshot, self._log):
            path.unlink(missing_ok=True)
        self._output.record_to(self._events)

    @property
    def _screenshot(self) -> Path:
        return self._folder / "session.png"

    @property
    def _events(self) -> Path:
        return self._folder / "events.jsonl"

    @property
    def _sessions(self) -> Path:
        return self._folder / "sessions"

    @property
    def _log(self) -> Path:
        return self._sessions / f"S-{setups.SESSION_NAME}" / "session.log"

    @contextlib.contextmanager
    def _set_up(self, interrupts: Interrupts) -> Iterator[setups.Setup]:
        missing = setups.missing_programs()
        if missing or self._with_stand_ins:
            self._announce("stand-ins", missing)
            with setups.stub_session(interrupts) as setup:
                yield setup
            return
        with contextlib.ExitStack() as stack:
            if self._keep:
                directory = tempfile.mkdtemp(prefix="proxy_fsm-demo-")
            else:
                directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="proxy_fsm-demo-"))
            self._announce("real", missing, directory if self._keep else None)
            yield stack.enter_context(setups.real_session(Path(directory), interrupts))

    def _announce(self, kind: str, missing: dict[str, str], kept: str | None = None) -> None:
        self._output.log.info("demo.began", programs=kind, missing=missing, kept=kept)
        if kind == "real":
            self._console.print("With the real nxagent, nxproxy and Xvfb.", highlight=False)
        elif missing:
            packages = " ".join(sorted(set(missing.values())))
            self._console.print(
                f"With stand-ins, since this machine lacks {', '.join(missing)} "
                f"(on Debian and Ubuntu: apt-get install {packages}).",
                highlight=False,
            )
        else:
            self._console.print("With stand-ins, as requested.", highlight=False)
        if kept is not None:
            self._console.print(f"Working directory, kept: {kept}", highlight=False)

    @contextlib.contextmanager
    def _shown(self, proxy: Proxy) -> Iterator[None]:
        """Show each state as it is entered: a live table on a terminal, else a line each."""
        if self._console.is_terminal and not self._output.is_json:
            with Live(
                get_renderable=lambda: _table(proxy.status()),
                console=self._console,
                refresh_per_second=_REFRESHES_PER_S,
                transient=True,
            ):
                yield
            return
        unsubscribe = proxy.subscribe(self._show_line, via=lambda call: call())  # in place, so before its effects
        try:
            yield
        finally:
            unsubscribe()

    def _show_line(self, record: TransitionRecord) -> None:
        words = f"{record.source} → {record.dest} after {record.elapsed_s:.3f} s"
        self._console.print(f"{words}  {record.detail}".rstrip(), highlight=False, markup=False)

    def _run_session(self, proxy: Proxy, setup: setups.Setup, interrupts: Interrupts) -> Path | None:
        """Bring the session up, let it run for a while, and end it; return the screenshot's path."""
        proxy.start()
        interrupts.on_signal(proxy.stop)
        screenshot = None
        if proxy.wait(State.RUNNING) is State.RUNNING:
            screenshot = self._watch(proxy, setup)
        proxy.close()
        return screenshot

    def _watch(self, proxy: Proxy, setup: setups.Setup) -> Path | None:
        """Let the session run for a while; return the screenshot's path."""
        try:
            setup.paint()
        except (OSError, ValueError) as error:
            self._output.log.warning("demo.not_painted", detail=f"Nothing was painted in the session: {error}")
        deadline = time.monotonic() + _PAINT_TIMEOUT_S
        while setup.screen is not None and not setup.is_painted() and time.monotonic() < deadline:
            if _ends_within(proxy, _POLL_S):
                return None
        if _ends_within(proxy, self._seconds):
            return None
        screenshot = setup.screenshot()
        if screenshot is None:
            return None
        screenshot.save(self._screenshot)
        self._output.log.info("demo.screenshot", path=str(self._screenshot), painter=setup.painter)
        return self._screenshot

    def _report(self, status: ProxyStatus, screenshot: Path | None) -> int:
        assert status.reason is not None  # noqa: S101 - a final state has one
        candidates = {"events": self._events, "proxy's log": self._log, "screenshot": screenshot}
        files = {name: str(path) for name, path in candidates.items() if path is not None and path.exists()}
        self._output.log.info("demo.ended", **_summary(status), files=files)
        self._console.print(_table(status))
        ending = Text(
            f"{status.state}: {status.reason}. {status.detail}", style="green" if status.reason.clean else "red"
        )
        self._console.print(ending)
        if status.hint:
            self._console.print(Text(status.hint))
        for name, path in files.items():
            self._console.print(Text(f"{name}: {path}"), soft_wrap=True)
        page = self._folder / "run.html"
        self._console.print(
            Text(f"See it: {shlex.join(['proxy-fsm', 'timeline', str(self._events), '-o', str(page)])}"), soft_wrap=True
        )
        return status.reason.cli_status


def _ends_within(proxy: Proxy, seconds: float) -> bool:
    try:
        proxy.wait(State.STOPPING, timeout=seconds)
    except TimeoutError:
        return False
    return True


def _summary(status: ProxyStatus) -> dict[str, Any]:
    return {
        "state": str(status.state),
        "reason": str(status.reason),
        "detail": status.detail,
        "hint": status.hint,
        "states": {str(record.source): round(record.elapsed_s, 6) for record in status.history},
        "bytes_to_agent": 0 if status.tunnel is None else status.tunnel.bytes_to_agent,
        "bytes_from_agent": 0 if status.tunnel is None else status.tunnel.bytes_from_agent,
    }


def _table(status: ProxyStatus) -> Group:
    table = Table("state", "seconds", "what moved it on")
    table.columns[1].justify = "right"
    for record in status.history:
        table.add_row(str(record.source), f"{record.elapsed_s:.3f}", str(record.trigger))
    now_s = "" if status.state.is_final else f"{time.time() - status.since.timestamp():.1f}"
    table.add_row(Text(str(status.state), style="bold"), now_s, status.waiting_for)
    carried = ""
    if status.tunnel is not None:
        stats = status.tunnel
        carried = f"The tunnel carried {stats.bytes_to_agent:,} bytes to the agent, {stats.bytes_from_agent:,} from it."
    return Group(table, Text(carried))
