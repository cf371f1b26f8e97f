"""``proxy-fsm doctor``: what this machine lacks, and how to get it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko
from rich.console import Console
from rich.text import Text

from proxy_fsm import (
    Backend,
    BackendContext,
    BackendError,
    DisplayError,
    EndReason,
    NX3Backend,
    SessionInfo,
    open_display,
)
from proxy_fsm.cli.output import LogFormat, Output, printable
from proxy_fsm.cli.verb import ExitStatus, conclude

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["Check", "doctor", "made_ready"]

_DISPLAY_S = 4.0
_VERSION_S = 5.0
_VERSION = re.compile(r"Version ([0-9][0-9A-Za-z.~+-]*)")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH | stat.S_IXGRP | stat.S_IXOTH

_GET_NXPROXY = (
    "Install nxproxy (on Debian, Ubuntu and Fedora the package nxproxy; on macOS X2Go Client brings one), or name it "
    "in NXPROXY_BINARY."
)
_GET_XAUTH = (
    "Install xauth (on Debian and Ubuntu the package xauth, on Fedora xorg-x11-xauth; on macOS XQuartz has it)."
)
_GET_KDRIVE = "It is only for sessions of the kind KDrive, and comes from the X2Go project, x2go.org."


@contextlib.contextmanager
def made_ready(backend: Backend, sessions_root: Path | None) -> Iterator[None]:
    """Make sure that a session could be shown here, before a server is asked for one.

    A proxy does all of this again: then, though, a session would be lost. As long as this is entered an X server that
    has no other client is not left by the last of them, which would make it start anew.

    Raises:
        BackendError: Something is not good.
    """
    executable = backend.find_executable()
    root = Path.home() / ".x2go" if sessions_root is None else sessions_root
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = _scratch(root)
    except OSError as error:
        raise BackendError(
            EndReason.LISTEN_FAILED,
            f"The sessions root {root} cannot be used: {error.strerror or error}.",
            "Make sure that it is a directory of yours, writable and not full.",
        ) from error
    with contextlib.ExitStack() as held:
        with scratch as session_root:
            if backend.needs_display:
                try:
                    held.enter_context(open_display(os.environ, timeout_s=_DISPLAY_S))
                except DisplayError as error:
                    raise BackendError(EndReason.DISPLAY_UNAVAILABLE, error.detail, error.hint) from error
            with _proxy_scratch() as proxy_scratch:
                backend.preflight(_context(backend, executable, root, Path(session_root), Path(proxy_scratch)))
        yield


def _context(backend: Backend, executable: str, root: Path, session_root: Path, scratch: Path) -> BackendContext:
    """Return what a backend's preflight is asked with while there is no session: one like those that there are."""
    session = SessionInfo(name="user-50-1700000000_stDprogram_dp24", cookie="0" * 32, graphics_port=1, display=50)
    return BackendContext(
        session=session,
        executable=executable,
        listen_address="127.0.0.1:1" if backend.listen_kind == "tcp" else str(scratch / "proxy.sock"),
        sessions_root=root,
        session_root=session_root,
        environ=dict(os.environ),
        scratch=scratch,
    )


def _proxy_scratch() -> tempfile.TemporaryDirectory[str]:
    """Make what a proxy has as its scratch directory, where it would be; it goes when it is left.

    Raises:
        BackendError: There is no place for it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):  # noqa: PTH117 - it may be empty
        with contextlib.suppress(OSError):  # then in the temporary directory, as a proxy does
            return _scratch(Path(runtime))
    try:
        return _scratch(None)
    except OSError as error:
        raise BackendError(
            EndReason.LISTEN_FAILED, f"The local end of the tunnel cannot be bound: {error.strerror or error}."
        ) from error


def _scratch(directory: Path | None) -> tempfile.TemporaryDirectory[str]:
    """Make a directory in another one, to see that this can be written to; it goes when it is left."""
    return tempfile.TemporaryDirectory(prefix=".proxy_fsm-", dir=directory)


def doctor(*, log_format: LogFormat = LogFormat.CONSOLE) -> int:
    """Tell what this machine lacks, and how to get it; no server is asked, and nothing is left behind.

    The exit status is 0 where everything is there that is needed to show an X2Go session, else 4.

    Args:
        log_format: ``console`` prints a list on standard output; ``json`` one event ``doctor.check`` for each.
    """
    output = Output(log_format)

    def body(interrupts: Interrupts) -> int:
        del interrupts  # nothing here waits for long
        console = Console(quiet=output.is_json, soft_wrap=True)
        lacking = False
        for check in _checks():
            lacking |= check.needed and not check.ok
            if output.is_json:
                _log(output, check)
            else:
                _print(console, check)
        return ExitStatus.LACKING if lacking else ExitStatus.CLEAN

    return conclude(output, body)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        ok: Whether it is there and as it should be.
        detail: What was found, for a person.
        hint: How to get it; None where it is there.
        needed: Whether no X2Go session can be shown without it.
    """

    name: str
    ok: bool
    detail: str
    hint: str | None = None
    needed: bool = False

    @property
    def result(self) -> str:
        """``ok``, ``missing`` (and needed) or ``missing_optional``."""
        if self.ok:
            return "ok"
        return "missing" if self.needed else "missing_optional"


def _log(output: Output, check: Check) -> None:
    level = {"ok": output.log.info, "missing": output.log.error, "missing_optional": output.log.warning}[check.result]
    level(
        "doctor.check",
        check=check.name,
        result=check.result,
        needed=check.needed,
        detail=check.detail,
        hint=check.hint,
    )


