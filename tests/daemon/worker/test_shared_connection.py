"""What a worker tells a far front is sent in order while it computes on; it waits once a step is behind."""

import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from framepackd.worker.finishing import BEHIND, SharedConnection
from framepackd.worker.messages import StepDone

PART = bytes(1 << 20)  # more than a pipe holds


@pytest.fixture
def pipe() -> Iterator[tuple[SharedConnection, Connection]]:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        shared = SharedConnection(ours)
        shared.send_behind()
        yield shared, theirs


def test_who_sends_does_not_wait_for_who_receives(pipe: tuple[SharedConnection, Connection]) -> None:
    shared, theirs = pipe
    for number in range(BEHIND):
        shared.send((number, PART))
    assert [theirs.recv()[0] for _ in range(BEHIND)] == list(range(BEHIND)), "in order"


def test_who_sends_waits_once_a_step_is_behind(pipe: tuple[SharedConnection, Connection]) -> None:
    shared, theirs = pipe
    more = 2  # one that is being sent, and one too many
    sending = threading.Thread(target=lambda: [shared.send(PART) for _ in range(BEHIND + more)])
    sending.start()
    sending.join(1)
    assert sending.is_alive()
    for _ in range(BEHIND + more):
        theirs.recv()
    sending.join(10)
    assert not sending.is_alive()


def test_after_a_flush_all_is_sent(pipe: tuple[SharedConnection, Connection]) -> None:
    shared, theirs = pipe
    shared.send(PART)
    flushing = threading.Thread(target=shared.flush)
    flushing.start()
    flushing.join(0.3)
    assert flushing.is_alive()
    theirs.recv()
    flushing.join(10)
    assert not flushing.is_alive()


def test_where_nobody_receives_any_more_the_next_send_says_so(
    pipe: tuple[SharedConnection, Connection],
) -> None:
    shared, theirs = pipe
    theirs.close()
    shared.send("not heard")
    shared.flush()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        shared.send("nor this")


def test_one_step_may_be_behind_and_not_two(pipe: tuple[SharedConnection, Connection]) -> None:
    shared, theirs = pipe
    shared.send(PART)  # nothing more is sent until this is received
    shared.send(StepDone(1, 1, 0.1))
    sending = threading.Thread(target=shared.send, args=(StepDone(1, 2, 0.1),))
    sending.start()
    sending.join(0.5)
    assert sending.is_alive()
    theirs.recv()
    sending.join(10)
    assert not sending.is_alive()
    assert [theirs.recv().step for _ in range(2)] == [1, 2]


def test_what_cannot_be_sent_at_all_is_told_and_nobody_waits_for_ever(
    pipe: tuple[SharedConnection, Connection],
) -> None:
    shared, _ = pipe
    shared.send(lambda: None)  # cannot be pickled
    shared.flush()
    with pytest.raises(Exception, match="pickle"):
        shared.send("more")
