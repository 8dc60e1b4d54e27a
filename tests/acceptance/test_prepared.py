"""Ten videos, prepared, dropped whole: they come out whole, and a second drop is skipped."""

import json
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest

from framepack_core.media import pictures as media
from framepackd.prepare.video_frames import difference, read_frames
from tests.acceptance.conftest import Daemon, MakeDaemon
from tests.daemon.videos import make_video

FRAMES = 25  # of a clip: 4 * window 3 * sections 2 + 1
NAMES = [
    *("cat.mp4", "ünï 猫.mp4", "walk_end.mp4", "clip.mov", "clip.mkv"),
    *("a/cat.mp4", "a/b/dog.webm", "a/loop.gif", "old.avi", "with space.mp4"),
]
PREPARED = [
    *("cat", "ünï 猫", "walk_end_video", "clip_mov", "clip_mkv"),
    *("a/cat", "a/b/dog", "a/loop", "old", "with space"),
]


def make_videos(root: Path, names: list[str] = NAMES) -> None:
    for number, name in enumerate(names):
        video = make_video(root / name, 12, seed=number, size=(40, 48))
        video.with_suffix(".txt").write_text(f"take {video.stem}\n")


def prepare(daemon: Daemon, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return daemon.command("prepare", *map(str, arguments))


@pytest.mark.long
def test_a_prepared_folder_dropped_whole_comes_out_whole_and_a_second_drop_is_skipped(
    tmp_path: Path, make_daemon: MakeDaemon
) -> None:
    make_videos(tmp_path / "videos")
    daemon = make_daemon(config='on_duplicate = "skip"\n')
    told = prepare(daemon, tmp_path / "videos", tmp_path / "prepared", "--set", "steps=1")
    assert told.returncode == 0, told.stderr
    daemon.start()

    shutil.copytree(tmp_path / "prepared", daemon.inbox / "drop")
    daemon.until(lambda: daemon.status()["counts"]["done"] == 10, "ten videos")
    for name, video in zip(PREPARED, NAMES, strict=True):
        record = json.loads((daemon.outbox / f"drop/{name}.json").read_text())
        assert record["prompt"] == f"take {Path(video).stem}"
        pictures = list(read_frames(tmp_path / "videos" / video, 2))
        assert record["frame_diff"] == difference(*pictures)
        for picture, ending in zip(pictures, ("first_frame", "last_frame"), strict=True):
            delivered = media.open_picture(daemon.outbox / f"drop/{name}_{ending}.png")
            np.testing.assert_array_equal(delivered, picture)
        with av.open(daemon.outbox / f"drop/{name}.mp4") as result:
            assert sum(1 for _ in result.decode(video=0)) == FRAMES
    assert left(daemon.inbox) == []

    shutil.copytree(tmp_path / "prepared", daemon.inbox / "drop", dirs_exist_ok=True)
    daemon.until(lambda: daemon.status()["counts"]["skipped"] == 10, "ten skipped jobs")
    assert daemon.status()["counts"]["done"] == 10
    assert len(list(daemon.outbox.rglob("*.mp4"))) == 10
    assert left(daemon.inbox) == []
    assert daemon.stop() == 0


@pytest.mark.long
def test_preparing_again_leaves_out_what_the_daemon_has_taken(daemon: Daemon, tmp_path: Path) -> None:
    make_videos(tmp_path / "videos", NAMES[:3])
    daemon.start()
    assert prepare(daemon, tmp_path / "videos").stdout == f"3 prepared in {daemon.inbox}\n"
    daemon.until(lambda: daemon.status()["counts"]["done"] > 0 and left(daemon.inbox) == [], "a video")
    (tmp_path / "videos/cat.txt").write_text("take another one")
    again = prepare(daemon, tmp_path / "videos", "--skip-done")
    assert again.stdout == f"1 prepared in {daemon.inbox}\n2 done or queued already\n"
    daemon.until(lambda: daemon.status()["counts"]["done"] == 4, "all videos")
    assert {path.stem for path in daemon.outbox.glob("*.mp4")} == {*PREPARED[:3], "cat_001"}


def left(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file()]
