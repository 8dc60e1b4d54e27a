"""ICC profiles as bytes, made from primaries and a curve, or from the colours of inks."""

import struct
from collections.abc import Sequence
from itertools import product

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
WHITE = (0.9642, 1.0, 0.8249)  # D50


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def linear(level: float) -> float:
    return level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4


def table(entries: int) -> bytes:
    """sRGB's curve as a table of points."""
    points = [round(65535 * linear(number / (entries - 1))) for number in range(entries)]
    return b"curv\0\0\0\0" + struct.pack(f">I{entries}H", entries, *points)


def formula() -> bytes:
    """sRGB's curve as a formula."""
    parameters = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + b"".join(map(fixed, parameters))


def described(text: str) -> bytes:
    content = text.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(content)) + content + bytes(78)


def profile(
    space: bytes, tags: dict[bytes, bytes], *, name: str, pcs: bytes = b"XYZ ", device: bytes = b"mntr"
) -> bytes:
    everything = {b"desc": described(name), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(WHITE), **tags}
    at = 128 + 4 + 12 * len(everything)
    index, body = b"", b""
    for tag, content in everything.items():
        index += tag + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    rest = struct.pack(">I", len(everything)) + index + body
    head = b"\0\0\0\0" + struct.pack(">I", 0x02400000) + device + space + pcs + bytes(12) + b"acsp"
    head += bytes(28) + b"".join(map(fixed, WHITE))
    return struct.pack(">I", 128 + len(rest)) + head + bytes(124 - len(head)) + rest


def rgb(primaries: Sequence[Sequence[float]], curve: bytes, name: str = "colours") -> bytes:
    tags = {
        letter + b"XYZ": xyz(values) for letter, values in zip((b"r", b"g", b"b"), primaries, strict=True)
    }
    return profile(b"RGB ", tags | {letter + b"TRC": curve for letter in (b"r", b"g", b"b")}, name=name)


def grey(curve: bytes) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve}, name="greys")


def inks(darkest: int = 0) -> bytes:
    """Make a CMYK profile whose inks all darken alike: greys from white to ``darkest`` (L* of 255)."""
    colours = [(255 - (255 - darkest) * max(amounts), 128, 128) for amounts in product((0, 1), repeat=4)]
    straight = bytes(range(256))
    content = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0))
    content += b"".join(fixed(float(row == column)) for row in range(3) for column in range(3))
    content += straight * 4 + b"".join(map(bytes, colours)) + straight * 3
    return profile(b"CMYK", {b"A2B0": content}, name="inks", pcs=b"Lab ", device=b"prtr")
