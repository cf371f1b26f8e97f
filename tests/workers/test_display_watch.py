"""The display watch reports a lost X server once, and nothing else."""

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


class RecordedWatch:
    """A watch, and its callbacks in order."""

    def __init__(self, environ: dict[str, str], *, timeout_s: float = WAIT_S) -> None:
        self.calls: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.watch = DisplayWatch(
            environ,
            self.calls.put,
            timeout_s=timeout_s,
            on_restored=lambda: self.calls.put(f"restored, suspect={self.watch.suspect}"),
        )

    def next(self) -> str:
        return self.calls.get(timeout=WAIT_S)

    def __enter__(self) -> Self:
        self.watch.open()
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.close()
        assert self.watch.join(WAIT_S)


class TestDisplayWatch:
    def test_events_are_read_and_discarded(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server, RecordedWatch(place) as recorded:
            client = server.clients.get(timeout=WAIT_S)
            client.sock.sendall(bytes(2**20))  # more than a socket holds
            assert recorded.calls.empty()
            assert not recorded.watch.suspect

    def test_servers_exit_is_reported_once(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server, RecordedWatch(place) as recorded:
            client = server.clients.get(timeout=WAIT_S)
            server.stop()
            Path(place["DISPLAY"]).unlink()
            client.sock.shutdown(socket.SHUT_RDWR)
            assert recorded.next().startswith("There is no X server at ")
            assert recorded.watch.suspect
            assert recorded.watch.join(WAIT_S)
            assert recorded.calls.empty()

    def test_closed_connection_is_replaced(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server, RecordedWatch(place) as recorded:
            for _ in range(3):
                server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
                assert recorded.next() == "restored, suspect=False"
            assert recorded.calls.empty()

    def test_connection_reset_over_tcp_is_replaced(self, place: dict[str, str]) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        place["DISPLAY"] = f"127.0.0.1:{listener.getsockname()[1] - 6000}"
        with FakeServer(listener, accept) as server, RecordedWatch(place) as recorded:
            reset(server.clients.get(timeout=WAIT_S).sock)
            assert recorded.next() == "restored, suspect=False"

    def test_on_restored_is_optional(self, place: dict[str, str]) -> None:
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

    def test_suspect_is_set_before_the_loss_is_confirmed(self, place: dict[str, str]) -> None:
        suspects: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def ask(_: FakeServer, client: Client) -> None:
            suspects.put(recorded.watch.suspect)
            client.sock.sendall(refused(b"no more"))

        with serving(place, accept, ask) as server, RecordedWatch(place) as recorded:
            server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
            assert suspects.get(timeout=WAIT_S)
            assert "no more" in recorded.next()

    def test_server_that_keeps_hanging_up_is_lost(self, place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(display_watch, "_SHORT_LIFE_S", 3600)  # on any machine, each of these is short
        with serving(place, sends(ACCEPTED, hang_up=True)), RecordedWatch(place) as recorded:
            calls = [recorded.next() for _ in range(display_watch._MAX_SHORT_LIVES + 1)]
            assert calls[:-1] == ["restored, suspect=False"] * display_watch._MAX_SHORT_LIVES
            assert calls[-1] == "The X server accepts connections and closes them at once."

    def test_server_with_lasting_connections_is_never_lost(
        self, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(display_watch, "_SHORT_LIFE_S", 0)
        with serving(place, sends(ACCEPTED, hang_up=True)), RecordedWatch(place) as recorded:
            for _ in range(2 * display_watch._MAX_SHORT_LIVES):
                assert recorded.next() == "restored, suspect=False"

    def test_close_ends_thread_and_descriptor(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server:
            recorded = RecordedWatch(place)
            with recorded:
                (thread,) = [one for one in threading.enumerate() if one.name == "proxy_fsm-display"]
                assert thread.daemon
            client = server.clients.get(timeout=WAIT_S)
            client.sock.settimeout(WAIT_S)
            assert client.sock.recv(1) == b""
            assert not thread.is_alive()
            assert recorded.watch._socket.sock is None
            assert recorded.calls.empty()
            assert not recorded.watch.suspect
            recorded.watch.close()

    def test_close_before_start_ends_the_connection(self, place: dict[str, str]) -> None:
        with serving(place, accept) as server:
            watch = RecordedWatch(place).watch
            watch.open()
            before = descriptors()
            watch.close()
            assert before - descriptors() or not before
            client = server.clients.get(timeout=WAIT_S)
            client.sock.settimeout(WAIT_S)
            assert client.sock.recv(1) == b""
            watch.start()
            assert watch.join(0)

    def test_open_after_close_does_not_connect(self, place: dict[str, str]) -> None:
        with serving(place, accept):
            watch = RecordedWatch(place).watch
            watch.close()
            watch.open()
            watch.start()
            assert watch._socket.sock is None
            assert watch.join()

    def test_close_interrupts_open(self, place: dict[str, str]) -> None:
        with serving(place, silent) as server:
            watch = RecordedWatch(place, timeout_s=3600).watch
            opener = threading.Thread(target=watch.open, daemon=True)
            opener.start()
            server.clients.get(timeout=WAIT_S)
            watch.close()
            opener.join(WAIT_S)
            assert not opener.is_alive()
            assert watch._socket.sock is None

    def test_close_interrupts_the_confirmation(self, place: dict[str, str]) -> None:
        with serving(place, accept, silent) as server:
            recorded = RecordedWatch(place, timeout_s=3600)
            with recorded:
                server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
                server.clients.get(timeout=WAIT_S)
                assert recorded.watch.suspect
            assert recorded.calls.empty()

    @pytest.mark.parametrize("answer", [accept, sends(refused(b"no"))])
    def test_no_callback_runs_after_close(
        self, place: dict[str, str], answer: Callable[[FakeServer, Client], None]
    ) -> None:
        def close_then(server: FakeServer, client: Client) -> None:
            # As if close() had been called, with its shutdown too early for this socket.
            recorded.watch._socket.cancelled = True
            answer(server, client)

        with serving(place, accept, close_then) as server:
            recorded = RecordedWatch(place)
            with recorded:
                server.clients.get(timeout=WAIT_S).sock.shutdown(socket.SHUT_RDWR)
                assert recorded.watch.join(WAIT_S)
            assert recorded.calls.empty()

    def test_close_waits_for_a_running_callback(self, place: dict[str, str]) -> None:
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

    def test_callback_may_close(self, place: dict[str, str]) -> None:
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

    def test_concurrent_closes_are_harmless(self, place: dict[str, str]) -> None:
        with serving(place, accept), RecordedWatch(place) as recorded:
            closers = [threading.Thread(target=recorded.watch.close, daemon=True) for _ in range(8)]
            for closer in closers:
                closer.start()
            for closer in closers:
                closer.join(WAIT_S)

    def test_open_without_an_x_server_raises_display_error(self, place: dict[str, str]) -> None:
        watch = RecordedWatch(place).watch
        with pytest.raises(DisplayError) as caught:
            watch.open()
        assert caught.value.kind == "absent"
        assert watch._socket.sock is None

    def test_watch_is_opened_once_and_then_started_once(self, place: dict[str, str]) -> None:
        with pytest.raises(RuntimeError):
            RecordedWatch(place).watch.start()
        with serving(place, accept), RecordedWatch(place) as recorded:
            with pytest.raises(RuntimeError):
                recorded.watch.open()
            with pytest.raises(RuntimeError):
                recorded.watch.start()


class TestShortage:
    """A process without descriptors cannot know whether there is an X server, and does not report it lost."""

    def test_shortage_is_not_reported_as_a_loss(self, place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        with serving(place, accept) as server, RecordedWatch(place) as recorded:
            client = server.clients.get(timeout=WAIT_S)
            tries = threading.Semaphore(0)
            with monkeypatch.context() as patch:
                patch.setattr(x11, "_connect", short_of(errno.EMFILE, tries.release))
                client.sock.shutdown(socket.SHUT_RDWR)
                for _ in range(8):
                    assert tries.acquire(timeout=WAIT_S)
                assert recorded.calls.empty()
                assert recorded.watch.suspect
            assert recorded.next() == "restored, suspect=False"

    def test_watch_can_be_closed_during_a_shortage(
        self, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with serving(place, accept) as server:
            recorded = RecordedWatch(place)
            tries = threading.Semaphore(0)
            with recorded:
                client = server.clients.get(timeout=WAIT_S)
                monkeypatch.setattr(x11, "_connect", short_of(errno.EMFILE, tries.release))
                client.sock.shutdown(socket.SHUT_RDWR)
                assert tries.acquire(timeout=WAIT_S)
            assert recorded.calls.empty()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(tmp_path)
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.real
class TestRealServer:
    def test_killed_server_is_reported(self, real: RealServer) -> None:
        with RecordedWatch(real.environ) as recorded:
            real.kill()
            assert recorded.next().startswith("There is no X server at :")
            assert recorded.watch.suspect
