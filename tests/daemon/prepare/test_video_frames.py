"""Which frames are taken from a video: held against FramePack's data scripts and what people have."""

import itertools
import os
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from framepack_core.media.pictures import Picture
from framepackd.prepare.video_frames import VideoError, difference, read_frames
from tests.core.media.films import BT709, BT2020, SMPTE170M, UNSPECIFIED, film
from tests.daemon.videos import make_endless, make_sound, make_video


def as_the_scripts(path: Path, count: int) -> tuple[list[Picture], list[float]]:
    """Take frames and differences as FramePack's data scripts do, with moviepy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moviepy.editor import VideoFileClip

        with VideoFileClip(str(path)) as video:
            times = np.linspace(0, video.duration - 0.1, count)
            taken = [video.get_frame(time).copy() for time in times]
    grey = [np.mean(frame, axis=2) for frame in taken]
    similar: list[Any] = [
        structural_similarity(one, other, full=True, data_range=1.0)[0]
        for one, other in itertools.pairwise(grey)
    ]
    return taken, [1 - each for each in similar]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("name", "frames", "rate"),
    [
        ("short.mp4", 45, 30),
        ("long.mp4", 230, 60),  # the scripts' reader jumps, to a frame that is later by one
        ("film.mkv", 150, Fraction(24000, 1001)),
        ("ntsc.mov", 40, Fraction(30000, 1001)),
        ("web.webm", 30, 25),
        ("old.avi", 30, 25),
        ("small.gif", 20, 10),
    ],
)
def test_frames_and_differences_are_those_of_the_scripts(
    tmp_path: Path, name: str, frames: int, rate: Fraction | int, count: int
) -> None:
    video = make_video(tmp_path / name, frames, rate=rate)
    theirs, differences = as_the_scripts(video, count)
    ours = list(read_frames(video, count))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    found = [difference(one, other) for one, other in itertools.pairwise(ours)]
    assert found == pytest.approx(differences, abs=1e-6)


def test_at_a_varying_rate_each_frame_is_the_one_that_is_shown(tmp_path: Path) -> None:
    times = [0, 1, 2, 3, 9, 10, 20, 29, 30]
    video = make_video(tmp_path / "a.mkv", len(times), times=times)
    all_of_it = [frame.to_ndarray(format="rgb24") for frame in decoded(video)]
    found = [
        next(number for number, frame in enumerate(all_of_it) if np.array_equal(frame, picture))
        for picture in read_frames(video, 4)  # at 0, 1, 2 and 3 seconds
    ]
    assert found == [0, 5, 6, 8]


def decoded(video: Path) -> Any:
    import av

    with av.open(str(video)) as container:
        yield from container.decode(video=0)


def test_a_recording_without_a_duration_is_read_to_its_end(tmp_path: Path) -> None:
    endless = list(read_frames(make_endless(tmp_path / "a.webm", 20), 2))
    ended = list(read_frames(make_video(tmp_path / "b.webm", 20), 2))
    np.testing.assert_array_equal(endless, ended)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_a_video_that_was_taken_sideways_is_upright(tmp_path: Path, degrees: int, turns: int) -> None:
    plain, turned = make_video(tmp_path / "plain.mp4"), tmp_path / "turned.mp4"
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error"]
    subprocess.run(
        [*ffmpeg, "-display_rotation", str(degrees), "-i", plain, "-c", "copy", turned], check=True
    )
    shown = tmp_path / "shown.png"  # by a player
    subprocess.run([*ffmpeg, "-i", turned, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", shown])
    first = next(read_frames(turned, 2))
    assert first.tobytes() == shown.read_bytes()
    np.testing.assert_array_equal(first, np.rot90(next(read_frames(plain, 2)), turns))


def spoil(path: Path, start: int, end: int | None = None) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:start] + (b"" if end is None else b"\xff" * (end - start) + content[end:]))


def test_what_gives_no_frames_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    make_sound(tmp_path / "sound.mp4")
    make_video(tmp_path / "one.mp4", 1)
    make_video(tmp_path / "two.mp4", 2, rate=30)
    make_video(tmp_path / "cut.mp4", 60)
    spoil(tmp_path / "cut.mp4", 5000)
    make_video(tmp_path / "other.mp4")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:5,\n{tmp_path}/other.mp4\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    os.mkfifo(tmp_path / "pipe.mp4")  # would be waited for
    for name, reason in {
        "empty.mp4": "cannot be read as a video",
        "text.mp4": "cannot be read as a video",
        "sound.mp4": "holds no pictures, only sound",
        "one.mp4": "has not 2 different frames: its last is at 0.00 s",
        "two.mp4": "has not 2 different frames",
        "cut.mp4": "cannot be read as a video",
        "list.mp4": "cannot be read as a video",
        "concat.mp4": "cannot be read as a video",
        "pipe.mp4": "is not a regular file",
        "missing.mp4": "cannot be read as a video .No such file",
    }.items():
        with pytest.raises(VideoError, match=reason):
            list(read_frames(tmp_path / name, 2))


def test_a_video_whose_frames_end_too_early_is_damaged(tmp_path: Path) -> None:
    """A download that broke off: the header tells more than there is."""
    video = make_video(tmp_path / "a.mp4", 100)
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error"]
    broken = tmp_path / "b.mp4"
    subprocess.run([*ffmpeg, "-i", video, "-c", "copy", "-movflags", "faststart", broken], check=True)
    spoil(broken, broken.stat().st_size // 2)
    with pytest.raises(VideoError, match=r"is damaged: its pictures end at \d.\d\d s of 10.00 s"):
        list(read_frames(broken, 2))


@pytest.mark.parametrize(
    ("tagged", "coded", "lines"),
    [
        (BT709, BT709, 96),
        (SMPTE170M, SMPTE170M, 720),
        (UNSPECIFIED, BT709, 720),
        (UNSPECIFIED, SMPTE170M, 96),
    ],
)
def test_frames_have_the_colours_that_players_show(
    tmp_path: Path, tagged: int, coded: int, lines: int
) -> None:
    colour = (40, 200, 120)
    video = film(tmp_path / "v.mp4", colour, tagged=tagged, coded=coded, size=(lines, 160), count=20)
    for frame in read_frames(video, 2):
        assert np.abs(frame[5, 5].astype(int) - colour).max() <= 2


def test_an_hdr_video_gives_no_frames_and_says_so(tmp_path: Path) -> None:
    video = film(tmp_path / "v.mp4", (9, 9, 9), tagged=BT2020, coded=BT2020, transfer=16, count=20)
    with pytest.raises(VideoError, match=r"is an HDR video \(HDR10 \(PQ\)\): save it as SDR"):
        list(read_frames(video, 2))


def test_frames_too_small_or_of_two_sizes_are_not_compared() -> None:
    small, large = np.zeros((6, 20, 3), np.uint8), np.zeros((20, 20, 3), np.uint8)
    for one, other in ((small, small), (small, large), (large, np.zeros((20, 21, 3), np.uint8))):
        with pytest.raises(VideoError, match="they need one size, of 7 pixels or more"):
            difference(one, other)
    assert difference(large, large) == 0


def test_a_long_video_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    """The frames of the long one would take 300 MB."""
    for name, frames in (("short", 30), ("long", 400)):
        make_video(tmp_path / f"{name}.mp4", frames, size=(480, 512), moving=0)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from framepackd.prepare.video_frames import read_frames\n"
        "for picture in read_frames(Path(sys.argv[1]), 16): pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    short, long = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / f"{name}.mp4")], capture_output=True, check=True
            ).stdout
        )
        for name in ("short", "long")
    )
    assert long - short < 50_000  # KiB
