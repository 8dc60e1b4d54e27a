"""The tiny decoder computes what its authors' code does, and reads only files that hold its weights."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from framepack_core.errors import ModelError
from framepack_core.networks.taehv import TinyDecoder
from tests.core.networks.taehv import as_published, random_weights
from tests.golden import HERE as GOLDEN


def random_latents(frames: int = 3, seed: int = 1) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(2 * rng.standard_normal((1, 16, frames, 4, 6), np.float32))


DECODER = TinyDecoder(random_weights())


@pytest.mark.parametrize("doublings", range(4))
def test_frames_are_those_of_the_reference(doublings: int) -> None:
    with np.load(GOLDEN / "tiny-decoder.npz") as recorded:
        expected = recorded[f"doublings_{doublings}"].astype(int)
    frames = DECODER.frames(random_latents(), side=6 * 2**doublings)
    assert frames.dtype == np.uint8
    assert frames.shape == expected.shape
    assert np.abs(frames - expected).max() <= 1, "of 255: other kernels round differently"


@given(st.integers(1, 4), st.integers(0, 100))
@settings(deadline=None, max_examples=5)
def test_a_frame_depends_on_earlier_frames_and_not_on_later_ones(count: int, seed: int) -> None:
    latents = random_latents(5, seed)
    frames = DECODER.frames(latents, side=6)
    assert np.array_equal(DECODER.frames(latents[:, :, :count], side=6), frames[:count])
    assert not np.array_equal(DECODER.frames(latents[:, :, 1:], side=6), frames[1:])


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [(4, 6, 1, (4, 6)), (4, 6, 9, (8, 12)), (6, 4, 8, (6, 4)), (4, 6, 9999, (32, 48))],
)
def test_frames_have_nearly_the_requested_size(
    height: int, width: int, side: int, expected: tuple[int, int]
) -> None:
    assert DECODER.frames(torch.zeros(1, 16, 1, height, width), side).shape == (1, *expected, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_latents_with_nan_still_give_a_picture(value: float) -> None:
    latents = random_latents(2)
    latents[:, 3] = value
    frames = DECODER.frames(latents, side=6)
    assert frames.shape == (2, 4, 6, 3)
    assert frames.std() > 1


def test_decoding_can_be_stopped_long_before_its_end() -> None:
    called: list[bool] = []

    def third() -> None:
        called.append(True)
        if len(called) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        DECODER.frames(random_latents(), 6, third)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".SAFETENSORS", ".PTH"])
def test_both_kinds_of_files_are_read_and_closed(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    """A file is not needed after it is read, even if it is overwritten."""
    file = tmp_path / f"taehv{suffix}"
    (save_file if suffix.lower() == ".safetensors" else torch.save)(
        {key: weight.to(dtype) for key, weight in as_published().items()}, file
    )
    decoder = TinyDecoder.load(file)
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(bytes(size))
    expected = TinyDecoder({name: weight.half().float() for name, weight in random_weights().items()})
    assert np.array_equal(decoder.frames(random_latents(), 6), expected.frames(random_latents(), 6))


class Harmful:
    """Runs code when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.made,)


def test_a_file_that_would_run_code_is_refused_without_running_it(tmp_path: Path) -> None:
    file, made = tmp_path / "taehv.pth", tmp_path / "made"
    torch.save(as_published(decoder__1__bias=Harmful(made)), file)  # type: ignore[arg-type] # on purpose
    with pytest.raises(ModelError, match=r"taehv\.pth holds no weights \(Weights only load failed.*"):
        TinyDecoder.load(file)
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists(), "it would have"


def cut_off(tensors: dict[str, torch.Tensor], suffix: str) -> bytes:
    whole = io.BytesIO()
    if suffix == ".pth":
        torch.save(tensors, whole)
        return whole.getvalue()[:-1000]
    return bytes.fromhex("ffff000000000000") + b'{"decoder'


OTHER_ARCHIVE = io.BytesIO()
with zipfile.ZipFile(OTHER_ARCHIVE, "w") as archive:
    archive.writestr("readme.txt", "no weights")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "taehv.ckpt",
            b"",
            "is neither .safetensors nor .pth: use taehv.safetensors or taehv.pth from https",
        ),
        ("taehv.pth", None, "cannot be read (No such file or directory): use"),
        ("taehv.safetensors", None, "or correct the path"),
        ("taehv.safetensors", b"<html>", "is damaged (it is an HTML page): use"),
        ("taehv.safetensors", cut_off({}, ".safetensors"), "is damaged (no safetensors file, or cut off)"),
        ("taehv.pth", b"<html>", "is damaged (no archive of torch's, or cut off): use"),
        (
            "taehv.pth",
            cut_off({"a": torch.ones(9999)}, ".pth"),
            "is damaged (no archive of torch's, or cut off)",
        ),
        ("taehv.pth", OTHER_ARCHIVE.getvalue(), "holds no weights ("),
    ],
)
def test_a_file_without_the_decoder_is_refused_with_a_remedy(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=f"^{re.escape(str(file))} .*{re.escape(message)}"):
        TinyDecoder.load(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decoder__16__conv__2__bias": None}, "(it has no decoder.16.conv.2.bias): use"),
        (
            {"decoder__1__weight": torch.zeros(256, 32, 3, 3)},
            "(decoder.1.weight has the shape (256, 32, 3, 3), not (256, 16, 3, 3)): use",
        ),
    ],
)
def test_the_decoder_of_another_model_is_refused(
    tmp_path: Path, suffix: str, changed: dict[str, Any], message: str
) -> None:
    file = tmp_path / f"taehv{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(as_published(**changed), file)
    with pytest.raises(ModelError, match=re.escape(f"is not the tiny decoder for HunyuanVideo {message}")):
        TinyDecoder.load(file)


def test_a_file_that_holds_other_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"decoder": as_published()}, tmp_path / "taehv.pth")
    with pytest.raises(ModelError, match="holds no weights"):
        TinyDecoder.load(tmp_path / "taehv.pth")
