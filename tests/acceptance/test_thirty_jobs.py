"""Thirty jobs dropped in shuffled order in every way people do it, and what people get wrong among them."""

import itertools
import json
import random
import shutil
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import pytest

from tests.acceptance.conftest import MakeDaemon, picture

FRAMES = 25  # 4 * window 3 * sections 2 + 1

GOOD = [
    "plain",
    "with spaces in it",
    "ünïcödé 猫 🐱",
    "-leading-dash",
    "--help",
    'it\'s (quoted) "name" [x]',
    "dots.in.the.name",
    "UPPER",
    "sub/folder/deep",
    "sub/with space/cat",
    "percent%20sign",
    "new\nline",
    "weekend_end",  # a text of exactly this name wins over the end-frame suffix
    "end1",
    "end2",
    "end3",
    "settings",
    "seed-names",
    "prompt-in-toml",
    "defaults/from-defaults",
]
FAILING = {  # name -> part of the reason
    "truncated": "damaged",
    "text-as-picture": "not a picture",
    "empty-text": "is empty",
    "latin-1": "not UTF-8",
    "unknown-key": "unknown key 'stepz'",
    "out-of-range": "steps must be 1 to 100, got 101",
    "broken-toml": "is not TOML",
}
WAITING = {
    "no-text": "no-text.txt",
    "no-picture": "no-picture.png",
    "nothing": "empty (0 bytes)",
}


def write_sources(root: Path) -> None:
    """Prepare everything that will be dropped, as files in a folder beside the inbox."""
    for number, name in enumerate(GOOD):
        suffix = (".png", ".JPG", ".jpeg", ".WebP", ".bmp", ".PNG")[number % 6]
        picture(root / f"{name}{suffix}", seed=number)
        if name not in ("prompt-in-toml", "defaults/from-defaults"):
            (root / f"{name}{'.TXT' if number % 4 == 3 else '.txt'}").write_text(f"pan left {number}\r\n")
    for number, name in enumerate(("end1.end", "end2_end", "end3_last_frame")):
        picture(root / f"{name}.png", seed=100 + number, size=(64, 32))
    (root / "settings.toml").write_text('steps = 3\nseed = "random"\ncrf = 30\nsave_section_frames = true\n')
    (root / "seed-names.toml").write_text(
        "total_second_length = 1.0\ncfg = 2\ngs = 9.5\nuse_teacache = true\n"
    )
    (root / "prompt-in-toml.toml").write_text('prompt = ""\n')
    (root / "defaults/_defaults.toml").write_text('prompt = "night falls"\n')

    whole = picture(root / "truncated.png", seed=50).read_bytes()
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "text-as-picture.png").write_text("this is no picture")
    (root / "nothing.png").write_bytes(b"")
    for name in ("empty-text", "latin-1", "unknown-key", "out-of-range", "broken-toml", "no-text"):
        picture(root / f"{name}.png", seed=51)
    for name in ("truncated", "text-as-picture", "nothing", "unknown-key", "out-of-range", "broken-toml"):
        (root / f"{name}.txt").write_text("pan left")
    (root / "no-picture.txt").write_text("pan left")
    (root / "empty-text.txt").write_text(" \n")
    (root / "latin-1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "unknown-key.toml").write_text("stepz = 3\n")
    (root / "out-of-range.toml").write_text("steps = 101\n")
    (root / "broken-toml.toml").write_text("steps = = 3\n")


def by_move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def by_rsync(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.which("rsync"):
        subprocess.run(["rsync", "-a", "--", str(source), str(target)], check=True)
    else:  # what it does: a hidden name first, then a rename
        hidden = target.with_name(f".{target.name}.Xq3Zy1")
        shutil.copy2(source, hidden)
        hidden.rename(target)


def by_small_writes(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    data = source.read_bytes()
    piece = max(len(data) // 5, 1)
    with target.open("wb") as file:
        for start in range(0, len(data), piece):
            file.write(data[start : start + piece])
            file.flush()
            time.sleep(0.02)


@pytest.mark.timeout(400)
def test_every_good_job_is_done_once_and_every_bad_one_says_why(
    tmp_path: Path, make_daemon: MakeDaemon
) -> None:
    source = tmp_path / "source"
    write_sources(source)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    assert len(GOOD) + len(FAILING) + len(WAITING) == 30
    random.Random(7).shuffle(files)
    # A folder's settings hold for what comes after them.
    files.sort(key=lambda path: path.name != "_defaults.toml")
    # Longer than the whole drop takes, so that a companion never comes after its picture has settled.
    daemon = make_daemon(settle_seconds=5)
    daemon.start()
    with ThreadPoolExecutor(3) as pool:
        ways = itertools.cycle((by_move, by_rsync, by_small_writes))
        list(pool.map(lambda way, path: way(path, daemon.inbox / path.relative_to(source)), ways, files))

    def all_ended() -> bool:
        counts = daemon.status()["counts"]
        return counts["done"] + counts["failed"] == len(GOOD) + len(FAILING)

    daemon.until(all_ended, "all jobs to end", 300)
    report = daemon.status()
    assert report["counts"] == {
        "waiting": len(WAITING),
        "queued": 0,
        "running": 0,
        "done": len(GOOD),
        "failed": len(FAILING),
        "cancelled": 0,
        "skipped": 0,
    }
    videos = {str(path.relative_to(daemon.outbox).with_suffix("")) for path in daemon.outbox.rglob("*.mp4")}
    assert videos == set(GOOD)
    assert Counter(job["name"] for job in report["jobs"]).most_common(1)[0][1] == 1
    for name in GOOD:
        record = json.loads((daemon.outbox / f"{name}.json").read_text())
        with av.open(daemon.outbox / f"{name}.mp4") as video:
            stream = video.streams.video[0]
            assert sum(1 for _ in video.decode(stream)) == FRAMES == record["frames"], name
            assert (stream.codec.canonical_name, stream.average_rate) == ("h264", 30), name
        for taken in record["inputs"].values():
            assert (daemon.outbox / name).with_name(taken["file"]).exists(), name
    for name in ("end1", "end2", "end3"):
        assert "end" in json.loads((daemon.outbox / f"{name}.json").read_text())["inputs"]
    assert "end" not in json.loads((daemon.outbox / "weekend_end.json").read_text())["inputs"]
    assert len(list(daemon.outbox.glob("settings.section-*.png"))) == 2
    settings = json.loads((daemon.outbox / "seed-names.json").read_text())
    assert (settings["true_cfg_scale"], settings["guidance_scale"], settings["cache"]) == (2, 9.5, "teacache")
    assert json.loads((daemon.outbox / "prompt-in-toml.json").read_text())["prompt"] == ""
    assert json.loads((daemon.outbox / "plain.json").read_text())["prompt"] == "pan left 0"

    for name, reason in FAILING.items():
        assert reason in (daemon.failed / f"{name}.error.txt").read_text(), name
        assert (daemon.failed / f"{name}.png").exists(), name
    missing = {entry["name"]: entry["missing"] for entry in report["waiting"]}
    assert set(missing) == set(WAITING)
    for name, reason in WAITING.items():
        assert reason in missing[name]
    left = {str(path.relative_to(daemon.inbox)) for path in daemon.inbox.rglob("*") if path.is_file()}
    assert left == {"no-text.png", "no-picture.txt", "nothing.png", "nothing.txt", "defaults/_defaults.toml"}
    assert not list((daemon.state / "jobs").iterdir()), "no work folder is left"
    assert daemon.stop() == 0
