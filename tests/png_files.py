"""PNG files that Pillow cannot write: of any bit depth, with headers that lie."""

import struct
import zlib


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, rows=b"", *, extra=b""):
    """A file with these raw rows; `extra` are chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


BOMB = png(50_000, 50_000, 8, 2)
"""A decompression bomb: 94 bytes that would be 7.5 GB."""
