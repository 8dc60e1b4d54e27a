"""HEIC, the format of iPhone photos: read if pi-heif is installed, refused by name if not.

``iphone.heic`` is 64x48 of (70, 200, 90), its upper left quarter of (200, 60, 40), in Display P3; written by
pillow-heif 1.8.1 (``image.save("iphone.heic", quality=90, icc_profile=...)``), which can write them.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from framepack_core.errors import RequestError
from framepack_core.media import heif
from framepack_core.media.pictures import open_picture, picture_size
from tests.core.media.photo import PHOTO, needs_pi_heif


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that pi-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pi_heif", None)


def called(tmp_path: Path, name: str, content: bytes | None = None) -> Path:
    path = tmp_path / name
    path.write_bytes(PHOTO.read_bytes() if content is None else content)
    return path


@needs_pi_heif
@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
def test_a_photo_of_an_iphone_is_read_in_its_colours(tmp_path: Path, name: str) -> None:
    picture = open_picture(called(tmp_path, name))
    assert picture.shape == (48, 64, 3)
    assert picture[40, 60].tolist() == [0, 205, 72]
    assert picture_size(tmp_path / name) == (48, 64)


@needs_pi_heif
@pytest.mark.parametrize("keep", [40, 400, 900])
def test_a_damaged_heic_file_is_named_as_heic(tmp_path: Path, keep: int) -> None:
    with pytest.raises(
        RequestError, match=r"^photo\.jpg: this is HEIC, from an iPhone .*, and cannot be read"
    ) as told:
        open_picture(called(tmp_path, "photo.jpg", PHOTO.read_bytes()[:keep]))
    assert "save it as JPEG" in str(told.value)


@needs_pi_heif
def test_the_heic_decoder_is_not_loaded_in_the_calling_process() -> None:
    code = (
        "import sys, pathlib\nfrom framepack_core.media import pictures\n"
        "pictures.open_picture(pathlib.Path(sys.argv[1]))\n"
        "assert 'pi_heif' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(PHOTO)], check=True)


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
@pytest.mark.usefixtures("hidden")
def test_without_pi_heif_the_error_names_heic_and_a_remedy(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError) as told:
        picture_size(called(tmp_path, name))
    assert str(told.value).startswith(f"{name}: this is HEIC, from an iPhone")
    assert "Most Compatible" in str(told.value)
    assert "pip install 'framepackd[heif]'" in str(told.value)


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGALRM, "takes more than 12 s to decode"), (signal.SIGSEGV, "breaks its decoder")],
)
def test_a_file_that_crashes_the_decoder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, said: str
) -> None:
    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\nkill -{number} $$\n")
    broken.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(broken))
    monkeypatch.setattr(heif, "available", lambda: True)
    with pytest.raises(RequestError, match=f"this is HEIC.*{said}"):
        open_picture(PHOTO)
