"""Out of the inbox: whole or not at all, whatever else happens to the files meanwhile."""

import contextlib
import errno
import io
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from framepackd import files
from framepackd.cli import page_of_job
from framepackd.inbox.listing import Signature
from framepackd.intake import claiming
from framepackd.intake import take as intake
from framepackd.jobs import folder
from framepackd.jobs.described import whole
from framepackd.jobs.job import State
from framepackd.machine.check import run_checks
from framepackd.settings.config import Config
from tests.daemon.place import Died, Place, at_every_call


@pytest.mark.parametrize("interrupted_by", ["", "somebody who writes to it"])
def test_taking_in_survives_dying_at_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_by: str
) -> None:
    """Also while it is undone, because a file has changed when it was copied."""
    places = iter(Place(tmp_path / str(number)) for number in range(500))
    place = next(places)
    place.drop("sub")
    copy = files.copy

    def copy_and_change(source: Path, target: Path) -> None:
        copy(source, target)
        if source.name.endswith("cat.txt.part"):
            source.write_text("pan right")

    def take() -> None:
        with monkeypatch.context() as patched, contextlib.suppress(claiming.ChangedError):
            if interrupted_by:
                patched.setattr(files, "copy", copy_and_change)
            place.take()

    def start_again_and_check() -> None:
        nonlocal place
        intake.adopt_leftovers(place.config, place.store)
        place.take()
        assert place.store.counts()["queued"] == 1, "one job: not lost, not doubled"
        (job,) = place.store.in_state(State.QUEUED)
        inputs = place.config.jobs_dir / job.id / folder.INPUTS
        assert sorted(path.name for path in inputs.iterdir()) == ["cat.png", "cat.txt"]
        assert job.settings["prompt"] == (inputs / "cat.txt").read_text()
        assert not list((place.config.inbox / "sub").iterdir())
        assert len(list(place.config.jobs_dir.iterdir())) == 1
        place = next(places)
        place.drop("sub")

    assert at_every_call(monkeypatch, take, start_again_and_check) > 5


def test_a_folder_removed_after_its_files_were_taken_hinders_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "place")
    place.drop("sub")

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(intake, "resolve", die)
        with pytest.raises(Died):
            place.take()
    (place.config.inbox / "sub").rmdir()
    intake.adopt_leftovers(place.config, place.store)
    assert place.store.counts()["queued"] == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cat.txt", "pan left".encode("utf-16"), "cat.txt is UTF-16: save it as UTF-8"),
        ("cat.txt", "pan left\r\n".encode("utf-16-le"), "cat.txt is UTF-16: save it as UTF-8"),
        ("cat.txt", "nach links".encode("utf-16-be"), "cat.txt is UTF-16: save it as UTF-8"),
        ("cat.txt", "pan left".encode("utf-32"), "cat.txt is UTF-32: save it as UTF-8"),
        ("cat.txt", bytes(8), "cat.txt holds null characters, so it is no text"),
        ("cat.txt", b"caf\xe9", "cat.txt is not UTF-8 (byte 3 is 0xe9): save it as UTF-8"),
        ("cat.toml", "steps = 3".encode("utf-16"), "cat.toml is UTF-16: save it as UTF-8"),
        ("cat.toml", "steps = 3".encode("utf-16-le"), "cat.toml is UTF-16: save it as UTF-8"),
        ("cat.toml", b"model = 'framepak'", "cat.toml: model must be one of demo, demo-f1, f1, framepack, "),
        ("cat.toml", b"model = 'framepak'", "got 'framepak': did you mean 'framepack'?"),
        ("cat.toml", b"loras = ['no.safetensors']", "cat.toml: loras: there is no no.safetensors in"),
        (
            "cat.toml",
            b"prompts = [{from = 90, to = 99, text = 'x'}]",
            "cat.toml: prompts: from = 90, to = 99",
        ),
    ],
)
def test_a_mistake_in_a_file_is_logged_as_a_warning_with_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes, said: str
) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    (place.config.inbox / name).write_bytes(content)
    job = place.take()
    assert job.delivery is not None
    assert said in job.delivery["error"]
    (record,) = (record for record in caplog.records if "taken in" in record.message)
    assert (record.levelname, said in record.message) == ("WARNING", True)


