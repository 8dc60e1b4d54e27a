"""Data sets: those of FramePack's data scripts are read, what is prepared is written and pushed like them."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from framepack_core.media import pictures
from framepackd.prepare import video_frames
from tests.daemon.place import Place
from tests.daemon.prepare.hub import TOKEN, Hub
from tests.daemon.prepare.prepared import PAIR, listed, run
from tests.daemon.videos import make_video


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8))


def as_the_scripts(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Make a data set as FramePack's data scripts do."""
    made = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    for name in ("first_frame", "last_frame"):
        made = made.cast_column(name, datasets.Image())
    return made


ROWS = [
    {"first_frame": picture(0), "last_frame": picture(1), "text": "a cat", "frame_diff": 0.25},
    {"first_frame": picture(2), "last_frame": picture(3), "text": "a dog", "frame_diff": 0.95},
    {"first_frame": picture(4), "last_frame": picture(5), "text": "a hen", "frame_diff": 0.9},
]


def write(rows: datasets.Dataset, path: Path, form: str) -> Path:
    if form == "saved":
        rows.save_to_disk(str(path))
    elif form == "saved splits":
        datasets.DatasetDict({"train": rows}).save_to_disk(str(path))
    elif form == "parquet":
        path = path.with_suffix(".parquet")
        rows.to_parquet(str(path))
    else:  # as on the hub
        (path / "data").mkdir(parents=True)
        rows.to_parquet(str(path / "data/train-00000-of-00002.parquet"))
        (path / "data/._train-00000-of-00002.parquet").write_bytes(b"left by macOS")
        rows.select(range(1)).to_parquet(str(path / "data/train-00001-of-00002.parquet"))
    return path


@pytest.mark.parametrize("form", ["saved", "saved splits", "parquet", "hub"])
def test_a_data_set_of_the_scripts_becomes_jobs(place: Place, tmp_path: Path, form: str) -> None:
    """The recorded difference counts, as in the scripts' loop: what is below the limit is kept."""
    source = write(as_the_scripts(ROWS), tmp_path / "lelouch", form)
    result = run(place, source, "--max-difference", 0.9)
    assert result.exit_code == 0, result.output
    names = ["lelouch_000000"] + ["lelouch_000003"] * (form == "hub")
    assert listed(place.config.inbox) == sorted(name + ending for name in names for ending in (".txt", *PAIR))
    inbox = place.config.inbox
    for column, ending in (("first_frame", "_first_frame.png"), ("last_frame", "_last_frame.png")):
        np.testing.assert_array_equal(
            pictures.open_picture(inbox / f"lelouch_000000{ending}"), np.array(ROWS[0][column])
        )
    assert (inbox / "lelouch_000000.txt").read_text() == "a cat\n"
    assert (inbox / "lelouch_000000_frame_diff.txt").read_text() == "0.25\n"
    assert run(place, source, "--max-difference", 0.9).stdout.startswith(f"{len(names)} there already\n")


def test_a_data_set_of_chains_becomes_chains(place: Place, tmp_path: Path) -> None:
    """The scripts record no text with them."""
    row = {f"frame_{number}": [picture(number)] for number in range(4)}
    rows = datasets.Dataset.from_dict({**row, "diff_0_1": [0.1], "diff_1_2": [0.2], "diff_2_3": [0.3]})
    source = write(rows, tmp_path / "dance", "saved")
    result = run(place, source)
    assert "row 0: has no text or caption or prompt: give one --prompt for all" in result.stderr
    assert run(place, source, "--prompt", "she dances").exit_code == 0
    frame_files = [f"dance_000000_frame_{number}.png" for number in range(4)]
    assert listed(place.config.inbox) == sorted(
        [*frame_files, "dance_000000.txt", "dance_000000_frame_diff.txt"]
    )
    assert (place.config.inbox / "dance_000000_frame_diff.txt").read_text() == "0.1\n0.2\n0.3\n"


def test_pictures_alone_become_jobs_named_by_their_rows(place: Place, tmp_path: Path) -> None:
    """None of them leads anywhere else, and two of one name both come in."""
    told = ["cat", "../../outside", "videos/dog.mp4", "cat", ".hidden", "", "x_end"]
    rows = datasets.Dataset.from_dict(
        {
            "image": [picture(number) for number in range(len(told))],
            "caption": ["x"] * len(told),
            "name": told,
        }
    )
    assert run(place, write(rows, tmp_path / "set", "parquet")).exit_code == 0
    names = ["cat", "outside", "dog", "cat_000003", "hidden", "set_000005", "x_end_video"]
    assert listed(place.config.inbox) == sorted(
        name + ending for name in names for ending in (".png", ".txt")
    )


