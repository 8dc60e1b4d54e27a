"""Small jobs in a front's work folder, nodes with the tiny models, and a link between them without Ray."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from framepack_core.request import Request
from framepackd.cluster import frames
from framepackd.cluster import node as node_end
from framepackd.cluster.bridge import Bridge
from framepackd.cluster.node_file import NodeFile
from framepackd.cluster.wire import Frame, Wire
from framepackd.worker import main, messages
from framepackd.worker.messages import Hello, Message, Work
from framepackd.worker.spawning import Spawned
from framepackd.worker.versions import versions
from tests.conftest import tiny_spec
from tests.daemon.worker.jobs import work_in

JOB = "20260101-000000-abcdef"
HOST = "render2"
PATIENCE = 60.0


def front_work(root: Path, make: Callable[..., Work] = work_in, job: str = JOB, **settings: Any) -> Work:
    """A job whose files lie as the daemon lays them: the dropped ones in ``inputs``."""
    folder = root / "jobs" / job
    folder.mkdir(parents=True)
    work = make(folder, **settings)
    (folder / "inputs").mkdir()
    for path in folder.glob("*.*"):
        path.rename(folder / "inputs" / path.name)

    def inside(request: Request) -> Request:
        pictures = {"image": request.image, "end_image": request.end_image}
        dropped = {key: path for key, path in pictures.items() if path and path.parent == folder}
        return request.model_copy(
            update={key: folder / "inputs" / path.name for key, path in dropped.items()}
        )

    following = tuple(map(inside, work.following))
    return replace(work, job_id=job, request=inside(work.request), following=following)


def own_of(root: Path) -> NodeFile:
    specs = [tiny_spec("framepack-i2v"), tiny_spec("framepack-f1")]
    return NodeFile({spec.name: spec for spec in specs}, root / "scratch", root / "cache")


class ThreadedWorker:
    """A worker in a thread of the test, killed by cutting its connection."""

    exitcode = -signal.SIGKILL

    def __init__(self, device: str) -> None:
        self.ours, theirs = multiprocessing.Pipe()
        self._thread = threading.Thread(target=self._run, args=(theirs, device), daemon=True)
        self._thread.start()

    def _run(self, theirs: Connection, device: str) -> None:
        with contextlib.suppress(OSError, SystemExit), theirs:
            main.main(theirs, os.getppid(), device)

    def kill(self) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.ours.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        self._thread.join(PATIENCE)


def start_threaded(device: str) -> Spawned:
    process: Any = ThreadedWorker(device)
    return Spawned(process, process.ours)


class Card:
    """A bridge and its node, both in threads of the test, and the daemon's end of the bridge.

    ``cut_after``: so many frames of the node arrive at the front, then the connection is gone.
    """

    def __init__(self, own: NodeFile, device: str = "cpu", cut_after: float = float("inf")) -> None:
        self.daemon, theirs = multiprocessing.Pipe()
        front, link = socket.socketpair()
        other, node = socket.socketpair()
        self.arrived: list[bytes] = []
        self._all = [Wire(end) for end in (link, other, front, node)]
        self._ends = self._all[:2]
        self._cut_after = cut_after
        self._theirs = theirs
        self._serve_daemon = Bridge(theirs, self._all[2], HOST, device).serve
        served = node_end.Node(self._all[3], own, device, start_threaded)
        threads = [served.serve, self._serve_daemon, self._up, self._down]
        self._threads = [threading.Thread(target=self._ending(run), daemon=True) for run in threads]
        for thread in self._threads:
            thread.start()

    def _ending(self, run: Callable[[], None]) -> Callable[[], None]:
        def to_the_end() -> None:
            try:
                run()
            finally:
                for end in self._ends:
                    end.shut()
                if run == self._serve_daemon:
                    self._theirs.close()

        return to_the_end

    def _up(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            assert b'"Open"' in (self._ends[0].receive_packed() or b"")
            while (frame := self._ends[0].receive_packed()) is not None:
                self._ends[1].send_packed(frame)

    def _down(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while len(self.arrived) < self._cut_after:
                frame = self._ends[1].receive_packed() or b""
                self._ends[0].send_packed(frame)
                self.arrived.append(frame)

    def end(self) -> None:
        self.daemon.close()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for wire in self._all:
            wire.close()


def heard(daemon: Connection, until: Callable[[Any], bool] = lambda _: False) -> list[Message]:
    """Hear what a bridge says, up to a message, or until it has ended."""
    found: list[Message] = []
    with contextlib.suppress(EOFError, ConnectionResetError):
        while not found or not until(found[-1]):
            assert daemon.poll(PATIENCE), found
            found.append(daemon.recv())
    return found


def is_end(message: Message) -> bool:
    return isinstance(message, (messages.Written, messages.Lost, messages.Died, *frames.ENDS))


def greeted(own: NodeFile, **card: Any) -> Card:
    """A card whose node has greeted."""
    found = Card(own, **card)
    (hello,) = heard(found.daemon, lambda message: True)
    assert isinstance(hello, Hello), hello
    return found


def done_on(own: NodeFile, work: Work) -> list[Message]:
    """Have a card do a job to its end; gives what the daemon hears of it."""
    card = greeted(own)
    card.daemon.send(work)
    told = heard(card.daemon, is_end)
    card.end()
    return told


class Front:
    """A bridge in a thread of the test, to which the test says what a node would."""

    def __init__(self) -> None:
        self.daemon, theirs = multiprocessing.Pipe()
        ours, front = map(Wire, socket.socketpair())
        self.node = ours
        self._front, self._theirs = front, theirs
        self._serving = threading.Thread(target=self._serve, daemon=True)
        self._serving.start()
        assert self.asked().kind == "Open"

    def _serve(self) -> None:
        Bridge(self._theirs, self._front, HOST, "cpu").serve()
        self._theirs.close()

    def asked(self) -> Frame:
        """Receive what the bridge sends the node."""
        frame = self.node.receive(PATIENCE)
        assert frame is not None
        return frame

    def greet(self, **other: Any) -> None:
        """Greet as this machine would."""
        own = Hello(versions(), "cpu", "cpu", "cpu", ("framepack-i2v",))
        self.node.send(frames.header(replace(own, **other)))

    def begin(self, work: Work) -> int:
        """Take a job, for which nothing is lacking; gives the number of its run."""
        self.daemon.send(work)
        run = int(self.asked().header["run"])
        self.node.send(frames.header(frames.Lacks(run, ())))
        assert self.asked().kind == "Go"
        return run

    def say(self, run: int, *said: Message) -> None:
        """Say what the worker would in a run."""
        for message in said:
            self.node.send(*frames.said(run, message))

    def end(self) -> list[Message]:
        """End the connection, and give what the daemon has heard."""
        self.node.shut()
        told = heard(self.daemon)
        self.close()
        return told

    def close(self) -> None:
        """Wait until the bridge has ended, and close what it leaves."""
        self._serving.join(PATIENCE)
        assert not self._serving.is_alive()
        for end in (self.node, self._front, self.daemon):
            end.close()


def started(front: Front, work: Work) -> int:
    """Have a bridge greeted and a job begun."""
    front.greet()
    assert isinstance(heard(front.daemon, lambda _: True)[0], Hello)
    return front.begin(work)
