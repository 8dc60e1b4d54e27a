"""Retry, cancel, top, pause: where a job and its files end up, also after a crash at any line."""

import itertools
import json
import os
from pathlib import Path

import pytest

from framepackd.folders import MARKER
from framepackd.inbox.scan import Inbox
from framepackd.intake import take
from framepackd.jobs import folder as work_folder
from framepackd.jobs.job import Job, State, utc_now
from framepackd.jobs.store import JobStore
from tests.daemon.control.orders import do, failed_place, only_job, settle
from tests.daemon.place import Place, at_every_call, undelivered  # noqa: F401 - across: a fixture


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


def test_a_retried_job_is_the_same_job_with_the_same_seed_and_history(tmp_path: Path) -> None:
    place = failed_place(tmp_path / "place", settings='seed = "random"')
    before = only_job(place)
    ((done, message),) = do(place, "retry", "cat")
    assert done, message
    job = only_job(place)
    assert (job.id, job.settings, job.inputs) == (before.id, before.settings, before.inputs)
    assert (job.state, job.attempts, job.error, job.finished_at) == (State.QUEUED, 0, None, None)
    assert job.history[: len(before.history)] == before.history
    assert job.steps_run == 1, "over all attempts"
    assert names(place.config.failed) == []
    place.generate()
    place.deliver()
    assert place.outbox() == ["cat.json", "cat.mp4", "cat.png", "cat.section-0.png", "cat.toml", "cat.txt"]
    assert json.loads((place.config.outbox / "cat.json").read_text())["seed"] == before.settings["seed"]


def test_without_a_daemon_a_job_that_fails_again_can_be_tried_once_more_at_once(tmp_path: Path) -> None:
    place = failed_place(tmp_path / "place", text="")
    for _ in range(2):
        ((done, message),) = do(place, "retry", "cat")
        assert (done, "fails again: cat.txt is empty" in message) == (False, True), message
        assert names(place.config.failed) == ["cat.error.txt", "cat.png", "cat.txt"]
    (place.config.failed / "cat.txt").write_text("pan left")
    ((done, message),) = do(place, "retry", "cat")
    assert done, message


@pytest.mark.parametrize(
    ("where", "checked"),
    [
        pytest.param("one file system", True, id="one file system", marks=pytest.mark.long),
        pytest.param("two file systems", True, id="two file systems"),
        pytest.param("one file system", False, id="failed its checks"),
    ],
)
def test_bringing_files_back_survives_dying_at_every_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    where: str,
    checked: bool,
) -> None:
    if where == "two file systems":
        request.getfixturevalue("across")
    roots = (tmp_path / str(number) for number in itertools.count())

    def fresh() -> Place:
        made = failed_place(next(roots), text="pan left" if checked else "")
        if not checked:
            (made.config.failed / "cat.txt").write_text("pan left")
        return made

    place = fresh()

    def start_again_and_check() -> None:
        nonlocal place
        place.store = JobStore(place.config.database)
        place.store.recover()
        take.clear_ended(place.config, place.store)
        take.adopt_leftovers(place.config, place.store)
        settle(place)
        if only_job(place).state == State.FAILED:  # it died before anything was recorded
            ((done, message),) = do(place, "retry", "cat")
            assert done, message
        inputs = place.config.jobs_dir / only_job(place).id / work_folder.INPUTS
        assert names(inputs) == ["cat.png", "cat.txt"]
        assert (inputs / "cat.txt").read_text() == "pan left"
        assert names(place.config.failed) == []
        job = place.store.claim()
        assert job is not None, "it runs again"
        assert job.settings["prompt"] == "pan left"
        place = fresh()

    assert at_every_call(monkeypatch, lambda: do(place, "retry", "cat"), start_again_and_check) > 5


def test_without_the_database_a_job_that_is_brought_back_is_taken_in_from_its_work_folder(
    tmp_path: Path,
) -> None:
    place = failed_place(tmp_path / "place")
    do(place, "retry", "cat")
    place.store.close()
    place.config.database.unlink()
    place.store = JobStore(place.config.database)
    (adopted,) = take.adopt_leftovers(place.config, place.store).jobs
    assert (adopted.name, adopted.state, adopted.delivery) == ("cat", State.QUEUED, None)


