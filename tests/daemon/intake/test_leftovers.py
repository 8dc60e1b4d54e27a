"""What a start finds in the state folder: taken up where it is ours, told and left alone where it is not."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framepackd import files
from framepackd.delivery import deliveries
from framepackd.intake import claiming, take, take_back
from framepackd.jobs import folder as work_folder
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from tests.daemon.place import Died, Place, cross

ID = "20260101-000000-abcdef"  # of no job


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def die(*_: object, **__: object) -> None:
    raise Died


def adopt(place: Place) -> tuple[list[Job], list[str]]:
    left = take.adopt_leftovers(place.config, place.store)
    return left.jobs, [problem.text for problem in left.problems]


def lose_the_database(place: Place) -> None:
    for file in place.config.state_dir.glob("framepackd.db*"):
        file.unlink()
    place.store = JobStore(place.config.database)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave_queued(place: Place) -> str:
    """Leave a job's work folder that the database does not know, to be taken up; give its id."""
    place.drop()
    job = place.take()
    lose_the_database(place)
    return job.id


def a_folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "beach.png").write_text("precious")


def a_file(path: Path, outside: Path) -> None:
    path.write_text("precious")


def a_link_to_a_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def a_link_to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "nothing")


FOREIGN = [a_folder, a_file, a_link_to_a_folder, a_link_to_nothing]


@pytest.mark.parametrize("make", FOREIGN)
def test_foreign_files_are_reported_and_left_alone_and_hide_no_job(
    place: Place, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").write_text("precious")
    identity = leave_queued(place)
    others = [place.config.jobs_dir / name for name in ("a", ID, f"{ID}-old", f"٢{ID[1:]}", "new\nline")]
    for path in others:
        make(path, tmp_path / "outside")
    for _ in range(2):  # at the next start as well
        _, problems = adopt(place)
        for path in others:
            assert os.path.lexists(path)
            assert path.is_symlink() or path.is_file() or (path / "beach.png").read_text() == "precious"
        assert (tmp_path / "outside/precious").exists()
        assert len(problems) == len(others)
        assert all("move" in problem and problem.isprintable() for problem in problems)
    assert place.store.get(identity).state == State.QUEUED


def test_many_foreign_files_are_a_few_lines(place: Place) -> None:
    for number in range(1000):
        (place.config.jobs_dir / str(number)).touch()
    (place.config.jobs_dir / "lost+found").mkdir()
    _, problems = adopt(place)
    assert len(problems) == take.MAX_FOREIGN + 1
    assert "995 more" in problems[-1]


MANIFESTS: dict[str, Any] = {
    "cut": '{"folder": "", "na',
    "empty": "",
    "a list": "[]",
    "without files": {"folder": "", "name": "cat", "defaults": []},
    "no files": {"folder": "", "name": "cat", "defaults": [], "files": []},
    "files of another kind": {"folder": "", "name": "cat", "defaults": [], "files": ["cat.png"]},
    "a number for a name": {"folder": "", "name": 7, "defaults": [], "files": []},
    "nested without end": "[" * 100_000,
    "no UTF-8": b"\xff\xfe",
}


def test_a_damaged_manifest_is_reported_with_a_remedy_and_hides_no_job(place: Place) -> None:
    identity = leave_queued(place)
    works = [place.config.jobs_dir / f"20260101-{number:06}-abcdef" for number in range(len(MANIFESTS))]
    for work, content in zip(works, MANIFESTS.values(), strict=True):
        (work / work_folder.INPUTS).mkdir(parents=True)
        (work / work_folder.INPUTS / "cat.png").write_text("precious")
        written = content if isinstance(content, str | bytes) else json.dumps(content)
        (work / work_folder.MANIFEST).write_bytes(written.encode() if isinstance(written, str) else written)
    jobs, problems = adopt(place)
    assert [job.id for job in jobs] == [identity]
    for work, problem in zip(works, problems, strict=True):
        assert "damaged" in problem
        assert f"{work}/inputs" in problem
        assert (work / work_folder.INPUTS / "cat.png").read_text() == "precious"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_a_manifest_that_is_no_file_neither_hangs_nor_stops_the_start(
    place: Place, make: Callable[[Path], None]
) -> None:
    identity = leave_queued(place)
    (place.config.jobs_dir / ID).mkdir()
    make(place.config.jobs_dir / ID / work_folder.MANIFEST)
    jobs, problems = adopt(place)
    assert [job.id for job in jobs] == [identity]
    assert len(problems) == 1


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), KeyError("odd"), RecursionError()])
def test_one_folder_that_cannot_be_finished_hides_no_job_behind_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    identity = leave_queued(place)
    shutil.copytree(place.config.jobs_dir / identity, place.config.jobs_dir / ID)
    read = work_folder.read_manifest

    def refuse(work: Path) -> dict[str, Any]:
        if work.name == ID:
            raise error
        return read(work)

    with monkeypatch.context() as patched:
        patched.setattr(take, "read_manifest", refuse)
        jobs, (problem,) = adopt(place)
    assert [job.id for job in jobs] == [identity]
    assert ID in problem
    jobs, problems = adopt(place)
    assert ([job.id for job in jobs], problems) == ([ID], []), "tried again"


