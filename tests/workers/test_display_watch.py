"""The display watch tells of a lost X server once, and of nothing else."""

from __future__ import annotations

import errno
import queue
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from proxy_fsm import x11
from proxy_fsm.workers import display_watch
from proxy_fsm.workers.display_watch import DisplayWatch
from proxy_fsm.x11 import DisplayError
from tests.helpers.holdings import descriptors
from tests.helpers.sockets import reset
from tests.helpers.wait import WAIT_S
from tests.helpers.x_server import (
    ACCEPTED,
    Client,
    FakeServer,
    RealServer,
    accept,
    environ_in,
    refused,
    sends,
    serving,
    short_of,
    silent,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """An environment whose DISPLAY is a socket in this test's own directory."""
    return environ_in(tmp_path)


class Heard:
    """A watch, and what it said, in order."""

    def __init__(self, environ: dict[str, str], *, timeout_s: float = WAIT_S) -> None:
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.watch = DisplayWatch(
            environ,
            self.said.put,
            timeout_s=timeout_s,
            on_restored=lambda: self.said.put(f"restored, suspect={self.watch.suspect}"),
        )

    def next(self) -> str:
        return self.said.get(timeout=WAIT_S)

    def __enter__(self) -> Self:
        self.watch.open()
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.close()
        assert self.watch.join(WAIT_S)


class TestDisplayWatch:
    def test_events_are_read_and_discarded(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server, Heard(place) as heard:
            client = server.clients.get(timeout=WAIT_S)
            client.sock.sendall(bytes(2**20))  # more than a socket holds
            assert heard.said.empty()
            assert not heard.watch.suspect

    def test_the_servers_end_is_told_once(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server, Heard(place) as heard:
            client = server.clients.get(timeout=WAIT_S)
            server.stop()
            Path(place["DISPLAY"]).unlink()
            client.sock.shutdown(socket.SHUT_RDWR)
            assert heard.next().startswith("There is no X server at ")
            assert heard.watch.suspect
            assert heard.watch.join(WAIT_S)
            assert heard.said.empty()

    def test_a_reset_connection_is_replaced(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server, Heard(place) as heard:
            for _ in range(3):
                server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
                assert heard.next() == "restored, suspect=False"
            assert heard.said.empty()

    def test_a_connection_may_end_by_an_error(self, place: dict[str, str]) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        place["DISPLAY"] = f"127.0.0.1:{listener.getsockname()[1] - 6000}"
        with FakeServer(listener, accept) as server, Heard(place) as heard:
            reset(server.clients.get(timeout=WAIT_S).sock)
            assert heard.next() == "restored, suspect=False"

    def test_on_restored_may_be_left_out(self, place: dict[str, str]) -> None:
        lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        with serving(place, accept) as server:
            watch = DisplayWatch(place, lost.put, timeout_s=WAIT_S)
            watch.open()
            watch.start()
            for _ in range(2):
                server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
            server.clients.get(timeout=WAIT_S)  # the third connection: the second was watched
            watch.close()
            assert watch.join(WAIT_S)
        assert lost.empty()

    def test_it_is_suspect_before_it_is_confirmed(self, place: dict[str, str]) -> None:
        suspects: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def ask(_: FakeServer, client: Client) -> None:
            suspects.put(heard.watch.suspect)
            client.sock.sendall(refused(b"no more"))

        with serving(place, accept, ask) as server, Heard(place) as heard:
            server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
            assert suspects.get(timeout=WAIT_S)
            assert "no more" in heard.next()

    def test_a_server_that_hangs_up_again_and_again_is_lost(
        self, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(display_watch, "_SHORT_LIFE_S", 3600)  # however slow the machine is, each of these is short
        with serving(place, sends(ACCEPTED, hang_up=True)), Heard(place) as heard:
            said = [heard.next() for _ in range(display_watch._MAX_SHORT_LIVES + 1)]
            assert said[:-1] == ["restored, suspect=False"] * display_watch._MAX_SHORT_LIVES
            assert said[-1] == "The X server accepts connections and closes them at once."

    def test_one_whose_connections_last_is_never_lost(
        self, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(display_watch, "_SHORT_LIFE_S", 0)
        with serving(place, sends(ACCEPTED, hang_up=True)), Heard(place) as heard:
            for _ in range(2 * display_watch._MAX_SHORT_LIVES):
                assert heard.next() == "restored, suspect=False"

    def test_close_ends_thread_and_descriptor(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server:
            heard = Heard(place)
            with heard:
                (thread,) = [one for one in threading.enumerate() if one.name == "proxy_fsm-display"]
                assert thread.daemon
            client = server.clients.get(timeout=WAIT_S)
            client.sock.settimeout(WAIT_S)
            assert client.sock.recv(1) == b""
            assert not thread.is_alive()
            assert heard.watch._socket.sock is None
            assert heard.said.empty()
            assert not heard.watch.suspect
            heard.watch.close()

    def test_close_before_start_ends_the_connection(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server:
            watch = Heard(place).watch
            watch.open()
            with_it = descriptors()
            watch.close()
            assert with_it - descriptors() or not with_it
            client = server.clients.get(timeout=WAIT_S)
            client.sock.settimeout(WAIT_S)
            assert client.sock.recv(1) == b""
            watch.start()
            assert watch.join(0)

    def test_close_before_open_wins(self, place: dict[str, str]) -> None:
        with serving(place, accept):
            watch = Heard(place).watch
            watch.close()
            watch.open()
            watch.start()
            assert watch._socket.sock is None
            assert watch.join()

    def test_close_interrupts_open(self, place: dict[str, str]) -> None:
        with serving(place, silent) as server:
            watch = Heard(place, timeout_s=3600).watch
            opener = threading.Thread(target=watch.open, daemon=True)
            opener.start()
            server.clients.get(timeout=WAIT_S)
            watch.close()
            opener.join(WAIT_S)
            assert not opener.is_alive()
            assert watch._socket.sock is None

    def test_close_interrupts_the_confirmation(self, place: dict[str, str]) -> None:
        with serving(place, accept, silent) as server:
            heard = Heard(place, timeout_s=3600)
            with heard:
                server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
                server.clients.get(timeout=WAIT_S)
                assert heard.watch.suspect
            assert heard.said.empty()

    @pytest.mark.parametrize("answer", [accept, sends(refused(b"no"))])
    def test_no_callback_comes_after_close(
        self, place: dict[str, str], answer: Callable[[FakeServer, Client], None]
    ) -> None:
        def close_then(server: FakeServer, client: Client) -> None:
            heard.watch._socket.cancelled = True  # close() came, and its shutdown too early for this socket
            answer(server, client)

        with serving(place, accept, close_then) as server:
            heard = Heard(place)
            with heard:
                server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
                assert heard.watch.join(WAIT_S)
            assert heard.said.empty()

    def test_close_waits_for_a_callback_under_way(self, place: dict[str, str]) -> None:
        entered, leave, closed = threading.Event(), threading.Event(), threading.Event()

        def lost(_: str) -> None:
            entered.set()
            leave.wait(WAIT_S)

        def close() -> None:
            watch.close()
            closed.set()

        watch = DisplayWatch(place, lost, timeout_s=WAIT_S)
        with serving(place, accept, sends(refused(b"no"))) as server:
            watch.open()
            watch.start()
            server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
            assert entered.wait(WAIT_S)
            closer = threading.Thread(target=close, daemon=True)
            closer.start()
            assert not closed.wait(0.05)
            leave.set()
            closer.join(WAIT_S)
            assert closed.is_set()
            assert watch.join(WAIT_S)

    def test_a_callback_may_close(self, place: dict[str, str]) -> None:
        done = threading.Event()

        def lost(_: str) -> None:
            watch.close()
            done.set()

        watch = DisplayWatch(place, lost, timeout_s=WAIT_S)
        with serving(place, accept, sends(refused(b"no"))) as server:
            watch.open()
            watch.start()
            server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
            assert done.wait(WAIT_S)
            assert watch.join(WAIT_S)

    def test_many_closes_at_once(self, place: dict[str, str]) -> None:
        with serving(place, accept), Heard(place) as heard:
            closers = [threading.Thread(target=heard.watch.close, daemon=True) for _ in range(8)]
            for closer in closers:
                closer.start()
            for closer in closers:
                closer.join(WAIT_S)

    def test_open_raises_what_open_display_raises(self, place: dict[str, str]) -> None:
        watch = Heard(place).watch
        with pytest.raises(DisplayError) as caught:
            watch.open()
        assert caught.value.kind == "absent"
        assert watch._socket.sock is None

    def test_it_is_opened_once_and_then_started_once(self, place: dict[str, str]) -> None:
        with pytest.raises(RuntimeError):
            Heard(place).watch.start()
        with serving(place, accept), Heard(place) as heard:
            with pytest.raises(RuntimeError):
                heard.watch.open()
            with pytest.raises(RuntimeError):
                heard.watch.start()


class TestShortage:
    """A process without descriptors cannot tell whether there is an X server, and does not report it lost."""

    def test_a_watch_does_not_take_it_for_a_loss(self, place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        with serving(place, accept) as server, Heard(place) as heard:
            client = server.clients.get(timeout=WAIT_S)
            tries = threading.Semaphore(0)
            with monkeypatch.context() as patch:
                patch.setattr(x11, "_connect", short_of(errno.EMFILE, tries.release))
                client.sock.shutdown(socket.SHUT_RDWR)
                for _ in range(8):
                    assert tries.acquire(timeout=WAIT_S)
                assert heard.said.empty()
                assert heard.watch.suspect
            assert heard.next() == "restored, suspect=False"

    def test_a_watch_that_waits_for_its_end_can_be_closed(
        self, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with serving(place, accept) as server:
            heard = Heard(place)
            tries = threading.Semaphore(0)
            with heard:
                client = server.clients.get(timeout=WAIT_S)
                monkeypatch.setattr(x11, "_connect", short_of(errno.EMFILE, tries.release))
                client.sock.shutdown(socket.SHUT_RDWR)
                assert tries.acquire(timeout=WAIT_S)
            assert heard.said.empty()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(tmp_path)
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.real
class TestRealServer:
    def test_its_death_is_told(self, real: RealServer) -> None:
        with Heard(real.environ) as heard:
            real.kill()
            assert heard.next().startswith("There is no X server at :")
            assert heard.watch.suspect
