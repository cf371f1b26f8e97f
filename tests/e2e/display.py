"""A private X server to paint on, and screenshots of what was painted."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from PIL import Image

from tests.helpers.wait import eventually

from .procs import SYSTEM_PATH, program

if TYPE_CHECKING:
    from typing import Self

START_S = 10.0
STOP_S = 5.0
XWD_FIELDS = 25  # CARD32s of the fixed header, big-endian (X11/XWDFile.h)
Z_PIXMAP = 2
PAINT_S = 60.0
POLL_S = 0.1  # between two screenshots: each is a program of its own, and a picture of megabytes
SHARE = 0.1  # of the screen that a window covers at least: an xterm covers about an eighth
RED, BLUE = (255, 0, 0), (0, 0, 255)
COLOUR_BYTES = 12  # one entry of the colour map
# a ClientMessage WM_DELETE_WINDOW (ICCCM 4.2.8.1), by Xlib, in a program of its own
CLOSE_WINDOW = """
import ctypes, sys
x11 = ctypes.CDLL("libX11.so.6")
x11.XOpenDisplay.restype = ctypes.c_void_p
x11.XInternAtom.restype = ctypes.c_ulong
display, window = ctypes.c_void_p(x11.XOpenDisplay(None)), int(sys.argv[1], 16)
atom = lambda name: x11.XInternAtom(display, name, 0)
class Event(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("serial", ctypes.c_ulong), ("send_event", ctypes.c_int),
        ("display", ctypes.c_void_p), ("window", ctypes.c_ulong), ("message", ctypes.c_ulong),
        ("format", ctypes.c_int), ("data", ctypes.c_long * 5), ("rest", ctypes.c_long * 24)]
event = Event(33, 0, 1, display, window, atom(b"WM_PROTOCOLS"), 32, (atom(b"WM_DELETE_WINDOW"), 0))
sys.exit(not x11.XSendEvent(display, ctypes.c_ulong(window), 0, ctypes.c_long(0), ctypes.byref(event))
    or x11.XCloseDisplay(display))