def test_what_a_crash_left_before_the_manifest_is_removed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(Died):
            place.take()
    (work,) = place.config.jobs_dir.iterdir()
    assert names(work) == [".framepackd-manifest.json.part", "inputs"]
    assert adopt(place) == ([], [])
    assert names(place.config.jobs_dir) == []


def test_a_full_disk_leaves_no_folder_behind_at_each_try(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        path.with_name(".framepackd-manifest.json.part").touch()
        raise OSError(errno.ENOSPC, "no room")

    place.drop()
    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="no room"):
        place.take()
    assert names(place.config.jobs_dir) == []
    assert names(place.config.inbox) == ["cat.png", "cat.txt"]


def test_an_ended_job_whose_folder_is_a_link_takes_nothing_with_it(place: Place, tmp_path: Path) -> None:
    place.drop()
    job = place.take()
    place.store.decide(job.id, State.FAILED, error="planted")
    work = place.config.jobs_dir / job.id
    work.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/precious").write_text("precious")
    work.symlink_to(tmp_path / "elsewhere")
    deliveries.settle(place.store.get(job.id), place.config, place.store, take_back.bring_back)
    assert place.store.get(job.id).state == State.FAILED
    _, (problem,) = adopt(place)
    assert "move it away" in problem
    assert (tmp_path / "elsewhere/precious").exists()


