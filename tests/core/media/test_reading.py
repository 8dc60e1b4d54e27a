"""Reading pictures: colours, transparency and depth become 8-bit sRGB."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from framepack_core.errors import RequestError
from framepack_core.media import pictures
from framepack_core.media.pictures import open_picture, picture_size
from tests.core.media import icc

P3 = icc.rgb(icc.DISPLAY_P3, icc.gamma(2.2))
NOISE = np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, form: str | None = None, **options: Any) -> Path:
    image.save(path, form, **options)
    return path


def read(path: Path, background: str = "#ffffff") -> tuple[pictures.Picture, list[str]]:
    told: list[str] = []
    return open_picture(path, background, told.append), told


# Colours


@pytest.mark.parametrize(("name", "expected"), [("a.png", (0, 205, 72)), ("a.jpg", (0, 205, 73))])
def test_a_photo_of_other_colours_is_converted_to_srgb(
    tmp_path: Path, name: str, expected: tuple[int, int, int]
) -> None:
    path = saved(tmp_path / name, Image.new("RGB", (16, 16), (70, 200, 90)), icc_profile=P3)
    picture, told = read(path)
    assert (tuple(picture[8, 8]), told) == (expected, [])


def built_in() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    "profile",
    [
        built_in(),
        icc.rgb(icc.SRGB, icc.formula(), "no name that says so"),
        icc.rgb(icc.SRGB, icc.table(1024), "sRGB IEC61966-2.1"),
        icc.rgb(icc.SRGB, icc.table(64)),
        icc.rgb([[round(value, 4) for value in colour] for colour in icc.SRGB], icc.table(4096)),
    ],
    ids=["littleCMS's", "formula", "table of 1024", "table of 64", "coarse primaries"],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_profile_of_srgb_changes_no_pixel_whatever_it_is_called(
    tmp_path: Path, mode: str, profile: bytes
) -> None:
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 52, 3)
    image = Image.fromarray(colours).convert(mode)
    picture, told = read(saved(tmp_path / "a.png", image, icc_profile=profile))
    assert np.array_equal(picture, colours)
    assert told == []


def test_a_profile_named_srgb_is_still_applied_if_it_differs(tmp_path: Path) -> None:
    lying = icc.rgb(icc.DISPLAY_P3, icc.gamma(2.2), "sRGB IEC61966-2.1")
    picture, _ = read(saved(tmp_path / "a.png", Image.new("RGB", (8, 8), (70, 200, 90)), icc_profile=lying))
    assert tuple(picture[0, 0]) == (0, 205, 72)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_pictures_are_converted_by_a_grey_profile(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.full((8, 8), 255 if mode == "1" else 64, np.uint8)).convert(mode)
    picture, told = read(saved(tmp_path / "a.png", image, icc_profile=icc.grey(icc.gamma(1.0))))
    # A quarter of the light is a half of sRGB's levels.
    assert (set(picture[0, 0]), told) == ({255 if mode == "1" else 137}, [])


def test_grey_pictures_with_srgbs_curve_keep_their_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    picture, _ = read(saved(tmp_path / "a.png", image, icc_profile=icc.grey(icc.table(1024))))
    assert np.array_equal(picture[..., 0], np.asarray(image))


def test_cmyk_is_converted_by_its_profile_and_without_one_as_before(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    with_profile, told = read(saved(tmp_path / "a.jpg", image, quality=100, icc_profile=icc.inks(128)))
    assert told == []
    assert np.ptp(with_profile[8, 8].astype(int)) <= 1, "grey, as the profile has it"
    without, _ = read(saved(tmp_path / "b.jpg", image, quality=100))
    with Image.open(tmp_path / "b.jpg") as stored:
        assert np.array_equal(without, np.array(stored.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "form", "profile", "said"),
    [
        ("L", "PNG", P3, "it is for RGB, and the picture is of grey"),
        ("LA", "PNG", P3, "it is for RGB, and the picture is of grey"),
        ("P", "PNG", P3, "it is for RGB, and the picture is of a palette"),
        ("CMYK", "JPEG", P3, "it is for RGB, and the picture is of CMYK"),
        ("RGB", "PNG", icc.grey(icc.gamma(1.0)), "it is for grey, and the picture is of RGB"),
        ("RGB", "JPEG", icc.inks(), "it is for CMYK, and the picture is of RGB"),
        ("RGB", "PNG", P3[:200], "it is damaged"),
        ("RGB", "WEBP", b"no profile at all", "it is damaged"),
        ("L", "JPEG", b"\0" * 3000, "it is damaged"),
        ("RGB", "AVIF", P3[:300] + b"\xff" * 40 + P3[340:], ""),
    ],
)
def test_a_profile_of_another_colour_space_is_ignored_with_a_warning(
    tmp_path: Path, mode: str, form: str, profile: bytes, said: str
) -> None:
    image = Image.fromarray(NOISE).convert(mode)
    picture, told = read(saved(tmp_path / "a", image, form, icc_profile=profile))
    plain, _ = read(saved(tmp_path / "b", image, form))
    if said:
        assert len(told) == 1
        assert told[0].startswith(f"a: its colour profile is ignored: {said}")
        assert np.array_equal(picture, plain)
    assert picture_size(tmp_path / "a", told.append) == (12, 10), "looked at as it is read"


def test_a_sideways_photo_is_turned_and_converted(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), (70, 200, 90))
    exif = image.getexif()
    exif[0x0112] = 6
    picture, _ = read(saved(tmp_path / "a.png", image, icc_profile=P3, exif=exif))
    assert picture.shape == (20, 10, 3)
    assert (picture == (0, 205, 72)).all()


# Transparency


def cutout(mode: str) -> Image.Image:
    """Noise with a transparent left half and a half transparent column."""
    image = Image.fromarray(NOISE).convert(mode[:-1]).convert(mode)
    alpha = np.full(NOISE.shape[:2], 255, np.uint8)
    alpha[:, :5], alpha[:, 5] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize(
    ("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "AVIF")]
)
@pytest.mark.parametrize("background", ["#ffffff", "#204060"])
def test_transparent_parts_show_the_background(tmp_path: Path, background: str, mode: str, form: str) -> None:
    image = cutout(mode)
    picture, _ = read(
        saved(tmp_path / "a", image, form, **({} if form == "PNG" else {"lossless": True})), background
    )
    colour = np.array([int(background[at : at + 2], 16) for at in (1, 3, 5)])
    assert (picture[:, :5] == colour).all()
    if form != "AVIF":  # which is not exact
        whole = np.array(image.convert("RGB")).astype(int)
        assert np.array_equal(picture[:, 6:], whole[:, 6:])
        assert np.abs(picture[:, 5] - (whole[:, 5] * 128 + colour * 127) / 255).max() <= 1


def sixteen(color: int, samples: list[int], *chunks: bytes, depth: int = 16) -> bytes:
    """A PNG of one row, of 16-bit samples or of fewer bits in one byte."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    row = struct.pack(f">{len(samples)}H", *samples) if depth == 16 else bytes(samples)
    width = len(samples) // channels if depth == 16 else 8 // depth
    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    return packed(header, zlib.compress(b"\0" + row), *chunks)


