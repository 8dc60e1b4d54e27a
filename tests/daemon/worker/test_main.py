"""The worker process as the daemon starts it."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from framepackd.supervisor import process
from framepackd.worker import main, messages
from tests.daemon.worker.jobs import work_in


def test_a_signal_that_is_for_the_daemon_does_not_end_a_worker_however_early_it_comes() -> None:
    handle = process.start("auto")
    assert handle.process.pid is not None
    for number in main.FOR_THE_DAEMON:
        os.kill(handle.process.pid, number)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not blocked & set(main.FOR_THE_DAEMON), "here they go on being heard"
    handle.connection.close()
    handle.process.join(60)
    assert handle.process.exitcode == 0, handle.manner_of_death()


@pytest.mark.parametrize(
    ("answer", "answered"),
    [
        (messages.Failed("AcceleratorError: CUDA error", retry=True, device=True), 1),
        (messages.Failed("KeyError: 3", retry=True), 1),
        (messages.Again("out of memory"), 1),
        (messages.Failed("the picture is damaged", retry=False), 3),
        (messages.Stopped(), 3),
    ],
)
def test_a_worker_in_which_anything_may_be_broken_takes_no_further_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: messages.Message, answered: int
) -> None:
    """After an illegal memory access all that a process computes on a GPU fails."""
    monkeypatch.setattr(main, "die_with", lambda parent: None)
    monkeypatch.setattr(main, "answer", lambda *_: answer)
    for name in ("signal", "pthread_sigmask"):
        monkeypatch.setattr(main.signal, name, lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    for _ in range(3):
        ours.send(work_in(tmp_path))
    running = threading.Thread(target=main.main, args=(theirs, os.getppid(), "auto"))
    running.start()
    told = [ours.recv() for _ in range(answered)]
    if answered == 3:
        ours.close()  # the daemon is done with it
    running.join(30)
    assert not running.is_alive()
    assert told == [answer] * answered