@pytest.mark.parametrize("how", ["missing", "changed", "no file"])
def test_files_that_are_not_what_they_were_are_named_and_nothing_is_touched(tmp_path: Path, how: str) -> None:
    place = failed_place(tmp_path / "place")
    if how == "missing":
        (place.config.failed / "cat.txt").unlink()
    elif how == "no file":
        (place.config.failed / "cat.txt").rename(tmp_path / "elsewhere")
        (place.config.failed / "cat.txt").symlink_to(tmp_path / "elsewhere")
    else:
        (place.config.failed / "cat.txt").write_text("pan right")
    before = names(place.config.failed)
    ((done, message),) = do(place, "retry", "cat")
    assert not done
    assert how in message
    assert str(place.config.failed / "cat.txt") in message
    assert only_job(place).state == State.FAILED
    assert names(place.config.failed) == before


def test_a_job_that_failed_its_checks_can_be_corrected_in_the_failed_folder(tmp_path: Path) -> None:
    place = failed_place(tmp_path / "place", settings="steps = 0")
    ((done, message),) = do(place, "retry", "cat")
    assert not done
    assert "steps must be 1 to 100, got 0" in message
    settle(place)
    (place.config.failed / "cat.toml").write_text("steps = 3")
    ((done, message),) = do(place, "retry", "cat")
    assert done, message
    job = only_job(place)
    assert (job.settings["steps"], job.steps_total) == (3, 4 * 3)
    assert names(place.config.failed) == []


def test_of_several_failed_jobs_of_one_name_each_gets_its_own_files_back(tmp_path: Path) -> None:
    place = failed_place(tmp_path / "place", text="first")
    place.drop()
    (place.config.inbox / "cat.txt").write_text("second")
    place.take()
    second = place.store.claim()
    assert second is not None
    place.store.decide(second.id, State.FAILED, error="no")
    settle(place)
    assert "cat_001.txt" in names(place.config.failed)
    ((done, message),) = do(place, "retry", "cat")
    assert done, message
    assert second.id in message, "the name means the last"
    assert (place.config.jobs_dir / second.id / work_folder.INPUTS / "cat.txt").read_text() == "second"
    assert names(place.config.failed) == ["cat.error.txt", "cat.png", "cat.txt"]


def test_while_the_failed_folder_cannot_be_written_the_job_waits_for_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = failed_place(tmp_path / "place")
    with monkeypatch.context() as patched:

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", "cat.png")

        patched.setattr("framepackd.files.moving.move", refuse)
        ((done, message),) = do(place, "retry", "cat")
    assert done
    assert "as soon as they can be moved (cat.png may not be moved or written by this user" in message
    assert place.store.claim() is None
    settle(place)
    assert place.store.claim() is not None


