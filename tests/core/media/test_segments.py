"""Segments of videos: joined, they hold the encoded frames, and players can play them."""

import io
import random
import subprocess
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from framepack_core.media.pictures import Frames, count_frames
from framepack_core.media.segments import (
    EXACT,
    QUICK,
    SegmentError,
    count,
    encode,
    encode_exactly,
    head,
    join,
)

SIZE = (64, 96)
# As sections have them: none (the first one backward), a frame or two (small windows), and whole ones.
LENGTHS = [(37,), (1, 36), (0, 36, 1, 2, 3, 5, 9), (4, 4, 4, 1), (73, 36)]


def moving_frames(count: int, height: int = SIZE[0], width: int = SIZE[1]) -> Frames:
    """Pan over coarse noise, for which the encoder has to make choices."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 8, (width + count) // 8 + 1, 3), dtype=np.uint8)
    scene = coarse.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([scene[:, number : number + width] for number in range(count)])


def pieces(lengths: tuple[int, ...], crf: int = 16) -> list[bytes]:
    frames = iter(moving_frames(sum(lengths)))
    return [encode([next(frames) for _ in range(length)], size=SIZE, crf=crf) for length in lengths]


def decoded(video: Path | bytes) -> tuple[list[float], Frames]:
    """Decode to times, in frames, and frames in their stored colours."""
    with av.open(io.BytesIO(video) if isinstance(video, bytes) else video) as container:
        shown = list(container.decode(video=0))
        times = [frame.pts * frame.time_base * 30 for frame in shown]
        return times, np.stack([frame.to_ndarray(format="yuv420p") for frame in shown])


def test_a_video_is_mp4_as_players_expect_it(tmp_path: Path) -> None:
    assert join(tmp_path / "v.mp4", pieces((20, 17))) == 37
    with av.open(tmp_path / "v.mp4") as video:
        stream = video.streams.video[0]
        assert stream.codec.canonical_name == "h264"
        assert (stream.format.name, stream.average_rate) == ("yuv420p", 30)
        assert (stream.height, stream.width, stream.frames) == (*SIZE, 37)
    content = (tmp_path / "v.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index comes first: it plays while it loads"
    assert count_frames(tmp_path / "v.mp4") == 37


@pytest.mark.parametrize("lengths", LENGTHS)
def test_joined_segments_show_their_frames_one_after_the_other(
    tmp_path: Path, lengths: tuple[int, ...]
) -> None:
    made = pieces(lengths)
    assert join(tmp_path / "v.mp4", iter(made)) == sum(lengths)
    times, pictures = decoded(tmp_path / "v.mp4")
    assert times == list(range(sum(lengths)))
    assert np.array_equal(pictures, np.concatenate([decoded(piece)[1] for piece in made if piece]))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packets_come_in_steps_of_one_frame_and_before_they_are_shown(
    tmp_path: Path, lengths: tuple[int, ...]
) -> None:
    join(tmp_path / "v.mp4", pieces(lengths))
    with av.open(tmp_path / "v.mp4") as video:
        packets = [packet for packet in video.demux(video=0) if packet.size]
    frame = packets[0].duration
    assert {later.dts - earlier.dts for earlier, later in pairwise(packets)} == {frame}
    assert all(packet.dts <= packet.pts and packet.duration == frame for packet in packets)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "command", ["ffprobe -show_frames", "ffmpeg -f null - -i", "ffmpeg -c copy -f null - -i"]
)
def test_ffmpeg_reports_no_errors(tmp_path: Path, lengths: tuple[int, ...], command: str) -> None:
    join(tmp_path / "v.mp4", pieces(lengths))
    program, *options = command.split()
    try:
        told = subprocess.run(
            [program, "-v", "warning", *options, tmp_path / "v.mp4"], capture_output=True, check=True
        )
    except FileNotFoundError:
        pytest.skip(f"{program} is not installed")
    assert told.stderr == b""


@pytest.mark.parametrize("crf", [0, 1, 16, 51])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_quickly_encoded_segments_can_be_joined_with_others(tmp_path: Path, crf: int, length: int) -> None:
    quick = encode(moving_frames(length), size=SIZE, crf=crf, options=QUICK)
    assert join(tmp_path / "v.mp4", [quick, *pieces((3,), crf)]) == length + 3


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """The macroblock tree of libx264 read uninitialized memory, so the bytes differed between runs."""
    frames = moving_frames(25, 64, 208)
    rng, rubbish, seen = random.Random(0), [], set()
    for _ in range(25):
        rubbish = [*rubbish[-10:], rng.randbytes(rng.randrange(1000, 500_000))]
        segment = encode(frames, size=(64, 208), crf=16)
        join(tmp_path / "v.mp4", [segment, segment])
        seen.add((segment, (tmp_path / "v.mp4").read_bytes()))
    assert len(seen) == 1


def test_no_frames_are_no_segment_and_no_video(tmp_path: Path) -> None:
    assert encode([], size=SIZE, crf=16) == b""
    with pytest.raises(SegmentError, match="no frames"):
        join(tmp_path / "v.mp4", [b"", b""])


@pytest.mark.parametrize(
    "other",
    [{"crf": 17}, {"size": (96, 64)}, {"options": f"{EXACT}:ref=1"}, {"options": f"{EXACT}:bframes=0"}],
)
def test_segments_of_other_settings_are_not_joined(tmp_path: Path, other: dict[str, object]) -> None:
    """The parameter sets hold for the whole file: other segments would be decoded wrongly."""
    settings = {"size": SIZE, "crf": 16} | other
    height, width = settings["size"]  # type: ignore[misc] # a size, in this dict of anything
    foreign = encode(moving_frames(3, height, width), **settings)  # type: ignore[arg-type] # the same
    with pytest.raises(SegmentError, match="other settings"):
        join(tmp_path / "v.mp4", [*pieces((3,)), foreign])


@pytest.mark.parametrize("damage", ["short", "garbage"])
def test_a_damaged_segment_is_not_joined(tmp_path: Path, damage: str) -> None:
    first, second = pieces((3, 9))
    with pytest.raises(SegmentError, match="damaged"):
        join(tmp_path / "v.mp4", [first, second[: len(second) // 2] if damage == "short" else bytes(100)])


@pytest.mark.parametrize(
    ("most", "kept"), [(0, 0), (3, 0), (4, 4), (39, 4), (40, 40), (75, 40), (76, 76), (500, 76)]
)
def test_the_head_of_a_video_ends_before_a_keyframe_and_can_be_joined(
    tmp_path: Path, most: int, kept: int
) -> None:
    made = pieces((4, 36, 36))
    join(tmp_path / "v.mp4", made)
    start = head((tmp_path / "v.mp4").read_bytes(), made[1], most)
    assert count(start) == kept
    assert join(tmp_path / "w.mp4", [start, made[0]]) == kept + 4
    _, pictures = decoded(tmp_path / "w.mp4")
    _, whole = decoded(tmp_path / "v.mp4")
    assert np.array_equal(pictures[:kept], whole[:kept])
    assert np.array_equal(pictures[kept:], whole[:4])


def test_a_video_with_other_parameters_has_no_head_to_join(tmp_path: Path) -> None:
    made = pieces((4, 36))
    join(tmp_path / "v.mp4", made)
    content = (tmp_path / "v.mp4").read_bytes()
    assert head(content, pieces((1,), crf=20)[0], 40) == b""
    with av.open(tmp_path / "slow.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "16", "x264-params": EXACT})
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in moving_frames(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    assert head((tmp_path / "slow.mp4").read_bytes(), made[0], 40) == b""


def test_exactly_encoded_frames_keep_every_pixel() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (12, *SIZE, 3), dtype=np.uint8)
    with av.open(io.BytesIO(encode_exactly(list(frames)))) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(np.stack(shown), frames)