def test_differences_that_are_not_recorded_are_measured(place: Place, tmp_path: Path) -> None:
    rows = as_the_scripts([{**row, "frame_diff": None} for row in ROWS]).cast_column(
        "frame_diff", datasets.Value("float64")
    )
    assert run(place, write(rows, tmp_path / "set", "saved")).exit_code == 0
    told = float((place.config.inbox / "set_000001_frame_diff.txt").read_text())
    pair = [np.array(ROWS[1][column]) for column in ("first_frame", "last_frame")]
    assert told == video_frames.difference(*pair)


def test_bad_rows_are_reported_and_the_others_prepared(place: Place, tmp_path: Path) -> None:
    """In a parquet file that tells nothing of pictures, as other programs write them."""
    content = io.BytesIO()
    picture().save(content, "PNG")
    good = {"bytes": content.getvalue(), "path": None}
    gone = {"bytes": None, "path": "/nowhere.png"}
    firsts = [good, None, {"bytes": b"no picture", "path": None}, gone, good]
    texts = ["x", "x", "x", "x", " "]
    source = tmp_path / "set.parquet"
    lasts = [good["bytes"]] * 5
    rows = {"first_frame": firsts, "last_frame": lasts, "text": texts, "frame_diff": [0.5] * 5}
    pyarrow.parquet.write_table(pyarrow.table(rows), source)
    result = run(place, source)
    assert (result.exit_code, result.stdout) == (1, f"1 prepared in {place.config.inbox}\n4 bad\n")
    told = dict(line.removeprefix("framepackd: ").split(": ", 1) for line in result.stderr.splitlines())
    assert "has no first_frame" in told["row 1"]
    assert "first_frame is not a picture" in told["row 2"]
    assert "first_frame is /nowhere.png, which is not a file" in told["row 3"]
    assert "has no text" in told["row 4"]


def test_of_a_parquet_file_no_more_than_a_row_group_or_two_is_in_memory(tmp_path: Path) -> None:
    megabyte = [{"bytes": bytes([number]) * (1 << 20), "path": None} for number in range(40)]
    rows = pyarrow.table({"image": megabyte, "text": ["x"] * 40})
    pyarrow.parquet.write_table(
        rows, tmp_path / "set.parquet", row_group_size=4, compression="none", use_dictionary=False
    )
    code = (
        "import sys, pyarrow; from pathlib import Path; from framepackd.prepare import items, prepare\n"
        "source = prepare.find(items.Options(Path(sys.argv[1]), Path('unused')))\n"
        "assert sum(1 for item in source.items) == source.total == 40\n"
        "print(pyarrow.default_memory_pool().max_memory())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set.parquet")], capture_output=True, check=True
    )
    assert 4 << 20 < int(told.stdout) < 12 << 20


def test_one_of_several_splits_has_to_be_named(place: Place, tmp_path: Path) -> None:
    rows = as_the_scripts(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "saved"))
    for split in ("train", "test"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        rows.select([0] if split == "train" else [1]).to_parquet(
            str(tmp_path / f"hub/{split}-00000-of-00001.parquet")
        )
    for source in (tmp_path / "saved", tmp_path / "hub"):
        result = run(place, source)
        assert result.exit_code == 2
        assert "--split must be one of them" in result.stderr
        assert run(place, source, tmp_path / f"to-{source.name}", "--split", "test").exit_code == 0
        text = tmp_path / f"to-{source.name}" / f"{source.name}_000000.txt"
        assert text.read_text() == "a dog\n"
    assert "got 'dev'" in run(place, tmp_path / "saved", "--split", "dev").stderr


def test_what_is_no_data_set_for_jobs_is_refused(place: Place, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"a": [1], "frame_0": [1]}).save_to_disk(str(tmp_path / "numbers"))
    result = run(place, tmp_path / "numbers")
    assert (result.exit_code, "has the columns a, frame_0: there must be" in result.stderr) == (2, True)
    (tmp_path / "broken.parquet").write_text("no parquet")
    result = run(place, tmp_path / "broken.parquet")
    assert (result.exit_code, "cannot be read as a data set" in result.stderr) == (2, True)
    assert "--frames is for videos" in run(place, tmp_path / "numbers", "--frames", 3).stderr


