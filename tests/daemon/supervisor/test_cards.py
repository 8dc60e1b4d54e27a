"""Several devices: who gets which job, and that what befalls one of them does not touch the others."""

import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framepack_core.memory import before_torch
from framepackd.control import commands
from framepackd.jobs.job import State
from framepackd.settings.config import Config
from framepackd.settings.tables import GpuConfig
from framepackd.supervisor import passed_over
from framepackd.worker.messages import (
    Again,
    Failed,
    Finished,
    Leave,
    Lowered,
    Message,
    Next,
    Ready,
    StepDone,
    Stopped,
    Waits,
    Work,
)
from tests.daemon.loop import Loop, got, messages

DONE = Finished({}, {}, {}, None)
SLOW, FAST = "NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090"


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(tmp_path / "place", monkeypatch, devices=("cpu", "cpu"))


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(tmp_path / "place", monkeypatch, devices=("cuda:0", "cuda:1"))


def drop(loop: Loop, folders: str, settings: str = "") -> None:
    for folder in folders:
        loop.place.drop(folder)
        (loop.place.config.inbox / folder / "cat.toml").write_text(settings)
        loop.place.take()


def state(loop: Loop, folder: str) -> str:
    return loop.place.store.matching(f"{folder}/cat")[0].state


def test_the_queue_is_spread_over_the_devices_in_its_order(loop: Loop) -> None:
    drop(loop, "abcd")
    loop.round()
    (other,) = loop.others
    assert (got(loop, loop.worker), got(loop, other)) == (["a"], ["b"])
    other.send(DONE)
    loop.round()
    assert (got(loop, loop.worker), got(loop, other)) == ([], ["c"])
    loop.worker.send(DONE)
    loop.round()
    assert (got(loop, loop.worker), got(loop, other)) == (["d"], [])
    report = loop.daemon.snapshot()
    running = {job["id"]: job["folder"] for job in report["jobs"] if job["state"] == State.RUNNING}
    assert [running.get(str(device["job"])) for device in report["daemon"]["devices"]] == ["d", "c"]
    assert report["daemon"]["device"] == "cpu, cpu"


def test_a_fault_of_one_device_does_not_touch_the_job_of_another(loop: Loop) -> None:
    drop(loop, "ab")
    loop.round()
    (other,) = loop.others
    other.send(StepDone(1, 1, 0.1))
    other.send(Failed("boom", retry=True))
    loop.round()
    a, b = (loop.place.store.matching(f"{folder}/cat")[0] for folder in "ab")
    assert (a.state, a.attempts, b.attempts) == (State.RUNNING, 0, 1)
    assert loop.daemon.cards.runs(a.id)


def test_a_lack_of_memory_on_one_device_does_not_touch_the_job_of_another(loop: Loop) -> None:
    drop(loop, "ab")
    loop.round()
    (other,) = loop.others
    got(loop, loop.worker)
    other.send(Lowered("RTX 3060|demo|32x32", 2, "decoding in tiles"))
    other.send(Again("out of memory"))
    loop.round()
    assert loop.daemon.cards.runs(loop.place.store.matching("a/cat")[0].id)
    assert not any(isinstance(message, Leave) for message in messages(loop))
    assert loop.place.store.matching("b/cat")[0].attempts == 0


def test_a_worker_that_hangs_is_ended_and_no_other(loop: Loop) -> None:
    drop(loop, "ab")
    loop.round()
    first, second = (supervisor.worker for supervisor in loop.daemon.cards.each)
    assert first is not None
    assert second is not None
    second.quiet = 1e6
    loop.round()
    assert first.hung is None
    assert second.hung is not None


def test_the_seeds_of_a_drop_are_spread_over_the_devices(loop: Loop) -> None:
    drop(loop, "a", "seeds = 2")
    loop.round()
    names = [loop.place.store.get(worker.recv().job_id).name for worker in (loop.worker, *loop.others)]
    assert names == ["cat_seed_31337", "cat_seed_31338"]


def test_only_the_job_that_is_cancelled_is_left(loop: Loop) -> None:
    drop(loop, "ab")
    loop.round()
    (other,) = loop.others
    got(loop, loop.worker), got(loop, other)
    queue = commands.Queue(loop.place.config, loop.place.store, loop.daemon.cards, loop.daemon.deliveries)
    commands.perform({"command": "cancel", "jobs": ["b/cat"]}, queue)
    loop.round()
    assert list(messages(loop)) == []
    assert other.recv() == Leave(keep=False)


def test_a_pause_has_every_worker_leave(loop: Loop) -> None:
    drop(loop, "ab")
    loop.round()
    loop.place.store.pause()
    loop.daemon.paused = loop.place.store.paused()
    loop.round()
    for worker in (loop.worker, *loop.others):
        sent = [worker.recv() for _ in iter(worker.poll, False)]
        assert sent[-1] == Leave(keep=False)


def test_each_device_encodes_ahead_the_job_that_it_will_get(loop: Loop) -> None:
    drop(loop, "abcd")
    loop.round()
    (other,) = loop.others
    loop.worker.send(StepDone(1, 1, 20.0))
    other.send(StepDone(1, 1, 5.0))  # it is free first
    loop.round()
    loop.round()

    def told(worker: Any) -> str:
        sent = [worker.recv() for _ in iter(worker.poll, False)]
        last = [message for message in sent if isinstance(message, Next)][-1]
        assert last.work is not None
        return loop.place.store.get(last.work.job_id).folder

    assert (told(other), told(loop.worker)) == ("c", "d")


