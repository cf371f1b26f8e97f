"""A screen dump becomes a PNG that other programs can read."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from proxy_fsm.cli.screenshot import Screenshot, paint_desktop

if TYPE_CHECKING:
    from pathlib import Path

WIDTH, HEIGHT, PADDING = 3, 2, 4


def dump(bits_per_pixel: int = 32) -> bytes:
    """Make a dump of six pixels, each encoding its position, with padded lines."""
    header = [0] * 25
    header[0], header[1], header[2], header[3] = 104, 7, 2, 24
    header[4], header[5], header[11], header[12] = WIDTH, HEIGHT, bits_per_pixel, 4 * WIDTH + PADDING
    header[14:17] = [0xFF0000, 0xFF00, 0xFF]
    header[19] = 2
    lines = b"".join(b"".join(bytes([x, y, 200, 255]) for x in range(WIDTH)) + bytes(PADDING) for y in range(HEIGHT))
    return struct.pack(">25I", *header) + b"Xvfb" + bytes(2 * 12) + lines


def test_dump_becomes_png(tmp_path: Path) -> None:
    Screenshot.of_screen(dump()).save(tmp_path / "screen.png")
    with Image.open(tmp_path / "screen.png") as image:
        image.verify()
    with Image.open(tmp_path / "screen.png") as image:
        assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
        for x in range(WIDTH):
            for y in range(HEIGHT):
                assert image.getpixel((x, y)) == (200, y, x)


@pytest.mark.parametrize("unreadable", [b"", dump()[:90], dump()[:-1], dump(24), bytes(4096)])
def test_invalid_dump_is_rejected(unreadable: bytes) -> None:
    with pytest.raises(ValueError, match="dump"):
        Screenshot.of_screen(unreadable)


def test_painting_a_missing_x_server_fails() -> None:
    with pytest.raises(OSError, match="No such file"):
        paint_desktop(99_999, "00", (1, 2, 3))
