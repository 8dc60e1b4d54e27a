"""A remote card does a job as a worker of this machine would, whoever dies meanwhile."""

from pathlib import Path
from typing import Any

from framepackd.worker import messages
from tests.daemon.cluster.jobs import Card, front_work, heard, is_end, own_of
from tests.daemon.worker.jobs import made, run, work_in


def done(work: Any, own: Any) -> list[messages.Message]:
    card = Card(own)
    assert isinstance(heard(card.daemon, lambda message: True)[0], messages.Hello)
    card.daemon.send(work)
    told = heard(card.daemon, is_end)
    card.end()
    return told


def test_a_job_on_a_remote_card_is_the_same_as_on_this_machine(tmp_path: Path) -> None:
    alone = work_in(tmp_path / "alone")
    _, said = run(alone)
    work = front_work(tmp_path / "front")
    told = done(work, own_of(tmp_path / "node"))
    assert isinstance(told[-1], messages.Written)
    assert isinstance(told[-1].reply, messages.Finished)
    assert [type(message) for message in told] == [type(message) for message in said] + [
        messages.Sampled,
        messages.Written,
    ]
    assert made(work) == made(alone)
