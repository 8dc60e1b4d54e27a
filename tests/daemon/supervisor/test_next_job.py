"""From job to job: what comes next is encoded ahead, no delivery is waited for, an idle model goes."""

import math
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from framepack_core.engine import Engine
from framepack_core.memory import devices
from framepack_core.models import model_files
from framepackd.delivery import deliveries
from framepackd.settings.tables import GpuConfig
from framepackd.worker import messages as worker_messages
from framepackd.worker.engines import Engines
from framepackd.worker.generation import Generation
from framepackd.worker.main import answer
from framepackd.worker.messages import (
    Blocked,
    Finished,
    Next,
    Ready,
    Resumed,
    SectionDecoded,
    StepDone,
    Stopped,
    Work,
)
from tests.daemon.loop import Loop, started
from tests.daemon.worker.jobs import Ears, made, run, told_steps, work_in


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(tmp_path / "place", monkeypatch)


def told(loop: Loop) -> list[Any]:
    """Take what the worker was told since."""
    messages = []
    while loop.worker.poll():
        messages.append(loop.worker.recv())
    return messages


def drop(loop: Loop, *folders: str) -> list[str]:
    """Have jobs taken in; gives their ids."""
    for folder in folders:
        loop.place.drop(folder)
        loop.round()
    return [loop.place.store.matching(f"{folder}/cat")[0].id for folder in folders]


def test_the_worker_is_told_what_comes_next_and_whenever_that_changes(loop: Loop) -> None:
    first, second, third = drop(loop, "a", "b", "c")
    start, *following = told(loop)
    assert (type(start), start.job_id) == (Work, first)
    assert [(type(message), message.work.job_id) for message in following] == [(Next, second)]
    loop.worker.send(StepDone(1, 1, 1.0))
    loop.round()
    assert told(loop) == [], "nothing has changed"
    loop.place.store.move_to_front(third)
    loop.round()
    assert [message.work.job_id for message in told(loop)] == [third]
    for job in (second, third):
        loop.place.store.cancel(job, "discard")
    loop.round()
    assert told(loop) == [Next(None)]


def test_a_next_job_that_does_not_fit_the_config_shows_it_when_it_starts(loop: Loop) -> None:
    """Not before, and not at the cost of the job that runs."""
    drop(loop, "a")
    told(loop)
    loop.place.drop("b")
    (loop.place.config.inbox / "b" / "cat.toml").write_text('model = "f1"')
    supervisor = loop.supervisor
    jobs_dir = supervisor.config.jobs_dir
    config: Any = SimpleNamespace(**{**vars(supervisor.config), "spec": failing, "jobs_dir": jobs_dir})
    supervisor.config = config
    loop.round()
    assert loop.counts() == {"running": 1, "queued": 1}
    assert told(loop) == []


def failing(_: str) -> None:
    raise KeyError("taken out of the config")


