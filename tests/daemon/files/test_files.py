"""Moving and delivering: whole or not at all, over nothing, and resumed after a crash at any line."""

import errno
import json
import os
from pathlib import Path

import pytest

from framepackd import files
from framepackd.delivery import target_names
from framepackd.files import moving
from framepackd.inbox.scan import Inbox
from framepackd.intake import claiming
from framepackd.intake import take as intake
from framepackd.jobs.job import State
from framepackd.settings.config import Config
from tests.daemon.place import DELIVERED, Died, Place, at_every_call, without_renameat2


@pytest.mark.parametrize("where", ["one file system", "two file systems"])
def test_a_move_never_overwrites(tmp_path: Path, request: pytest.FixtureRequest, where: str) -> None:
    if where == "two file systems":
        request.getfixturevalue("across")
    (tmp_path / "one").mkdir()
    source, target = tmp_path / "one/a", tmp_path / "b"
    source.write_text("new")
    target.write_text("old")
    with pytest.raises(FileExistsError):
        moving.move(source, target, part="x")
    assert (source.read_text(), target.read_text()) == ("new", "old")


def test_a_folder_that_is_made_is_durable_and_so_are_those_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that, a power cut could take a new folder with the video whose inputs were removed already."""
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]


@pytest.mark.parametrize(
    ("above", "made"), [(0o755, 0o755), (0o750, 0o750), (0o700, 0o700), (0o2770, 0o2770)]
)
def test_a_folder_below_one_that_others_read_can_be_read_by_them_whatever_the_umask(
    tmp_path: Path, above: int, made: int
) -> None:
    outbox = tmp_path / "outbox"
    outbox.mkdir()
    outbox.chmod(above)
    before = os.umask(0o077)
    try:
        files.make_folder(outbox / "sub")
    finally:
        os.umask(before)
    assert (outbox / "sub").stat().st_mode & 0o7777 == made


@pytest.mark.parametrize(
    ("where", "consumer"),
    [
        ("one file system", False),
        ("two file systems", True),
        pytest.param("one file system", True, marks=pytest.mark.long),
        pytest.param("two file systems", False, marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else "who empties the outbox" if value else "",
)
def test_delivery_survives_dying_at_every_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    where: str,
    consumer: bool,
) -> None:
    if where == "two file systems":
        request.getfixturevalue("across")
    places = iter(Place(tmp_path / str(number)) for number in range(500))

    def fresh() -> Place:
        made = next(places)
        made.make_ready()
        return made

    place = fresh()

    def start_again_and_check() -> None:
        nonlocal place
        collected: list[str] = []
        if consumer:
            for path in place.config.outbox.glob("[!.]*"):
                collected.append(path.name)
                path.unlink()
        intake.clear_ended(place.config, place.store)
        intake.adopt_leftovers(place.config, place.store)
        place.deliver()
        assert sorted([*collected, *place.outbox()]) == DELIVERED, "each file once, and no part of one"
        assert place.store.counts()["done"] == 1
        intake.clear_ended(place.config, place.store)
        intake.adopt_leftovers(place.config, place.store)
        assert not list(place.config.jobs_dir.iterdir())
        place = fresh()

    assert at_every_call(monkeypatch, lambda: place.deliver(), start_again_and_check) > 8


def test_a_name_that_is_taken_in_the_last_moment_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "place")
    place.make_ready()
    choose = target_names.free_stem

    def choose_and_be_overtaken(name: str, rests: list[str], target: Path, after: str | None = None) -> str:
        stem = choose(name, rests, target, after)
        (target / f"{stem}.mp4").write_text("another's")
        monkeypatch.setattr(target_names, "free_stem", choose)
        return stem

    monkeypatch.setattr(target_names, "free_stem", choose_and_be_overtaken)
    place.deliver()
    assert (place.config.outbox / "cat.mp4").read_text() == "another's"
    assert (place.config.outbox / "cat_001.mp4").read_text() == "video"


@pytest.mark.usefixtures("across")
def test_a_name_taken_after_the_file_was_copied_is_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "place")
    place.make_ready()
    with monkeypatch.context() as patched:
        rename = files.rename_new

        def die_before_it_has_its_name(source: Path, target: Path) -> None:
            if source.parent == target.parent:
                raise Died
            rename(source, target)

        patched.setattr(files, "rename_new", die_before_it_has_its_name)
        with pytest.raises(Died):
            place.deliver()
    (part,) = place.config.outbox.glob(".framepackd-*.part")
    taken = f"cat{part.name.split('-.', 1)[-1].removesuffix('.part')}"
    (place.config.outbox / taken).write_text("another's")
    place.deliver()
    assert (place.config.outbox / taken).read_text() == "another's"
    assert place.outbox() == sorted([taken, *(name.replace("cat", "cat_001") for name in DELIVERED)])


@pytest.mark.parametrize("links", [True, False])
def test_a_move_works_and_overwrites_nothing_where_renameat2_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    without_renameat2(monkeypatch)
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("new")
    moving.move(source, target, part="x")
    assert target.read_text() == "new"
    source.write_text("newer")
    with pytest.raises(FileExistsError):
        moving.move(source, target, part="x")
    assert (source.read_text(), target.read_text()) == ("newer", "new")


def test_a_file_that_changes_between_scan_and_taking_is_left_where_it_is(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    (group,) = Inbox(place.config.inbox, 0).scan().ready
    (place.config.inbox / "cat.txt").write_text("something else altogether")
    with pytest.raises(claiming.ChangedError):
        intake.take(group, place.config, place.store)
    assert len(list(place.config.inbox.iterdir())) == 2


def test_the_size_that_is_set_nearest_to_the_job_wins(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    (place.config.inbox / "_defaults.toml").write_text("width = 64\nheight = 64\n")
    (place.config.inbox / "cat.toml").write_text("resolution = 320\n")
    place.take()
    (job,) = place.store.in_state(State.QUEUED)
    assert (job.height, job.width) == (320, 304)


def test_what_is_recorded_of_a_job_is_what_the_contract_names(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.make_ready()
    place.deliver()
    record = json.loads((place.config.outbox / "cat.json").read_text())
    named = (
        "id name state prompt model width height frames fps sections attempts resumes steps_total steps_run"
    )
    assert set(named.split()) <= set(record)
    assert {"seed", "timings", "versions", "device", "model_sources", "inputs"} <= set(record)
    assert record["state"] == "done"
    assert len(record["inputs"]["image"]["sha256"]) == 64


def test_an_error_of_our_own_fails_the_job_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "place")
    place.drop()

    def fail(*_: object) -> None:
        raise KeyError("what a fuzzed file may lead to")

    monkeypatch.setattr(Config, "spec", fail)
    place.take()
    place.deliver()
    assert "KeyError" in (place.config.failed / "cat.error.txt").read_text()
    assert (place.config.failed / "cat.png").exists()


def test_a_group_that_cannot_be_moved_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    copy = files.copy

    def refuse_text(source: Path, target: Path) -> None:
        if source.name.endswith("cat.txt.part"):
            raise PermissionError(errno.EACCES, "no")
        copy(source, target)

    monkeypatch.setattr(files, "copy", refuse_text)
    with pytest.raises(PermissionError):
        place.take()
    assert sorted(path.name for path in place.config.inbox.iterdir()) == ["cat.png", "cat.txt"]
    assert not list(place.config.jobs_dir.iterdir())
