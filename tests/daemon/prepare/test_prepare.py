"""From a folder of videos to the inbox: names, what is whole, what is skipped, what is bad."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framepack_core.media import pictures as media
from framepackd.inbox.naming import group_files
from framepackd.inbox.scan import Inbox
from framepackd.intake import take
from framepackd.jobs.job import State
from framepackd.prepare import items, prepare, video_frames
from tests.daemon.place import Place, at_every_call
from tests.daemon.prepare.prepared import PAIR, listed, run
from tests.daemon.videos import make_sound, make_video


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two videos with captions, one of them in a folder."""
    root = tmp_path / "videos"
    make_video(root / "cat.mp4", 5)
    make_video(root / "sub/dog.mkv", 5, seed=1, moving=0)
    (root / "cat.txt").write_bytes("\ufeffa cat turns\r\n".encode())
    (root / "sub/dog.txt").write_text("a dog sits")
    return root


def test_videos_become_pairs_in_the_inbox(place: Place, videos: Path) -> None:
    result = run(place, videos, "--set", "seconds=1", "--set", "seed=random")
    assert (result.exit_code, result.stdout) == (0, f"2 prepared in {place.config.inbox}\n"), result.output
    inbox = place.config.inbox
    assert listed(inbox) == sorted(
        name + ending for name in ("cat", "sub/dog") for ending in (".toml", ".txt", *PAIR)
    )
    assert (inbox / "cat.txt").read_text() == "a cat turns\n"
    assert (inbox / "cat.toml").read_text() == 'seconds = 1\nseed = "random"\n'
    first, last = video_frames.read_frames(videos / "cat.mp4", 2)
    np.testing.assert_array_equal(media.open_picture(inbox / "cat_first_frame.png"), first)
    np.testing.assert_array_equal(media.open_picture(inbox / "cat_last_frame.png"), last)
    assert float((inbox / "cat_frame_diff.txt").read_text()) == video_frames.difference(first, last)
    groups = Inbox(inbox, settle_seconds=0).scan().ready
    assert [(group.folder, group.name) for group in groups] == [("", "cat"), ("sub", "dog")]
    assert [path.name for path in inbox.iterdir() if path.name.startswith(".")] == []


def test_videos_become_chains_with_a_difference_for_each_pair(place: Place, videos: Path) -> None:
    assert run(place, videos, "--frames", 3).exit_code == 0
    pictures = [media.open_picture(place.config.inbox / f"cat_frame_{number}.png") for number in range(3)]
    for one, other in zip(pictures, video_frames.read_frames(videos / "cat.mp4", 3), strict=True):
        np.testing.assert_array_equal(one, other)
    told = (place.config.inbox / "cat_frame_diff.txt").read_text().split()
    assert [float(each) for each in told] == [
        video_frames.difference(one, other) for one, other in itertools.pairwise(pictures)
    ]


def test_what_differs_too_much_is_left_out(place: Place, tmp_path: Path) -> None:
    """Of a chain it is enough that one pair does; the limit itself is too much."""
    video = make_video(tmp_path / "videos/still.mp4", 8, moving=0)
    make_video(tmp_path / "videos/wild.mp4", 8)
    result = run(place, tmp_path / "videos", "--prompt", "x", "--max-difference", 0.9)
    assert (result.exit_code, result.stdout) == (
        0,
        f"1 prepared in {place.config.inbox}\n1 too different\n",
    )
    assert listed(place.config.inbox) == ["still.txt", *(f"still{ending}" for ending in PAIR)]
    differences = [
        video_frames.difference(one, other)
        for one, other in itertools.pairwise(video_frames.read_frames(video, 3))
    ]
    for limit, kept in ((max(differences), 0), (max(differences) + 1e-6, 1)):
        target = tmp_path / f"target{kept}"
        result = run(place, video, target, "--prompt", "x", "--frames", 3, "--max-difference", limit)
        assert len(listed(target)) == 5 * kept, result.output


