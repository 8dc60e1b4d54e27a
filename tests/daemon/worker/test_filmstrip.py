"""The strip of a video's frames that the results page shows; the video does not depend on it."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from framepack_core.media import pictures, segments
from framepackd.jobs.folder import STRIP
from framepackd.worker.messages import Finished, Work
from framepackd.worker.video import FILMSTRIP_FRAMES, Filmstrip
from tests.daemon.worker.jobs import made, run, work_in


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return replace(work_in(tmp_path), filmstrip=True)


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (16, 1024)])
@pytest.mark.parametrize("count", [1, 2, 7, 145])
def test_a_strip_shows_frames_from_the_first_to_the_last(
    tmp_path: Path, count: int, size: tuple[int, int]
) -> None:
    levels = np.linspace(20, 230, count).round().astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (count, *size, 3))
    segments.join(tmp_path / "video.mp4", [segments.encode(frames, size=size, crf=16)])
    made = Filmstrip(count)
    assert pictures.count_frames(tmp_path / "video.mp4", made.offer) == count
    made.save(tmp_path / "strip.jpg")
    picture = np.asarray(Image.open(tmp_path / "strip.jpg")).astype(int)
    parts = min(count, FILMSTRIP_FRAMES)
    width = picture.shape[1] // parts
    assert width / picture.shape[0] == pytest.approx(size[1] / size[0], rel=0.05)
    shown = [picture[:, width * part + width // 2].mean() for part in range(parts)]
    expected = levels[np.linspace(0, count - 1, parts).round().astype(int)]
    assert np.abs(np.array(shown) - expected).max() < 8


def test_the_worker_makes_one_on_the_way_and_the_video_is_the_same(tmp_path: Path, work: Work) -> None:
    without = work_in(tmp_path / "without")
    assert isinstance(run(without)[0], Finished)
    assert isinstance(run(work)[0], Finished)
    files = made(work)
    with Image.open(work.result / STRIP) as picture:
        assert picture.format == "JPEG"
    assert len(files.pop(STRIP)) < 100_000
    assert files == made(without)
    with av.open(work.result / ".mp4") as video:
        assert video.streams.video[0].frames == work.frames


def test_a_video_does_without_one_that_cannot_be_written(
    work: Work, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Filmstrip, path: Path) -> None:
        path.write_bytes(b"what there was room for")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Filmstrip, "save", full)
    assert isinstance(run(work)[0], Finished)
    assert "there is no picture of the video's frames" in caplog.text
    assert not (work.result / STRIP).exists()
    assert (work.result / ".mp4").exists()