def test_an_unknown_model_in_a_folders_defaults_is_reported_with_that_file(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop("sub")
    (place.config.inbox / "sub/_defaults.toml").write_text("model = 'zzz'")
    job = place.take()
    assert job.delivery is not None
    assert job.delivery["error"].startswith("sub/_defaults.toml: model must be one of")


def test_a_lossless_video_is_made_with_a_warning_about_players(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    (place.config.inbox / "cat.toml").write_text("crf = 0")
    job = place.take()
    assert (job.delivery, job.settings["crf"]) == (None, 0)
    told = "crf = 0 is lossless, which phones, Firefox and QuickTime do not play: crf = 1 looks the same"
    assert [told in record.message for record in caplog.records if record.levelname == "WARNING"] == [True]
    shown = io.StringIO()
    Console(file=shown, width=400).print(
        page_of_job.page(whole(job, place.config) | {"history": []}, datetime.now(UTC))
    )
    assert told in shown.getvalue()
    (check,) = (found for fine, what, found in run_checks(lossless(place.config), gpu=False) if what == "crf")
    assert told in check


def lossless(config: Config) -> Config:
    return config.model_copy(update={"defaults": {"crf": 0}})


def test_a_hard_link_is_copied_and_the_other_name_stays_as_it_is(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    original = tmp_path / "original.txt"
    original.hardlink_to(place.config.inbox / "cat.txt")
    original.chmod(0o4755)
    job = place.take()
    taken = place.config.jobs_dir / job.id / folder.INPUTS / "cat.txt"
    assert not (place.config.inbox / "cat.txt").exists()
    assert original.stat().st_nlink == 1
    assert taken.stat().st_mode & 0o7777 == 0o666 & ~umask(), "neither set-uid nor executable"
    original.write_text("something else")
    assert taken.read_text() == "pan left"


def umask() -> int:
    now = os.umask(0o22)
    os.umask(now)
    return now


def test_a_writer_that_still_has_a_file_open_cannot_change_the_job(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    with (place.config.inbox / "cat.txt").open("a") as writer:
        job = place.take()
        writer.write(" and explode")
    assert (place.config.jobs_dir / job.id / folder.INPUTS / "cat.txt").read_text() == "pan left"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_other(path: Path) -> None:
    path.write_text("not what had settled")


@pytest.mark.parametrize("make", [make_fifo, make_link, make_folder, make_other])
@pytest.mark.parametrize("moment", ["rename", "copy"])
def test_what_takes_a_files_place_while_it_is_taken_in_is_neither_followed_nor_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], moment: str
) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    text = place.config.inbox / "cat.txt"
    signature_of, copy = claiming.signature_of, files.copy

    def swap_and_look(path: Path) -> Signature | None:
        if not (tmp_path / "taken away").exists():
            text.rename(tmp_path / "taken away")
            make(text)
        return signature_of(path)

    def swap_and_copy(source: Path, target: Path) -> None:
        if source.name.endswith("cat.txt.part"):
            source.rename(tmp_path / "taken away")
            make(source)
        copy(source, target)

    if moment == "rename":
        monkeypatch.setattr(claiming, "signature_of", swap_and_look)
    else:
        monkeypatch.setattr(files, "copy", swap_and_copy)
    with pytest.raises(OSError):  # noqa: PT011 - what it says depends on what is in the way
        place.take()
    assert sorted(path.name for path in place.config.inbox.iterdir()) == ["cat.png", "cat.txt"]
    assert (tmp_path / "taken away").read_text() == "pan left"
    assert text.lstat().st_mode != (tmp_path / "taken away").lstat().st_mode or make is make_other
    assert not list(place.config.jobs_dir.iterdir())


def test_a_file_put_back_overwrites_none_that_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "place")
    place.drop()

    def come_and_fail(source: Path, target: Path) -> None:
        (place.config.inbox / "cat.png").write_text("another")
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(files, "copy", come_and_fail)
    with pytest.raises(OSError, match="no room"):
        place.take()
    assert (place.config.inbox / "cat.png").read_text() == "another"
    assert sorted(path.name for path in place.config.inbox.iterdir()) == ["cat.png", "cat.txt", "cat_001.png"]


def test_a_failure_after_the_first_file_was_removed_brings_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    unlink = Path.unlink

    def refuse_text(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith("cat.txt.part"):
            raise OSError(errno.EIO, "input/output error")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_text)
    with pytest.raises(OSError, match="input/output"):
        place.take()
    assert sorted(path.name for path in place.config.inbox.iterdir()) == ["cat.png", "cat.txt"]
    assert not list(place.config.jobs_dir.iterdir())