def test_bad_videos_are_reported_and_the_others_prepared(place: Place, videos: Path) -> None:
    (videos / "empty.mp4").touch()
    make_sound(videos / "sound.mp4")
    make_video(videos / "one.mp4", 1)
    make_video(videos / "mute.mp4", 5)
    make_video(videos / "latin.mp4", 5)
    make_video(videos / "wordless.mp4", 5)
    for name in ("empty", "sound", "one"):
        (videos / f"{name}.txt").write_text("x")
    (videos / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (videos / "wordless.txt").write_text(" \n")
    result = run(place, videos)
    assert result.exit_code == 1
    assert result.stdout == f"2 prepared in {place.config.inbox}\n6 bad\n"
    told = dict(line.removeprefix("framepackd: ").split(": ", 1) for line in result.stderr.splitlines())
    for name, reason in {
        "empty.mp4": "cannot be read as a video",
        "sound.mp4": "only sound",
        "one.mp4": "has not 2 different frames",
        "mute.mp4": "has no caption mute.txt: write it, or give one --prompt for all",
        "latin.mp4": "latin.txt is not UTF-8 (byte 3 is 0xe9): save it as UTF-8",
        "wordless.mp4": "wordless.txt is empty",
    }.items():
        assert reason in told[name]
    assert run(place, videos).stdout == "2 there already\n6 bad\n"


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """Tell of each file which it is and when it was written."""
    found = {name: (folder / name).stat() for name in listed(folder)}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def test_a_second_run_resumes_and_changes_nothing(place: Place, videos: Path) -> None:
    run(place, videos)
    before = versions(place.config.inbox)
    (place.config.inbox / "sub/dog_first_frame.png").unlink()
    assert run(place, videos).stdout == f"1 prepared in {place.config.inbox}\n1 there already\n"
    assert listed(place.config.inbox) == sorted(before)
    changed = {name for name, version in versions(place.config.inbox).items() if version != before[name]}
    assert changed == {"sub/dog_first_frame.png"}


def test_files_that_are_taken_meanwhile_stop_nothing(
    place: Place, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place, videos)
    read = Path.read_bytes

    def taken(path: Path) -> bytes:
        if path == place.config.inbox / "cat.txt":
            for file in place.config.inbox.glob("cat*"):
                file.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", taken)
    result = run(place, videos)
    assert (result.exit_code, result.stdout) == (0, "2 there already\n")


@pytest.mark.parametrize("name", ["cat.txt", "cat_first_frame.png", "cat_frame_diff.txt"])
def test_what_is_there_is_never_overwritten(place: Place, videos: Path, name: str) -> None:
    (place.config.inbox / name).write_text("mine")
    result = run(place, videos)
    assert result.exit_code == 1
    assert f"{name} is there already with something else in it" in result.stderr
    assert (place.config.inbox / name).read_text() == "mine"
    assert [each for each in listed(place.config.inbox) if "cat" in each] == [name]
    assert "1 prepared" in result.stdout


def test_after_dying_at_any_line_no_job_is_half_and_the_next_run_resumes(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where jobs need no text, and files are taken as soon as they are there."""
    make_video(tmp_path / "videos/cat.mp4", 5)
    targets = iter(tmp_path / f"target{number}" for number in range(500))
    target = next(targets)

    def prepare_it() -> None:
        options = items.Options(tmp_path / "videos", target, prompt="x", settings="seconds = 1\n")
        source = prepare.find(options)
        for result in prepare.prepare(source, options, place.config):
            assert result.error is None

    def check() -> None:
        nonlocal target
        if target.exists():
            for group in Inbox(target, settle_seconds=0, prompted=True).scan().ready:
                assert set(group.files) == {"image", "end", "text", "diff", "settings"}
        prepare_it()
        assert [path.name for path in sorted(target.iterdir())] == sorted(
            f"cat{ending}" for ending in (".toml", ".txt", *PAIR)
        )
        target = next(targets)

    assert at_every_call(monkeypatch, prepare_it, check) > 10


def test_a_run_that_is_killed_leaves_nothing_half_in_the_inbox(place: Place, tmp_path: Path) -> None:
    for number in range(30):
        make_video(tmp_path / f"videos/clip{number:02}.mp4", 5, size=(240, 320), seed=number)
    config = place.config.state_dir.parent / "config.toml"
    command = [sys.executable, "-m", "framepackd", "prepare", "--config", config, tmp_path / "videos"]
    running = subprocess.Popen([*command, "--prompt", "x"])
    while len(listed(place.config.inbox)) < 12:
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    ready = Inbox(place.config.inbox, settle_seconds=0).scan().ready
    assert 1 < len(ready) <= 30
    for group in ready:
        assert set(group.files) == {"image", "end", "text", "diff"}
        for role in ("image", "end"):
            media.open_picture(place.config.inbox / str(group.only(role)))
    assert run(place, tmp_path / "videos", "--prompt", "x").exit_code == 0
    assert len(Inbox(place.config.inbox, settle_seconds=0).scan().ready) == 30
    assert len(listed(place.config.inbox)) == 30 * 4


def test_an_interrupted_run_says_how_to_resume(place: Place, tmp_path: Path) -> None:
    make_video(tmp_path / "videos/clip.mp4", 5, size=(240, 320))
    for number in range(100):  # seconds of work, however late the signal comes
        (tmp_path / f"videos/clip{number:03}.mp4").hardlink_to(tmp_path / "videos/clip.mp4")
    config = place.config.state_dir.parent / "config.toml"
    command = [sys.executable, "-m", "framepackd", "prepare", "--config", config, tmp_path / "videos"]
    running = subprocess.Popen(
        [*command, "--prompt", "x", "--frames", "5"],
        stderr=subprocess.PIPE,
        # Where the tests run in the background of a script, it is ignored, and a child inherits that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not list(place.config.inbox.glob("*.png")):
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate()
    assert running.returncode == 130
    assert told.decode() == (
        "framepackd: interrupted: the same command goes on, and --skip-done leaves out what a daemon has "
        "taken meanwhile\n"
    )
    assert not [path for path in place.config.inbox.iterdir() if path.name.startswith(".")]


def take_all(place: Place, *states: State) -> None:
    """Be the daemon: take everything, and let it end in these states."""
    for group in Inbox(place.config.inbox, 0).scan().ready:
        take.take(group, place.config, place.store)
    for job, state in zip(place.store.in_state(State.QUEUED), states, strict=True):
        if state is not State.QUEUED:
            place.store.finish(job.id, state, error=None, output=None)


def test_skip_done_leaves_out_what_is_done_or_queued(place: Place, videos: Path) -> None:
    make_video(videos / "hen.mp4", 5, seed=3)
    (videos / "hen.txt").write_text("a hen")
    run(place, videos)
    take_all(place, State.DONE, State.FAILED, State.QUEUED)
    result = run(place, videos, "--skip-done")
    assert result.stdout == f"1 prepared in {place.config.inbox}\n2 done or queued already\n", result.output
    assert [group.name for group in Inbox(place.config.inbox, 0).scan().ready] == ["hen"]


def test_skip_done_knows_a_job_by_its_pictures_whatever_it_was_called(place: Place, videos: Path) -> None:
    run(place, videos)
    (place.config.inbox / "elsewhere").mkdir()
    for path in sorted(place.config.inbox.glob("cat*")):
        path.rename(place.config.inbox / "elsewhere" / f"other{path.name}")
    take_all(place, State.DONE, State.QUEUED)
    assert run(place, videos, "--skip-done").stdout == "2 done or queued already\n"


@pytest.mark.parametrize("what", ["the caption", "the video", "pairs to chains"])
def test_skip_done_prepares_what_has_changed(place: Place, videos: Path, what: str) -> None:
    run(place, videos)
    take_all(place, State.DONE, State.DONE)
    if what == "the caption":
        (videos / "cat.txt").write_text("a cat jumps")
    elif what == "the video":
        make_video(videos / "cat.mp4", 5, seed=9)
    chain = ["--frames", 3] if what == "pairs to chains" else []
    result = run(place, videos, "--skip-done", *chain)
    if chain:
        assert result.stdout == f"2 prepared in {place.config.inbox}\n"
    else:
        assert result.stdout == f"1 prepared in {place.config.inbox}\n1 done or queued already\n"
        assert "cat_first_frame.png" in listed(place.config.inbox)


def test_a_dry_run_writes_nothing_and_shows_the_differences(
    place: Place, videos: Path, tmp_path: Path
) -> None:
    result = run(place, videos, tmp_path / "target", "--dry-run")
    first, last = video_frames.read_frames(videos / "cat.mp4", 2)
    assert f"cat: would be prepared: difference {video_frames.difference(first, last):.4f}\n" in result.stdout
    assert f"2 would be prepared in {tmp_path / 'target'}" in result.stdout
    assert not (tmp_path / "target").exists()


def test_two_runs_cannot_use_one_target(place: Place, videos: Path) -> None:
    options = items.Options(videos, place.config.inbox, prompt="x")
    going: Iterator[items.ItemResult] = prepare.prepare(prepare.find(options), options, place.config)
    next(going)
    result = run(place, videos)
    assert result.exit_code == 2
    assert "another framepackd prepare is at work" in result.stderr
    assert len(list(going)) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere does not exist: give a folder of videos"),
        (["."], "holds no videos (.mp4"),
        (["videos", "--set", "seconds"], "--set needs KEY=VALUE, got 'seconds'"),
        (["videos", "--set", "second=1"], "--set: unknown key 'second'"),
        (["videos", "--set", "seconds=500"], "seconds must be 1 to 120, got 500"),
        (["videos", "--set", "prompt=x"], "use --prompt"),
        (["videos", "--prompt", " "], "--prompt is empty"),
        (["videos", "--split", "train"], "--split is for data sets"),
        (["videos", "--private"], "--private is for --push"),
        (["videos", "--dry-run", "--save-dataset", "x"], "--dry-run writes nothing"),
        (["videos", "--frames", "1"], "1 is not in the range 2<=x<=256"),
    ],
)
def test_unusable_options_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    place = Place(tmp_path / "place")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if arguments[0] == "videos":
        make_video(Path("videos/cat.mp4"), 3)
    result = run(place, *arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert "Traceback" not in result.output
    assert listed(place.config.inbox) == []


def test_an_unwritable_target_is_a_clear_error(place: Place, videos: Path) -> None:
    (place.config.inbox / "file").touch()
    result = run(place, videos, place.config.inbox / "file")
    assert result.exit_code == 1
    assert f"{place.config.inbox / 'file'}: Not a directory" in result.stderr or "exists" in result.stderr


def test_preparing_loads_no_torch(place: Place, videos: Path, tmp_path: Path) -> None:
    config = place.config.state_dir.parent / "config.toml"
    code = (
        "import sys; from framepackd.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    for source in (videos, tmp_path / "set"):
        more = ["--save-dataset", tmp_path / "set"] if source == videos else [tmp_path / "target"]
        command = [sys.executable, "-c", code, "prepare", "--config", config, source, *more]
        subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(tmp_path / "set")


PARTS = (
    *("a", "B", "b", "_", ".", " ", "-", "\n", "0", "é", "e\u0301", "猫" * 60, "\udce9"),
    *("_end", ".end", "_first_frame", "_last_frame", "_frame_", "_frame_diff", "_section_0"),
    *("_defaults", "_mp4", "_video"),
)
stems = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("".join)


@given(
    st.sets(st.tuples(stems, st.sampled_from([".mp4", ".mov", ".MP4"])), max_size=8), st.sampled_from([0, 3])
)
def test_whatever_videos_are_called_each_is_a_group_of_its_own(
    names: set[tuple[str, str]], chain: int
) -> None:
    paths = [PurePosixPath(stem + suffix) for stem, suffix in names if not stem.startswith(".")]
    chosen = items.choose_names(paths)
    assert chosen == items.choose_names(paths[::-1])
    endings = (*items.endings_of(chain or 2, chain=bool(chain)), ".txt", "_frame_diff.txt", ".toml")
    groups = group_files([name + ending for name in chosen.values() for ending in endings])
    assert sorted(group.name for group in groups) == sorted(chosen.values())
    for group in groups:
        assert sorted(group.paths) == sorted(group.name + ending for ending in endings)
        assert max(len(path.encode()) for path in group.paths) <= 180


@pytest.mark.parametrize(
    ("content", "recorded"),
    [
        (b"0.25", 0.25),
        (b"\xef\xbb\xbf0.5\r\n", 0.5),
        (b"0.1\n1.08\n0\n", [0.1, 1.08, 0.0]),
        (b"", None),
        (b"much", None),
        (b"nan", None),
        (b"-0.1", None),
        (b"3", None),
        (b"0.5 " * 5000, None),
        (b"0.5 \xe9", None),
        ("0.5".encode("utf-16"), None),
    ],
)
def test_a_recorded_difference_goes_into_the_record_and_spoils_no_job(
    place: Place, caplog: pytest.LogCaptureFixture, content: bytes, recorded: object
) -> None:
    place.drop()
    (place.config.inbox / "cat_frame_diff.txt").write_bytes(content)
    take_all(place, State.QUEUED)
    (job,) = place.store.matching("cat")
    assert job.delivery is None
    assert json.loads(json.dumps(job.record()))["frame_diff"] == recorded
    assert ("cat_frame_diff.txt" in caplog.text) == (recorded is None)
    assert ("is UTF-16: save it as UTF-8" in caplog.text) == content.startswith(b"\xff\xfe")


def test_what_is_prepared_is_recorded(place: Place, videos: Path) -> None:
    run(place, videos)
    difference = float((place.config.inbox / "cat_frame_diff.txt").read_text())
    take_all(place, State.QUEUED, State.QUEUED)
    (job,) = place.store.matching("cat")
    assert job.record()["frame_diff"] == difference
