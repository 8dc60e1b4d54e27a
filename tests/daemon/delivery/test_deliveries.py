"""Deliveries that cannot be made: they stop nothing else, say why, and can be cancelled."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from framepackd import daemon, folders
from framepackd.delivery import deliver as delivery
from framepackd.delivery import deliveries
from framepackd.folders import MARKER
from framepackd.intake import scanning, take_back
from framepackd.jobs.job import Job, State, utc_now
from framepackd.reports.prometheus import Metrics
from framepackd.worker import messages
from tests.daemon.control.drawing import drawn
from tests.daemon.loop import PATIENCES, Loop, ask_in_thread

DONE = messages.Finished({}, {}, {}, None)


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    loop = Loop(tmp_path / "place", monkeypatch)
    for module in (scanning, deliveries):
        for patience in PATIENCES:
            monkeypatch.setattr(module, patience, 2.0)
    return loop


class Hanging:
    """Delivers nothing to a folder until it is let go, as a share whose server is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, key: str = "outbox") -> None:
        self.answers = threading.Event()
        self.stop: Callable[[], bool] | None = None
        original = delivery.deliver
        ways = deliveries.WAYS[key]

        def deliver(job: Job, config: Any, store: Any, *, progress: Any) -> None:
            assert job.delivery is not None
            self.stop = progress.stop
            if job.delivery["state"] in ways:
                assert self.answers.wait(30)
            original(job, config, store, progress=progress)

        monkeypatch.setattr(delivery, "deliver", deliver)
        for patience in PATIENCES:
            monkeypatch.setattr(deliveries, patience, 0.05)


