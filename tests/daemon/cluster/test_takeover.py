"""Whoever dies, and whenever: the job goes on elsewhere, loses at most one step, and is the same video."""

from pathlib import Path

import pytest

from framepackd.cluster import bridge, wire
from framepackd.worker import messages
from framepackd.worker.messages import Finished, Message, Resumed, StepDone, Written
from tests.daemon.cluster.jobs import (
    HOST,
    Front,
    done_on,
    front_work,
    greeted,
    heard,
    is_end,
    own_of,
    started,
)
from tests.daemon.cluster.link import Link, is_gone, kill
from tests.daemon.worker.jobs import STEPS, made, run, work_in


def steps(told: list[Message]) -> int:
    """Give how many steps of a job without a chain the daemon knows of."""
    done = 0
    for message in told:
        if isinstance(message, Resumed):
            done = message.steps
        if isinstance(message, StepDone):
            done = (message.section - 1) * STEPS + message.step
    return done


def check_goes_on(told: list[Message], before: int) -> None:
    """Check that a job was resumed and made, at most one step before where it was."""
    assert not [message for message in told if isinstance(message, messages.SetAside)]
    assert next(message.steps for message in told if isinstance(message, Resumed)) >= before - 1
    reply = told[-1].reply if isinstance(told[-1], Written) else told[-1]
    assert isinstance(reply, Finished), reply


def test_after_each_frame_that_has_arrived_another_node_or_this_machine_goes_on(tmp_path: Path) -> None:
    """That the front has so many frames is all that the death of a bridge, a link or a node means to it."""
    whole = front_work(tmp_path / "whole")
    card = greeted(own_of(tmp_path / "node"))
    card.daemon.send(whole)
    heard(card.daemon, is_end)
    card.end()
    frames = [frame for frame in card.arrived if b'"Said"' in frame[:40]]
    headers = [wire.unpacked(frame).header for frame in frames]
    decisive = [
        number
        for number, header in enumerate(headers, 1)
        if header["type"] == "StepDone" or header["message"].get("name", "").startswith("checkpoint/")
    ]
    for number in decisive:
        work = front_work(tmp_path / str(number))
        front = Front()
        started(front, work)
        for frame in frames[:number]:
            front.node.send_packed(frame)
        before = steps(front.end())
        if number % 6:
            reply, told = run(work)
            told.append(reply)
        else:
            told = done_on(own_of(tmp_path / f"other-{number}"), work)
        check_goes_on(told, before)
        assert made(work)[".mp4"] == made(whole)[".mp4"], f"after {number} frames"


@pytest.mark.parametrize("victim", ["bridge", "node", "worker"])
def test_when_a_process_is_killed_all_behind_it_ends_and_the_job_goes_on(tmp_path: Path, victim: str) -> None:
    work, alone = front_work(tmp_path / "front"), work_in(tmp_path / "alone")
    run(alone)
    link = Link(tmp_path, own_of(tmp_path / "node"))
    process, daemon = bridge.start(bridge.Way(link.socket, HOST, "cpu", tmp_path, tmp_path))
    told = heard(daemon, lambda _: True)
    assert isinstance(told[0], messages.Hello), told
    assert link.node is not None
    daemon.send(work)
    told = heard(daemon, lambda message: isinstance(message, StepDone))
    worker = link.worker
    kill({"bridge": process.pid, "node": link.node.pid, "worker": worker}[victim] or 0)
    told += heard(daemon)
    process.join(60)
    daemon.close()
    link.end()
    assert is_gone(worker)
    if victim == "worker":
        assert isinstance(told[-1], messages.Died)
        assert "SIGKILL" in told[-1].manner
    if victim == "node":
        assert isinstance(told[-1], messages.Lost)
    before = steps(told)
    if victim == "node":
        told = done_on(own_of(tmp_path / "other"), work)
    else:  # the start of another worker takes seconds: this machine goes on
        reply, told = run(work)
        told.append(reply)
    check_goes_on(told, before)
    assert made(work) == made(alone)
