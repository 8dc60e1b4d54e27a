"""The door for bridges: who may connect, and that each connection has a link, which ends with the door."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framepackd.cluster import bridges
from framepackd.cluster.bridges import Bridges
from framepackd.cluster.wire import Wire

NOWHERE = "127.0.0.1:9"  # nobody listens there


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Bridges]:
    made = Bridges(tmp_path / "bridges.sock", frozenset(), NOWHERE, tmp_path / "ray", {})
    yield made
    made.close()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[[], Wire]]:
    made: list[Wire] = []

    def connected() -> Wire:
        end = socket.socket(socket.AF_UNIX)
        made.append(Wire(end))
        end.connect(str(tmp_path / "bridges.sock"))
        return made[-1]

    yield connected
    for wire in made:
        wire.close()


def test_a_socket_of_a_former_life_is_replaced(tmp_path: Path, connect: Callable[[], Wire]) -> None:
    (tmp_path / "bridges.sock").touch()
    door = Bridges(tmp_path / "bridges.sock", frozenset(), NOWHERE, tmp_path / "ray", {})
    connect()
    door.close()


def test_who_has_connected_is_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert bridges.user_of(ours) == os.geteuid()
    assert bridges.user_ids("root") == {0}
    assert bridges.user_ids("nobody-of-this-name") == frozenset()


def test_another_user_is_sent_away(
    door: Bridges, connect: Callable[[], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridges, "user_of", lambda _: 54321)
    wire = connect()
    door.round(5)
    with pytest.raises(EOFError):
        wire.receive(5)


def test_a_link_that_is_asked_for_nonsense_says_so(door: Bridges, connect: Callable[[], Wire]) -> None:
    wire = connect()
    door.round(5)
    wire.send_packed(b"\xff" * 8)
    lost = wire.receive(30)
    assert lost is not None
    assert lost.kind == "Lost"
    assert "longer than" in lost.header["reason"]


def test_a_link_ends_with_the_door(door: Bridges, connect: Callable[[], Wire]) -> None:
    wire = connect()
    door.round(5)
    door.close()
    with pytest.raises(EOFError):
        wire.receive(5)
