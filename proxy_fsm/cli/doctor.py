"""``proxy-fsm doctor``: what this machine lacks, and how to get it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import paramiko
from rich.console import Console
from rich.text import Text

from proxy_fsm import BackendError, EndReason, KDriveBackend, NX3Backend, run_checks
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.verb import ExitStatus, run_verb
from proxy_fsm.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["Check", "doctor"]

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
_GET_KDRIVE = "It is needed for KDrive sessions only, and comes from the X2Go project, x2go.org."


def doctor(*, log_format: LogFormat = LogFormat.CONSOLE) -> int:
    """Report what this machine lacks, and how to get it; contacts no server and leaves nothing behind.

    The exit status is 0 if everything that is needed to show an X2Go session is there, else 4.

    Args:
        log_format: ``console`` prints a list on standard output; ``json`` one event ``doctor.check`` for each.
    """
    output = Output(log_format)

    def body(interrupts: Interrupts) -> int:
        console = Console(quiet=output.is_json, soft_wrap=True)
        lacking = False
        for check in _checks():
            interrupts.check()  # each takes a few seconds at most
            lacking |= check.needed and not check.ok
            if output.is_json:
                _log(output, check)
            else:
                _print(console, check)
        return ExitStatus.LACKING if lacking else ExitStatus.CLEAN

    return run_verb(output, body)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        ok: Whether it is present and as it should be.
        detail: What was found, in words.
        hint: How to get it, or to improve it; None if it is ok.
        needed: Whether no X2Go session can be shown without it.
        present: If it is not ok: whether it is present, and could only be better.
    """

    name: str
    ok: bool
    detail: str
    hint: str | None = None
    needed: bool = False
    present: bool = False

    @property
    def result(self) -> Literal["ok", "missing", "advice"]:
        """``ok``, ``missing`` (`needed` says whether that matters), or ``advice``: present, but could be better."""
        if self.ok:
            return "ok"
        return "advice" if self.present else "missing"


def _log(output: Output, check: Check) -> None:
    level = output.log.info if check.ok else output.log.error if check.needed else output.log.warning
    level(
        "doctor.check",
        check=check.name,
        result=check.result,
        needed=check.needed,
        detail=check.detail,
        hint=check.hint,
    )


def _print(console: Console, check: Check) -> None:
    label, style = {
        "ok": ("ok", "green"),
        "missing": ("missing (needed)", "red") if check.needed else ("missing (optional)", "yellow"),
        "advice": ("advice", "yellow"),
    }[check.result]
    console.print(Text.assemble((f"{label:<20}", style), f"{check.name}: {printable(check.detail)}"))
    if check.hint is not None:
        console.print(Text(f"{'':<20}{printable(check.hint)}"))


def _checks() -> Iterator[Check]:
    for name, error in run_checks(NX3Backend()):
        yield from _PREFLIGHT[name](error)
    yield _kdrive()
    yield _known_hosts()
    yield _ssh_keys()
    yield _extra("diagram", "pygraphviz")
    yield _extra("timeline", "matplotlib")


