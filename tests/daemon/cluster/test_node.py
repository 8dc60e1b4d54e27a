"""A node's end: what it does in its scratch folder, and what it refuses of a front."""

import hashlib
import json
import multiprocessing
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framepackd.cluster import frames, inventory, names
from framepackd.cluster.inventory import Entry
from framepackd.cluster.located import to_json
from framepackd.cluster.names import RefusedError
from framepackd.cluster.node import Node
from framepackd.cluster.node_file import FILE, NodeFileError, read_node_file, write_node_file
from framepackd.cluster.wire import Frame, Wire
from framepackd.worker.spawning import Spawned
from tests.daemon.cluster.jobs import JOB, PATIENCE, front_work, own_of, start_threaded

OTHER = "20260101-000000-bbbbbb"


class Served:
    """A node in a thread of the test, to which the test says what a front would."""

    def __init__(self, root: Path) -> None:
        self.front, self._node = map(Wire, socket.socketpair())
        self.scratch = root / "scratch" / "cpu"
        self.refused: Exception | None = None
        self._served = Node(self._node, own_of(root), "cpu", start_threaded)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._served.serve()
        except Exception as error:
            self.refused = error
            self._node.shut()

    def next(self) -> Frame:
        frame = self.front.receive(PATIENCE)
        assert frame is not None
        return frame

    def begin(self, files: dict[str, bytes], job: str = JOB) -> None:
        listed = [
            asdict(Entry(name, len(content), hashlib.sha256(content).hexdigest()))
            for name, content in files.items()
        ]
        body = json.dumps({"work": "{}", "files": listed}).encode()
        self.front.send({"kind": "Begin", "run": 1, "job": job}, body)

    def end(self) -> Exception | None:
        """End the connection, and give why the node has ended before, if so."""
        self.front.shut()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        for wire in (self.front, self._node):
            wire.close()
        return self.refused


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    node = Served(tmp_path)
    assert node.next().kind == "Hello"
    yield node
    node.end()


def send(served: Served, content: bytes, **other: Any) -> None:
    served.front.send({"kind": "Part", "run": 1, "name": "inputs/a.png", "offset": 0} | other, content)


def test_the_folder_of_a_job_is_made_what_it_is_on_the_front(served: Served) -> None:
    here = served.scratch / "jobs" / JOB
    for name, content in {"inputs/a.png": b"a", "inputs/b.png": b"old", "result/.mp4": b"x"}.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    (served.scratch / "jobs" / OTHER).mkdir()
    served.begin({"inputs/a.png": b"a", "inputs/b.png": b"new", "checkpoint/state-00000001": b"s"})
    assert served.next().header["names"] == ["inputs/b.png", "checkpoint/state-00000001"]
    assert sorted(path.name for path in here.rglob("*") if path.is_file()) == ["a.png", "b.png"]
    assert [path.name for path in here.parent.iterdir()] == [JOB], "what is left of other jobs is removed"


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "manifest.json", "result/.mp4", "inputs/..", "loras/x"]
)
def test_a_file_that_no_job_brings_along_is_refused(served: Served, name: str) -> None:
    served.begin({name: b"x"})
    assert served.next().kind == "Lost"
    assert isinstance(served.end(), RefusedError)


@pytest.mark.parametrize("job", ["../x", "", "x", f"{JOB}/.."])
def test_what_is_no_job_is_refused(served: Served, job: str) -> None:
    served.begin({}, job)
    assert served.next().kind == "Lost"
    assert isinstance(served.end(), RefusedError)


@pytest.mark.parametrize(
    "part", [{"name": "inputs/other.png"}, {"offset": 1}, {"run": 2}, {"name": "../a.png"}]
)
def test_a_part_that_nobody_asked_for_is_refused(served: Served, part: dict[str, Any]) -> None:
    served.begin({"inputs/a.png": b"abc"})
    served.next()
    send(served, b"abc", **part)
    assert served.next().kind == "Lost"
    assert isinstance(served.end(), RefusedError)


def test_a_file_that_arrives_with_another_content_is_refused(served: Served) -> None:
    served.begin({"inputs/a.png": b"abc"})
    served.next()
    send(served, b"abd")
    served.front.send({"kind": "Go", "run": 1})
    assert served.next().kind == "Lost"
    assert "another content" in str(served.end())