def packed(header: bytes, pixels: bytes, *chunks: bytes) -> bytes:
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (sixteen(0, [0x0000, 0x12FF, 0xFFFF]), [(0,) * 3, (0x12,) * 3, (255,) * 3]),
        (sixteen(0, [0x1200, 0x1201], chunk(b"tRNS", b"\x12\x01")), [(0x12,) * 3, (255,) * 3]),
        (sixteen(4, [0x1234, 0xFFFF, 0x1234, 0]), [(0x12,) * 3, (255,) * 3]),
        (sixteen(2, [0x1234, 0x5678, 0x9ABC]), [(0x12, 0x56, 0x9A)]),
        (
            sixteen(2, [0x1234, 0x5678, 0x9ABC, 1, 2, 3], chunk(b"tRNS", b"\x12\x34\x56\x78\x9a\xbc")),
            [(255,) * 3, (0, 0, 0)],
        ),
        (sixteen(6, [0x1234, 0x5678, 0x9ABC, 0xFFFF]), [(0x12, 0x56, 0x9A)]),
        (
            sixteen(0, [0b00011011], chunk(b"tRNS", b"\0\1"), depth=2),
            [(0,) * 3, (255,) * 3, (170,) * 3, (255,) * 3],
        ),
        (sixteen(0, [0x3C], chunk(b"tRNS", b"\0\3"), depth=4), [(255,) * 3, (204,) * 3]),
        (sixteen(0, [0x80], chunk(b"tRNS", b"\0\0"), depth=1), [(255,) * 3] * 8),
    ],
    ids=[
        "grey",
        "grey, one clear",
        "grey and alpha",
        "RGB",
        "RGB, one clear",
        "RGBA",
        "2 bits",
        "4 bits",
        "1 bit",
    ],
)
def test_samples_of_other_depths_are_scaled_and_their_transparent_colour_is_found(
    tmp_path: Path, content: bytes, row: list[tuple[int, ...]]
) -> None:
    (tmp_path / "a.png").write_bytes(content)
    picture, _ = read(tmp_path / "a.png")
    assert [tuple(map(int, pixel)) for pixel in picture[0]] == row


def test_sixteen_bits_of_grey_and_alpha_take_a_profile_of_grey(tmp_path: Path) -> None:
    profile = chunk(b"iCCP", b"grey\0\0" + zlib.compress(icc.grey(icc.gamma(1.0))))
    (tmp_path / "a.png").write_bytes(sixteen(4, [0x4000, 0xFFFF], profile))
    picture, told = read(tmp_path / "a.png")
    assert (set(picture[0, 0]), told) == ({137}, [])


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])])
def test_transparent_palette_entries_show_the_background(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    picture, _ = read(saved(tmp_path / "a.png", image, transparency=transparency), "#000000")
    green = 200 if transparency == 0 else 100
    assert picture[0].tolist() == [[0, 0, 0], [0, green, 0], [0, 0, 200]]


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (0, 0, 0)), ("L", 0), ("1", 0)])
def test_a_transparent_colour_shows_the_background(tmp_path: Path, mode: str, clear: object) -> None:
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), (255,) * 3 if mode == "RGB" else 255)
    picture, _ = read(saved(tmp_path / "a.png", image, transparency=clear), "#204060")
    assert picture[0].tolist() == [[0x20, 0x40, 0x60], [255] * 3]


