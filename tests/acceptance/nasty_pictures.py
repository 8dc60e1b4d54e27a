"""Pictures as bytes, good and bad, each small: what is large is large only once it is decoded."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from framepack_core.media import heif
from tests.core.media import icc

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What Pillow can write and framepackd does not read.
OTHER_FORMATS = (
    *("GIF", "TIFF", "EPS", "PDF", "ICO", "PPM", "JPEG2000", "TGA"),
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
GOOD_AVIF = saved(noise(), "AVIF")
GOOD_ONES = (
    *(("JPEG", GOOD_JPEG), ("WebP", GOOD_WEBP), ("BMP", GOOD_BMP)),
    ("AVIF", GOOD_AVIF),
)
P3 = icc.rgb(icc.DISPLAY_P3, icc.gamma(2.2))
HEIC = Path(icc.__file__).with_name("iphone.heic")
# The first box of HEIC, as of any photo of an iPhone, and nothing behind it.
HEIC_CUT = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(range(256))


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


def cutout() -> Image.Image:
    """Noise, half of which is clear."""
    image = noise("RGBA")
    image.paste((200, 10, 10, 0), (0, 0, 6, 10))
    return image


def with_profile(profile: bytes) -> bytes:
    return with_chunks(chunk(b"iCCP", b"x\0\0" + zlib.compress(profile)))


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


def good_pictures() -> Iterator[tuple[str, bytes, str]]:
    yield "lying on its side", saved(noise(), "JPEG", exif=exif(6)), ".jpg"
    yield "with an orientation there is not", saved(noise(), "JPEG", exif=exif(99)), ".jpg"
    yield "with EXIF that is rubbish", broken_exif(b"II*\0" + b"\xff" * 64), ".jpg"
    yield "with EXIF that ends early", broken_exif(b"MM\0*\0\0\0\x08\0\x09"), ".jpg"
    yield "of CMYK", saved(noise("CMYK"), "JPEG"), ".jpeg"
    transparent = saved(noise("P"), transparency=bytes(range(200)))
    yield "of palette and transparency", transparent, ".png"
    yield "of 16 bits in colour", sixteen_bits(2), ".png"
    yield "of one pixel", saved(noise(size=(1, 1))), ".png"
    yield "a JPEG called PNG", GOOD_JPEG, ".png"
    yield "a WebP called BMP", GOOD_WEBP, ".BMP"
    yield "and archive in one", GOOD + b"PK\3\4" + bytes(200) + b"PK\5\6" + bytes(18), ".png"
    yield "a camera's with a preview", saved(noise(), "MPO", save_all=True), ".jpg"
    bomb = chunk(b"IDAT", zeros(200))
    yield "with a bomb behind its last pixel", png(8, 8, bomb), ".png"
    photo = saved(noise(), "JPEG", icc_profile=P3)
    yield "of other colours", photo, ".jpg"
    yield (
        "of other colours, lying on its side",
        saved(noise(), "JPEG", icc_profile=P3, exif=exif(6)),
        ".jfif",
    )
    yield "of inks, with a profile", saved(noise("CMYK"), "JPEG", icc_profile=icc.inks()), ".jpe"
    yield "with a profile of a megabyte and a half", with_profile(P3 + bytes(3 << 19)), ".png"
    yield "with a profile of another colour space", saved(noise("L"), icc_profile=P3), ".png"
    yield (
        "with a profile that is rubbish",
        saved(noise(), "WEBP", icc_profile=b"\xff" * 999),
        ".webp",
    )
    bomb = zeros(200)
    yield "with a bomb for a profile", with_chunks(chunk(b"iCCP", b"x\0\0" + bomb)), ".png"
    yield "with a bomb for a comment", with_chunks(chunk(b"zTXt", b"a\0\0" + bomb)), ".png"
    yield "with a bomb in Unicode", with_chunks(chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)), ".png"
    many = [chunk(b"zTXt", b"%d\0\0" % number + zeros(1)) for number in range(100)]
    yield "with a hundred small bombs", with_chunks(*many), ".png"
    yield "of 16 bits in grey", sixteen_bits(0), ".png"
    yield "of 16 bits in grey and alpha", sixteen_bits(4), ".png"
    yield "cut out", saved(cutout()), ".png"
    yield "cut out, as WebP", saved(cutout(), "WEBP", lossless=True), ".webp"
    yield "an AVIF", GOOD_AVIF, ".avif"
    yield "an AVIF called PNG", GOOD_AVIF, ".png"
    if heif.available():
        yield "of an iPhone", HEIC.read_bytes(), ".HEIC"
        yield "of an iPhone, called JPEG", HEIC.read_bytes(), ".jpg"
    yield "with a script in it", saved(noise(), "JPEG", comment=b"<?php system('id'); ?>"), ".jpg"


def bad_pictures() -> Iterator[tuple[str, bytes, str]]:
    yield "to decode for hours", jpeg_of_many_scans(4000), "takes more than 15 s"
    for kind in OTHER_FORMATS:
        yield f"of format {kind}", in_other_format(kind), "not a picture that can be read"
    for name, start in (("GIF", b"GIF89a"), ("PSD", b"8BPS\0\1"), ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n")):
        yield f"that only starts like {name}", start + bytes(40), "not a picture that can be read"
    for name, content in (
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        ("a page", b"<!DOCTYPE html><script>alert(1)</script>"),
        ("a text", b"not a picture"),
        ("zeros", bytes(5000)),
        ("one byte", b"\x89"),
        ("a pickle", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."),
        ("an executable", b"\x7fELF" + bytes(100)),
    ):
        yield f"that is {name}", content, "not a picture that can be read"
    for kind, good in GOOD_ONES:
        yield f"{kind} cut in the middle", good[: len(good) * 2 // 3], ""
        yield f"{kind} cut after its header", good[:30], ""
    for length in (8, 20, 33, 45, len(GOOD) // 2):
        yield f"PNG cut after {length} bytes", GOOD[:length], ""
    for at in (20, 40, 60, 100):
        spoilt = GOOD[:at] + bytes([GOOD[at] ^ 0xFF]) + GOOD[at + 1 :]
        yield f"PNG with byte {at} turned", spoilt, ""
    yield "PNG without pixels", png(8, 8), "is damaged"
    yield "PNG of no width", png(0, 8), ""
    yield "PNG of more than there are numbers", png(2**31 - 1, 2**31 - 1), "megapixels"
    for name, huge in (
        ("PNG", saved(Image.new("1", (32000, 32000)))),
        ("PNG just over", saved(Image.new("1", (10001, 10000)))),
        ("JPEG", jpeg_of_size(65500, 65500)),
        ("BMP", bmp_of_size(100_000, 10_000)),
        ("WebP", webp_of_size(16383, 16383)),
    ):
        yield f"{name} of too many pixels", huge, ""
    yield "PNG that lacks ninety megapixels", png(9500, 9500), "is damaged"
    yield "BMP that lacks ninety megapixels", bmp_of_size(9500, 9500), "is damaged"
    for kind in ("PNG", "WEBP"):
        yield f"animated {kind}", animated(kind), "is animated (2 frames)"
    yield "animated GIF", animated("GIF"), "not a picture that can be read"
    yield "of an iPhone, cut after its first box", HEIC_CUT, "this is HEIC, from an iPhone"
