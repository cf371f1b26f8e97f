"""The server's commands on a real X2Go server, for accounts of every kind."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proxy_fsm import EndReason, Proxy, ServerError, ServerReason, SessionInfo, SessionStatus
from proxy_fsm.server import SessionOptions, X2GoServer
from tests.helpers.wait import eventually

from .attempt import FINAL_S
from .display import RED
from .procs import alive, program
from .x2go import RED_XTERM, run, transport_of
from .x2go import X2GoServer as RealServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .display import Display
    from .x2go import AgentSession

OPTIONS = SessionOptions(link="lan")
#: A shell, its start-up file, and what that prints: at the beginning, and where the shell can, at the end.
NOISY = {
    "bash": (".bashrc", "echo hello; echo 'LIMIT 1' >&2; printf tail; trap 'echo bye' EXIT"),
    "zsh": (".zshenv", "echo hello; echo 'ACCESS DENIED' >&2; printf tail; zshexit() { echo bye }"),
    "tcsh": (".cshrc", 'echo hello; echo "4711|x-50-1_stDx_dp24|50"; printf tail'),
    "fish": (
        ".config/fish/config.fish",
        "echo hello; echo 50 >&2; printf tail; function bye --on-event fish_exit; echo bye; end",
    ),
}


class Account:
    """An account of its own on a real server, whose shell and start-up files a test may change."""

    def __init__(self, real: RealServer) -> None:
        self.real = real
        self.home = Path(pwd.getpwnam(real.user).pw_dir)

    def use_shell(self, shell: str) -> None:
        path = program(shell)
        assert path is not None, f"{shell} is not installed"
        subprocess.run([program("usermod") or "usermod", "--shell", path, self.real.user], check=True)

    def write(self, name: str, text: str) -> None:
        """Write one of its files, at the front of what is in it."""
        path = self.home / name
        before = path.read_text() if path.exists() else ""
        for directory in reversed(path.relative_to(self.home).parents[:-1]):
            (self.home / directory).mkdir(exist_ok=True)
            self._give(self.home / directory)
        path.write_text(f"{text}\n{before}")
        self._give(path)

    def _give(self, path: Path) -> None:
        entry = pwd.getpwnam(self.real.user)
        os.chown(path, entry.pw_uid, entry.pw_gid)

    @contextlib.contextmanager
    def server(self) -> Iterator[X2GoServer]:
        with contextlib.closing(self.real.connect()) as client:
            yield X2GoServer(transport_of(client))


@contextlib.contextmanager
def opened_account(user: str = "pfsmshell", **options: str) -> Iterator[Account]:
    """An account whose shell and files are restored at the end."""
    with RealServer(user=user, **options) as real:
        account = Account(real)
        kept = {path: path.read_bytes() for path in account.home.iterdir() if path.is_file()}
        try:
            yield account
        finally:
            account.use_shell("bash")
            for path in account.home.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path not in kept:
                    path.unlink()
            for path, content in kept.items():
                path.write_bytes(content)


def environment(display: Display, runtime: Path) -> dict[str, str]:
    """What nxproxy inherits: without HOME it aborts."""
    return {
        **display.env,
        "PATH": os.environ["PATH"],
        "HOME": str(runtime),
        "XDG_RUNTIME_DIR": str(runtime / "run"),
    }


pytestmark = pytest.mark.usefixtures("real_programs")


@pytest.mark.parametrize("shell", NOISY)
def test_noisy_account_of_any_shell_is_served(shell: str) -> None:
    """Its locale is missing too, so that every Perl program complains."""
    name, text = NOISY[shell]
    with opened_account(extra_config="SetEnv LC_ALL=xx_YY.UTF-8") as account:
        account.write(name, text)
        account.use_shell(shell)
        check_served(account)


def check_served(account: Account) -> None:
    with contextlib.closing(account.real.connect()) as client:
        assert run(client, "true").startswith("hello\n")
    with account.server() as server:
        assert server.capabilities().versions["x2goserver"]
        assert server.sessions() == ()
        session = server.start(OPTIONS, "xterm")
        (listed,) = server.sessions()
        assert (listed.info, listed.status) == (session, SessionStatus.RUNNING)
        server.terminate(session.name)
        assert server.sessions() == ()


@pytest.mark.parametrize(
    ("shell", "config", "quoted"),
    [
        ("nologin", "", "This account is currently not available."),
        ("bash", "ForceCommand internal-sftp", "This service allows sftp connections only."),
        ("bash", "ForceCommand true", "printed nothing"),
        ("bash", "ForceCommand echo only backups here", "only backups here"),
    ],
)
def test_account_that_runs_no_commands_is_quoted(shell: str, config: str, quoted: str) -> None:
    with opened_account(extra_config=config) as account:
        account.use_shell(shell)
        check_quoted(account, quoted)


def check_quoted(account: Account, quoted: str) -> None:
    with account.server() as server:
        for call in (server.sessions, lambda: server.start(OPTIONS, "xterm")):
            with pytest.raises(ServerError) as caught:
                call()
            assert caught.value.reason is ServerReason.NO_COMMANDS
            assert quoted in caught.value.detail


def test_limit_is_named_among_warnings() -> None:
    """x2gostartagent runs x2gosessionlimit; this account has one of its own, which says that there are too many."""
    with opened_account(extra_config="SetEnv LC_ALL=xx_YY.UTF-8") as account, account.server() as server:
        account.write("bin/x2gosessionlimit", "#!/bin/sh\nprintf 'LIMIT 2\\n'")
        (account.home / "bin/x2gosessionlimit").chmod(0o755)
        account.write(".bashrc", "PATH=$HOME/bin:$PATH; perl -e 1")
        with pytest.raises(ServerError) as caught:
            server.start(OPTIONS, "xterm")
        assert caught.value.reason is ServerReason.LIMIT_REACHED
        assert caught.value.exit_status == 9


def test_session_is_started_filled_suspended_resumed_taken_over_and_ended(display: Display, runtime: Path) -> None:
    """Over one connection for each of two clients, which the server ends at none of these steps."""
    with opened_account() as account, account.server() as one, account.server() as two:

        def shown(server: X2GoServer, session: SessionInfo, *, resumed: bool = True) -> Proxy:
            root = runtime / f"sessions-{id(server)}"
            environ = environment(display, runtime)
            transport = server.transport
            return Proxy(session, transport, sessions_root=root, environ=environ, ask_server=True, resumed=resumed)

        session = one.start(OPTIONS, "xterm")
        with shown(one, session, resumed=False) as first:
            one.run(session, RED_XTERM)
            display.wait_for(RED)
            one.suspend(session.name)
            first.wait(timeout=FINAL_S)
            assert first.status().reason is EndReason.SESSION_SUSPENDED
        with shown(one, one.resume(session.name, OPTIONS)) as first:
            with pytest.raises(ServerError) as caught:
                two.resume(session.name, OPTIONS)
            assert caught.value.reason is ServerReason.SESSION_IN_USE
            with shown(two, two.resume(session.name, OPTIONS, take_over=True)) as second:
                check_taken_over(first)
                display.wait_for(RED)
                with shown(one, one.resume(session.name, OPTIONS, take_over=True)) as third:
                    check_taken_over(second)
                    display.wait_for(RED)
                    one.terminate(session.name)
                    third.wait(timeout=FINAL_S)
                    assert third.status().reason is EndReason.SESSION_TERMINATED
        eventually(lambda: not alive(session.agent_pid or 0))
        assert one.transport.is_active()
        assert two.transport.is_active()


def check_taken_over(proxy: Proxy) -> None:
    proxy.wait(timeout=FINAL_S)
    status = proxy.status()
    assert (status.reason, status.retryable) == (EndReason.SESSION_TAKEN_OVER, False)
    assert "--take-over" in (status.hint or "")


def test_session_of_another_account_is_not_taken_for_ended(
    x2go_server: RealServer, agent: AgentSession, display: Display, runtime: Path
) -> None:
    """The tunnel's account does not own the session: the list that it is shown does not have it."""
    with opened_account() as account, account.server() as server:
        session = SessionInfo(
            name=agent.name, cookie=agent.cookie, graphics_port=agent.graphics_port, display=agent.display
        )
        environ = environment(display, runtime)
        proxy = Proxy(session, server.transport, sessions_root=runtime / "sessions", environ=environ, ask_server=True)
        with proxy, contextlib.closing(x2go_server.connect()) as owner:
            display.wait_for(RED)
            assert server.session(agent.name) is None
            x2go_server.suspend(owner, agent.name)
            proxy.wait(timeout=FINAL_S)
        status = proxy.status()
        assert status.reason in {EndReason.SESSION_ENDED, EndReason.SESSION_SUSPENDED}
        assert status.retryable is not False
        assert alive(agent.pid)


def test_session_of_a_domain_user_is_told_by_the_database(display: Display, runtime: Path) -> None:
    """x2golistsessions shows nothing to such an account."""
    with opened_account("DOM\\jdoe") as account, account.server() as server:
        session = server.start(OPTIONS, "xterm")
        assert session.name.startswith("DOMjdoe")
        assert server.sessions() == ()
        environ = environment(display, runtime)
        proxy = Proxy(session, server.transport, sessions_root=runtime / "sessions", environ=environ, ask_server=True)
        with proxy:
            server.run(session, RED_XTERM)
            display.wait_for(RED)
            server.suspend(session.name)
            proxy.wait(timeout=FINAL_S)
            status = proxy.status()
            assert (status.reason, status.retryable) == (EndReason.SESSION_SUSPENDED, True)
        assert session.agent_pid is not None
        assert alive(session.agent_pid)
        server.terminate(session.name)
        eventually(lambda: not alive(session.agent_pid or 0))
