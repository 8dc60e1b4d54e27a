"""A real daemon as systemd sees it: what it is told, the watchdog, the reload, the stop."""

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.acceptance.conftest import LONG, LONG_SECTIONS, Daemon, MakeDaemon, ending, environment

WATCHDOG_SECONDS = 3.0


class Systemd:
    """The end that systemd holds: hears messages, with the time at which each came."""

    def __init__(self, daemon: Daemon, patched: pytest.MonkeyPatch) -> None:
        """Listen to a daemon that starts with the environment patched."""
        address = str(daemon.root / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        patched.setenv("NOTIFY_SOCKET", address)
        patched.setenv("WATCHDOG_USEC", str(round(WATCHDOG_SECONDS * 1e6)))
        self.heard: list[tuple[float, str]] = []

    def listen(self) -> list[str]:
        """Take in what has come; gives all lines so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                message = self.socket.recv(4096, socket.MSG_DONTWAIT).decode()
                self.heard += [(time.monotonic(), line) for line in message.splitlines()]
        return [line for _, line in self.heard]

    def status(self) -> str:
        """Give the last status that was told."""
        return next((line for line in reversed(self.listen()) if line.startswith("STATUS=")), "")

    def heard_step_of(self, name: str) -> bool:
        return any(line.startswith(f"STATUS={name}: ") and "step" in line for line in self.listen())

    def gaps_between_feeds(self) -> list[float]:
        fed = [at for at, line in self.heard if line == "WATCHDOG=1"]
        return [later - earlier for earlier, later in pairwise(fed)]


@pytest.fixture
def systemd(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    systemd = Systemd(daemon, monkeypatch)
    yield systemd
    systemd.socket.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Systemd]]:
    """Have a running daemon for several tests, of which the last one stops it."""
    daemon = Daemon(tmp_path_factory.mktemp("service"))
    with pytest.MonkeyPatch.context() as patched:
        systemd = Systemd(daemon, patched)
        daemon.start()
    with ending([daemon]):
        yield daemon, systemd
    systemd.socket.close()


def test_systemd_hears_when_it_is_ready_and_what_it_does(service: tuple[Daemon, Systemd]) -> None:
    daemon, systemd = service
    daemon.until(lambda: "READY=1" in systemd.listen(), "READY=1")
    daemon.drop("cat", **LONG)
    daemon.until(lambda: systemd.heard_step_of("cat"), "progress")
    daemon.until(lambda: systemd.status() == "STATUS=idle", "the job to be done")
    where = rf"section \d/{LONG_SECTIONS}, (step \d+/100|decoding)"
    told = re.compile(rf"STATUS=cat: \d+ %, {where}, done .*\d\d:\d\d")
    assert any(told.fullmatch(line) for line in systemd.listen())


def test_a_reload_takes_what_may_change_while_the_job_goes_on(service: tuple[Daemon, Systemd]) -> None:
    daemon, systemd = service
    daemon.drop("lion", **LONG | {"steps": 40})
    daemon.until(lambda: systemd.heard_step_of("lion"), "the job to run")
    text = daemon.config.read_text()
    daemon.config.write_text(
        text.replace("settle_seconds = 0.3", "settle_seconds = 0.2")
        .replace('inbox = "inbox"', 'inbox = "elsewhere"')
        .replace("seconds = 1\n", "seconds = 4\n")
        + '[gpu]\ndevice = "cuda:7"\n'
    )
    before = len(systemd.listen())
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    daemon.until(lambda: "READY=1" in systemd.listen()[before:], "the second READY=1")
    lines = systemd.listen()[before:]
    assert lines.index("RELOADING=1") + 2 == lines.index("READY=1")
    log = daemon.log.read_text()
    assert "configuration read again: new settle_seconds, defaults" in log
    assert "inbox, gpu: new in the configuration, but holds only after a restart" in log
    daemon.drop("dog")
    # A systemd that does not listen holds the daemon up.
    dog = daemon.outbox / "dog.mp4"
    daemon.until(lambda: systemd.status() == "STATUS=idle" and dog.exists(), "both jobs to be done")
    jobs = {job["name"]: job for job in daemon.status()["jobs"]}
    assert jobs["lion"]["resumes"] == 0, "it went on"
    assert jobs["dog"]["frames"] > jobs["lion"]["frames"], "the new defaults hold for what comes after"


def test_a_stop_is_told_and_asks_for_time_while_the_worker_is_in_a_step(
    service: tuple[Daemon, Systemd],
) -> None:
    daemon, systemd = service
    daemon.drop("seal", **LONG)
    daemon.until(lambda: systemd.heard_step_of("seal"), "the job to run")
    assert "STOPPING=1" not in systemd.listen()
    worker = daemon.worker()
    os.kill(worker, signal.SIGSTOP)
    assert daemon.process is not None
    daemon.process.terminate()
    daemon.until(
        lambda: sum("EXTEND_TIMEOUT_USEC" in line for line in systemd.listen()) >= 3, "it to ask for time"
    )
    os.kill(worker, signal.SIGCONT)
    assert daemon.process.wait(30) == 0
    assert "STOPPING=1" in systemd.listen()


@pytest.mark.long
def test_the_watchdog_is_fed_while_idle_and_while_it_works_and_not_while_it_hangs(
    daemon: Daemon, systemd: Systemd
) -> None:
    daemon.start()
    began = time.monotonic()

    def long_enough() -> bool:
        systemd.listen()
        return time.monotonic() - began > WATCHDOG_SECONDS

    daemon.until(long_enough, "an idle while")
    daemon.drop("cat", **LONG)
    daemon.until(lambda: systemd.status().startswith("STATUS=cat: "), "the job to run")
    daemon.until(lambda: systemd.status() == "STATUS=idle", "the job to end")
    assert max(systemd.gaps_between_feeds()) < WATCHDOG_SECONDS
    assert daemon.process is not None
    os.kill(daemon.process.pid, signal.SIGSTOP)
    systemd.listen()
    before = len(systemd.heard)
    time.sleep(WATCHDOG_SECONDS / 2)
    assert len(systemd.listen()) == before
    os.kill(daemon.process.pid, signal.SIGCONT)


@pytest.mark.long
def test_a_broken_configuration_is_not_taken(daemon: Daemon, systemd: Systemd) -> None:
    daemon.start()
    before = daemon.config.read_text()
    daemon.config.write_text(f"max_attempts = 0\n{before}")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    daemon.until(lambda: "the configuration stays as it was" in daemon.log.read_text(), "the refusal")
    assert "max_attempts" in daemon.log.read_text()
    daemon.until(lambda: systemd.listen().count("READY=1") == 2, "the daemon to be ready again")
    daemon.config.write_text(before)
    daemon.drop("cat")
    daemon.until(lambda: daemon.status()["counts"]["done"] == 1, "a job to be done")


def test_in_a_terminal_a_hang_up_still_ends_it(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    terminal, theirs = pty.openpty()
    process = daemon.process = subprocess.Popen(
        daemon.arguments("run"), stdin=theirs, stdout=theirs, stderr=theirs, env=environment()
    )
    os.close(theirs)
    daemon.until(lambda: (daemon.state / "control.sock").exists(), "the daemon to start")
    process.send_signal(signal.SIGHUP)  # while the window is open: a reload
    time.sleep(0.5)
    assert process.poll() is None
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0
