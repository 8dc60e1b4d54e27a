"""Pictures as bytes, good and bad, each small: what is large is large only once it is decoded."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What Pillow can write and framepackd does not read.
OTHER_FORMATS = (
    *("GIF", "TIFF", "EPS", "PDF", "ICO", "PPM", "JPEG2000", "AVIF", "TGA"),
    *("PCX", "SGI", "DDS", "SPIDER", "ICNS", "MSP", "XBM"),
)


def noise(mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, form, **options)
        return file.getvalue()


def in_other_format(form: str) -> bytes:
    modes = {"MSP": "1", "XBM": "1", "SPIDER": "F"}
    return saved(noise(modes.get(form, "RGB"), (32, 32)), form)


GOOD = saved(noise())
GOOD_JPEG = saved(noise(), "JPEG")
GOOD_WEBP = saved(noise(), "WEBP")
GOOD_BMP = saved(noise(), "BMP")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2) -> bytes:
    """Put a PNG together whose pixels need not be there."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return SIGNATURE + header + b"".join(chunks) + chunk(b"IEND", b"")


def with_chunks(*chunks: bytes) -> bytes:
    """Put chunks into a good PNG, behind its header."""
    return GOOD[:33] + b"".join(chunks) + GOOD[33:]


def zeros(megabytes: int) -> bytes:
    """Compress that many megabytes of zeros to a thousandth."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def sixteen_bits(color: int) -> bytes:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    rows = b"".join(b"\0" + bytes(range(8 * channels)) + bytes(8 * channels) for _ in range(8))
    return png(8, 8, chunk(b"IDAT", zlib.compress(rows)), depth=16, color=color)


def jpeg_of_size(width: int, height: int) -> bytes:
    """Have a small JPEG claim another size."""
    at = GOOD_JPEG.index(b"\xff\xc0") + 5
    return GOOD_JPEG[:at] + struct.pack(">HH", height, width) + GOOD_JPEG[at + 4 :]


def bmp_of_size(width: int, height: int) -> bytes:
    return GOOD_BMP[:18] + struct.pack("<ii", width, height) + GOOD_BMP[26:]


def webp_of_size(width: int, height: int) -> bytes:
    """An extended WebP whose canvas is large and whose frame is small."""
    frame = GOOD_WEBP[12:]
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_many_scans(times: int) -> bytes:
    """A progressive JPEG that tells its ninety megapixels again and again: small to send, hours to decode."""
    whole = saved(Image.new("L", (9500, 9500), 77), "JPEG", progressive=True)
    starts = [at for at in range(len(whole) - 1) if whole[at : at + 2] == b"\xff\xda"]
    scan = whole[starts[1] : starts[2]]
    tables = scan.find(b"\xff\xc4")
    scan = scan if tables < 0 else scan[:tables]
    return whole[: starts[2]] + scan * times + whole[starts[2] :]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def broken_exif(content: bytes) -> bytes:
    """A JPEG whose EXIF block is not what it should be."""
    block = b"Exif\0\0" + content
    return GOOD_JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + GOOD_JPEG[2:]


def text_chunks(kind: str, size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * size, zip=kind == "zTXt")
    return saved(noise(), pnginfo=info)


def animated(form: str) -> bytes:
    return saved(noise(), form, save_all=True, append_images=[Image.new("RGB", (12, 10))], duration=100)
