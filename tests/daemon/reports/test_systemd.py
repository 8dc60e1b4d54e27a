"""What systemd hears, on a real socket."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from framepackd.reports import systemd
from framepackd.reports.systemd import Reporter


class Listener:
    """Systemd's end: a datagram socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(5)

    def heard(self) -> list[str]:
        """Give what has come, a message each."""
        messages = []
        self.socket.setblocking(False)
        try:
            while True:
                messages.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            return messages


@pytest.fixture(params=["path", "abstract"])
def listener(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Listener]:
    name = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name if request.param == "path" else f"@{name}")
    listener = Listener(name if request.param == "path" else f"\0{name}")
    yield listener
    listener.socket.close()


def watched(monkeypatch: pytest.MonkeyPatch, seconds: float, pid: int | None = None) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(round(seconds * 1e6)))
    monkeypatch.setenv("WATCHDOG_PID", str(pid or os.getpid()))


def test_what_is_said_together_arrives_together(listener: Listener) -> None:
    systemd.notify("READY=1", "STATUS=idle")
    systemd.reloading()
    ready, reloading = listener.heard()
    assert ready == "READY=1\nSTATUS=idle"
    first, monotonic = reloading.splitlines()
    assert first == "RELOADING=1"
    microseconds = int(monotonic.removeprefix("MONOTONIC_USEC="))
    assert 0 <= time.monotonic() * 1e6 - microseconds < 5e6


@pytest.mark.parametrize("address", [None, "", "/nowhere/to/be/found", "@framepackd-nobody-listens"])
def test_where_nobody_listens_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1")
    Reporter(lambda: "idle").round(stopping=False)


def test_who_is_not_run_by_systemd_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)

    def status() -> str:
        raise AssertionError("asked for a status that nobody reads")

    reporter = Reporter(status)
    reporter.round(stopping=False)
    assert reporter.patience == float("inf")


def test_the_watchdog_is_fed_by_rounds_and_by_nothing_else(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(monkeypatch, 4)
    reporter = Reporter(lambda: "idle")
    assert reporter.patience <= 1, "the loop goes round in time to feed it"
    clock = [time.monotonic()]
    monkeypatch.setattr(systemd.time, "monotonic", lambda: clock[0])
    fed = []
    for _ in range(8):  # rounds half a second apart
        reporter.round(stopping=False)
        fed.append("WATCHDOG=1" in listener.heard())
        clock[0] += 0.5
    assert fed == [True, False] * 4, "not in every round: a busy inbox must not flood systemd"


@pytest.mark.parametrize(("microseconds", "pid"), [("4000000", 1), ("", None), ("soon", None)])
def test_a_watchdog_that_means_another_or_nothing_is_not_fed(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, microseconds: str, pid: int | None
) -> None:
    watched(monkeypatch, 4, pid)
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    reporter = Reporter(lambda: "idle")
    reporter.round(stopping=False)
    assert listener.heard() == ["STATUS=idle"]


def test_the_last_status_is_said_however_fast_they_follow(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = ["step 1"]
    reporter = Reporter(lambda: now[0])
    clock = [time.monotonic()]
    monkeypatch.setattr(systemd.time, "monotonic", lambda: clock[0])
    for step in range(1, 100):
        now[0] = f"step {step}"
        reporter.round(stopping=False)
    assert listener.heard() == ["STATUS=step 1"]
    assert 0 < reporter.patience <= 1, "the loop comes back for it"
    clock[0] += reporter.patience
    reporter.round(stopping=False)
    reporter.round(stopping=False)
    assert listener.heard() == ["STATUS=step 99"]


def test_a_stop_says_so_once_and_asks_for_time_as_long_as_it_lasts(listener: Listener) -> None:
    reporter = Reporter(lambda: "idle")
    reporter.round(stopping=False)
    listener.heard()
    for _ in range(3):
        reporter.round(stopping=True)
    asked = f"EXTEND_TIMEOUT_USEC={systemd.STOP_USEC}"
    assert listener.heard() == [f"STOPPING=1\n{asked}", asked, asked]
