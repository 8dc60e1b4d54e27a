"""Extending a video: from latents it gets the bits of a longer video; or from its last frames."""

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.torch
import torch

from framepack_core.engine import Clip, Engine, Step
from framepack_core.errors import RequestError
from framepack_core.media import extend, segments, video_reader
from framepack_core.request import Request
from tests.conftest import whole_video
from tests.core.requests import GUIDED, comparable, everything, request_for

TinyEngine = Callable[[str], Engine]
SECTION = 0.4  # seconds, with a window of 3


def clips(engine: Engine, request: Request) -> list[Clip]:
    return [event for event in engine.generate(request) if isinstance(event, Clip)]


def lasting(request: Request, sections: int, **changes: object) -> Request:
    return request.model_copy(update={"seconds": sections * SECTION, **changes})


def kept(path: Path, latents: torch.Tensor) -> Path:
    safetensors.torch.save_file({"latents": latents.contiguous()}, path)
    return path


@pytest.mark.parametrize(
    ("sections", "settings"), [(1, {}), (2, GUIDED), (3, {}), pytest.param(5, {}, marks=pytest.mark.long)]
)
def test_extending_from_latents_gives_the_bits_of_a_longer_video(
    tiny_engine: TinyEngine, tmp_path: Path, sections: int, settings: dict[str, object]
) -> None:
    """Latents and frames have the same bits, also at the seam."""
    engine = tiny_engine("framepack-f1")
    request = request_for(tmp_path, **settings)
    short, long = (clips(engine, lasting(request, number)) for number in (sections, sections + 2))
    latents = kept(tmp_path / "cat.latents.safetensors", short[-1].latents)
    added = clips(engine, lasting(request, 2, continue_from=latents))
    assert torch.equal(added[-1].latents, long[-1].latents)
    seam = len(whole_video(engine, short)) - extend.remade(short[-1].latents.shape[2], 3)
    together = np.concatenate([whole_video(engine, short)[:seam], whole_video(engine, added)])
    assert np.array_equal(together, whole_video(engine, long))


