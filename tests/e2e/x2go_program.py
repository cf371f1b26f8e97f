"""A program on python-x2go's API that loads our proxy through the keyword ``proxy_backend``.

Called with a host, a port, a user, a command and a backend (``ours``, or ``theirs``: python-x2go's own nx3 class on
our base). Prints its progress to standard output, one JSON object per line; suspends at a line on standard input, and
ends at another.
"""

from __future__ import annotations

import json
import select
import sys
import time
from typing import Any

import x2go  # type: ignore[import-not-found]  # it patches the standard library: before anything else

HOST, PORT, USER, COMMAND, BACKEND = sys.argv[1:]


def backend() -> Any:
    from proxy_fsm.x2go import base, nx3  # noqa: PLC0415 - after x2go

    if BACKEND == "ours":
        return nx3.X2GoProxy
    sys.modules["x2go.backends.proxy.base"] = base
    import x2go.backends.proxy  # type: ignore[import-not-found]  # noqa: PLC0415

    x2go.backends.proxy.base = base
    from x2go.backends.proxy.nx3 import X2GoProxy  # type: ignore[import-not-found]  # noqa: PLC0415

    assert issubclass(X2GoProxy, base.X2GoProxy)
    return X2GoProxy


def report(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)  # noqa: T201 - its output is read by the test


def timed(kind: Any) -> Any:
    """Return a subclass that reports how long it takes to start and to stop."""

    class Timed(kind):  # type: ignore[misc]
        def start_proxy(self) -> Any:
            began = time.monotonic()
            process, ok = super().start_proxy()
            status = self.engine.status()
            report(
                what="started",
                ok=ok,
                state=str(status.state),
                pid=process.pid if process else None,
                seconds=time.monotonic() - began,
            )
            return process, ok

        stop_reported = False

        def stop_thread(self) -> None:
            began = time.monotonic()
            super().stop_thread()
            if self.engine is not None and not self.stop_reported:  # python-x2go's guardian may call it concurrently
                self.stop_reported = True
                report(what="stopped", reason=str(self.engine.status().reason), seconds=time.monotonic() - began)

    return Timed


def main() -> None:
    client = x2go.X2GoClient(proxy_backend=timed(backend()), use_cache=False, start_xserver=False)
    session = client.register_session(
        HOST,
        port=int(PORT),
        username=USER,
        cmd=COMMAND,
        session_type="desktop",
        geometry="800x600",
        kbtype="auto",
        kblayout="null",
        snd_system="none",
        add_to_known_hosts=True,
    )
    client.connect_session(session)
    client.start_session(session)
    report(what="session", ok=client.session_ok(session), name=client.get_session_name(session))
    wait_for_line()
    client.suspend_session(session)
    report(what="suspended")
    wait_for_line()  # if the guardian was first, its stop is still in progress


def wait_for_line() -> None:
    select.select([sys.stdin], [], [])  # a blocking read would block gevent's hub, and every greenlet on it
    sys.stdin.readline()


if __name__ == "__main__":
    main()
