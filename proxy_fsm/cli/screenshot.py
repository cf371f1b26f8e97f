"""Takes screenshots of an X server and sets its background colour, with the standard library alone."""

from __future__ import annotations

import socket
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Screenshot", "paint_desktop"]

_HEADER_FIELDS = 25
_COLOUR_BYTES = 12
_Z_PIXMAP = 2
_LEAST_SIGNIFICANT_FIRST = 0
_BITS_PER_PIXEL = 32
_MASKS = (0xFF0000, 0xFF00, 0xFF)

_CHANGE_WINDOW_ATTRIBUTES, _CLEAR_AREA = 2, 61
_BACKGROUND_PIXEL = 0x2
_ACCEPTED = 1
_ANSWER_S = 5.0


@dataclass(frozen=True)
class Screenshot:
    """Pixels, row by row from the top, three bytes each: red, green, blue."""

    width: int
    height: int
    pixels: bytes

    @classmethod
    def of_screen(cls, dump: bytes) -> Self:
        """Read a screen dump: Xvfb's framebuffer file (its option ``-fbdir``), or the output of xwd.

        Raises:
            ValueError: It is no such dump, or does not have 32 bits per pixel, blue first, as Xvfb's at depth 24.

        Source: X11/XWDFile.h.
        """
        if len(dump) < 4 * _HEADER_FIELDS:
            raise ValueError("The screen dump is truncated.")
        header = struct.unpack_from(f">{_HEADER_FIELDS}I", dump)
        header_bytes, _, pixmap_format, _, width, height, _, byte_order = header[:8]
        bits_per_pixel, line_bytes, _, *masks = header[11:17]
        layout = (pixmap_format, byte_order, bits_per_pixel, tuple(masks))
        if layout != (_Z_PIXMAP, _LEAST_SIGNIFICANT_FIRST, _BITS_PER_PIXEL, _MASKS):
            raise ValueError(f"A screen dump of this layout cannot be read: {layout}.")
        start = header_bytes + header[19] * _COLOUR_BYTES
        if len(dump) < start + height * line_bytes:
            raise ValueError("The screen dump is truncated.")
        pixels = bytearray(3 * width * height)
        for row in range(height):
            line = dump[start + row * line_bytes :][: 4 * width]
            for channel in range(3):
                pixels[3 * width * row + channel : 3 * width * (row + 1) : 3] = line[2 - channel :: 4]
        return cls(width, height, bytes(pixels))

    def save(self, path: Path) -> None:
        """Write it as PNG.

        Source: RFC 2083; colour type 2, no filter.
        """
        line_bytes = 3 * self.width
        rows = b"".join(b"\0" + self.pixels[at : at + line_bytes] for at in range(0, len(self.pixels), line_bytes))
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = [_chunk(b"IHDR", head), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def paint_desktop(display: int, cookie: str, colour: tuple[int, int, int]) -> socket.socket:
    """Set the background colour of an X server's screen.

    Args:
        display: The server's display number, on this machine.
        cookie: Its MIT-MAGIC-COOKIE-1, in hexadecimal.
        colour: Red, green and blue; the screen has 24 bits, red first.

    Returns:
        The connection; keep it, since many X servers reset when their last client disconnects.

    Raises:
        OSError: The server is not running, or does not answer.
        ValueError: It rejects the cookie.

    Source: X Window System Protocol, version 11: connection set-up, ChangeWindowAttributes, ClearArea.
    """
    client = socket.socket(socket.AF_UNIX)
    try:
        client.settimeout(_ANSWER_S)
        client.connect(f"/tmp/.X11-unix/X{display}")  # noqa: S108 - where X servers have their sockets
        name, data = b"MIT-MAGIC-COOKIE-1", bytes.fromhex(cookie)
        client.sendall(
            struct.pack("<cxHHHHxx", b"l", 11, 0, len(name), len(data)) + name + bytes(-len(name) % 4) + data
        )
        answer = _read_answer(client)
        vendor_bytes, formats = struct.unpack_from("<H", answer, 16)[0], answer[21]
        root = struct.unpack_from("<I", answer, 32 + vendor_bytes + -vendor_bytes % 4 + 8 * formats)[0]
        pixel = int.from_bytes(bytes(colour), "big")
        client.sendall(
            struct.pack("<BxHIII", _CHANGE_WINDOW_ATTRIBUTES, 4, root, _BACKGROUND_PIXEL, pixel)
            + struct.pack("<BxHIhhHH", _CLEAR_AREA, 4, root, 0, 0, 0, 0)
        )
    except BaseException:
        client.close()
        raise
    return client


def _read_answer(client: socket.socket) -> bytes:
    status, words = struct.unpack("<B5xH", _read(client, 8))
    answer = _read(client, 4 * words)
    if status != _ACCEPTED:
        raise ValueError("The X server rejects the cookie.")
    return answer


def _read(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = client.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("The X server closed the connection.")
        data += piece
    return data