def test_a_video_of_a_backward_model_can_be_extended(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    request = lasting(request_for(tmp_path), 3)
    backward = clips(tiny_engine("framepack-i2v"), request)
    latents = kept(tmp_path / "a.safetensors", backward[-1].latents)
    engine = tiny_engine("framepack-f1")
    added = clips(engine, lasting(request, 1, continue_from=latents))
    assert added[-1].latents.shape[2] == 1 + 4 * 3
    assert len(whole_video(engine, added)) == extend.remade(10, 3) + 12


def test_latents_with_an_extension_in_capitals_are_not_read_as_a_video(
    tiny_engine: TinyEngine, tmp_path: Path
) -> None:
    latents = kept(tmp_path / "CAT.LATENTS.SAFETENSORS", torch.zeros(1, 16, 4, 4, 6))
    request = request_for(tmp_path, continue_from=latents)
    existing = tiny_engine("framepack-f1").encode(request).existing
    assert existing is not None
    assert torch.equal(existing.latents, torch.zeros(1, 16, 4, 4, 6))


@pytest.mark.parametrize("window", [1, 2, 4, 7])
def test_another_window_than_the_videos_own_gives_the_right_length(
    tiny_engine: TinyEngine, tmp_path: Path, window: int
) -> None:
    engine = tiny_engine("framepack-f1")
    request = lasting(request_for(tmp_path, steps=1), 2)
    latents = kept(tmp_path / "a.safetensors", clips(engine, request)[-1].latents)
    changed = request.model_copy(
        update={"latent_window_size": window, "seconds": 2 * 4 * window / 30, "continue_from": latents}
    )
    added = clips(engine, changed)
    assert added[-1].latents.shape[2] == 7 + 2 * window
    assert len(whole_video(engine, added)) == extend.remade(7, window) + 2 * 4 * window


def film(path: Path, frames: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Write a video that moves, and give its frames as they are read."""
    moving = np.zeros((frames, *size, 3), np.uint8)
    for number, frame in enumerate(moving):
        frame[:, : 2 + 3 * number % size[1]] = (200, number * 5 % 255, 90)
    path.write_bytes(segments.encode(moving, size=size, crf=16))
    return np.stack(list(video_reader.pictures(path)))


@pytest.mark.parametrize("frames", [1, 2, 5, 12, 30, 90])
def test_a_foreign_video_is_extended_from_its_last_frames_without_repeating_one(
    tiny_engine: TinyEngine, tmp_path: Path, frames: int
) -> None:
    engine = tiny_engine("framepack-f1")
    shown = film(tmp_path / "a.mp4", frames)
    request = lasting(request_for(tmp_path, continue_from=tmp_path / "a.mp4"), 2)
    added = clips(engine, request)
    known = extend.tail_latents(frames)
    assert added[-1].latents.shape[2] == known + 2 * 3
    remade = extend.remade(known, 3)
    video = np.concatenate([shown[: frames - remade], whole_video(engine, added)])
    assert len(video) == frames + 2 * 12
    # What comes with the new frames is the old video's own until it fades.
    untouched = remade - extend.frames_of(min(known, 3))
    assert np.array_equal(video[: frames - remade + untouched + 1], shown[: frames - remade + untouched + 1])


def source_of(engine: Engine, folder: Path, source: str) -> tuple[Path, int]:
    """Make what is to be extended, and give it with the number of its latents that are known."""
    if source == "video":
        film(folder / "a.mp4", 40)
        return folder / "a.mp4", extend.tail_latents(40)
    latents = clips(engine, lasting(request_for(folder), 3))[-1].latents
    return kept(folder / "a.safetensors", latents), latents.shape[2]


@pytest.mark.parametrize("source", ["latents", "video"])
def test_resuming_after_any_event_gives_the_same_bits(
    tiny_engine: TinyEngine, tmp_path: Path, source: str
) -> None:
    engine = tiny_engine("framepack-f1")
    request = request_for(tmp_path)
    path, _ = source_of(engine, tmp_path, source)
    request = lasting(request, 2, continue_from=path)
    conditioned = engine.encode(request)
    whole = list(engine.sample(request, conditioned))
    assert [event.section for event in whole if isinstance(event, Step)] == [0, 0, 0, 1, 1, 1]
    for number, event in enumerate(whole):
        following = list(islice(engine.sample(request, conditioned, resume=event.progress), 3))
        assert everything(following) == everything(whole[number + 1 : number + 4]), f"after event {number}"


@pytest.mark.parametrize("source", ["latents", "video"])
def test_dropping_later_sections_gives_the_progress_after_the_last_one_left(
    tiny_engine: TinyEngine, tmp_path: Path, source: str
) -> None:
    engine = tiny_engine("framepack-f1")
    request = request_for(tmp_path)
    path, known = source_of(engine, tmp_path, source)
    first, last = clips(engine, lasting(request, 2, continue_from=path))
    lost = replace(last.progress, sampled=last.progress.sampled[:1], decoded=1, edge=first.progress.edge)
    again = lost.without_later(request.seed, extend.sections_taken(known, 3))
    assert comparable(again) == comparable(first.progress)


def test_a_backward_model_refuses_to_extend(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    latents = kept(tmp_path / "a.safetensors", torch.zeros(1, 16, 4, 4, 6))
    with pytest.raises(RequestError, match="framepack-i2v generates backward and cannot extend a video"):
        tiny_engine("framepack-i2v").encode(request_for(tmp_path, continue_from=latents))


def test_another_size_than_that_of_the_latents_is_refused(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    latents = kept(tmp_path / "a.safetensors", torch.zeros(1, 16, 4, 8, 8))
    with pytest.raises(RequestError, match=r"a\.safetensors is of 64x64, what is added cannot be of 48x32"):
        tiny_engine("framepack-f1").encode(request_for(tmp_path, continue_from=latents))


def header(told: object, data: bytes = b"") -> bytes:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text + data


SOUND = {"dtype": "F32", "shape": [1, 16, 1, 4, 6], "data_offsets": [0, 1536]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no latents"),
        (b"\xff" * 200, "holds no latents"),
        (header(b"[" * 60_000), "holds no latents"),
        (header([1]), "holds no latents"),
        (header({"latents": {"shape": [1, 16]}}), "holds no latents"),
        (header({"other": SOUND}, bytes(1536)), "holds no latents"),
        (header({"latents": SOUND}, bytes(1535)), "damaged, or not all of it is here"),
        (header({"latents": SOUND}, bytes(9000)), "damaged"),
        (header({"latents": SOUND | {"dtype": "F16"}}, bytes(1536)), "holds 'F16' of shape"),
        (header({"latents": SOUND | {"shape": [1, 3, 1, 4, 6]}}), r"holds 'F32' of shape \[1, 3, 1, 4, 6\]"),
        (header({"latents": SOUND | {"shape": [1, 16, 1, 5, 6]}}), r"shape \[1, 16, 1, 5, 6\]"),
        (header({"latents": SOUND | {"shape": [1, 16, -1, 4, 6]}}), r"shape \[1, 16, -1, 4, 6\]"),
        (header({"latents": SOUND | {"shape": [1, 16, 10**30, 4, 6]}}), "not the latents of a video"),
    ],
)
def test_other_files_than_latents_are_refused_by_their_header_alone(
    tmp_path: Path, content: bytes, told: str
) -> None:
    path = tmp_path / "cat.latents.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=rf"cat\.latents\.safetensors.*{told}.*leave it out"):
        extend.latents_shape(path)


def test_latents_are_read_and_nan_is_refused(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    assert extend.latents_shape(kept(tmp_path / "a.safetensors", torch.zeros(1, 16, 3, 4, 6))) == (
        3,
        4,
        6,
    )
    spoilt = kept(tmp_path / "b.safetensors", torch.full((1, 16, 3, 4, 6), torch.nan))
    with pytest.raises(RequestError, match=r"b\.safetensors holds numbers that are not finite"):
        tiny_engine("framepack-f1").encode(request_for(tmp_path, continue_from=spoilt))


def shot(path: Path, times: list[int], base: Fraction, codec: str = "libx264") -> None:
    """Write a video whose n-th frame is of brightness 10 n and comes at ``times[n]``."""
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("times", "base", "expected"),
    [
        ([0, 1, 2, 3], Fraction(1, 30), [0, 1, 2, 3]),
        ([0, 1, 2, 3, 4, 5, 6], Fraction(1, 60), [0, 2, 4, 6]),
        ([0, 1, 2, 3], Fraction(1, 15), [0, 0, 1, 1, 2, 2, 3]),
        ([0, 1, 2, 3, 4], Fraction(1, 24), [0, 0, 1, 2, 3, 4]),
        ([0, 33, 67, 100, 300], Fraction(1, 1000), [0, 1, 2, 3, 3, 3, 3, 3, 3, 4]),
        ([500, 533], Fraction(1, 1000), [0, 1]),
    ],
)
def test_each_30th_of_a_second_has_the_frame_that_is_shown_then(
    tmp_path: Path, times: list[int], base: Fraction, expected: list[int]
) -> None:
    shot(tmp_path / "a.mp4", times, base)
    frames = list(video_reader.pictures(tmp_path / "a.mp4"))
    assert [round(float(frame.mean()) / 10) for frame in frames] == expected
    assert video_reader.look(tmp_path / "a.mp4") == extend.Footage(len(expected), 32, 32)


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [((0, 1, 0, -1, 0, 0), 3), ((-1, 0, 0, 0, -1, 0), 2), ((0, -1, 0, 1, 0, 0), 1), ((1, 0, 0, 0, 1, 0), 0)],
)
def test_a_video_that_a_phone_held_sideways_is_read_upright(
    tmp_path: Path, matrix: tuple[int, ...], turned: int
) -> None:
    halves = np.zeros((3, 32, 64, 3), np.uint8)
    halves[:, :16, :32] = 250
    content = bytearray(segments.encode(halves, size=(32, 64), crf=10))
    place = content.index(b"tkhd") + 44
    content[place : place + 24] = b"".join(
        (16**4 * number).to_bytes(4, "big", signed=True) for number in matrix
    )
    (tmp_path / "a.mp4").write_bytes(content)
    frame = next(video_reader.pictures(tmp_path / "a.mp4"))
    assert np.abs(frame.astype(int) - np.rot90(halves[0], turned)).max() < 20
    assert video_reader.look(tmp_path / "a.mp4").size == frame.shape[:2]


def test_a_video_that_is_too_long_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shot(tmp_path / "a.mp4", [0, 601], Fraction(1))
    with pytest.raises(RequestError, match=r"a\.mp4 is 601 s long: at most 600 s can be: cut it"):
        video_reader.look(tmp_path / "a.mp4")
    monkeypatch.setattr(video_reader, "MAX_PIXELS", 1000)
    with pytest.raises(RequestError, match=r"a\.mp4 has frames of 32x32: at most"):
        video_reader.look(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "content",
    [b"", b"no video", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile a.mp4\n"],
)
def test_other_containers_than_mp4_are_not_opened(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cat.mp4").write_bytes(content)
    with pytest.raises(RequestError, match=r"cat\.mp4 cannot be read as mp4.*save it again as mp4"):
        video_reader.look(tmp_path / "cat.mp4")