@pytest.fixture
def hanging(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    hanging = Hanging(monkeypatch)
    yield hanging
    hanging.answers.set()


def drop(loop: Loop, name: str, settings: str = "") -> None:
    inbox = loop.place.config.inbox
    Image.new("RGB", (32, 32)).save(inbox / f"{name}.png")
    (inbox / f"{name}.txt").write_text("pan left")
    (inbox / f"{name}.toml").write_text(settings)


def finish_a_job(loop: Loop, name: str = "cat") -> None:
    drop(loop, name)

    def running() -> list[str]:
        return [job.id for job in loop.place.store.in_state(State.RUNNING) if job.name == name]

    loop.round()
    until(lambda: bool(running()), loop)
    result = loop.place.config.jobs_dir / running()[0]
    (result / "result").mkdir(exist_ok=True)
    (result / "result/.mp4").write_text(f"video of {name}")
    loop.worker.send(DONE)
    loop.round()


def report(loop: Loop) -> dict[str, Any]:
    return loop.daemon.snapshot()


def until(true: Callable[[], bool], loop: Loop) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        loop.daemon.round()
        time.sleep(0.01)


def test_an_outbox_that_hangs_stops_neither_the_loop_nor_the_next_job(
    loop: Loop, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_a_job(loop)
    began = time.monotonic()
    loop.round()
    assert time.monotonic() - began < 5, "the main loop goes round, and feeds systemd's watchdog"
    drop(loop, "dog")
    loop.round()
    assert [job["name"] for job in report(loop)["jobs"] if job["state"] == "running"] == ["cat", "dog"]
    assert report(loop)["jobs"][0]["note"] == "its files are being moved"
    monkeypatch.setattr(deliveries, "SILENT_SECONDS", 0.1)
    time.sleep(0.2)
    (problem,) = report(loop)["problems"]
    assert problem["code"] == "outbox"
    assert "has not answered for" in problem["text"]
    hanging.answers.set()
    until(lambda: loop.counts() == {"done": 1, "running": 1}, loop)
    until(lambda: report(loop)["problems"] == [], loop)


def test_while_the_outbox_hangs_the_failed_folder_is_used(loop: Loop, hanging: Hanging) -> None:
    finish_a_job(loop)
    drop(loop, "dog", "steps = 0")
    loop.round()
    until(lambda: loop.counts() == {"failed": 1, "running": 1}, loop)
    assert (loop.place.config.failed / "dog.error.txt").exists()


def test_a_copy_that_moves_bytes_is_not_silent(
    loop: Loop, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "SILENT_SECONDS", 0.2)
    finish_a_job(loop)
    time.sleep(0.3)
    assert report(loop)["problems"]
    assert hanging.stop is not None
    assert not hanging.stop(), "asked between two blocks"
    assert not report(loop)["problems"]


def test_a_stop_ends_a_copy_and_does_not_wait_for_a_disk_that_hangs(
    loop: Loop, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "STOP_SECONDS", 0.5)
    finish_a_job(loop)
    loop.daemon.stop()
    assert hanging.stop is not None
    assert not loop.daemon.finished
    time.sleep(0.6)
    assert hanging.stop()
    assert loop.daemon.finished


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, place: Path) -> list[str]:
    """Have the outbox refuse everything; gives the names of the jobs whose turn it was."""
    original = delivery.deliver
    tried: list[str] = []

    def deliver(job: Job, config: Any, store: Any, *, progress: Any) -> None:
        assert job.delivery is not None
        if job.delivery["state"] == State.DONE:
            tried.append(job.name)
            raise OSError(code, os.strerror(code), str(place))
        original(job, config, store, progress=progress)

    monkeypatch.setattr(delivery, "deliver", deliver)
    return tried


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EROFS, "is read-only: mount it for writing"),
        (errno.ENOSPC, "is full: make room"),
        (errno.EACCES, "correct its owner or rights"),
    ],
)
def test_a_delivery_that_cannot_be_made_says_why_and_when_it_is_tried_again(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, words: str
) -> None:
    tried = refuse(monkeypatch, code, loop.place.config.outbox)
    with caplog.at_level(logging.ERROR):
        finish_a_job(loop)
        finish_a_job(loop, "dog")
        for _ in range(4):
            loop.round()
    assert {"cat", "dog"} <= set(tried), "none keeps the others back"
    assert caplog.text.count("cannot be moved") == 1, "one line a reason"
    told = report(loop)
    for job in told["jobs"]:
        assert job["delivery"]["state"] == "done"
        assert words in job["delivery"]["reason"]
        assert str(loop.place.config.outbox) in job["delivery"]["reason"]
        assert job["delivery"]["next_try"] > "2026"
        assert job["eta_seconds"] is None
    assert told["eta_seconds"] is None
    assert [problem["code"] for problem in told["problems"]] == ["outbox"]
    shown = drawn(told)
    assert "moving" in shown
    assert "tried again at" in shown
    assert shown.count(words) == 1, "as the problem that it is, not with each job again"
    assert shown.count("its files cannot be moved: see problem") == 2
    whole = loop.daemon.answer({"command": "show", "job": "cat"})["job"]
    assert words in whole["delivery"]["reason"]
    file = loop.place.config.state_dir / "figures.prom"
    config = loop.place.config.model_copy(update={"metrics_file": file})
    Metrics(config, loop.place.store, loop.daemon.snapshot).round()
    assert words in file.read_text()
    assert "framepackd_delivery_next_try_time_seconds" in file.read_text()


def test_a_delivery_that_cannot_be_made_can_be_cancelled(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EROFS, loop.place.config.outbox)
    finish_a_job(loop)
    loop.round()
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"]})
    loop.daemon.round()
    (answer,) = asked()["results"]
    assert answer["done"], answer
    assert loop.counts() == {"cancelled": 1}
    names = sorted(path.name for path in loop.place.config.failed.iterdir())
    assert names == [MARKER, "cat.cancelled.txt", "cat.png", "cat.toml", "cat.txt"]


def test_only_unfinished_copies_of_unknown_jobs_are_reported(loop: Loop) -> None:
    place = loop.place
    place.make_ready()
    (job,) = place.store.in_state(State.RUNNING)
    (place.config.outbox / "sub").mkdir()
    (place.config.outbox / f"sub/.framepackd-{job.id}-.mp4.part").touch()
    unknown = place.config.outbox / "sub/.framepackd-20200101-000000-abcdef-.mp4.part"
    unknown.touch()
    loop.daemon.deliveries.look_for_leftovers()
    until(lambda: not loop.daemon.deliveries.busy, loop)
    (problem,) = report(loop)["problems"]
    assert problem["code"] == "forgotten"
    assert f"rm {unknown}" in problem["text"]
    assert job.id not in problem["text"]


def test_a_job_whose_files_are_moving_cannot_be_cancelled(loop: Loop, hanging: Hanging) -> None:
    finish_a_job(loop)
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"]})
    loop.daemon.round()
    (answer,) = asked()["results"]
    assert not answer["done"]
    assert "is being moved" in answer["message"]


