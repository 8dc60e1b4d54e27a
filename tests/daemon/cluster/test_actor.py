"""What a link calls on a node: frames go both ways, and the end of the node's end is told in words."""

import json
import threading
import time
from collections.abc import Iterator

import pytest

from framepackd.cluster import actor
from framepackd.cluster.actor import ENVIRONMENT, Relay
from framepackd.cluster.wire import PART_BYTES, Frame, packed, unpacked
from tests.wings import ROOT

HEAD = 8  # bytes before the header of a frame: two lengths


def frames_in(block: bytes) -> list[Frame]:
    found = []
    while block:
        size = HEAD + int.from_bytes(block[:4]) + int.from_bytes(block[4:HEAD])
        found.append(unpacked(block[:size]))
        block = block[size:]
    return found


def taken(relay: Relay, count: int) -> list[Frame]:
    found: list[Frame] = []
    until = time.monotonic() + 30
    while len(found) < count and time.monotonic() < until:
        found += frames_in(relay.take())
    return found


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as Ray sets it for an actor without a GPU
    monkeypatch.setenv(ENVIRONMENT, json.dumps({"PYTHONPATH": str(ROOT), "HF_HOME": "/models"}))
    made = Relay("cpu", "tests.daemon.cluster.echo")
    yield made
    made.give(packed({"kind": "End"}))
    while made.take():
        pass


def test_the_nodes_end_has_the_environment_of_before_ray(relay: Relay) -> None:
    (hello,) = taken(relay, 1)
    assert hello.header["device"] == "cpu"
    assert hello.header["environment"]["HF_HOME"] == "/models"
    assert "CUDA_VISIBLE_DEVICES" not in hello.header["environment"]
    assert ENVIRONMENT not in hello.header["environment"]


def test_frames_come_back_whole_and_in_order(relay: Relay) -> None:
    taken(relay, 1)
    sent = [
        Frame({"kind": "Part", "number": n}, bytes([n]) * size)
        for n, size in enumerate((0, 1, PART_BYTES, 3))
    ]
    giving = threading.Thread(target=lambda: [relay.give(packed(*frame)) for frame in sent])
    giving.start()
    assert taken(relay, len(sent)) == sent
    giving.join()


def test_a_call_returns_although_nothing_comes(relay: Relay) -> None:
    taken(relay, 1)
    begun = time.monotonic()
    assert relay.take() == b""
    assert time.monotonic() - begun < actor.SILENT_SECONDS + 5


def test_the_end_of_the_nodes_end_is_told_once(relay: Relay) -> None:
    taken(relay, 1)
    relay.give(packed({"kind": "End"}))
    (lost,) = taken(relay, 1)
    assert lost.header == {"kind": "Lost", "reason": "the process for the card ended with exit code 7"}
    assert relay.take() == b""
    relay.give(packed({"kind": "Tell"}))  # nobody is there, which is no error
