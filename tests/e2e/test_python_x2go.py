"""Debian's python-x2go and pyhoca-cli, unchanged, on our proxy, against a real X2Go server.

They are packages of Debian's Python, so they run in a virtual environment of that Python with access to the system's
packages and with this package installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import proxy_fsm
from tests.helpers.real import PYTHON_X2GO, skip_or_fail
from tests.helpers.wait import eventually

from .display import RED
from .procs import SYSTEM_PATH, alive, command_lines, program_name, send_signal
from .x2go import X2GoServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from .x2go import Display

PYTHON = Path("/usr/bin/python3")
PYHOCA = Path("/usr/bin/pyhoca-cli")
HERE = Path(__file__).parent
CHECKOUT = Path(proxy_fsm.__file__).parents[1]
RED_XTERM = "xterm -bg red -geometry 60x20+10+10"
UP_S = 60.0
END_S = 60.0
SOON_S = 5.0


def shown_code() -> tuple[str, str]:
    """Return the code of the documentation: the two lines that switch python-x2go, and pyhoca-cli started with them."""
    page = (CHECKOUT / "docs" / "moving-from-python-x2go.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = [block for block in blocks if "BACKENDS" in block and "runpy" not in block]
    programs = [block for block in blocks if "BACKENDS" in block and "runpy" in block]
    assert (len(lines), len(programs)) == (1, 1), (
        "The page must show the two lines once, and the file for pyhoca-cli once."
    )
    return lines[0], programs[0]


@pytest.fixture(scope="session")
def debian_python(real_programs: None, pytestconfig: pytest.Config) -> Path:
    """A Python that has both python-x2go and this package; created once, kept in pytest's cache."""
    del real_programs
    places = {"python3": PYTHON, "pyhoca-cli": PYHOCA, "python3-x2go": PYTHON_X2GO}
    missing = [name for name, path in places.items() if not path.exists()]
    if missing:
        skip_or_fail(missing)
    version = hashlib.sha256((CHECKOUT / "pyproject.toml").read_bytes()).hexdigest()[:12]
    cache = pytestconfig.cache.mkdir("python-x2go")
    place = cache / version
    python, ready = place / "bin" / "python", place / "ready"
    with (cache / "lock").open("w") as lock:  # shared by tests that run in parallel
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run([PYTHON, "-m", "venv", "--system-site-packages", place], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", CHECKOUT], check=True)
            ready.touch()
    return python


@pytest.fixture
def server(real_programs: None) -> Iterator[X2GoServer]:
    """A server for one test, whose connections may all be cut."""
    del real_programs
    with X2GoServer(user="pfsmpyhoca") as server:
        yield server


@pytest.fixture
def environ(server: X2GoServer, display: Display, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has a key, and no known hosts yet."""
    (tmp_path / ".ssh").mkdir(mode=0o700)
    shutil.copy(server.client_key_path, tmp_path / ".ssh" / "id_ecdsa")
    return {"HOME": str(tmp_path), "PATH": SYSTEM_PATH, "LANG": "C.UTF-8", **display.env}


class Pyhoca:
    """A running pyhoca-cli, and its output."""

    def __init__(self, python: Path, server: X2GoServer, environ: dict[str, str], *arguments: str) -> None:
        self.log = Path(environ["HOME"], f"pyhoca-{time.monotonic_ns()}.log")
        place = ["--server", "127.0.0.1", "-p", str(server.port), "-u", server.user, "--add-to-known-hosts"]
        command = [str(python), "-c", shown_code()[1], *place, "--debug", "--libdebug", *arguments]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = UP_S) -> None:
        """Wait until it has printed a text."""

        def has_printed() -> bool:
            assert text in self.output or self._process.poll() is None, self.output[-5000:]
            return text in self.output

        eventually(has_printed, timeout_s, interval_s=0.1)

    @property
    def proxy_pid(self) -> int:
        """The process of its nxproxy."""
        found = Path(f"/proc/{self._process.pid}/task").glob("*/children")
        return next(
            pid for each in found for pid in map(int, each.read_text().split()) if program_name(pid) == "nxproxy"
        )

    def interrupt(self) -> int:
        """Send SIGINT, as Ctrl-C does, and return the exit status.

        gevent raises KeyboardInterrupt in whichever greenlet runs, and in one of python-x2go's it is lost: so it is
        sent while none seems to run, and sent again if it has no effect, as a person would.
        """
        eventually(self._is_idle, END_S, what="pyhoca-cli is idle")
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_S / 2)
        self._process.send_signal(signal.SIGINT)
        return self.exit_status()

    def _is_idle(self) -> bool:
        """Return whether it is idle for 0.2 s."""
        assert self._process.poll() is None, self.output[-5000:]
        for _ in range(20):
            time.sleep(0.01)
            if Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
                return False
        return True

    def exit_status(self) -> int:
        return self._process.wait(END_S)


def cookie_of(server: X2GoServer, name: str) -> str:
    with server.connect() as client:
        rows = [line.split("|") for line in server.list_sessions(client).splitlines()]
    return next(row[6] for row in rows if row[1] == name)


def wait_status(server: X2GoServer, name: str, *wanted: str) -> None:
    with server.connect() as client:
        server.wait_status(client, name, *wanted, timeout_s=END_S)


def new_session(pyhoca: Pyhoca) -> str:
    """Wait until it has a session, and return the session's name."""
    marker = "X2Go session name is: "
    pyhoca.wait_for(marker)
    return pyhoca.output.partition(marker)[2].split()[0]


def test_two_lines_make_python_x2go_load_our_proxy(debian_python: Path, tmp_path: Path) -> None:
    load = """
from importlib import import_module
print({import_module(BACKENDS["X2GoProxy"][name]).X2GoProxy.__module__ for name in ("NX3", "KDRIVE")})
"""
    output = subprocess.run(
        [debian_python, "-c", shown_code()[0] + load],
        env={"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "proxy_fsm.x2go.nx3" in output
    assert "proxy_fsm.x2go.kdrive" in output


def test_pyhoca_cli_starts_suspends_resumes_and_terminates_a_session(
    debian_python: Path, server: X2GoServer, display: Display, environ: dict[str, str]
) -> None:
    with Pyhoca(debian_python, server, environ, "-N", "-t", "desktop", "-g", "800x600", "-c", RED_XTERM) as first:
        name = new_session(first)
        display.wait_for(RED)
        cookie = cookie_of(server, name).encode()
        lines = command_lines()
        assert lines[first.proxy_pid].rstrip(b"\0").split(b"\0")[1:] == [b"-S"]
        assert [pid for pid, line in lines.items() if cookie in line] == []
        first.wait_for("dest='running'")
        assert first.interrupt() == 0
        # It asks the server to suspend the session, then ends the proxy: either may be first, both are clean ends.
        assert re.search(r"The NX Proxy has ended \((stop_requested|session_ended)\)", first.output)
        ours = [line for line in first.output.splitlines() if "(proxy_fsm.x2go.nx3)" in line]
        assert ours
        assert [line for line in ours if cookie.decode() in line] == []
    wait_status(server, name, "S")
    with Pyhoca(debian_python, server, environ, "-R", name) as second:
        second.wait_for("dest='running'")
        display.wait_for(RED)
        assert cookie not in b"".join(command_lines().values())
        with Pyhoca(debian_python, server, environ, "-T", name) as third:
            assert third.exit_status() == 0
        second.wait_for("The NX Proxy has ended (session_ended)")
        second.exit_status()
    wait_status(server, name, "F", "-")
    root = Path(environ["HOME"], ".x2go", f"S-{name}")
    for log in ("session.log", "session.err"):
        assert (root / log).stat().st_mode & 0o777 == 0o600
        assert "Established X server connection" in (root / log).read_text()


def test_pyhoca_cli_logs_the_reason_if_the_ssh_connection_is_dropped(
    debian_python: Path, server: X2GoServer, display: Display, environ: dict[str, str]
) -> None:
    with Pyhoca(debian_python, server, environ, "-N", "-t", "desktop", "-g", "800x600", "-c", RED_XTERM) as pyhoca:
        name = new_session(pyhoca)
        display.wait_for(RED)
        proxy = pyhoca.proxy_pid
        send_signal(server.pids().sessions, signal.SIGKILL)
        pyhoca.wait_for("The NX Proxy has ended (transport_lost)", SOON_S)
        assert not alive(proxy)
    wait_status(server, name, "S")


@pytest.mark.parametrize("backend", ["ours", "theirs"])
def test_python_x2go_api_runs_on_our_proxy_backend(
    *,
    debian_python: Path,
    server: X2GoServer,
    display: Display,
    environ: dict[str, str],
    backend: str,
    tmp_path: Path,
    record_property: Any,
) -> None:
    """Our class, and python-x2go's own nx3 class on our base class."""
    # -P: the directory of the program contains an x2go module too, ours.
    program = [debian_python, "-P", HERE / "x2go_program.py"]
    command = [*program, "127.0.0.1", server.port, server.user, RED_XTERM, backend]
    errors = tmp_path / "errors"
    with (
        errors.open("wb") as error_file,
        subprocess.Popen(
            list(map(str, command)),
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=error_file,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        seen: dict[str, Any] = {}

        def read_until(what: str) -> None:
            assert process.stdout is not None
            while what not in seen:
                line = process.stdout.readline()
                assert line, errors.read_text(errors="replace")[-5000:]
                if line.startswith("{"):
                    seen[json.loads(line)["what"]] = json.loads(line)

        try:
            read_until("session")
            assert seen["started"]["ok"]
            assert seen["started"]["state"] == "running"
            assert seen["session"]["ok"]
            record_property("start_proxy_s", seen["started"]["seconds"])
            display.wait_for(RED)
            assert cookie_of(server, seen["session"]["name"]).encode() not in b"".join(command_lines().values())
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            read_until("suspended")
            read_until("stopped")  # by this client or by python-x2go's guardian, which may be later
            record_property("stop_thread_s", seen["stopped"]["seconds"])
            assert seen["stopped"]["reason"] in {"stop_requested", "session_ended"}
            wait_status(server, seen["session"]["name"], "S")
        finally:
            process.kill()