def test_the_next_job_goes_to_the_device_that_has_its_model_loaded(loop: Loop) -> None:
    drop(loop, "a")
    drop(loop, "b", 'model = "demo-f1"')
    loop.round()
    (other,) = loop.others
    for worker in (loop.worker, other):
        worker.send(Ready("cpu", "cpu", "cpu"))
        worker.send(DONE)
    drop(loop, "c", 'model = "demo-f1"')
    loop.daemon.cards.listen()
    got(loop, loop.worker), got(loop, other)
    loop.round()
    assert (got(loop, loop.worker), got(loop, other)) == ([], ["c"])


def ready(card: str, number: int) -> Message:
    return Ready(f"cuda:{number}", f"{card}, driver 550.54", card)


def both_cards_run(cards: Loop) -> Connection:
    """Have the slow card run a and the fast one b; gives the worker of the fast one."""
    drop(cards, "ab")
    cards.round()
    (other,) = cards.others
    cards.worker.send(ready(SLOW, 0))
    other.send(ready(FAST, 1))
    return other


def test_a_job_waits_for_the_kind_of_card_that_it_began_on_while_that_is_busy(cards: Loop) -> None:
    other = both_cards_run(cards)
    cards.round()
    work = other.recv()
    assert isinstance(work, Work)
    drop(cards, "cd")
    cards.worker.send(DONE)
    cards.round()
    assert got(cards, cards.worker) == ["a", "c"]
    cards.worker.send(Waits("it was made on the other card", FAST, SLOW))
    cards.round()
    assert got(cards, cards.worker) == ["d"], "c waits for the other card"
    assert (state(cards, "c"), cards.daemon.cards.problems) == (State.QUEUED, ())
    other.send(DONE)
    cards.round()
    assert got(cards, other) == ["c"]


def begun_on_the_fast_card(cards: Loop) -> Connection:
    """Have two jobs run, c wait for the second card, which is busy; give that card's worker."""
    other = both_cards_run(cards)
    drop(cards, "c")
    cards.worker.send(DONE)
    cards.round()
    cards.worker.send(Waits("it was made on the other card", FAST, SLOW))
    cards.round()
    assert (got(cards, cards.worker), got(cards, other)) == (["a", "c"], ["b"])
    return other


def wait(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the clock of what is passed over be so much later."""
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds)
    monkeypatch.setattr(passed_over, "time", later)


def test_a_job_begins_anew_elsewhere_once_it_has_waited_as_long_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = timedelta(minutes=1)
    cards = Loop(tmp_path / "place", monkeypatch, devices=("cuda:0", "cuda:1"), move_after=minute)
    begun_on_the_fast_card(cards)
    cards.round()
    assert got(cards, cards.worker) == []
    wait(61, monkeypatch)
    cards.round()
    assert cards.worker.poll()
    work = cards.worker.recv()
    assert (cards.place.store.get(work.job_id).folder, work.moves) == ("c", True)


def test_without_move_after_a_job_waits_for_ever(cards: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    begun_on_the_fast_card(cards)
    wait(1e8, monkeypatch)
    cards.round()
    assert got(cards, cards.worker) == []


def test_a_job_goes_back_to_the_card_that_it_began_on(cards: Loop) -> None:
    other = both_cards_run(cards)
    cards.worker.send(DONE)
    other.send(Stopped())  # b is the first of the queue again, and both cards are free
    got(cards, cards.worker), got(cards, other)
    cards.round()
    assert (got(cards, cards.worker), got(cards, other)) == ([], ["b"])


def test_the_cards_are_known_before_their_workers_have_reported_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first card would begin anew what only waits for the second to be asked."""
    names = {"cuda:0": SLOW, "cuda:1": FAST}
    monkeypatch.setattr(before_torch, "card_name", names.get)
    loop = Loop(tmp_path / "place", monkeypatch, devices=("cuda:0", "cuda:1"))
    drop(loop, "a")
    loop.round()
    assert loop.worker.recv().elsewhere == {FAST}


def test_the_work_names_the_cards_of_the_other_devices(cards: Loop) -> None:
    both_cards_run(cards)
    cards.round()
    job = cards.place.store.matching("a/cat")[0]
    assert cards.supervisor.work_of(job).elsewhere == {FAST}


def test_a_list_of_devices_names_each_card_once() -> None:
    assert GpuConfig(device=("cuda:0", "cuda:1")).devices == ("cuda:0", "cuda:1")
    assert GpuConfig(device=("cpu", "cpu")).devices == ("cpu", "cpu")
    assert GpuConfig().devices == ("auto",)
    with pytest.raises(ValueError, match="must name each card once, got 'cuda:1' twice"):
        GpuConfig(device=("cuda:1", "cuda:1"))
    with pytest.raises(ValueError, match="must name at least one device"):
        Config(gpu=GpuConfig(device=()))
    with pytest.raises(ValueError, match="such as \"cuda:0\", got 'auto'"):
        GpuConfig(device=("auto", "cpu"))