def test_a_link_in_the_folder_of_a_failed_job_is_removed_and_not_followed(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").touch()
    work = place.config.jobs_dir / ID
    (work / work_folder.CHECKPOINT).mkdir(parents=True)
    (work / "result").symlink_to(tmp_path / "outside")
    work_folder.clear_work_folder(work, failed=True)
    assert names(work) == [work_folder.CHECKPOINT]
    assert names(tmp_path / "outside") == ["precious"]


class Share:
    """A place whose inbox can be unmounted: what lies under it then is an empty folder."""

    def __init__(self, place: Place) -> None:
        self.inbox = place.config.inbox
        self.aside = self.inbox.with_name("share")

    def unmount(self) -> None:
        self.inbox.rename(self.aside)
        self.inbox.mkdir()

    def mount(self) -> None:
        self.inbox.rmdir()
        self.aside.rename(self.inbox)


def die_while_taking(place: Place, monkeypatch: pytest.MonkeyPatch, copied: int) -> None:
    """Die when all files have their hidden names, and some are copied."""
    copy = files.copy
    done: list[Path] = []

    def some(source: Path, target: Path) -> None:
        if len(done) == copied:
            raise Died
        copy(source, target)
        done.append(target)

    with monkeypatch.context() as patched:
        patched.setattr(files, "copy", some)
        with pytest.raises(Died):
            place.take()


@pytest.mark.parametrize("copied", [0, 1])
@pytest.mark.parametrize("folder", ["", "sub"])
@pytest.mark.parametrize("noted", [True, False])
def test_a_job_half_taken_in_waits_for_its_share(
    place: Place, monkeypatch: pytest.MonkeyPatch, copied: int, folder: str, noted: bool
) -> None:
    """``noted``: which inbox it was; what an earlier version left does not say."""
    place.drop(folder)
    die_while_taking(place, monkeypatch, copied)
    (work,) = place.config.jobs_dir.iterdir()
    if not noted:
        manifest = json.loads((work / work_folder.MANIFEST).read_text())
        del manifest["inbox"]
        (work / work_folder.MANIFEST).write_text(json.dumps(manifest))
    share = Share(place)
    share.unmount()
    for _ in range(2):
        jobs, (problem,) = adopt(place)
        assert not jobs
        assert "is half taken in" in problem
        assert "is its share mounted?" in problem
        assert names(place.config.inbox) == [], "nothing is put where the share will hide it"
        assert work.exists()
    share.mount()
    (job,), problems = adopt(place)
    assert (job.name, job.delivery, problems) == ("cat", None, [])
    assert names(place.config.inbox / folder) == []
    assert names(work / work_folder.INPUTS) == ["cat.png", "cat.txt"]


def test_files_of_that_name_in_the_bare_folder_are_neither_hidden_nor_taken_for_the_others(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop()
    die_while_taking(place, monkeypatch, 1)
    share = Share(place)
    share.unmount()
    (place.config.inbox / "cat.txt").write_text("another's")
    _, (problem,) = adopt(place)
    assert "is half taken in" in problem
    assert names(place.config.inbox) == ["cat.txt"]
    (place.config.inbox / "cat.txt").unlink()
    share.mount()
    (job,), _ = adopt(place)
    assert job.settings["prompt"] == "pan left"


@pytest.mark.parametrize("copied", [0, 1])
def test_files_that_somebody_removed_from_the_inbox_are_not_waited_for(
    place: Place, monkeypatch: pytest.MonkeyPatch, copied: int
) -> None:
    place.drop()
    die_while_taking(place, monkeypatch, copied)
    (claimed,) = place.config.inbox.glob("*cat.txt.part")
    claimed.unlink()
    assert adopt(place) == ([], [])
    assert names(place.config.inbox) == ["cat.png"]
    assert names(place.config.jobs_dir) == []


def test_an_inbox_that_goes_away_while_files_are_taken_leaves_them_to_be_taken_in_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop()
    share = Share(place)
    copy = files.copy

    def go_away(source: Path, target: Path) -> None:
        copy(source, target)
        share.unmount()
        raise OSError(errno.ESTALE, "stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(files, "copy", go_away)
        with pytest.raises(claiming.HalfTakenError):
            place.take()
    assert names(place.config.inbox) == []
    share.mount()
    (job,), problems = adopt(place)
    assert (job.name, problems) == ("cat", [])


def test_files_that_can_be_neither_taken_nor_put_back_are_adopted_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(files, "copy", fail)
        patched.setattr(files, "rename_to_free_name", fail)
        with pytest.raises(claiming.HalfTakenError, match="input/output error"):
            place.take()
    (job,), problems = adopt(place)
    assert (job.name, problems) == ("cat", [])


@pytest.mark.parametrize("dying", ["unlink", "rename_new"])
def test_a_copy_on_its_way_back_across_file_systems_is_not_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch, dying: str
) -> None:
    """It is all there is when the file itself was removed from the inbox."""
    place.drop()
    picture = (place.config.inbox / "cat.png").read_bytes()
    cross(monkeypatch)
    unlink, rename = Path.unlink, files.rename_new
    failing = True

    def fail_at_the_text(path: Path, missing_ok: bool = False) -> None:
        nonlocal failing
        if failing and path.name.endswith("cat.txt.part"):
            failing = False
            raise OSError(errno.EIO, "input/output error")
        unlink(path, missing_ok=missing_ok)
        if not failing and dying == "unlink" and path.name == "cat.png":
            raise Died  # the copy is gone from the work folder, and has no name in the inbox yet

    def die_before_the_name(source: Path, target: Path) -> None:
        if dying == "rename_new" and source.name.startswith(".framepackd-back-"):
            raise Died
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fail_at_the_text)
        patched.setattr(files, "rename_new", die_before_the_name)
        with pytest.raises(Died):
            place.take()
    adopt(place)
    job = place.take()
    (taken,) = (place.config.jobs_dir / job.id / work_folder.INPUTS).glob("*.png")
    assert taken.read_bytes() == picture
    assert names(place.config.inbox) == []


def test_a_last_copy_is_put_back_next_to_another_file_of_its_name(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop()
    picture = (place.config.inbox / "cat.png").read_bytes()
    unlink = Path.unlink

    def refuse_text(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith("cat.txt.part"):
            (place.config.inbox / "cat.png").write_text("another's")
            raise OSError(errno.EIO, "input/output error")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_text)
    with pytest.raises(OSError, match="input/output"):
        place.take()
    assert (place.config.inbox / "cat.png").read_text() == "another's"
    assert (place.config.inbox / "cat_001.png").read_bytes() == picture


def test_a_folder_that_was_being_made_or_removed_is_no_work_folder(place: Place) -> None:
    (place.config.jobs_dir / f".framepackd-{ID}.part/inputs").mkdir(parents=True)
    (place.config.jobs_dir / f".framepackd-{ID}.part/inputs/cat.png").touch()
    assert adopt(place) == ([], [])
    assert names(place.config.jobs_dir) == []


def test_thousands_of_folders_of_known_jobs_are_checked_without_opening_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = [f"20260101-{number:06}-abcdef" for number in range(3000)]
    for identity in identities:
        (place.config.jobs_dir / identity).mkdir()
    monkeypatch.setattr(place.store, "states", lambda: dict.fromkeys(identities, State.QUEUED))
    with monkeypatch.context() as patched:
        for call in ("lstat", "exists", "is_dir", "iterdir"):
            patched.setattr(Path, call, die)
        left = adopt(place)
    assert left == ([], [])
