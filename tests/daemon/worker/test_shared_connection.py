"""What a worker tells a far front is sent in order while it computes on; it waits once a step is behind."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
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


def waiting(do: Callable[[], object]) -> threading.Thread:
    """Have something done in a thread, and see that it waits."""
    thread = threading.Thread(target=do)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    return thread


def check_ends(thread: threading.Thread) -> None:
    thread.join(10)
    assert not thread.is_alive()


def test_who_sends_does_not_wait_for_who_receives(pipe: tuple[SharedConnection, Connection]) -> None:
    shared, theirs = pipe
    for number in range(BEHIND):
        shared.send((number, PART))
    assert [theirs.recv()[0] for _ in range(BEHIND)] == list(range(BEHIND)), "in order"


def test_who_sends_waits_once_a_step_is_behind(pipe: tuple[SharedConnection, Connection]) -> None:
    shared, theirs = pipe
    more = 2  # one that is being sent, and one too many
    sending = waiting(lambda: [shared.send(PART) for _ in range(BEHIND + more)])
    for _ in range(BEHIND + more):
        theirs.recv()
    check_ends(sending)


def test_after_a_flush_all_is_sent(pipe: tuple[SharedConnection, Connection]) -> None:
    shared, theirs = pipe
    shared.send(PART)
    flushing = waiting(shared.flush)
    theirs.recv()
    check_ends(flushing)


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
    sending = waiting(lambda: shared.send(StepDone(1, 2, 0.1)))
    theirs.recv()
    check_ends(sending)
    assert [theirs.recv().step for _ in range(2)] == [1, 2]


def test_what_cannot_be_sent_at_all_is_told_and_nobody_waits_for_ever(
    pipe: tuple[SharedConnection, Connection],
) -> None:
    shared, _ = pipe
    shared.send(lambda: None)  # cannot be pickled
    shared.flush()
    with pytest.raises(Exception, match="pickle"):
        shared.send("more")