def _nxproxy(error: BackendError | None) -> Iterator[Check]:
    if error is not None:
        yield Check("nxproxy", ok=False, detail=error.detail, hint=_GET_NXPROXY, needed=True)
        return
    path = NX3Backend().find_executable()
    try:
        answer = subprocess.run(
            [path, "-v"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_VERSION_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        why = problem.strerror if isinstance(problem, OSError) and problem.strerror else "it does not exit"
        yield Check("nxproxy", ok=False, detail=f"{path} cannot be run: {why}.", hint=_GET_NXPROXY, needed=True)
        return
    version = _VERSION.search(answer.stdout.decode("utf-8", "replace"))
    version_text = f"version {version[1]}" if version else "of unknown version"
    yield Check("nxproxy", ok=True, detail=f"{path}, {version_text}.", needed=True)


def _sessions_root(error: BackendError | None) -> Iterator[Check]:
    name, root = "~/.x2go", Path.home() / ".x2go"
    if error is not None:
        yield Check(name, ok=False, detail=error.detail, hint=error.hint, needed=True)
        return
    if not root.exists():
        yield Check(name, ok=True, detail=f"{root} does not exist yet, and can be created.", needed=True)
        return
    info = root.stat()
    advice = partial(Check, name, ok=False, present=True)
    if info.st_uid != os.geteuid():
        detail = f"{root} belongs to another user, who can read and replace its contents."
        yield advice(detail=detail, hint=f"Move it away, or have root change its owner: chown $(id -un) {root}")
    elif info.st_mode & _OTHERS_WRITE:
        yield advice(detail=f"{root} can be written to by others.", hint=f"Make it private: chmod 700 {root}")
    elif info.st_mode & _OTHERS_READ:
        detail = f"{root} can be read by others; its contents are still private."
        yield advice(detail=detail, hint=f"chmod 700 {root}")
    else:
        yield Check(name, ok=True, detail=f"{root} is private and writable.", needed=True)


def _display(error: BackendError | None) -> Iterator[Check]:
    if error is not None:
        hint = f"{error.hint} (On macOS, XQuartz is an X server.)"
        yield Check("X server", ok=False, detail=error.detail, hint=hint, needed=True)
    else:
        yield Check("X server", ok=True, detail=f"the one at {os.environ['DISPLAY']} accepts connections.", needed=True)


def _tunnel(error: BackendError | None) -> Iterator[Check]:
    if error is not None:
        yield Check("tunnel", ok=False, detail=error.detail, hint=error.hint or error.reason.hint, needed=True)
    else:
        yield Check("tunnel", ok=True, detail="its local end can be bound.", needed=True)


def _xauth(error: BackendError | None) -> Iterator[Check]:
    """Besides xauth, nxproxy needs a socket path that can be written into its options."""
    path = shutil.which("xauth")
    if path is not None:
        yield Check("xauth", ok=True, detail=f"{path}.", needed=True)
    elif error is not None:
        detail = "the program xauth, with which nxproxy reads the X server's cookie, was not found."
        yield Check("xauth", ok=False, detail=detail, hint=_GET_XAUTH, needed=True)
    else:
        detail = "the program xauth was not found, but this X server accepts connections without a cookie."
        yield Check("xauth", ok=False, detail=detail, hint=_GET_XAUTH)
    if error is not None and error.reason is not EndReason.DISPLAY_UNAVAILABLE:
        yield Check("nxproxy's options", ok=False, detail=error.detail, hint=error.hint, needed=True)


#: The preflight's checks, and how each is reported; there is no connection to a server yet.
_PREFLIGHT: dict[str, Callable[[BackendError | None], Iterator[Check]]] = {
    "the proxy program's path": _nxproxy,
    "the session root and its log": _sessions_root,
    "the X server": _display,
    "the SSH transport": lambda _: iter(()),
    "the local end of the tunnel": _tunnel,
    "the backend's own preflight": _xauth,
}


def _kdrive() -> Check:
    try:
        path = KDriveBackend().find_executable()
    except BackendError as error:
        return Check("x2gokdriveclient", ok=False, detail=error.detail, hint=_GET_KDRIVE)
    return Check("x2gokdriveclient", ok=True, detail=f"{path}.")


def _known_hosts() -> Check:
    files = [Path.home() / ".ssh" / "known_hosts", Path("/etc/ssh/ssh_known_hosts")]
    found = [str(path) for path in files if path.is_file()]
    if found:
        return Check("known hosts", ok=True, detail=f"{', '.join(found)}.")
    hint = "Connect once with ssh and compare the fingerprint; an unknown server is rejected."
    return Check("known hosts", ok=False, detail="no known_hosts file was found.", hint=hint)


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
        return Check("SSH keys", ok=True, detail=f"no SSH agent with keys; found {', '.join(files)}.")
    hint = "Make one with ssh-keygen and load it with ssh-add, or log in with a password."
    return Check("SSH keys", ok=False, detail="no SSH agent with keys, and no key file of a standard name.", hint=hint)


def _extra(extra: str, module: str) -> Check:
    installed = importlib.util.find_spec(module) is not None
    name = f"extra {extra}"
    if installed:
        return Check(name, ok=True, detail=f"{module} is installed.")
    return Check(name, ok=False, detail=f"{module} is not installed.", hint=f'pip install "proxy_fsm[{extra}]"')
