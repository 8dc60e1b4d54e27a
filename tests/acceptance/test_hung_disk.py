"""An outbox whose disk stops answering, for real: on a frozen file system every write waits without end."""

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.acceptance.conftest import Daemon, MakeDaemon
from tests.crash.disk import Disk, unusable

WATCHDOG_SECONDS = 8.0


class Systemd:
    """Hears what a service says, and when it last fed the watchdog."""

    def __init__(self, root: Path) -> None:
        self.path = root / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self.said: list[str] = []
        self.fed = [time.monotonic()]
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while (message := self._socket.recv(4096).decode()) != "end":
            self.said.append(message)
            if "WATCHDOG=1" in message:
                self.fed.append(time.monotonic())

    def longest_silence(self, since: float) -> float:
        fed = [since, *(moment for moment in self.fed if moment > since), time.monotonic()]
        return max(after - before for before, after in pairwise(fed))

    def until(self, word: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not any(word in message for message in list(self.said)):
            assert time.monotonic() < deadline, f"{word} was not said: {self.said[-5:]}"
            time.sleep(0.05)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.sendto(b"end", str(self.path))
        self._thread.join()
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_SECONDS * 1e6)))
    yield systemd
    systemd.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    reason = unusable()
    if reason:
        pytest.skip(reason)
    disk = Disk(tmp_path, mebibytes=64)
    yield disk
    disk.unmount()


def moving(daemon: Daemon) -> set[str]:
    """Name the jobs whose videos are made and not delivered."""
    return {job["name"] for job in daemon.status()["jobs"] if job["delivery"]}


def test_a_hung_outbox_stops_neither_the_queue_nor_the_next_daemon(
    disk: Disk, make_daemon: MakeDaemon, systemd: Systemd
) -> None:
    daemon = make_daemon(config="results_page = false\n")
    config = daemon.config.read_text().replace('outbox = "outbox"', f'outbox = "{disk.root}"')
    daemon.config.write_text(config)
    daemon.drop("first")
    daemon.start()
    daemon.until(lambda: (disk.root / "first.mp4").exists(), "the first video")
    begun = time.monotonic()
    with disk.frozen():
        daemon.drop("second")
        daemon.until(lambda: moving(daemon) >= {"second"}, "the second video")
        daemon.drop("third")
        daemon.until(lambda: moving(daemon) >= {"second", "third"}, "the third, made all the same")
        time.sleep(WATCHDOG_SECONDS / 2)
        assert systemd.longest_silence(begun) < WATCHDOG_SECONDS, "the watchdog was fed all the time"
        before = daemon.process
        assert before is not None
        before.send_signal(signal.SIGKILL)
        time.sleep(1)
        assert before.poll() is None, "it cannot end: a thread of it waits for the disk"
        systemd.said.clear()
        with daemon.log.open("ab") as log:
            after = daemon.process = subprocess.Popen(daemon.arguments("run"), stderr=log)
        systemd.until("EXTEND_TIMEOUT_USEC")
        systemd.until("waiting for pid")
        assert after.poll() is None, "a predecessor that cannot end is waited for"
    before.wait(30)
    daemon.until(lambda: (disk.root / "third.mp4").exists(), "all videos")
    assert daemon.stop() == 0
    assert sorted(path.name for path in disk.root.glob("*.mp4")) == ["first.mp4", "second.mp4", "third.mp4"]
    records = [json.loads((disk.root / f"{name}.json").read_text()) for name in ("second", "third")]
    assert [record["steps_run"] for record in records] == [record["steps_total"] for record in records]
