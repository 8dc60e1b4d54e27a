"""Folders that come and go: nothing is delivered into what a share is mounted over, and nothing is missed."""

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest

from framepackd import folders
from framepackd.control import commands
from framepackd.delivery import deliveries
from framepackd.folders import MARKER, FolderError
from framepackd.intake import take_back
from framepackd.intake.rounds import Rounds
from framepackd.jobs.job import State
from tests.daemon.loop import Loop, ask_in_thread
from tests.daemon.mounts import mounted, needs_mounts, unmount
from tests.daemon.place import Place, undelivered


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def accept(place: Place) -> None:
    answer = commands.perform({"command": "accept_folders"}, commands.Queue(place.config, place.store))
    assert all(result["done"] for result in answer["results"])


def deliver(place: Place) -> None:
    for job in undelivered(place.store):
        deliveries.settle(job, place.config, place.store, take_back.bring_back)


def test_a_folder_that_was_never_seen_is_made_and_marked(place: Place) -> None:
    place.config.outbox.rmdir()
    with folders.opened("outbox", place.config):
        pass
    assert "leave this file" in (place.config.outbox / MARKER).read_text()


@pytest.mark.parametrize("state", [State.DONE, State.FAILED])
def test_a_folder_without_the_marker_is_waited_for_and_nothing_is_made_in_it(
    place: Place, state: State
) -> None:
    key = "outbox" if state is State.DONE else "failed"
    root: Path = getattr(place.config, key)
    with folders.opened(key, place.config):
        pass
    away = root.with_name("away")
    root.rename(away)
    place.drop()
    job = place.take()
    place.store.claim()
    place.store.decide(job.id, state)
    with pytest.raises(FolderError, match="is not there: mount its disk"):
        deliver(place)
    assert not root.exists(), "the daemon does not make it again"
    root.mkdir()
    with pytest.raises(FolderError, match="is not the folder that it was") as told:
        deliver(place)
    assert "framepackd check --accept-folders" in str(told.value)
    assert not list(root.iterdir())
    root.rmdir()
    away.rename(root)
    deliver(place)
    assert place.store.get(job.id).state == state


@needs_mounts
def test_an_outbox_that_is_read_only_at_the_first_start_is_reported_and_used_when_it_can_be(
    place: Place,
) -> None:
    with mounted(place.config.outbox, "-o", "ro"):
        folders.make_new(place.config)
        with pytest.raises(OSError, match="Read-only") as told, folders.opened("outbox", place.config):
            pass
        reason, for_all = folders.why(told.value, "outbox", place.config)
        assert reason == f"outbox {place.config.outbox} is read-only: mount it for writing"
        assert for_all
        subprocess.run(["mount", "-o", "remount,rw", place.config.outbox], check=True)
        with folders.opened("outbox", place.config):
            pass


@pytest.mark.parametrize(
    ("place_of", "whose", "for_all"),
    [("", "", True), ("cat.png", "", True), ("sub/cat.png", "sub/cat.png", False)],
)
def test_rights_that_lack_on_a_folder_below_keep_no_other_job_back(
    place: Place, place_of: str, whose: str, for_all: bool
) -> None:
    outbox = place.config.outbox
    error = PermissionError(13, "Permission denied", str(outbox / place_of))
    reason, of_all = folders.why(error, "outbox", place.config)
    assert reason.startswith(f"{outbox / whose} may not" if whose else f"outbox {outbox} may not")
    assert of_all == for_all


def test_another_folder_is_the_right_one_once_it_is_accepted(place: Place) -> None:
    with folders.opened("outbox", place.config):
        pass
    place.config.outbox.rename(place.config.outbox.with_name("full"))
    place.config.outbox.mkdir()
    assert "is not the folder that it was" in (folders.trouble("outbox", place.config) or "")
    accept(place)
    assert folders.trouble("outbox", place.config) is None
    place.config.outbox.with_name("full").rename(place.config.outbox.with_name("outbox-again"))
    (place.config.outbox / MARKER).unlink()
    assert folders.trouble("outbox", place.config) is not None, "it is known by its marker alone"