def test_a_retry_whose_failed_folder_hangs_is_answered(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(loop, "cat", "steps = 0")
    loop.round()
    assert loop.counts() == {"failed": 1}
    answers = threading.Event()
    monkeypatch.setattr(deliveries, "REACH_SECONDS", 0.1)
    monkeypatch.setattr(take_back, "obstacle", lambda *_: answers.wait(20) and None)
    asked = ask_in_thread(loop, {"command": "retry", "jobs": ["cat"]})
    loop.daemon.round()
    (answer,) = asked()["results"]
    answers.set()
    assert not answer["done"]
    assert "has not answered yet" in answer["message"]


def decide_some(loop: Loop, count: int) -> None:
    """Have jobs whose video is made, and gone: their deliveries fail, each with its own path."""
    for number in range(count):
        job = Job(id=f"20260101-000000-{number:06x}", name=f"cat{number}", state=State.RUNNING)
        job.created_at, job.delivery = utc_now(), {"state": State.DONE, "error": None}
        loop.place.store.add(job)


def test_a_reason_that_many_jobs_share_is_one_line_and_one_query(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand of them were a thousand lines and a thousand looks at all of them, every half minute."""
    decide_some(loop, 20)
    asked: list[Any] = []
    to_deliver = loop.place.store.to_deliver
    monkeypatch.setattr(
        loop.place.store, "to_deliver", lambda *states: asked.append(1) or to_deliver(*states)
    )
    with caplog.at_level(logging.ERROR):
        loop.daemon.round()
        assert len(asked) == 2, "for the outbox and for the failed folder"
        loop.round()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the files of 20 jobs cannot be moved, those of job 20260101-000000-000000: its video is" in line
    reasons = {job["delivery"]["reason"] for job in report(loop)["jobs"]}
    assert len(reasons) == 20, "status has each with its own"


def waits(loop: Loop) -> bool:
    """Say whether the loop would sleep now, and not go round at once, again and again."""
    return loop.daemon.deliveries.due > time.monotonic()


def test_the_loop_sleeps_when_a_job_that_could_not_be_delivered_was_cancelled(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide_some(loop, 1)
    loop.daemon.round()
    loop.place.store.cancel_delivery("20260101-000000-000000", "discard")
    loop.place.store.finish("20260101-000000-000000", State.CANCELLED, error=None, output=None)
    monkeypatch.setattr(deliveries.time, "monotonic", lambda now=time.monotonic: now() + 60)
    loop.daemon.round()
    assert waits(loop)


def test_the_loop_sleeps_while_something_is_moved_and_others_could_not_be(
    loop: Loop, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "RETRY_SECONDS", 0.0)
    hang = delivery.deliver

    def deliver(job: Job, *rest: Any, **named: Any) -> None:
        if job.name == "cat0":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
        hang(job, *rest, **named)

    monkeypatch.setattr(delivery, "deliver", deliver)
    decide_some(loop, 2)
    loop.daemon.round()
    assert loop.daemon.deliveries.busy
    assert waits(loop)


def test_a_folder_missing_at_the_start_is_checked_again_even_if_no_job_goes_there(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a minute later the loop began to go round without end."""
    outbox = loop.place.config.outbox
    for key in ("outbox", "failed"):
        folders.accept(key, loop.place.config)
    outbox.rename(outbox.with_name("away"))
    loop.daemon.deliveries.look_for_leftovers()
    until(lambda: not loop.daemon.deliveries.busy, loop)
    assert [problem["code"] for problem in report(loop)["problems"]] == ["outbox"]
    monkeypatch.setattr(deliveries.time, "monotonic", lambda now=time.monotonic: now() + 60)
    for _ in range(3):
        loop.daemon.round()
        until(lambda: not loop.daemon.deliveries.busy, loop)
    assert waits(loop)
    assert caplog.text.count("cannot be moved") == 1
    outbox.with_name("away").rename(outbox)
    monkeypatch.setattr(deliveries.time, "monotonic", lambda now=time.monotonic: now() + 120)
    loop.daemon.round()
    until(lambda: not loop.daemon.deliveries.busy, loop)
    loop.daemon.round()
    assert report(loop)["problems"] == []
