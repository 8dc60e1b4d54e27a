"""Cards of other machines: when they get a job, and what their loss, death and drain mean for it."""

import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from framepackd.jobs.job import State
from framepackd.supervisor import remote
from framepackd.supervisor.cards import Cards
from framepackd.worker.messages import (
    Again,
    Died,
    Failed,
    Finished,
    Leave,
    Lost,
    Message,
    Next,
    Ready,
    Resumed,
    Sampled,
    SectionDecoded,
    StepDone,
    Stopped,
    Waits,
    Work,
    Written,
)
from tests.daemon.loop import got
from tests.daemon.supervisor.remote_cards import FAST, SLOW, Machines

DONE = Finished({}, {}, {}, None)
READY = Ready("cuda:0", f"{FAST}, driver 550.54", FAST)
KILLED = Died("was killed by SIGKILL (Killed)")
SILENT = Lost("render2 is silent for 12 s")


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """A front without a card."""
    return Machines(tmp_path / "place", monkeypatch, "all", devices=())


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """A front with a device of its own."""
    return Machines(tmp_path / "place", monkeypatch, "all", devices=("cpu",))


def later(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the clock of the cards of other machines be so much later."""
    moved = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds)
    monkeypatch.setattr(remote, "time", moved)


def test_no_job_is_claimed_before_the_card_has_greeted(machines: Machines) -> None:
    machines.drop("a")
    machines.roll.joined("render2")
    machines.round()
    (bridge,) = machines.bridges
    assert (machines.job("a").state, bridge.got()) == (State.QUEUED, [])
    bridge.greet()
    machines.round()
    assert (machines.job("a").state, machines.works(bridge)) == (State.RUNNING, ["a"])


def test_the_work_names_the_device_as_its_machine_does_and_is_mirrored(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.drop("a")
    machines.round()
    (work,) = bridge.got()
    assert isinstance(work, Work)
    assert (work.device, work.mirrored) == ("cuda:0", True)


def test_a_job_is_done_on_the_card_of_another_machine(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.drop("ab")
    machines.round()
    job = machines.job("a")
    result = machines.loop.place.config.jobs_dir / job.id / "result"
    result.mkdir(parents=True)
    (result / ".mp4").write_bytes(b"video")
    bridge.say(READY, Resumed(0), StepDone(1, 1, 0.1), SectionDecoded(1, 0.1), Sampled())
    machines.round()
    assert machines.works(bridge) == ["a", "b"], "the next one begins while the first is written"
    bridge.say(Written(DONE))
    machines.round()
    machines.round()
    assert (machines.job("a").state, machines.job("a").device) == (State.DONE, "render2:cuda:0")


def test_a_loss_of_the_machine_costs_no_attempt_and_the_card_waits(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = machines.reached("render2")
    machines.drop("a")
    machines.round()
    bridge.say(READY, SILENT)
    machines.round()
    job = machines.job("a")
    assert (job.state, job.attempts) == (State.QUEUED, 0)
    assert "the worker on render2:cuda:0 was lost: render2 is silent for 12 s" in job.history[-1]["note"]
    assert len(machines.bridges) == 1
    assert machines.cards.held == "render2 is silent for 12 s; tried again after 2 s"
    assert machines.loop.daemon.cards.due <= time.monotonic() + 2
    later(3, monkeypatch)
    machines.loop.daemon.cards.steer(time.monotonic() + 3)
    assert len(machines.bridges) == 2


def test_the_wait_after_losses_in_a_row_doubles_up_to_a_bound_and_ends_with_a_step(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.drop("a")
    waits = []
    for number in range(10):
        machines.roll.nodes = {}
        machines.round()
        bridge = machines.reached("render2")  # it has been away: it is tried at once
        bridge.say(READY, *([StepDone(1, 1, 0.1)] if number == 9 else []), SILENT)
        machines.round()
        waits.append(str(machines.card("render2:cuda:0").away).rsplit(" ", 2)[-2])
    assert waits == ["2", "4", "8", "16", "32", "64", "128", "256", "300", "2"]


def test_a_machine_that_is_of_no_use_for_months_is_still_tried() -> None:
    waits = [remote.wait_after(losses) for losses in range(10_000)]
    assert (waits[0], waits[-1]) == (remote.FIRST_WAIT_SECONDS, remote.LONGEST_WAIT_SECONDS)


@pytest.mark.parametrize("answer", [Again("a new link"), Failed("its LoRA is gone", retry=True)])
def test_a_job_whose_video_is_written_goes_on_when_another_needs_a_new_bridge(
    machines: Machines, answer: Message
) -> None:
    bridge = machines.reached("render2")
    machines.drop("ab")
    machines.round()
    bridge.say(READY, Sampled())
    machines.round()
    machines.round()
    assert machines.works(bridge) == ["a", "b"]
    bridge.say(answer)
    machines.round()
    first = machines.job("a")
    assert (first.state, first.attempts, machines.cards.running) == (State.QUEUED, 0, [])
    assert machines.job("b").state == State.QUEUED


def test_the_death_of_the_worker_there_counts_as_one_here(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.drop("a")
    machines.round()
    bridge.say(READY, StepDone(1, 1, 0.1), KILLED)
    machines.round()
    job = machines.job("a")
    assert (job.state, job.attempts) == (State.QUEUED, 1)
    assert "the worker on render2:cuda:0 was killed by SIGKILL" in job.history[-1]["note"]
    assert len(machines.bridges) == 2, "it is greeted anew at once"


def test_of_two_jobs_none_loses_an_attempt_for_a_death(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.drop("ab")
    machines.round()
    bridge.say(READY, Sampled())
    machines.round()
    bridge.say(KILLED)
    machines.round()
    assert [machines.job(folder).attempts for folder in "ab"] == [0, 0]
    assert [machines.job(folder).state for folder in "ab"] == [State.QUEUED] * 2


@pytest.mark.parametrize(("exitcode", "attempts"), [(-9, 0), (1, 1)])
def test_a_bridge_that_is_killed_is_no_fault_of_the_job_one_that_fails_may_be(
    machines: Machines, exitcode: int, attempts: int
) -> None:
    bridge = machines.reached("render2")
    machines.drop("a")
    machines.round()
    bridge.exitcode = exitcode
    machines.round()
    assert (machines.job("a").state, machines.job("a").attempts) == (State.QUEUED, attempts)


def test_a_worker_there_that_hangs_is_ended_and_costs_an_attempt(machines: Machines) -> None:
    machines.reached("render2")
    machines.drop("a")
    machines.round()
    worker = machines.card("render2:cuda:0").worker
    assert worker is not None
    worker.quiet = 1e6
    machines.round()
    machines.round()
    assert machines.job("a").attempts == 1


def test_a_job_of_a_lost_machine_goes_on_on_the_same_kind_of_card(machines: Machines) -> None:
    second, third = machines.reached("render2"), machines.reached("render3")
    machines.drop("a")
    machines.round()
    bridge, other = (second, third) if machines.works(second) else (third, second)
    bridge.say(READY, SILENT)
    machines.round()
    assert machines.works(other) == ["a"]
    assert machines.job("a").attempts == 0


def test_a_job_whose_only_card_is_lost_waits_and_says_so(machines: Machines) -> None:
    fast, slow = machines.reached("render2", FAST), machines.reached("render3", SLOW)
    machines.drop("a")
    machines.round()
    assert machines.works(fast) == ["a"]
    fast.say(READY, SILENT)
    machines.roll.joined("render2", alive=False)
    machines.round()
    (work,) = slow.got()
    assert FAST in work.elsewhere, "it may come back: nothing is begun anew"
    slow.say(Waits("it was made on the other card", FAST, SLOW))
    machines.round()
    assert (machines.job("a").state, slow.got()) == (State.QUEUED, [])
    assert any(
        "it was made on the other card (render2:cuda:0 cannot be reached now)" in problem.text
        for problem in machines.cards.problems
    )


def test_a_card_that_was_once_reached_is_waited_for_after_a_restart(beside: Machines) -> None:
    """Else a card here would begin anew what only that one can resume."""
    beside.reached("render2")
    after = Cards(beside.loop.place.config, beside.store, ())
    assert FAST in after.passed_over.elsewhere(after.local[0])


def test_a_model_that_a_machine_lacks_is_named_and_holds_up_no_other_job(machines: Machines) -> None:
    bridge = machines.reached("render2", models=("demo",))
    machines.drop("a", 'model = "demo-f1"')
    machines.drop("b")
    machines.round()
    assert machines.works(bridge) == ["b"]
    bridge.say(READY, DONE)
    machines.round()
    machines.round()
    said = "render2 lacks the model demo-f1: framepackd models download demo-f1 there"
    assert (machines.job("a").state, machines.cards.held) == (State.QUEUED, said)
    other = machines.reached("render3")
    assert machines.works(other) == ["a"]


def test_a_card_that_lacks_a_model_is_asked_again_after_a_while(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.reached("render2", models=("demo",))
    machines.drop("a", 'model = "demo-f1"')
    machines.round()
    assert len(machines.bridges) == 1
    machines.cards.steer(time.monotonic() + remote.LOOK_AGAIN_SECONDS + 1)
    assert len(machines.bridges) == 2


def test_another_machine_neither_helps_nor_is_told_what_comes_next(beside: Machines) -> None:
    bridge = beside.reached("render2", "cpu")
    beside.drop("abc")
    beside.round()
    bridge.say(READY, StepDone(1, 1, 0.1))
    beside.round()
    sent = bridge.got()
    assert not any(isinstance(message, Next) for message in sent)
    assert not any(isinstance(message, Work) and message.helps for message in sent)


def test_a_drained_machine_gets_no_jobs_and_ends_what_it_has(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.drop("ab")
    machines.round()
    assert machines.ask(command="drain", host="render2")[0]
    machines.round()
    assert [type(message) for message in bridge.got()] == [Work]
    bridge.say(READY, DONE)
    machines.round()
    machines.round()
    assert (bridge.got(), bridge.exitcode) == ([], -9), "its card is free for whoever drained it"
    assert machines.cards.held == "drained: framepackd nodes undrain render2 has it work again"
    machines.ask(command="undrain", host="render2")
    machines.round()
    assert len(machines.bridges) == 2


def test_drained_at_once_a_job_leaves_at_its_next_step_and_goes_on_elsewhere(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.drop("a")
    machines.round()
    machines.ask(command="drain", host="render2", now=True)
    machines.round()
    assert [type(message) for message in bridge.got()] == [Work, Leave]
    bridge.say(READY, Stopped())
    machines.round()
    job = machines.job("a")
    assert (job.state, job.attempts, job.history[-1]["note"]) == (State.QUEUED, 0, remote.DRAINED)
    assert machines.works(machines.reached("render3")) == ["a"]


def test_a_machine_stays_drained_over_a_restart(machines: Machines) -> None:
    machines.reached("render2")
    machines.ask(command="drain", host="render2")
    after = Cards(machines.loop.place.config, machines.store, ())
    after.listen()
    after.steer(time.monotonic())
    assert after.held == "drained: framepackd nodes undrain render2 has it work again"
    assert len(machines.bridges) == 1


def test_an_unknown_machine_cannot_be_drained(machines: Machines) -> None:
    machines.reached("render2")
    done, said = machines.ask(command="drain", host="rendr2")
    assert (done, said) == (False, "no other machine is named 'rendr2': there are render2")


def test_an_idle_card_is_let_go_and_greeted_again_when_a_job_wants_it(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = machines.reached("render2")
    worker = machines.card("render2:cuda:0").worker
    assert worker is not None
    worker.idle_since -= 601
    machines.round()
    assert (bridge.exitcode, len(machines.bridges)) == (-9, 1)
    machines.round()
    assert len(machines.bridges) == 1
    machines.drop("a")
    machines.round()
    assert len(machines.bridges) == 2


def test_for_one_job_one_idle_card_is_greeted(machines: Machines) -> None:
    for host in ("render2", "render3"):
        machines.reached(host)
    for name in ("render2:cuda:0", "render3:cuda:0"):
        machines.card(name).end_worker()
    machines.drop("a")
    machines.round()
    machines.round()
    assert len(machines.bridges) == 3


def test_a_pause_ends_the_idle_bridges_and_greets_none(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.store.pause()
    machines.loop.daemon.paused = machines.store.paused()
    machines.round()
    machines.round()
    assert (bridge.exitcode, len(machines.bridges)) == (-9, 1)
    assert machines.cards.due > time.monotonic() + 60, "the loop may sleep"


def test_a_cancelled_job_leaves_the_card_of_another_machine(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.drop("a")
    machines.round()
    machines.ask(command="cancel", jobs=["a/cat"], keep=True)
    machines.round()
    assert bridge.got()[-1] == Leave(keep=True)
    bridge.say(READY, Stopped())
    machines.round()
    machines.round()
    assert machines.job("a").state == State.CANCELLED


def test_what_ends_a_worker_here_ends_the_bridge_to_one_there(machines: Machines) -> None:
    bridge = machines.reached("render2")
    machines.drop("a")
    machines.round()
    bridge.say(READY, StepDone(1, 1, 0.1), Failed("boom", retry=True))
    machines.round()
    assert (machines.job("a").attempts, bridge.exitcode, len(machines.bridges)) == (1, -9, 2)


@pytest.mark.parametrize(
    "said",
    [
        StepDone(99, 1, 0.1),
        StepDone(1, 0, 0.1),
        StepDone(1, 1, float("nan")),
        StepDone(1, 1, 1e15),  # longer than the job is there: the end of the queue would lie beyond all dates
        SectionDecoded(0, 0.1),
        SectionDecoded(1, 60.0),
        Resumed(-1),
        Resumed(10**9),
        Resumed(1, (1, 2, 3)),
    ],
)
def test_what_cannot_be_true_of_a_job_ends_the_bridge(machines: Machines, said: Message) -> None:
    bridge = machines.reached("render2")
    machines.drop("a")
    machines.round()
    bridge.say(READY, said)
    machines.round()
    job = machines.job("a")
    assert (job.state, job.attempts, job.steps_run, bridge.exitcode) == (State.QUEUED, 0, 0, -9)


@pytest.mark.parametrize("said", [StepDone(1, 1, 0.1), DONE, Written(DONE), Sampled(), READY])
def test_what_is_said_of_no_job_changes_nothing(machines: Machines, said: Message) -> None:
    bridge = machines.reached("render2")
    bridge.say(said)
    machines.round()
    assert machines.card("render2:cuda:0").free


def test_a_bridge_that_never_says_anything_is_given_up(machines: Machines) -> None:
    machines.roll.joined("render2")
    machines.round()
    machines.cards.steer(time.monotonic() + remote.GREETING_SECONDS + 1)
    assert machines.bridges[0].exitcode == -9
    assert machines.cards.held == "it does not answer within 90 s; tried again after 2 s"


def test_only_the_machines_and_cards_that_are_named_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = Machines(tmp_path / "place", monkeypatch, ("render2", "render3:cuda:1"), devices=())
    for host in ("render2", "render3", "render4"):
        machines.roll.joined(host, "cuda:0", "cuda:1")
    machines.round()
    names = {"render2:cuda:0", "render2:cuda:1", "render3:cuda:1"}
    assert {bridge.name for bridge in machines.bridges} == names


def test_a_named_machine_that_has_not_joined_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = Machines(tmp_path / "place", monkeypatch, ("render2",), devices=())
    said = "render2 has not joined: run framepackd node there"
    assert [problem.text for problem in machines.cards.problems] == [said]
    assert machines.loop.paused() == said
    machines.reached("render2")
    assert (machines.cards.problems, machines.loop.paused()) == ((), None)


def test_a_machine_that_has_the_name_of_another_is_a_problem_and_the_first_one_works(
    machines: Machines,
) -> None:
    machines.roll.joined("render2", others=("10.0.0.8",))
    machines.round()
    said = (
        "render2 is the name of 10.0.0.7, 10.0.0.8: only the first is used; give each machine its own with "
        "framepackd node --name"
    )
    assert [problem.text for problem in machines.cards.problems] == [said]
    assert machines.cards.held is None


def test_of_this_machine_among_the_others_it_is_said_where_its_cards_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = socket.gethostname()
    machines = Machines(tmp_path / "place", monkeypatch, (here,), devices=())
    said = f"{here} is this machine: its cards stand under [gpu] device, not under [cluster] nodes"
    assert [problem.text for problem in machines.cards.problems] == [said]


def test_status_has_the_same_keys_for_a_card_of_another_machine(beside: Machines) -> None:
    bridge = beside.reached("render2")
    beside.drop("ab")
    beside.round()
    local, there = beside.loop.daemon.snapshot()["daemon"]["devices"]
    assert local.keys() == there.keys()
    assert (there["name"], there["card"]) == ("render2:cuda:0", f"{FAST}, driver 550.54")
    assert {local["job"], there["job"]} == {beside.job(folder).id for folder in "ab"}
    assert beside.works(bridge)
    assert got(beside.loop, beside.loop.worker)


def test_a_device_that_is_out_of_reach_shares_no_queue(beside: Machines) -> None:
    beside.reached("render2").say(SILENT)
    beside.round()
    report = beside.loop.daemon.snapshot()
    assert report["daemon"]["devices"][1]["held"] == "render2 is silent for 12 s; tried again after 2 s"
    assert report["daemon"]["paused"] is None


def test_nodes_tells_of_each_machine(machines: Machines) -> None:
    machines.reached("render2")
    machines.drop("a")
    machines.round()
    machines.ask(command="drain", host="render2")
    machines.roll.joined("render3", alive=False)
    machines.round()
    report = machines.loop.daemon.answer({"command": "nodes"})
    second, third = report["nodes"]
    (card,) = second["cards"]
    assert (second["name"], second["reachable"], second["address"]) == ("render2", True, "10.0.0.7")
    assert second["drained"] is not None
    assert (card["card"], card["job"], card["models"]) == (FAST, machines.job("a").id, ["demo", "demo-f1"])
    assert third["why"].startswith("render3 does not answer")


def test_a_machine_that_is_asked_greets_anew_unless_it_works(machines: Machines) -> None:
    machines.reached("render2")
    assert machines.ask(command="ask_again", host="render2") == (True, "render2 is asked")
    machines.round()
    assert len(machines.bridges) == 2
    machines.bridges[-1].greet()
    machines.drop("a")
    machines.round()
    machines.ask(command="ask_again", host="render2")
    machines.round()
    assert len(machines.bridges) == 2
