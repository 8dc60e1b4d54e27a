"""A video that was begun on a GPU and would go on on the CPU, or the other way round, waits for a person."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framepack_core.memory import devices
from framepackd.control import commands
from framepackd.jobs import aside
from framepackd.jobs.folder import CHECKPOINT
from framepackd.jobs.job import State
from framepackd.worker import identity
from framepackd.worker import messages as worker_messages
from framepackd.worker.checkpoint import Checkpoints
from framepackd.worker.messages import Finished, Resumed, SetAside, Waits, Work
from framepackd.worker.other_device import OtherDeviceError
from tests.daemon.control.orders import do, failed_place, only_job
from tests.daemon.loop import Loop, messages, started
from tests.daemon.place import Place
from tests.daemon.worker.checkpoints import contents, save_all, saves
from tests.daemon.worker.jobs import interrupt_in_the_second_section, made, run, told_steps, work_in

CPU, RTX_3060, RTX_4090 = ({"request": "abc", "device": name} for name in ("cpu", "RTX 3060", "RTX 4090"))


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(tmp_path / "place", monkeypatch)


# the checkpoint


@pytest.mark.parametrize(("before", "now"), [(RTX_3060, CPU), (CPU, RTX_3060)], ids=["to cpu", "to gpu"])
def test_what_was_made_on_the_other_type_of_device_is_left_as_it_is(
    tmp_path: Path, before: dict[str, str], now: dict[str, str]
) -> None:
    """It was set aside, and the days that a GPU had worked begun again on the CPU."""
    folder = tmp_path / "checkpoint"
    save_all(folder, 4, before)
    there = contents(folder)
    with pytest.raises(OtherDeviceError, match=r"1 sections and 1 steps made on .* --anew") as error:
        Checkpoints(folder, now).load()
    assert (error.value.made_on, error.value.here) == (before["device"], now["device"])
    assert "RTX 3060" in str(error.value)
    assert contents(folder) == there
    assert aside.places(folder) == []
    assert Checkpoints(folder, before).load() is not None, "it can go on"
    assert Checkpoints(folder, now, to_write=True).load() is not None, "what exists can be written"


def test_another_card_begins_anew_by_itself(tmp_path: Path) -> None:
    save_all(tmp_path / "checkpoint", 3, RTX_3060)
    assert Checkpoints(tmp_path / "checkpoint", RTX_4090).load() is None
    assert len(aside.places(tmp_path / "checkpoint")) == 1


def test_another_card_leaves_a_job_to_the_card_that_began_it_where_both_are_here(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_all(folder, 3, RTX_3060)
    there = contents(folder)
    with pytest.raises(OtherDeviceError, match="it resumes when RTX 3060 is free"):
        Checkpoints(folder, RTX_4090, elsewhere={RTX_3060["device"]}).load()
    assert contents(folder) == there


def test_what_the_work_of_a_card_cannot_use_outlives_that_work_and_is_resumed_by_its_own_card(
    tmp_path: Path,
) -> None:
    """Work that moved saves and clears in the same folder: never what it found there."""
    folder = tmp_path / "checkpoint"
    save_all(folder, 3, RTX_3060)
    there = contents(folder)
    moved = Checkpoints(folder, CPU, elsewhere={RTX_3060["device"]}, moves=True)
    assert moved.load() is None
    for progress, segment in saves()[:2]:
        moved.save(progress, {}, segment)
        moved.clear()
    assert contents(folder.with_name("checkpoint.aside-1")) == there
    back = Checkpoints(folder, RTX_3060, elsewhere={CPU["device"]}, moves=True).load()
    assert back is not None
    assert back.progress.decoded == 1
    assert len(contents(folder.with_name("checkpoint.aside-2"))) > 1, "that of the other card is kept too"


def test_a_checkpoint_that_names_its_model_by_its_folder_still_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_all(folder, 3, CPU | {"model": ["/old/transformer", "/old/base"]})
    now = CPU | {"model": "0123456789abcdef"}
    former = {"model": ["/old/transformer", "/old/base"]}
    checkpoints = Checkpoints(folder, now, former=former)
    assert checkpoints.load() is not None
    progress, segment = saves()[3]
    checkpoints.save(progress, {}, segment)
    assert Checkpoints(folder, now).load() is not None, "from then on it has the new name"
    assert Checkpoints(folder, CPU | {"model": "another"}, former={"model": ["/other"]}).load() is None


@pytest.mark.parametrize("identity", [RTX_3060, CPU])
def test_what_was_abandoned_is_kept_and_never_restored(tmp_path: Path, identity: dict[str, str]) -> None:
    """On the same device it would fit at once: begun anew means from the beginning."""
    folder = tmp_path / "checkpoint"
    save_all(folder, 3, RTX_3060)
    there = contents(folder)
    place = aside.give_up(folder)
    assert place == folder.with_name("checkpoint.aside-1")
    assert Checkpoints(folder, identity).load() is None
    assert contents(place).items() >= there.items()
    assert aside.give_up(folder) is None, "nothing is left to give up"


def test_what_was_set_aside_before_is_abandoned_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_all(folder, 3, RTX_3060)
    assert Checkpoints(folder, RTX_4090).load() is None
    aside.give_up(folder)
    assert Checkpoints(folder, RTX_3060).load() is None


# the worker


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """Have a job begun on a card that is gone."""
    work = work_in(tmp_path / "job")
    with monkeypatch.context() as patched:
        patched.setattr(devices, "device_name", lambda _: "NVIDIA GeForce RTX 3060")
        interrupt_in_the_second_section(work, patched, identity.versions())
    return work


def test_the_worker_says_that_a_job_waits_and_touches_nothing(begun: Work) -> None:
    there = contents(begun.checkpoint)
    answer, messages = run(begun)
    assert isinstance(answer, Waits)
    assert messages == []
    assert answer.made_on == "NVIDIA GeForce RTX 3060"
    for words in (
        "1 sections and 1 steps made on NVIDIA GeForce RTX 3060",
        "the CPU cannot resume them",
        "device under [gpu]",
        "--anew",
    ):
        assert words in answer.reason
    assert contents(begun.checkpoint) == there
    assert not worker_messages.leaves_after(answer), "it can do another job"


def test_begun_anew_it_becomes_the_same_video_as_on_a_machine_without_that_gpu(
    begun: Work, tmp_path: Path
) -> None:
    whole = work_in(tmp_path / "whole")
    run(whole)
    aside.give_up(begun.checkpoint)
    answer, messages = run(begun)
    assert isinstance(answer, Finished)
    assert messages[0] == Resumed(0)
    assert not any(isinstance(message, SetAside) for message in messages)
    assert len(told_steps(messages)) == 4
    assert made(begun) == made(whole)
    assert [place.name for place in aside.of_job(begun.checkpoint.parent, CHECKPOINT)] == [
        "checkpoint.aside-1"
    ]


def test_what_exists_is_written_without_the_device_that_made_it(begun: Work) -> None:
    answer, _ = run(replace(begun, keep_only=True, device="cuda:7"))
    assert isinstance(answer, Finished)


# the daemon

GONE = Waits("it was made on NVIDIA GeForce RTX 3060, and here is the CPU", "NVIDIA GeForce RTX 3060", "cpu")


def test_others_run_while_a_job_waits_for_its_device_and_it_resumes_when_that_is_back(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in "ab":
        loop.place.drop(folder)
        loop.place.take()
    loop.round()
    loop.worker.send(GONE)
    loop.round()
    assert started(loop) == ["a", "b"]
    first = loop.place.store.matching("a/cat")[0]
    assert (first.state, first.attempts) == (State.QUEUED, 0)
    (problem,) = loop.daemon.cards.problems
    assert problem.code == "other-device"
    assert problem.text == f"job {first.id} waits: {GONE.reason}"
    report = loop.daemon.snapshot()
    assert next(job["note"] for job in report["jobs"] if job["id"] == first.id) == GONE.reason
    assert report["daemon"]["paused"] is None
    loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    for _ in range(3):
        loop.round()
    assert started(loop) == [], "it is not asked for again and again"
    assert loop.paused() == problem.text
    loop.place.drop("c")
    loop.round()
    loop.worker.send(worker_messages.Ready("cuda:0", "NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 3060"))
    loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    loop.round()
    assert started(loop) == ["c", "a"]
    assert loop.daemon.cards.problems == ()


@pytest.mark.parametrize("command", ["retry", "cancel"])
def test_a_job_that_waits_is_begun_anew_or_cancelled(loop: Loop, command: str) -> None:
    loop.start_job()
    work = loop.place.config.jobs_dir / next(iter(loop.place.store.states()))
    save_all(work / CHECKPOINT, 3)
    loop.worker.send(GONE)
    loop.round()
    ((done, message),) = ask(loop, command, anew=command == "retry")
    assert done, message
    loop.round()
    assert loop.daemon.cards.problems == ()
    if command == "retry":
        assert started(loop) == [""]
        assert not (work / CHECKPOINT).exists()
        assert str(work / "checkpoint.aside-1") in message
    else:
        assert loop.counts() == {"cancelled": 1}


def ask(loop: Loop, command: str, **more: Any) -> list[tuple[bool, str]]:
    """Have the daemon do it."""
    daemon = loop.daemon
    queue = commands.Queue(daemon.config, loop.place.store, daemon.cards, daemon.deliveries)
    answer = commands.perform({"command": command, "jobs": ["cat"], **more}, queue)
    return [(result["done"], result["message"]) for result in answer["results"]]


def test_a_waiting_job_that_is_cancelled_with_keep_writes_what_exists(loop: Loop) -> None:
    loop.start_job()
    work = loop.place.config.jobs_dir / next(iter(loop.place.store.states()))
    save_all(work / CHECKPOINT, 3)
    loop.worker.send(GONE)
    loop.round()
    ((done, message),) = ask(loop, "cancel", keep=True)
    assert done, message
    loop.round()
    (told,) = (message for message in messages(loop) if isinstance(message, Work))
    assert told.keep_only


def test_once_leaves_such_a_job_in_the_queue_says_so_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path / "place", monkeypatch, once=True)
    loop.place.drop()
    loop.place.take()
    loop.worker.send(GONE)
    assert loop.daemon.run() == 1
    assert loop.counts() == {"queued": 1}
    assert f"jobs are left in the queue: job {only_job(loop.place).id} waits: {GONE.reason}" in caplog.text


def test_once_leaves_the_jobs_in_the_queue_when_the_gpu_is_gone_says_so_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path / "place", monkeypatch, once=True)
    loop.place.drop()
    loop.place.take()
    loop.worker.send(worker_messages.Blocked("device 'cuda' is not there", device=True))
    assert loop.daemon.run() == 1
    assert loop.counts() == {"queued": 1}
    assert "jobs are left in the queue: device 'cuda' is not there" in caplog.text


# the command


def test_a_failed_job_is_tried_again_from_its_beginning(tmp_path: Path) -> None:
    place = failed_place(tmp_path / "place")
    work = place.config.jobs_dir / only_job(place).id
    save_all(work / CHECKPOINT, 3)
    ((done, message),) = do(place, "retry", "cat", anew=True)
    assert done
    assert message.endswith("is in the queue again, and begins anew")
    assert not (work / CHECKPOINT).exists()
    assert len(contents(work / "checkpoint.aside-1")) > 1, "kept"


def test_without_the_option_a_failed_job_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    place = failed_place(tmp_path / "place")
    work = place.config.jobs_dir / only_job(place).id
    save_all(work / CHECKPOINT, 3)
    there = contents(work / CHECKPOINT)
    assert do(place, "retry", "cat")[0][0]
    assert contents(work / CHECKPOINT) == there


def test_a_cancelled_job_is_tried_again(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    place.take()
    do(place, "cancel", "cat")
    assert do(place, "retry", "cat", anew=True)[0][0]
    assert only_job(place).state == State.QUEUED


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING], ids=str)
def test_where_no_daemon_runs_a_job_that_has_not_ended_is_begun_anew(tmp_path: Path, state: State) -> None:
    """One that its daemon died under too: then its state is still that it runs."""
    place = Place(tmp_path / "place")
    place.drop()
    place.take()
    save_all(place.config.jobs_dir / only_job(place).id / CHECKPOINT, 3)
    if state is State.RUNNING:
        claimed = place.store.claim()
        assert claimed is not None
        place.store.step(claimed.id, section=2, step=1, seconds=1.0)
    ((done, message),) = do(place, "retry", "cat", anew=True)
    assert done, message
    job = only_job(place)
    assert (job.state, job.section, job.step) == (state, 0, 0)
    assert job.history[-1]["note"] == "framepackd retry --anew"


def test_a_running_job_and_a_finished_one_are_not_begun_anew(loop: Loop) -> None:
    loop.start_job()
    ((done, message),) = ask(loop, "retry", anew=True)
    assert not done
    assert "is running and cannot be begun anew: framepackd pause puts it back" in message
    loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    loop.round()
    ((done, message),) = ask(loop, "retry", anew=True)
    assert not done
    assert "is done and cannot be begun anew" in message


def test_which_of_several_jobs_of_a_name_is_to_begin_anew_has_to_be_said(tmp_path: Path) -> None:
    place = failed_place(tmp_path / "place")
    place.drop()
    place.take()
    ((done, message),) = do(place, "retry", "cat", anew=True)
    assert not done
    assert "give the whole id of one" in message


def test_what_is_to_be_written_is_not_begun_anew(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    place.drop()
    place.take()
    save_all(place.config.jobs_dir / only_job(place).id / CHECKPOINT, 3)
    do(place, "cancel", "cat", keep=True)
    ((done, message),) = do(place, "retry", "cat", anew=True)
    assert not done
    assert "is cancelled, and waits for a daemon to write" in message