def test_a_cancelled_job_lies_in_the_failed_folder_and_can_be_retried(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    place.take()
    ((done, message),) = do(place, "cancel", "cat")
    assert done, message
    assert names(place.config.failed) == ["cat.cancelled.txt", "cat.png", "cat.txt"]
    assert only_job(place).state == State.CANCELLED
    assert place.store.claim() is None
    ((done, message),) = do(place, "retry", "cat")
    assert done, message
    assert place.store.claim() is not None


@pytest.mark.parametrize(("how", "delivered"), [("keep", True), ("discard", False)])
def test_the_unfinished_video_of_a_cancelled_job_is_delivered_only_with_keep(
    tmp_path: Path, how: str, delivered: bool
) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    place.take()
    (job,) = place.store.in_state(State.QUEUED)
    place.store.claim()
    place.store.cancel(job.id, how)
    result = place.config.jobs_dir / job.id / "result"
    result.mkdir()
    (result / ".mp4").write_text("half a video")
    place.store.decide(job.id, State.CANCELLED, error="cancelled")
    settle(place)
    assert (place.config.failed / "cat.mp4").exists() is delivered


def test_a_cancellation_that_is_recorded_outlives_the_daemon_and_wins_over_every_end(tmp_path: Path) -> None:
    def dies(store: JobStore, job_id: str) -> None:
        assert job_id
        store.recover()

    ends = (
        dies,
        lambda store, job_id: store.requeue(job_id, "stopped"),
        lambda store, job_id: store.count_attempt(job_id, "killed", max_attempts=3),
        lambda store, job_id: store.count_attempt(job_id, "killed", max_attempts=1),
        lambda store, job_id: store.decide(job_id, State.DONE),
        lambda store, job_id: store.decide(job_id, State.FAILED, error="no"),
    )
    for number, end in enumerate(ends):
        place = Place(tmp_path / str(number))
        place.drop()
        place.take()
        job = place.store.claim()
        assert job is not None
        assert place.store.cancel(job.id, "discard")
        end(place.store, job.id)
        assert place.store.claim() is None
        settle(place)
        assert only_job(place).state == State.CANCELLED


def test_a_running_job_of_a_daemon_that_is_dead_is_cancelled_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    place.take()
    assert place.store.claim() is not None
    ((done, message),) = do(place, "cancel", "cat")
    assert done, message
    assert only_job(place).state == State.CANCELLED


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
def test_a_failed_job_keeps_checkpoints_that_were_set_aside_for_some_days(
    tmp_path: Path, state: State, old: bool
) -> None:
    work = tmp_path / "job"
    kept = ("checkpoint", "checkpoint.aside-1")
    for name in (*kept, "inputs"):
        (work / name).mkdir(parents=True)
        (work / name / "file").touch()
    (work / "manifest.json").touch()
    if old:
        for path in work.rglob("*"):
            os.utime(path, (0, 0))
    work_folder.clear_work_folder(work, failed=state is State.FAILED)
    left = sorted(path.name for path in work.iterdir()) if work.exists() else []
    assert left == ([] if old or state is State.CANCELLED else [*kept])


def add(store: JobStore, *jobs: str, state: State = State.QUEUED) -> None:
    for name in jobs:
        store.add(Job(id=f"2026-{name}-1", name=name, state=state, created_at=utc_now()))


def order(store: JobStore) -> list[str]:
    return [job.name for job in store.in_state(State.QUEUED)]


def test_top_lets_jobs_run_next_in_the_order_given_but_after_an_interrupted_one(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    add(place.store, "ant", "bee", "cat", "dog")
    assert place.store.claim() is not None
    assert [done for done, _ in do(place, "top", "dog", "cat")] == [True, True]
    assert order(place.store) == ["dog", "cat", "bee"]
    place.store.requeue("2026-ant-1", "paused")
    assert order(place.store) == ["ant", "dog", "cat", "bee"]


def test_move_lets_a_job_run_right_before_another_one_or_last(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    add(place.store, "ant", "bee", "cat", "dog")
    for name, before, wanted in (
        ("dog", "2026-bee-1", ["ant", "dog", "bee", "cat"]),
        ("ant", None, ["dog", "bee", "cat", "ant"]),
        ("bee", "2026-dog-1", ["bee", "dog", "cat", "ant"]),
    ):
        ((done, message),) = do(place, "move", name, before=before)
        assert done, message
        assert order(place.store) == wanted
    assert place.store.claim() is not None
    for name, before in (("bee", None), ("cat", "2026-bee-1"), ("cat", "2026-cat-1")):
        ((done, message),) = do(place, "move", name, before=before)
        assert not done, message
    assert order(place.store) == ["dog", "cat", "ant"]
    add(place.store, "eel")
    assert order(place.store) == ["dog", "cat", "ant", "eel"]


@pytest.mark.parametrize(
    ("command", "state", "said"),
    [
        ("retry", State.QUEUED, "framepackd top lets it run next"),
        ("retry", State.DONE, "drop its files from the outbox into the inbox"),
        ("retry", State.SKIPPED, 'on_duplicate = "run"'),
        ("cancel", State.DONE, "its video is in the outbox"),
        ("cancel", State.FAILED, "framepackd retry"),
        ("top", State.CANCELLED, "framepackd retry"),
        ("top", State.RUNNING, "nothing to move"),
    ],
)
def test_a_command_that_a_state_does_not_allow_names_one_that_it_does(
    tmp_path: Path, command: str, state: State, said: str
) -> None:
    place = Place(tmp_path / "place")
    add(place.store, "cat", state=state)
    ((done, message),) = do(place, command, "cat")
    assert not done
    assert f"(cat) is {state}" in message
    assert said in message
    assert place.store.states() == {"2026-cat-1": state}


def test_which_job_is_meant_is_never_guessed(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    add(place.store, "ant", "bee")
    for wanted in ("", "2026", "nobody"):
        ((done, message),) = do(place, "cancel", wanted)
        assert not done
        assert "give the whole id" in message or "no job" in message
    assert place.store.counts()["queued"] == 2
    ((done, message),) = do(place, "cancel", "2026-a")
    assert done, message


def test_a_pause_is_remembered_and_keeps_its_time(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    do(place, "pause")
    place.store = JobStore(place.config.database)
    paused = place.store.paused()
    assert paused is not None
    assert "by framepackd pause since 20" in paused
    do(place, "pause")
    assert place.store.paused() == paused
    do(place, "resume")
    assert place.store.paused() is None


def test_a_file_in_the_inbox_is_no_hindrance_to_a_retry(tmp_path: Path) -> None:
    place = failed_place(tmp_path / "place")
    place.drop()
    ((done, message),) = do(place, "retry", "cat")
    assert done, message
    (group,) = Inbox(place.config.inbox, 0).scan().ready
    take.take(group, place.config, place.store)
    assert place.store.counts()["queued"] == 2
