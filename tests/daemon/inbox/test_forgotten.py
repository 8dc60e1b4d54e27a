"""Hidden files of our own in the inbox that nobody comes back for are told, with what to do."""

import subprocess
import time
from pathlib import Path

import pytest

from framepackd import files
from framepackd.control import client
from framepackd.inbox.forgotten import forgotten
from framepackd.inbox.scan import Inbox
from framepackd.intake import take
from framepackd.jobs.store import JobStore
from tests.daemon.place import Died, Place

ID = "20260101-000000-abcdef"
DAY = 86400.0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def told(place: Place, later: float = 0.0) -> list[str]:
    parts = Inbox(place.config.inbox, 0).scan().parts
    problems = forgotten(parts, place.config, place.store, time.time() + later)
    assert {problem.code for problem in problems} <= {"forgotten"}
    return [problem.text for problem in problems]


def die_while_taking(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(files, "copy", die)
        with pytest.raises(Died):
            place.take()


def test_files_taken_by_a_lost_state_folder_are_reported_until_they_are_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop("sub")
    die_while_taking(place, monkeypatch)
    assert told(place) == [], "a start takes them up"
    (work,) = place.config.jobs_dir.iterdir()
    work.rename(place.config.state_dir / "elsewhere")
    problems = told(place)
    assert len(problems) == 2
    for problem, name in zip(problems, ("cat.png", "cat.txt"), strict=True):
        assert f"sub/.framepackd-{work.name}-{name}.part was being taken in as job {work.name}" in problem
        subprocess.run(["bash", "-c", problem.partition("its name: ")[2]], check=True)
    assert told(place) == []
    assert place.take().name == "cat"


def test_files_of_known_jobs_and_of_work_folders_are_not_reported(place: Place) -> None:
    place.drop()
    job = place.take()
    (place.config.inbox / f".framepackd-{job.id}-cat.png.part").touch()
    (place.config.inbox / f".framepackd-{ID}-cat.png.part").touch()
    (place.config.jobs_dir / ID).mkdir()
    assert told(place) == []
    (place.config.jobs_dir / ID).rmdir()
    (problem,) = told(place)
    assert ID in problem


@pytest.mark.parametrize(
    "name", ["a cat.png", "it's.png", "new\nline.png", "\x1b[31m.png", "$(id).png", "caf\udce9.png"]
)
def test_the_suggested_command_is_printable_and_means_that_file(place: Place, name: str) -> None:
    part = place.config.inbox / f".framepackd-{ID}-{name}.part"
    part.write_text("precious")
    (problem,) = told(place)
    assert problem.isprintable()
    problem.encode()
    subprocess.run(["bash", "-c", problem.partition("its name: ")[2]], check=True)
    assert [path.name for path in place.config.inbox.iterdir()] == [name]


def test_the_suggested_command_overwrites_no_file_that_came_meanwhile(place: Place) -> None:
    (place.config.inbox / f".framepackd-{ID}-cat.png.part").write_text("old")
    (place.config.inbox / "cat.png").write_text("new")
    (problem,) = told(place)
    subprocess.run(["bash", "-c", problem.partition("its name: ")[2]], check=False)
    assert (place.config.inbox / "cat.png").read_text() == "new"


def test_files_that_the_page_left_half_written_are_reported_after_a_day(place: Place) -> None:
    (place.config.inbox / "web").mkdir()
    part = place.config.inbox / "web/.framepackd-cat-1234.png.part"
    part.touch()
    assert told(place) == [], "it may be being written"
    (problem,) = told(place, later=DAY + 60)
    assert f"{part} was left half-written by the page" in problem
    subprocess.run(["bash", "-c", problem.partition("this one: ")[2]], check=True)
    assert told(place, later=DAY + 60) == []


def test_thousands_of_hidden_files_are_one_line_for_each_folder(place: Place) -> None:
    for folder in range(12):
        (place.config.inbox / str(folder)).mkdir()
        for number in range(100):
            (place.config.inbox / str(folder) / f".framepackd-{ID}-{number}.png.part").touch()
    problems = told(place)
    assert len(problems) == 11
    assert all("holds 100 hidden files" in problem for problem in problems[:-1])
    assert "2 more folders" in problems[-1]


def test_status_reports_them_and_a_closed_inbox_without_a_daemon(place: Place) -> None:
    (place.config.inbox / f".framepackd-{ID}-cat.png.part").touch()
    report, _ = client.report(place.config)
    assert [problem["code"] for problem in report["problems"]] == ["forgotten"]
    place.config.inbox.rename(place.config.inbox.with_name("aside"))
    place.config.inbox.touch()
    report, _ = client.report(place.config)
    assert [problem["code"] for problem in report["problems"]] == ["inbox"]
    assert "is no folder" in report["problems"][0]["text"]


def test_after_the_database_was_lost_adopted_files_are_not_reported(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop()
    die_while_taking(place, monkeypatch)
    for file in place.config.state_dir.glob("framepackd.db*"):
        file.unlink()
    place.store = JobStore(place.config.database)
    assert told(place) == []
    assert [job.name for job in take.adopt_leftovers(place.config, place.store).jobs] == ["cat"]
    assert told(place) == []