def test_two_nodes_do_not_use_one_device_at_the_same_time(tmp_path: Path) -> None:
    first = Served(tmp_path)
    assert first.next().kind == "Hello"
    second = Served(tmp_path)
    assert second.front.receive(0.3) is None, "it waits until the first is gone"
    first.end()
    assert second.next().kind == "Hello"
    second.end()


def test_loras_that_were_used_longest_ago_are_removed_and_those_that_are_wanted_stay(tmp_path: Path) -> None:
    for age, sha in enumerate("abc"):
        path = tmp_path / (sha * 64) / "oil.safetensors"
        path.parent.mkdir()
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    wanted = f"{names.LORAS}/{'c' * 64}/oil.safetensors"
    inventory.forget_oldest(tmp_path, 20, {wanted: Entry(wanted, 10, "c" * 64)})
    assert sorted(path.parent.name[0] for path in tmp_path.glob("*/*")) == ["a", "c"]


def test_of_a_checkpoint_that_was_given_up_only_the_mark_travels(tmp_path: Path) -> None:
    work = front_work(tmp_path)
    folder = work.result.parent
    for name in (
        "checkpoint/state-00000001",
        "checkpoint.aside-1/state-00000001",
        "checkpoint.aside-1/given-up",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "inputs" / "link.png").symlink_to("/etc/passwd")
    (folder / "checkpoint" / ".framepackd-state-00000002.part").touch()
    (folder / "manifest.json").touch()
    assert {entry.name for entry in inventory.of_folder(folder)} == {
        "inputs/image.png",
        "checkpoint/state-00000001",
        "checkpoint.aside-1/given-up",
    }


def test_a_node_finds_its_own_file_and_says_what_to_do_if_it_cannot(tmp_path: Path) -> None:
    own, path = own_of(tmp_path), tmp_path / "node.json"
    write_node_file(path, own)
    assert read_node_file({FILE: str(path)}) == own
    path.write_text("{}")
    for environment in ({}, {FILE: str(tmp_path / "none")}, {FILE: str(path)}):
        with pytest.raises(NodeFileError, match="framepackd node"):
            read_node_file(environment)


def test_it_ends_with_the_front_although_a_worker_never_leaves_the_job(tmp_path: Path) -> None:
    """A job is begun anew while the worker, which hangs, still has it."""
    ours, theirs = multiprocessing.Pipe()
    killed = threading.Event()
    hung: Any = SimpleNamespace(kill=lambda: (killed.set(), theirs.close()), join=lambda: None, exitcode=-9)
    front, end = map(Wire, socket.socketpair())
    node = Node(end, own_of(tmp_path), "cpu", lambda _: Spawned(hung, ours))
    serving = threading.Thread(target=node.serve, daemon=True)
    serving.start()
    work = front_work(tmp_path / "front")
    described = to_json(work, "cpu", {})
    listed = inventory.of_folder(work.result.parent)
    assert (front.receive(PATIENCE) or Frame({})).kind == "Hello"
    front.send({"kind": "Begin", "run": 1, "job": JOB}, frames.description(described, listed))
    assert (front.receive(PATIENCE) or Frame({})).kind == "Lacks"
    for entry, path in listed.items():
        part = {"kind": "Part", "run": 1, "name": entry.name, "offset": 0}
        front.send(part, path.read_bytes())
    front.send({"kind": "Go", "run": 1})
    front.send({"kind": "Begin", "run": 2, "job": JOB}, frames.description(described, listed))
    front.close()
    serving.join(PATIENCE)
    assert not serving.is_alive()
    assert killed.is_set()
    end.close()
    ours.close()


def test_why_it_cannot_go_on_is_told(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("in the way of a folder")
    front, end = map(Wire, socket.socketpair())
    node = Node(end, own_of(tmp_path), "cpu", start_threaded)
    with pytest.raises(NotADirectoryError):
        node.serve()
    told = front.receive(PATIENCE)
    assert told is not None
    assert told.kind == "Lost"
    assert "Not a directory" in told.header["reason"]
    for wire in (front, end):
        wire.close()