"""


class Display:
    """Xvfb on a free display, which accepts only clients with the cookie in `xauthority`."""

    def __init__(self, *, size: tuple[int, int] = (1024, 768), no_reset: bool = True) -> None:
        """Prepare; nothing runs yet.

        Args:
            size: width and height of the screen in pixels.
            no_reset: whether the server keeps its state when its last client disconnects.
        """
        self._size = size
        self._no_reset = no_reset
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = Path()
        self.name = ""
        self.xauthority = Path()

    @property
    def pid(self) -> int:
        """The process of the X server."""
        if self._process is None:
            raise RuntimeError("The display was not started.")
        return self._process.pid

    @property
    def env(self) -> dict[str, str]:
        """The environment that a program needs to paint here."""
        return {"DISPLAY": self.name, "XAUTHORITY": str(self.xauthority)}

    @property
    def socket_path(self) -> Path:
        """The socket that the X server listens on."""
        return Path(f"/tmp/.X11-unix/X{self.name.removeprefix(':')}")

    def start(self) -> None:
        """Start the X server and wait until it accepts connections."""
        self._directory = Path(tempfile.mkdtemp(prefix="pfsm-display-"))
        self.xauthority = self._directory / "Xauthority"
        server_authority = self._directory / "server-authority"
        cookie = token_hex(16)
        self._add_cookie(server_authority, ":0", cookie)  # the server reads only the cookie
        read_end, write_end = os.pipe()
        command = [program("Xvfb") or "Xvfb", "-displayfd", str(write_end)]
        command += ["-screen", "0", "{}x{}x24".format(*self._size)]
        command += ["-auth", str(server_authority), "-nolisten", "tcp"]
        try:
            with (self._directory / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, *(["-noreset"] if self._no_reset else [])],
                    pass_fds=[write_end],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            os.close(write_end)
            write_end = -1
            self.name = f":{self._display_number(read_end)}"
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(read_end)
            if write_end >= 0:
                os.close(write_end)
        self._add_cookie(self.xauthority, self.name, cookie)

    def _add_cookie(self, path: Path, display: str, cookie: str) -> None:
        path.touch(mode=0o600)
        subprocess.run(
            [program("xauth") or "xauth", "-q", "-f", path, "source", "-"],
            input=f"add {display} MIT-MAGIC-COOKIE-1 {cookie}\n".encode(),
            check=True,
        )

    def _display_number(self, read_end: int) -> int:
        deadline = time.monotonic() + START_S
        answer = b""
        while not answer.endswith(b"\n"):
            readable, _, _ = select.select([read_end], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(read_end, 64) if readable else b""
            if not piece:
                log = (self._directory / "log").read_text(errors="replace")
                raise RuntimeError(f"Xvfb did not start: {log}")
            answer += piece
        return int(answer)

    def kill(self) -> None:
        """Kill the X server as in a crash: its socket file is left behind."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(STOP_S)

    def stop(self) -> None:
        """End the X server and remove all of its files."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.send_signal(signal.SIGCONT)
                self._process.terminate()
                self._process.wait(STOP_S)
            self.kill()
            if self.name:
                self._remove_leftovers()
            self._process = None
        if self._directory != Path():
            shutil.rmtree(self._directory, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Remove the socket file, unless another server now owns the display.

        Xvfb leaves the file behind if it chose its display itself. The owner of the abstract socket of the same name
        owns the display; while it is bound here, no other server can claim the display.
        """
        with socket.socket(socket.AF_UNIX) as guard, contextlib.suppress(OSError):
            guard.bind(f"\0{self.socket_path}")
            self.socket_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ask(self, *command: str) -> bytes:
        environment = {"PATH": SYSTEM_PATH, **self.env}
        return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=10).stdout

    def screenshot(self) -> Image.Image:
        """Take a picture of the whole screen, in RGB.

        xwd first asks for the windows and then for their colours: it fails if one was closed in between, and is
        run again.
        """
        for _ in range(5):
            with contextlib.suppress(subprocess.CalledProcessError):
                return picture_of_dump(self._ask("xwd", "-root", "-silent"))
        return picture_of_dump(self._ask("xwd", "-root", "-silent"))

    def share_of(self, colour: tuple[int, int, int]) -> float:
        """Return the share of the screen, from 0 to 1, that shows exactly `colour`."""
        screen = self.screenshot()
        colours = screen.getcolors(screen.width * screen.height) or []
        return sum(count for count, shown in colours if shown == colour) / (screen.width * screen.height)

    def wait_for(self, colour: tuple[int, int, int]) -> None:
        """Wait until a window of this colour is shown."""
        eventually(lambda: self.share_of(colour) > SHARE, PAINT_S, what=f"{colour} on the screen", interval_s=POLL_S)

    def wait_without(self, colour: tuple[int, int, int]) -> None:
        """Wait until no window of this colour is shown any more."""
        eventually(lambda: self.share_of(colour) < SHARE, PAINT_S, what=f"no {colour} left", interval_s=POLL_S)

    def windows(self) -> list[str]:
        """List the names of all windows that have one."""
        tree = self._ask("xwininfo", "-root", "-tree").decode(errors="replace")
        return re.findall(r'^\s+0x[0-9a-f]+ "(.*)": \(', tree, re.MULTILINE)

    def close_window(self, name: str) -> None:
        """Close a window as a window manager does when its user clicks on the cross: it asks the window to close."""
        found = re.search(r"Window id: (0x[0-9a-f]+)", self._ask("xwininfo", "-name", name).decode())
        if found is None:
            raise LookupError(f"There is no window {name}.")
        environment = {"PATH": SYSTEM_PATH, **self.env}
        command = [sys.executable, "-c", CLOSE_WINDOW, found[1]]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=10)


def picture_of_dump(dump: bytes) -> Image.Image:
    """Turn the output of xwd into a picture.

    Raises:
        ValueError: it is not a ZPixmap of 24 or 32 bits a pixel, blue first, as Xvfb produces at depth 24.

    Source: X11/XWDFile.h.
    """
    header = struct.unpack_from(f">{XWD_FIELDS}I", dump)
    header_bytes, _, pixmap_format, _, width, height, _, byte_order = header[:8]
    bits_per_pixel, line_bytes, _, red, green, blue = header[11:17]
    layout = (pixmap_format, byte_order, red, green, blue)
    order = {24: "BGR", 32: "BGRX"}.get(bits_per_pixel)
    if order is None or layout != (Z_PIXMAP, 0, 0xFF0000, 0xFF00, 0xFF):
        raise ValueError(f"unsupported window dump: {bits_per_pixel} bits, {layout}")
    pixels = dump[header_bytes + header[19] * COLOUR_BYTES :]
    return Image.frombytes("RGB", (width, height), pixels, "raw", order, line_bytes)