def test_a_marker_that_another_daemon_has_left_is_taken_over(place: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other")
    shared = other.config.model_copy(update={"outbox": place.config.outbox})
    for config in (place.config, shared):
        with folders.opened("outbox", config):
            pass
    assert folders.trouble("outbox", place.config) is None, "the first still knows it"


@needs_mounts
def test_a_share_that_is_mounted_over_the_outbox_late_is_not_filled_underneath(place: Place) -> None:
    """The daemon was first started without the share: the folder underneath has a marker as well."""
    with folders.opened("outbox", place.config):
        pass
    with mounted(place.config.outbox):
        assert folders.trouble("outbox", place.config) is not None
        accept(place)
        with folders.opened("outbox", place.config):
            pass
        unmount(place.config.outbox)
        assert folders.trouble("outbox", place.config) is not None, "underneath lies another marker"


@needs_mounts
def test_an_outbox_cannot_be_unmounted_under_a_delivery(place: Place) -> None:
    with (
        mounted(place.config.outbox),
        folders.opened("outbox", place.config),
        pytest.raises(subprocess.CalledProcessError),
    ):
        unmount(place.config.outbox)


def test_the_daemon_says_that_a_folder_is_away_and_accepts_another_when_it_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "place", monkeypatch)
    place = loop.place
    with folders.opened("failed", place.config):
        pass
    (place.config.failed / MARKER).unlink()
    place.drop()
    (place.config.inbox / "cat.toml").write_text("steps = 0")
    loop.round()
    (problem,) = loop.daemon.snapshot()["problems"]
    assert problem["code"] == "failed"
    assert "is not the folder that it was" in problem["text"]
    (job,) = loop.daemon.snapshot()["jobs"]
    assert job["delivery"]["state"] == "failed"
    assert "--accept-folders" in job["delivery"]["reason"]
    assert job["delivery"]["next_try"].endswith("Z")
    asked = ask_in_thread(loop, {"command": "accept_folders"})
    loop.daemon.round()
    assert all(result["done"] for result in asked()["results"])
    loop.daemon.round()
    assert loop.counts() == {"failed": 1}
    assert loop.daemon.snapshot()["problems"] == []


def test_an_inbox_that_was_there_is_not_made_again(place: Place) -> None:
    folders.make_new(place.config)
    place.config.inbox.rmdir()
    folders.make_new(place.config)
    assert not place.config.inbox.exists()


def look(rounds: Rounds, place: Place) -> list[str]:
    return [problem.text for problem in rounds.look(place.config, lambda: False).problems]


def drops_are_noticed(place: Place, woken: threading.Event) -> bool:
    woken.clear()
    (place.config.inbox / f"{time.monotonic_ns()}.txt").write_text("x")
    return woken.wait(5)


@pytest.fixture
def woken() -> threading.Event:
    return threading.Event()


@pytest.fixture
def rounds(place: Place, woken: threading.Event) -> Rounds:
    return Rounds(place.config, place.store, woken.set)


def test_an_inbox_that_was_replaced_is_watched_again(
    place: Place, rounds: Rounds, woken: threading.Event
) -> None:
    assert look(rounds, place) == []
    assert drops_are_noticed(place, woken)
    place.config.inbox.rename(place.config.inbox.with_name("old"))
    assert rounds.has_moved(place.config)
    (told,) = look(rounds, place)
    assert "is not there: mount its share" in told
    assert not rounds.has_moved(place.config), "it is away, which was said"
    place.config.inbox.mkdir()
    assert rounds.has_moved(place.config)
    assert look(rounds, place) == []
    assert drops_are_noticed(place, woken)
    rounds.end()


@needs_mounts
def test_an_inbox_whose_share_is_mounted_late_and_goes_away_is_reported_and_watched_again(
    place: Place, rounds: Rounds, woken: threading.Event
) -> None:
    assert look(rounds, place) == []
    with mounted(place.config.inbox):
        assert rounds.has_moved(place.config)
        assert look(rounds, place) == [], "a share that comes is looked at"
        assert drops_are_noticed(place, woken)
        unmount(place.config.inbox)
    (told,) = look(rounds, place)
    assert f"lay on the disk or share at {place.config.inbox}, which is not mounted now" in told
    with mounted(place.config.inbox):
        assert rounds.has_moved(place.config)
        assert look(rounds, place) == []
        assert drops_are_noticed(place, woken)
    rounds.end()


def test_the_record_of_folders_survives_damage(place: Place) -> None:
    with folders.opened("outbox", place.config):
        pass
    marker = (place.config.outbox / MARKER).read_text()
    record = place.config.state_dir / folders.RECORD
    record.write_text(record.read_text()[:10])
    with folders.opened("outbox", place.config):
        pass
    assert json.loads(record.read_text())[str(place.config.outbox)] == marker
