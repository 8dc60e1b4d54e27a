"""Reading, cropping and scaling the pictures that people have."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from framepack_core.errors import RequestError
from framepack_core.media.pictures import crop_to, open_picture, picture_size, resize
from framepack_core.media.sizes import BUCKETS, nearest_bucket, output_size, scale_buckets
from framepack_core.request import GenerationSettings

sizes = st.integers(1, 4000)


@given(height=sizes, width=sizes)
def test_no_bucket_is_nearer_in_shape_than_the_one_chosen(height: int, width: int) -> None:
    chosen = nearest_bucket(height, width)
    best = min(abs(height * w - width * h) for h, w in BUCKETS)
    assert abs(height * chosen[1] - width * chosen[0]) == best


@given(resolution=st.integers(64, 2048))
def test_scaled_buckets_are_multiples_of_16(resolution: int) -> None:
    assert all(side % 16 == 0 and side >= 32 for size in scale_buckets(resolution) for side in size)


def test_a_size_that_is_set_wins_over_the_buckets() -> None:
    assert output_size(GenerationSettings(), (1000, 1000)) == (640, 608)
    assert output_size(GenerationSettings(resolution=320), (1000, 1000)) == (320, 304)
    assert output_size(GenerationSettings(width=64, height=96), (1000, 1000)) == (96, 64)


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        ((50, 37), "a20a31967b1b107d"),
        ((37, 50), "4f4207591bda9fcc"),
        ((20, 20), "827d1328574145c9"),
        ((20, 90), "082f38377b527afd"),
        ((90, 20), "2c920e0cbc448810"),
    ],
)
def test_pictures_are_scaled_to_the_same_bits_by_every_pillow(size: tuple[int, int], digest: str) -> None:
    """Recorded with a single call of Pillow 13; in one call, earlier versions give another first result."""
    y, x = np.indices(size)
    picture = ((y[..., None] * 37 + x[..., None] * 91 + np.array([0, 80, 160])) % 256).astype(np.uint8)
    scaled = resize(picture, (28, 28), resample=Image.Resampling.BICUBIC)
    assert hashlib.sha256(scaled.tobytes()).hexdigest()[:16] == digest


@given(height=st.integers(1, 90), width=st.integers(1, 90))
def test_a_crop_has_the_size_of_even_targets_exactly(height: int, width: int) -> None:
    assert crop_to(np.zeros((height, width, 3), np.uint8), (48, 32)).shape == (48, 32, 3)


def test_a_photo_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert open_picture(tmp_path / "photo.jpg").shape == (20, 10, 3)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_each_orientation_is_turned_as_pillow_does(tmp_path: Path, form: str, orientation: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 20, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    image.save(path, form, exif=exif)
    with Image.open(path) as stored:
        expected = np.array(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(open_picture(path), expected)
    assert picture_size(path) == expected.shape[:2]


def test_other_formats_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript to read EPS."""
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png", "EPS")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile.__init__", fail)
    with pytest.raises(RequestError, match="is not a picture"):
        open_picture(tmp_path / "picture.png")


def test_a_camera_jpeg_with_a_preview_behind_the_photo_is_a_photo(tmp_path: Path) -> None:
    photo, preview = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (4, 2), "blue")
    photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[preview])
    assert open_picture(tmp_path / "photo.jpg")[0, 0, 0] > 200


def test_a_strip_of_a_picture_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(RequestError, match="too far from the shape"):
        crop_to(np.zeros((1, 10000, 3), np.uint8), (416, 960))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_pictures_of_every_usual_kind_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new(mode, (8, 6)).save(path)
    picture = open_picture(path)
    assert (picture.shape, picture.dtype) == ((6, 8, 3), np.uint8)


def write_animated(path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(path, save_all=True, append_images=[Image.new("RGB", (8, 8))])


def write_truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def write_text(path: Path) -> None:
    path.write_text("not a picture")


def write_bomb(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_animated, "is animated"),
        (write_truncated, "is damaged"),
        (write_text, "is not a picture"),
        (write_bomb, "is too large"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused_by_name(tmp_path: Path, write: object, said: str) -> None:
    path = tmp_path / "picture.png"
    write(path)  # type: ignore[operator] # one of the functions above
    with pytest.raises(RequestError, match=said) as raised:
        open_picture(path)
    assert str(raised.value).startswith("picture.png ")