def test_a_bmp_with_an_unused_fourth_byte_is_opaque(tmp_path: Path) -> None:
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 1, 1, 1, 32, 3, 4, 0, 0, 0, 0) + masks + bytes(52)
    content = b"BM" + struct.pack("<IHHI", 126, 0, 0, 122) + header + bytes([30, 20, 10, 0])
    (tmp_path / "a.bmp").write_bytes(content)
    assert read(tmp_path / "a.bmp")[0].tolist() == [[[10, 20, 30]]]


def test_colours_are_converted_before_the_background_is_added(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (70, 200, 90, 255))
    image.putpixel((1, 0), (70, 200, 90, 0))
    picture, _ = read(saved(tmp_path / "a.png", image, icc_profile=P3), "#46c85a")
    assert picture[0].tolist() == [[0, 205, 72], [0x46, 0xC8, 0x5A]]


# What is not the picture


def zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def with_chunks(*chunks: bytes) -> bytes:
    """Make a PNG with these chunks before and after its pixels."""
    header = struct.pack(">IIBBBBB", 10, 12, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in NOISE)
    content = packed(header, zlib.compress(rows), *chunks)
    end = content.index(b"IEND") - 4
    return content[:end] + b"".join(part for part in chunks if b"iCCP" not in part) + content[end:]


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"zTXt", b"a\0\0" + zeros(64))],
        [chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(64))],
        [chunk(b"zTXt", b"%d\0\0" % number + zeros(1)[:-1]) for number in range(100)],
        [chunk(b"zTXt", b"a\0\7" + zeros(1))],
        [chunk(b"tEXt", b"a\0" + b"x" * (3 << 20))],
    ],
    ids=["text", "Unicode", "many", "packed otherwise", "not packed"],
)
def test_texts_in_a_png_are_no_reason_to_refuse_it(tmp_path: Path, chunks: list[bytes]) -> None:
    (tmp_path / "a.png").write_bytes(with_chunks(*chunks))
    picture, told = read(tmp_path / "a.png")
    assert np.array_equal(picture, NOISE)
    assert told == []


def padded(megabytes: float) -> bytes:
    """The profile of Display P3, enlarged by zeros after its last tag."""
    content = P3 + bytes(int(megabytes * 2**20))
    return struct.pack(">I", len(content)) + content[4:]


def test_a_large_profile_is_used_and_a_huge_one_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(with_chunks(chunk(b"iCCP", b"x\0\0" + zlib.compress(padded(1.5)))))
    with Image.open(saved(tmp_path / "b.png", Image.fromarray(NOISE), icc_profile=P3)):
        expected, _ = read(tmp_path / "b.png")
    picture, told = read(tmp_path / "a.png")
    assert np.array_equal(picture, expected)
    assert not np.array_equal(picture, NOISE)
    (tmp_path / "a.png").write_bytes(with_chunks(chunk(b"iCCP", b"x\0\0" + zeros(200))))
    picture, told = read(tmp_path / "a.png")
    assert np.array_equal(picture, NOISE)
    assert told == ["a.png: its colour profile is ignored: it has more than 16 MiB"]


@pytest.mark.parametrize(
    "content", [b"x\0\0no zlib", b"x\0\0" + zlib.compress(P3)[:-40], b"x\0\7abc", b"", b"x"]
)
def test_a_profile_that_cannot_be_unpacked_is_ignored_with_a_warning(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(with_chunks(chunk(b"iCCP", content)))
    picture, told = read(tmp_path / "a.png")
    assert np.array_equal(picture, NOISE)
    assert "a.png: its colour profile is ignored: it is damaged" in told[0]


def test_a_false_chunk_length_allocates_no_memory(tmp_path: Path) -> None:
    content = with_chunks()[:33] + b"\xff\xff\xff\xf0zTXt" + b"abc"
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(RequestError, match="damaged"):
        open_picture(tmp_path / "a.png")


def test_colour_chunks_of_png_without_a_profile_are_ignored(tmp_path: Path) -> None:
    chunks = [chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"cICP", bytes([12, 16, 0, 1]))]
    (tmp_path / "a.png").write_bytes(with_chunks(*chunks, chunk(b"cHRM", bytes(32)), chunk(b"sRGB", b"\0")))
    assert np.array_equal(read(tmp_path / "a.png")[0], NOISE)


# Kinds


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "AVIF"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.avif", "a.bmp", "a"])
def test_the_content_of_a_picture_decides_its_format_not_its_name(
    tmp_path: Path, form: str, name: str
) -> None:
    path = saved(tmp_path / name, Image.fromarray(NOISE), form)
    assert read(path)[0].shape == NOISE.shape
