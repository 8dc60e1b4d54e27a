"""A video read by its colour tags has the colours of the frames it was made of."""

import io
import itertools
import subprocess
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest

from framepack_core.errors import RequestError
from framepack_core.media import segments
from framepack_core.media.pictures import Frames, Picture
from framepack_core.media.segments import EXACT, QUICK
from framepack_core.media.video_colours import Colours
from framepack_core.media.video_reader import has_our_options, look, pictures
from tests.core.media.films import BT709, BT2020, FULL, LIMITED, SMPTE170M, UNSPECIFIED, film

CORNERS = list(itertools.product((0, 255), repeat=3))
SIZES = [(96, 160), (720, 400)]  # players guess by the lines
WITHIN = 2  # levels of 255


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (96, 160)) -> Picture:
    return np.full((*size, 3), colour, np.uint8)


def patches(size: tuple[int, int]) -> Picture:
    """Give the eight corners of the RGB cube side by side, each wide enough to have a middle."""
    return flat((0, 0, 0), size) + np.repeat(np.array(CORNERS, np.uint8), size[1] // 8, axis=0)


def middles(picture: Picture) -> np.ndarray:
    width = picture.shape[1] // 8
    return picture[picture.shape[0] // 2, width // 2 :: width].astype(int)


def by_the_tags(path: Path, size: tuple[int, int]) -> Frames:
    """Decode a video with ffmpeg, which follows its tags."""
    command = ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    try:
        told = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("ffmpeg is not installed")
    return np.frombuffer(told.stdout, np.uint8).reshape(-1, *size, 3)


def read(path: Path, untagged: Colours | None = None) -> np.ndarray:
    return next(pictures(path, untagged))[5, 5].astype(int)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [EXACT, QUICK])
@pytest.mark.parametrize("crf", [0, 1, 16])
def test_decoding_by_the_tags_gives_the_original_colours(
    tmp_path: Path, size: tuple[int, int], options: str, crf: int
) -> None:
    frames = [flat(colour, size) for colour in CORNERS] + [patches(size)] * 3
    segments.join(tmp_path / "v.mp4", [segments.encode(frames, size=size, crf=crf, options=options)] * 2)
    for shown in (by_the_tags(tmp_path / "v.mp4", size), list(pictures(tmp_path / "v.mp4"))):
        assert len(shown) == 2 * len(frames)
        for made, frame in zip(shown, frames * 2, strict=True):
            assert np.abs(middles(made) - middles(frame)).max() <= WITHIN


def test_videos_for_people_are_tagged_as_bt709_of_limited_range(tmp_path: Path) -> None:
    segment = segments.encode([patches((96, 160))], size=(96, 160), crf=16)
    segments.join(tmp_path / "v.mp4", [segment, segment])
    for content in (segment, (tmp_path / "v.mp4").read_bytes()):
        assert content.count(b"colrnclx" + bytes([0, 1, 0, 1, 0, 1, 0])) == 1, (
            "in the container, for QuickTime"
        )
        with av.open(io.BytesIO(content)) as video:
            context = video.streams.video[0].codec_context
            assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
            assert context.color_range == LIMITED


def test_segments_of_older_versions_are_recognized_and_never_joined_with_others(tmp_path: Path) -> None:
    old, new = (
        segments.encode([patches((96, 160))], size=(96, 160), crf=16, colours=colours)
        for colours in ("bt601", "bt709")
    )
    assert (segments.colours_of(old), segments.colours_of(new)) == ("bt601", "bt709")
    with pytest.raises(segments.SegmentError, match="other settings"):
        segments.join(tmp_path / "v.mp4", [old, new])
    assert segments.head(old, new, 1) == b""
    segments.join(tmp_path / "old.mp4", [old, old])
    shown = next(pictures(tmp_path / "old.mp4", "bt601"))
    assert np.abs(middles(shown) - middles(patches((96, 160)))).max() <= 2 * WITHIN


@pytest.mark.parametrize("matrix", [BT709, SMPTE170M, BT2020])
@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
@pytest.mark.parametrize("size", SIZES)
def test_a_video_is_read_by_its_tags_whatever_its_size(
    tmp_path: Path, matrix: int, colour_range: int, size: tuple[int, int]
) -> None:
    colour = (40, 200, 120)
    video = film(
        tmp_path / "v.mp4", colour, tagged=matrix, coded=matrix, colour_range=colour_range, size=size
    )
    for untagged in (None, "bt601", "bt709"):
        assert np.abs(read(video, untagged) - colour).max() <= WITHIN  # type: ignore[arg-type] # one of these


@pytest.mark.parametrize(
    ("untagged", "size", "coded"),
    [
        (None, (96, 160), SMPTE170M),
        (None, (718, 400), SMPTE170M),
        (None, (720, 400), BT709),
        ("bt601", (720, 400), SMPTE170M),
        ("bt709", (96, 160), BT709),
    ],
)
def test_an_untagged_video_has_the_given_colours_or_those_that_players_guess(
    tmp_path: Path, untagged: Literal["bt601", "bt709"] | None, size: tuple[int, int], coded: int
) -> None:
    colour = (40, 200, 120)
    video = film(tmp_path / "v.mp4", colour, tagged=UNSPECIFIED, coded=coded, size=size)
    assert np.abs(read(video, untagged) - colour).max() <= WITHIN


def test_our_own_videos_are_recognized_by_their_options(tmp_path: Path) -> None:
    for crf in (0, 16, 51):
        ours = segments.encode([flat((1, 2, 3))] * 3, size=(96, 160), crf=crf, colours="bt601")
        segments.join(tmp_path / "ours.mp4", [ours])
        assert has_our_options(tmp_path / "ours.mp4")
    assert not has_our_options(film(tmp_path / "v.mp4", (1, 2, 3), tagged=BT709, coded=BT709))


@pytest.mark.parametrize(("transfer", "name"), [(16, r"HDR10 \(PQ\)"), (18, "HLG")])
def test_an_hdr_video_is_refused_by_name(tmp_path: Path, transfer: int, name: str) -> None:
    video = film(tmp_path / "v.mp4", (9, 9, 9), tagged=BT2020, coded=BT2020, transfer=transfer)
    with pytest.raises(RequestError, match=rf"v\.mp4 is an HDR video \({name}\): save it as SDR"):
        look(video)
