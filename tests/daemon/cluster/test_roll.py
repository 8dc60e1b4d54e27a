"""The list of machines: asked for over a socket, kept as long as it is told, and checked."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from framepackd.cluster import roll
from framepackd.cluster.roll import Node, Roll
from framepackd.cluster.wire import Wire, WireError

RENDER2: dict[str, Any] = {
    "host": "render2",
    "address": "10.0.0.7",
    "alive": True,
    "devices": ["cuda:0", "cpu"],
}


class Server:
    """What ``framepackd node`` is to those who ask for the machines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[str] = []
        self.wires: list[Wire] = []
        self._open = socket.socket(socket.AF_UNIX)
        self._open.bind(str(path))
        self._open.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire = Wire(self._open.accept()[0])
                frame = wire.receive(5)
                assert frame is not None
                self.asked.append(frame.kind)
                self.wires.append(wire)
                wire.send({"kind": "Nodes", "nodes": [RENDER2]})

    def tell(self, *nodes: dict[str, Any]) -> None:
        self.wires[-1].send({"kind": "Nodes", "nodes": list(nodes)})

    def end(self) -> None:
        self._open.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._open.close()
        self.path.unlink()
        for wire in self.wires:
            wire.shut()
            wire.close()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(roll, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(roll, "LOST_SECONDS", 2.0)
    return tmp_path / "bridges.sock"


@pytest.fixture
def woken() -> threading.Semaphore:
    return threading.Semaphore(0)


@pytest.fixture
def asking(path: Path, woken: threading.Semaphore) -> Iterator[Roll]:
    asking = Roll(path, woken.release)
    asking.start()
    yield asking
    asking.end()


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_what_is_told_is_known_and_wakes_the_loop(
    path: Path, asking: Roll, woken: threading.Semaphore
) -> None:
    server = Server(path)
    assert soon(lambda: "render2" in asking.nodes)
    assert server.asked == ["Nodes"]
    assert asking.nodes["render2"] == Node("render2", "10.0.0.7", True, ("cuda:0", "cpu"))
    assert asking.last_signs["render2"] == pytest.approx(time.time(), abs=10)
    while woken.acquire(blocking=False):
        pass
    server.tell(RENDER2)
    server.tell(RENDER2 | {"alive": False})
    assert soon(lambda: not asking.nodes["render2"].alive)
    assert woken.acquire(timeout=5)
    assert not woken.acquire(timeout=0.2), "what has not changed wakes nobody"
    server.end()


def test_without_a_server_it_says_what_to_start_and_asks_again(path: Path, asking: Roll) -> None:
    assert soon(lambda: asking.answered)
    assert "systemctl start framepackd-node" in str(asking.trouble)
    server = Server(path)
    assert soon(lambda: asking.trouble is None)
    server.end()
    assert soon(lambda: asking.trouble is not None)
    assert asking.nodes == {}


def test_while_ray_is_away_its_reason_is_told(path: Path, asking: Roll) -> None:
    server = Server(path)
    assert soon(lambda: "render2" in asking.nodes)
    server.wires[-1].send({"kind": "Lost", "reason": "Ray's head at 10.0.0.1:6379 does not answer"})
    assert soon(lambda: asking.trouble == "Ray's head at 10.0.0.1:6379 does not answer")
    assert asking.nodes == {}
    server.end()


def test_a_server_that_falls_silent_is_asked_again(
    path: Path, asking: Roll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(roll, "ROUND_SECONDS", 0.05)
    server = Server(path)
    assert soon(lambda: len(server.asked) > 1)
    server.end()


def test_ask_gives_the_list_once_or_says_what_to_do(path: Path) -> None:
    with pytest.raises(OSError, match="does not run on this machine"):
        roll.ask(path)
    server = Server(path)
    assert [node.host for node in roll.ask(path)] == ["render2"]
    server.end()


def test_who_may_not_use_the_socket_is_told_which_key_allows_it(path: Path) -> None:
    assert "set front_user under [cluster]" in roll.trouble_of(PermissionError(), path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "../etc"},
        {"host": "render2:cuda:0"},
        {"host": "render2\n"},
        {"host": 3},
        {"alive": "yes"},
        {"devices": ["cuda"]},
        {"devices": ["cuda:0\n"]},
        {"devices": "cuda:0"},
        {"devices": ["cpu"] * 2000},
        {"address": "a\x1b[2J"},
    ],
)
def test_a_list_with_names_that_no_machine_has_is_refused(wrong: dict[str, Any]) -> None:
    assert roll.nodes_in({"kind": "Nodes", "nodes": [RENDER2]})
    with pytest.raises(WireError, match="its list of machines is wrong"):
        roll.nodes_in({"kind": "Nodes", "nodes": [RENDER2 | wrong]})


@pytest.mark.parametrize("header", [{"kind": "Hello"}, {"kind": "Nodes"}, {"kind": "Nodes", "nodes": {}}])
def test_what_is_no_list_is_refused(header: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="list of machines"):
        roll.nodes_in(header)
