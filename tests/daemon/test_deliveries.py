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

from framepackd import commands, daemon, deliveries, delivery, worker
from framepackd.database import Job, State
from framepackd.folders import MARKER
from framepackd.metrics import Metrics
from tests.daemon.test_loop import Loop, ask_in_thread
from tests.daemon.test_status import drawn

DONE = worker.Finished({}, {}, {}, None)


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    loop = Loop(tmp_path / "place", monkeypatch)
    for module in (daemon, deliveries):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 2.0)
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
        monkeypatch.setattr(deliveries, "PATIENCE_SECONDS", 0.05)


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
    loop.round()
    result = loop.place.config.jobs_dir / next(
        job.id for job in loop.place.store.in_state(State.RUNNING) if job.name == name
    )
    (result / "result").mkdir(exist_ok=True)
    (result / "result/.mp4").write_text(f"video of {name}")
    loop.worker.send(DONE)
    loop.round()


def report(loop: Loop) -> dict[str, Any]:
    return loop.daemon._snapshot()


def until(true: Callable[[], bool], loop: Loop) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        loop.daemon._round()
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


def test_where_the_outbox_hangs_the_failed_folder_is_used_all_the_same(loop: Loop, hanging: Hanging) -> None:
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


def test_told_to_stop_a_copy_ends_and_a_disk_that_hangs_is_not_waited_for(
    loop: Loop, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "STOP_SECONDS", 0.5)
    finish_a_job(loop)
    loop.daemon.stop()
    assert hanging.stop is not None
    assert not loop.daemon._finished()
    time.sleep(0.6)
    assert hanging.stop()
    assert loop.daemon._finished()


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
    Metrics(lambda: config, loop.place.store, loop.daemon._snapshot).round()
    assert words in file.read_text()
    assert "framepackd_delivery_next_try_time_seconds" in file.read_text()


def test_a_delivery_that_cannot_be_made_can_be_cancelled(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EROFS, loop.place.config.outbox)
    finish_a_job(loop)
    loop.round()
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"]})
    loop.daemon._round()
    (answer,) = asked()["results"]
    assert answer["done"], answer
    assert loop.counts() == {"cancelled": 1}
    names = sorted(path.name for path in loop.place.config.failed.iterdir())
    assert names == [MARKER, "cat.cancelled.txt", "cat.png", "cat.toml", "cat.txt"]


def test_half_finished_copies_of_unknown_jobs_are_told_and_those_of_known_ones_are_not(loop: Loop) -> None:
    place = loop.place
    place.make_ready()
    (job,) = place.store.in_state(State.RUNNING)
    (place.config.outbox / "sub").mkdir()
    (place.config.outbox / f"sub/.framepackd-{job.id}-.mp4.part").touch()
    unknown = place.config.outbox / "sub/.framepackd-20200101-000000-abcdef-.mp4.part"
    unknown.touch()
    loop.daemon._deliveries.look_for_leftovers()
    until(lambda: not loop.daemon._deliveries.busy, loop)
    (problem,) = report(loop)["problems"]
    assert problem["code"] == "forgotten"
    assert f"rm {unknown}" in problem["text"]
    assert job.id not in problem["text"]


def test_what_is_just_being_moved_cannot_be_cancelled(loop: Loop, hanging: Hanging) -> None:
    finish_a_job(loop)
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"]})
    loop.daemon._round()
    (answer,) = asked()["results"]
    assert not answer["done"]
    assert "is being moved" in answer["message"]


def test_a_retry_whose_failed_folder_hangs_is_answered(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(loop, "cat", "steps = 0")
    loop.round()
    assert loop.counts() == {"failed": 1}
    answers = threading.Event()
    monkeypatch.setattr(deliveries, "REACH_SECONDS", 0.1)
    monkeypatch.setattr(commands, "_obstacle", lambda *_: answers.wait(20) and None)
    asked = ask_in_thread(loop, {"command": "retry", "jobs": ["cat"]})
    loop.daemon._round()
    (answer,) = asked()["results"]
    answers.set()
    assert not answer["done"]
    assert "has not answered yet" in answer["message"]