def test_without_the_library_the_error_says_what_to_install(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run(place, tmp_path / "x.parquet")
    assert (result.exit_code, "pip install 'framepackd[datasets]'" in result.stderr) == (2, True)


@pytest.mark.parametrize("chain", [None, 3])
def test_what_is_prepared_is_saved_with_the_columns_of_the_scripts_and_read_again(
    place: Place, tmp_path: Path, chain: int | None
) -> None:
    """Also what an earlier run had prepared; and the names come back."""
    for number in range(3):
        make_video(tmp_path / f"videos/clip{number}.mp4", 6, seed=number)
        (tmp_path / f"videos/clip{number}.txt").write_text(f"clip {number}")
    more = ["--frames", chain] if chain else []
    run(place, tmp_path / "videos/clip1.mp4", *more)
    result = run(place, tmp_path / "videos", *more, "--save-dataset", tmp_path / "saved")
    assert result.exit_code == 0, result.output
    assert "3 rows in" in result.stdout
    rows = datasets.load_from_disk(str(tmp_path / "saved"))
    if chain:
        assert rows.column_names == ["frame_0", "frame_1", "frame_2", "text", "diff_0_1", "diff_1_2"]
    else:
        assert rows.column_names == ["first_frame", "last_frame", "text", "frame_diff"]
    assert rows["text"][:] == [f"clip {number}" for number in range(3)]
    taken = list(video_frames.read_frames(tmp_path / "videos/clip2.mp4", chain or 2))
    for column, expected in zip(rows.column_names, taken, strict=False):
        np.testing.assert_array_equal(np.array(rows[2][column]), expected)
    assert rows[2]["diff_0_1" if chain else "frame_diff"] == video_frames.difference(*taken[:2])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    again = run(place, tmp_path / "saved", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert listed(tmp_path / "again") == listed(place.config.inbox)
    for name in listed(tmp_path / "again"):
        assert (tmp_path / "again" / name).read_bytes() == (place.config.inbox / name).read_bytes()

    result = run(place, tmp_path / "videos", "--save-dataset", tmp_path / "saved")
    assert (result.exit_code, "is there already: move it away" in result.stderr) == (2, True)


def push(place: Place, hub: Hub, *arguments: object, token: str) -> "subprocess.CompletedProcess[str]":
    """Run the command with a hub of our own, in a process that knows no other."""
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(place.config.state_dir.parent / "hf"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",  # the older of its two ways to upload, which ours knows
        "PYTHONPATH": ":".join(sys.path),
    }
    config = place.config.state_dir.parent / "config.toml"
    command = [sys.executable, "-m", "framepackd", "prepare", "--config", config, *arguments]
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False, timeout=100
    )


def test_a_data_set_is_pushed_with_the_users_token(place: Place, tmp_path: Path) -> None:
    video = make_video(tmp_path / "cat.mp4", 6)
    with Hub() as hub:
        result = push(place, hub, video, "--prompt", "x", "--push", "me/cats", "--private", token=TOKEN)
    assert result.returncode == 0, result.stderr
    assert "1 rows pushed to me/cats" in result.stdout
    (created,) = hub.created
    assert (created["organization"], created["name"], created["type"]) == ("me", "cats", "dataset")
    assert created.get("visibility") == "private" or created.get("private") is True
    (name,) = (name for name in hub.files if name.endswith(".parquet"))
    pushed = tmp_path / "pushed.parquet"
    pushed.write_bytes(hub.files[name])
    rows = datasets.Dataset.from_parquet(str(pushed), cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["first_frame", "last_frame", "text", "frame_diff"]
    np.testing.assert_array_equal(np.array(rows[0]["first_frame"]), next(video_frames.read_frames(video, 2)))


def test_a_push_that_is_refused_says_so_and_keeps_what_was_saved(place: Place, tmp_path: Path) -> None:
    video = make_video(tmp_path / "cat.mp4", 6)
    more = ["--prompt", "x", "--push", "me/cats", "--save-dataset", tmp_path / "kept"]
    with Hub() as hub:
        result = push(place, hub, video, *more, token="hf_wrong")  # noqa: S106 - nobody's
    assert result.returncode == 1
    assert "me/cats could not be pushed (" in result.stderr
    assert f"it is in {tmp_path / 'kept'}" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(datasets.load_from_disk(str(tmp_path / "kept"))) == 1
    assert hub.created == []


def test_a_push_that_cannot_work_is_refused_before_the_work(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    video = make_video(tmp_path / "cat.mp4", 6)
    for name, reason in (
        ("me/cats", "--push needs your token of the hub: run hf auth login, or set HF_TOKEN"),
        ("cats", "--push needs ORG/NAME, got 'cats'"),
    ):
        result = run(place, video, "--prompt", "x", "--push", name)
        assert (result.exit_code, reason in result.stderr) == (2, True)
    assert listed(place.config.inbox) == []
