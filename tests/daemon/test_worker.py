"""The worker process as the daemon starts it."""

import os
import signal

import pytest

from framepackd import worker


@pytest.mark.parametrize("number", worker.FOR_THE_DAEMON)
def test_a_signal_that_is_for_the_daemon_does_not_end_a_worker_however_early_it_comes(
    number: signal.Signals,
) -> None:
    handle = worker.start()
    assert handle.process.pid is not None
    os.kill(handle.process.pid, number)
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, []), "here they go on being heard"
    handle.connection.close()
    handle.process.join(60)
    assert handle.process.exitcode == 0, handle.manner_of_death()
