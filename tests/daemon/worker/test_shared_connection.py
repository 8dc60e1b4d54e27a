"""What a worker tells a far front is sent in order while it computes on; it waits once a step is behind."""

import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from framepackd.worker.finishing import BEHIND, SharedConnection

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