def test_the_next_job_starts_before_the_one_that_ended_is_delivered(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = drop(loop, "a", "b")
    told(loop)
    settle = deliveries.settle

    def looking(*arguments: Any, **named: Any) -> None:
        states = loop.place.store.states()
        assert [message.job_id for message in told(loop) if isinstance(message, Work)] == [second]
        assert (states[first], states[second]) == ("running", "running"), "decided, and not yet moved"
        settle(*arguments, **named)

    monkeypatch.setattr(deliveries, "settle", looking)
    result = loop.place.config.jobs_dir / first / "result"
    result.mkdir()
    (result / ".mp4").write_text("video")
    loop.worker.send(Finished({}, {}, {}, None))
    loop.round()
    assert loop.counts() == {"done": 1, "running": 1}


def test_room_that_a_delivery_makes_is_used_at_once(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    delivered: list[str] = []
    settle = deliveries.settle

    def noting(job: Any, *rest: Any, **named: Any) -> None:
        settle(job, *rest, **named)
        delivered.append(job.id)

    monkeypatch.setattr(deliveries, "settle", noting)
    first, second = drop(loop, "a", "b")
    told(loop)
    loop.starter.obstacles = (lambda *_: None if delivered else "no room",)
    (loop.place.config.jobs_dir / first / "result").mkdir()
    (loop.place.config.jobs_dir / first / "result/.mp4").write_text("video")
    loop.worker.send(Finished({}, {}, {}, None))
    loop.round()
    assert [message.job_id for message in told(loop) if isinstance(message, Work)] == [second]
    assert loop.paused() is None


@pytest.mark.parametrize("seconds", [600.0, 0.0])
def test_a_worker_without_work_is_ended_after_a_while_unless_it_shall_stay(
    loop: Loop, seconds: float
) -> None:
    supervisor = loop.supervisor
    supervisor.config = loop.place.config.model_copy(update={"gpu": GpuConfig(idle_unload_seconds=seconds)})
    loop.start_job()
    assert supervisor.unload_at == math.inf, "it has work"
    loop.worker.send(Blocked("no room"))
    loop.starter.obstacles = (lambda *_: "no room",)  # the job waits, and the worker with it
    loop.round()
    assert supervisor.worker is not None
    assert supervisor.unload_at == (supervisor.worker.idle_since + 600 if seconds else math.inf)
    supervisor.worker.idle_since -= 590
    loop.round()
    assert supervisor.worker is not None
    supervisor.worker.idle_since -= 11
    loop.round()
    assert (supervisor.worker is None) == bool(seconds)


def test_the_loop_wakes_to_end_an_idle_worker(loop: Loop) -> None:
    loop.start_job()
    loop.worker.send(Blocked("no room"))
    loop.round()
    running = loop.supervisor.worker
    assert running is not None
    running.idle_since -= 599
    loop.daemon.scanning.next_scan = loop.daemon.scanning.next_glance = math.inf
    loop.starter.held = None
    assert 0 < loop.daemon.patience <= 1


# in the worker


class Encoding:
    """Notes what was encoded, and when: after how many steps and sections of the running job."""

    def __init__(self, ears: Ears, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, int]] = []
        encode = Engine.encode

        def noting(engine: Engine, request: Any) -> Any:
            heard = ears.heard()
            self.heard += heard
            steps = len(told_steps(self.heard))
            sections = sum(isinstance(message, SectionDecoded) for message in self.heard)
            self.calls.append((request.prompt, steps, sections))
            return encode(engine, request)

        self.heard: list[Any] = []
        monkeypatch.setattr(Engine, "encode", noting)


def test_the_next_jobs_inputs_are_encoded_after_a_section_and_not_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, ears = Engines(), Ears()
    first, second = work_in(tmp_path / "1"), work_in(tmp_path / "2", prompt="a dog", seed=5)
    alone = work_in(tmp_path / "alone", prompt="a dog", seed=5)
    run(alone)
    encoding = Encoding(ears, monkeypatch)
    ears.ours.send(Next(second))
    assert isinstance(answer(first, engines, ears.theirs), Finished)
    assert encoding.calls == [("a cat", 0, 0), ("a dog", 2, 1)]
    assert isinstance(answer(second, engines, ears.theirs), Finished)
    assert len(encoding.calls) == 2, "nothing more"
    assert made(second) == made(alone)


def test_what_cannot_be_encoded_ahead_is_the_fault_of_the_job_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, ears = Engines(), Ears()
    first, second = work_in(tmp_path / "1"), work_in(tmp_path / "2", prompt="a dog")
    second.request.image.write_bytes(b"no picture")
    encoding = Encoding(ears, monkeypatch)
    ears.ours.send(Next(second))
    assert isinstance(answer(first, engines, ears.theirs), Finished)
    assert [prompt for prompt, *_ in encoding.calls] == ["a cat", "a dog"], "tried once"
    reply, _ = run(second, engines)
    assert isinstance(reply, worker_messages.Failed)
    assert not reply.retry
    assert "image.png" in reply.error


def test_out_of_memory_ahead_of_time_takes_no_lower_memory_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, ears = Engines(), Ears()
    first, second = work_in(tmp_path / "1"), work_in(tmp_path / "2", prompt="a dog")
    encode = Engine.encode

    def limited(engine: Engine, request: Any) -> Any:
        if request.prompt == "a dog":
            raise torch.OutOfMemoryError("planted")
        return encode(engine, request)

    monkeypatch.setattr(Engine, "encode", limited)
    ears.ours.send(Next(second))
    assert isinstance(answer(first, engines, ears.theirs), Finished)
    assert not [message for message in ears.heard() if isinstance(message, worker_messages.Lowered)]


def failing_ahead(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[list[str], list[Any]]:
    """Have encoding a dog fail; gives the prompts that are encoded, and references to what fails with it."""
    tried: list[str] = []
    taken: list[Any] = []
    encode = Engine.encode

    def encoding(engine: Engine, request: Any) -> Any:
        tried.append(request.prompt)
        if request.prompt == "a dog":
            tensor = torch.zeros(1000)
            taken.append(weakref.ref(tensor))
            raise type(error)(*error.args)  # a new one each time: it holds on to this tensor
        return encode(engine, request)

    monkeypatch.setattr(Engine, "encode", encoding)
    return tried, taken


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_device_that_breaks_ahead_of_time_has_the_running_job_continue_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The error was swallowed: the next step of the job that ran failed, and cost it an attempt."""
    alone, first = work_in(tmp_path / "alone"), work_in(tmp_path / "1")
    run(alone)
    second = replace(work_in(tmp_path / "2", prompt="a dog"), job_id="second")
    ears = Ears()
    ears.ours.send(Next(second))
    with monkeypatch.context() as patched:
        tried, _ = failing_ahead(patched, RuntimeError(text))
        reply = answer(first, Engines(), ears.theirs)
        assert isinstance(reply, worker_messages.Again)
        assert reply.not_ahead == "second"
        assert text in reply.reason
        assert worker_messages.leaves_after(reply)
        ears.heard()
        ears.ours.send(Next(replace(second, ahead=False)))
        assert isinstance(answer(first, Engines(), ears.theirs), Finished)
    assert tried == ["a cat", "a dog", "a cat"], "in the other process it is not tried again"
    assert ears.heard()[0] == Resumed(2)
    assert made(first) == made(alone)


def test_too_little_memory_ahead_of_time_holds_on_to_nothing_and_is_not_met_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = work_in(tmp_path / "1", latent_window_size=2)
    second = replace(work_in(tmp_path / "2", prompt="a dog"), job_id="second")
    tried, taken = failing_ahead(monkeypatch, torch.OutOfMemoryError("planted"))
    held: list[bool] = []
    monkeypatch.setattr(devices, "release_unused", lambda _: held.extend(ref() is not None for ref in taken))
    ears, engines = Ears(), Engines()
    ears.ours.send(Next(second))
    ahead = Generation.work_ahead
    calls = iter((second, replace(second, request=first.request), second, second))
    monkeypatch.setattr(Generation, "work_ahead", lambda self: ahead(self) and next(calls))
    assert isinstance(answer(first, engines, ears.theirs), Finished)
    assert held == [False], "it is let go of before the memory is given back"
    assert tried == ["a cat", "a dog"]


def test_what_broke_the_device_ahead_of_time_is_left_to_its_own_time(loop: Loop) -> None:
    first, second = drop(loop, "a", "b")
    told(loop)
    loop.answer_and_leave(worker_messages.Again("the device failed", not_ahead=second))
    loop.round()
    start, *following = told(loop)
    assert (start.job_id, start.ahead) == (first, True)
    assert [(message.work.job_id, message.work.ahead) for message in following] == [(second, False)]


@pytest.mark.parametrize(
    "why", ["another model", "no room for both", "it is only to be written", "it is gone"]
)
def test_nothing_is_encoded_ahead_that_would_be_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    engines, ears = Engines(), Ears()
    first, second = work_in(tmp_path / "1"), work_in(tmp_path / "2", prompt="a dog")
    ears.ours.send(Next(second))
    if why == "another model":
        ears.ours.send(Next(replace(second, spec=replace(second.spec, name="another"))))
    elif why == "no room for both":
        engines.get(first, 0)
        first = replace(first, levels={"cpu|framepack-i2v|48x32": 2})
    elif why == "only to be written":
        ears.ours.send(Next(replace(second, keep_only=True)))
    else:
        ears.ours.send(Next(None))
    encoding = Encoding(ears, monkeypatch)
    assert isinstance(answer(first, engines, ears.theirs), Finished)
    assert [prompt for prompt, *_ in encoding.calls] == ["a cat"]


def test_a_wish_to_leave_is_heard_behind_other_words(tmp_path: Path) -> None:
    ears, first = Ears(), work_in(tmp_path / "1")
    for message in (Next(None), worker_messages.Leave(), Next(first)):
        ears.ours.send(message)
    assert answer(first, Engines(), ears.theirs) == Stopped()
    assert told_steps(ears.heard()) == [], "before anything is loaded"


def test_the_files_of_a_model_that_is_loaded_are_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look takes a while, in which the device waits."""
    looked: list[str] = []
    look = model_files.look
    monkeypatch.setattr(model_files, "look", lambda spec: looked.append(spec.name) or look(spec))
    loop = Loop(tmp_path / "place", monkeypatch)
    for number, model in enumerate(("demo", "demo", "demo-f1", "demo")):
        loop.place.drop(str(number))
        (loop.place.config.inbox / str(number) / "cat.toml").write_text(f'model = "{model}"')
        loop.place.take()
        looked.clear()
        loop.round()
        assert started(loop) == [str(number)]
        assert looked == ([] if number == 1 else [model])
        loop.worker.send(Ready("cpu", "cpu", "cpu"))
        loop.worker.send(Finished({}, {}, {}, None))
        loop.round()