def _print(console: Console, check: Check) -> None:
    words, style = {
        "ok": ("ok", "green"),
        "missing": ("missing (needed)", "red"),
        "missing_optional": ("missing (optional)", "yellow"),
    }[check.result]
    console.print(Text.assemble((f"{words:<20}", style), f"{check.name}: {printable(check.detail)}"))
    if check.hint is not None:
        console.print(Text(f"{'':<20}{printable(check.hint)}"))


def _checks() -> Iterator[Check]:
    yield _nxproxy()
    yield _display()
    yield _xauth()
    yield _sessions_root()
    yield _program("x2gokdriveclient", _GET_KDRIVE)
    yield _known_hosts()
    yield _ssh_keys()
    yield _extra("diagram", "pygraphviz")


def _nxproxy() -> Check:
    try:
        path = NX3Backend().find_executable()
    except BackendError as error:
        return Check("nxproxy", ok=False, detail=error.detail, hint=_GET_NXPROXY, needed=True)
    try:
        answer = subprocess.run(
            [path, "-v"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_VERSION_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else "it does not end"
        return Check("nxproxy", ok=False, detail=f"{path} cannot be run: {problem}.", hint=_GET_NXPROXY, needed=True)
    version = _VERSION.search(answer.stdout.decode("utf-8", "replace"))
    known = f"version {version[1]}" if version else "which does not tell its version"
    return Check("nxproxy", ok=True, detail=f"{path}, {known}.", needed=True)


def _display() -> Check:
    try:
        open_display(os.environ, timeout_s=_DISPLAY_S).close()
    except DisplayError as error:
        hint = f"{error.hint} (On macOS, XQuartz is an X server.)"
        return Check("X server", ok=False, detail=error.detail, hint=hint, needed=True)
    return Check("X server", ok=True, detail=f"the one at {os.environ['DISPLAY']} lets us in.", needed=True)


def _xauth() -> Check:
    path = shutil.which("xauth")
    if path is not None:
        return Check("xauth", ok=True, detail=f"{path}.", needed=True)
    display = os.environ.get("DISPLAY", "")
    try:
        open_display({"DISPLAY": display}, timeout_s=_DISPLAY_S).close()
    except DisplayError:
        detail = "the program xauth, with which nxproxy reads the X server's cookie, was not found."
        return Check("xauth", ok=False, detail=detail, hint=_GET_XAUTH, needed=True)
    detail = "the program xauth was not found, and this X server lets us in without a cookie."
    return Check("xauth", ok=False, detail=detail, hint=_GET_XAUTH)


def _sessions_root() -> Check:
    name, root = "~/.x2go", Path.home() / ".x2go"
    place = root
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        _scratch(place).cleanup()
        info = place.stat()
    except OSError as error:
        detail = f"{place} cannot be written to: {error.strerror or error}."
        return Check(name, ok=False, detail=detail, hint="Make it a directory of yours, writable.", needed=True)
    if place != root:
        return Check(name, ok=True, detail=f"{root} is not there yet, and can be made.", needed=True)
    if info.st_uid != os.geteuid() or info.st_mode & _OTHERS_WRITE:
        detail = f"{root} belongs to another user, or others may write to it."
        return Check(name, ok=False, detail=detail, hint=f"Make it yours alone: chmod 700 {root}", needed=False)
    if info.st_mode & _OTHERS_READ:
        detail = f"{root} can be read by others; what is in it is still private."
        return Check(name, ok=False, detail=detail, hint=f"chmod 700 {root}")
    return Check(name, ok=True, detail=f"{root} is yours alone, and writable.", needed=True)


def _program(name: str, hint: str) -> Check:
    path = shutil.which(name)
    return Check(name, ok=path is not None, detail=f"{path or 'not found'}.", hint=None if path else hint)


def _known_hosts() -> Check:
    files = [Path.home() / ".ssh" / "known_hosts", Path("/etc/ssh/ssh_known_hosts")]
    found = [str(path) for path in files if path.is_file()]
    if found:
        return Check("known hosts", ok=True, detail=f"{', '.join(found)}.")
    hint = "Connect once with ssh and compare the fingerprint; an unknown server is refused."
    return Check("known hosts", ok=False, detail="no file of known hosts was found.", hint=hint)


def _ssh_keys() -> Check:
    agent = paramiko.Agent()
    try:
        count = len(agent.get_keys())
    except (paramiko.SSHException, OSError):
        count = 0
    finally:
        agent.close()
    if count:
        return Check("SSH keys", ok=True, detail=f"the SSH agent holds {count}.")
    kinds = ("rsa", "ecdsa", "ed25519")
    files = [str(path) for kind in kinds if (path := Path.home() / ".ssh" / f"id_{kind}").is_file()]
    if files:
        return Check("SSH keys", ok=True, detail=f"no SSH agent with keys; there is {', '.join(files)}.")
    hint = "Make one with ssh-keygen and load it with ssh-add, or log in with a password."
    return Check("SSH keys", ok=False, detail="no SSH agent with keys, and no key of the usual name.", hint=hint)


def _extra(extra: str, module: str) -> Check:
    there = importlib.util.find_spec(module) is not None
    name = f"extra {extra}"
    if there:
        return Check(name, ok=True, detail=f"{module} is installed.")
    return Check(name, ok=False, detail=f"{module} is not installed.", hint=f'pip install "proxy_fsm[{extra}]"')
