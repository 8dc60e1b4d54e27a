"""A node's end: does a front's jobs with the worker of this machine, in a scratch folder of its own.

Started as ``python -m framepackd.cluster.node FD DEVICE``, with a connected socket. The main thread reads
what the front sends, and starts the worker: the kernel ends it with the thread that did. Another thread
relays what the worker says. All ends with the connection.
"""

import fcntl
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from framepack_core.errors import FramePackError
from framepack_core.memory import before_torch
from framepack_core.models import model_files
from framepack_core.models.registry import ModelSpec
from framepackd import files
from framepackd.cluster import frames, inventory, names
from framepackd.cluster.inventory import Entry
from framepackd.cluster.located import LocatedError, from_json
from framepackd.cluster.names import RefusedError
from framepackd.cluster.node_file import NodeFile, read_node_file
from framepackd.cluster.wire import Frame, Wire
from framepackd.text import JOB_ID
from framepackd.worker import main as worker_main
from framepackd.worker.messages import (
    Clear,
    Died,
    Hello,
    Kept,
    Leave,
    Lost,
    Message,
    Moved,
    Sampled,
    Written,
    leaves_after,
)
from framepackd.worker.spawning import Spawned, spawn
from framepackd.worker.versions import versions

ROUND_SECONDS = 1.0  # between two looks whether the front is still there
LORAS_KEPT_BYTES = 20 << 30  # a LoRA has 0.3 to 1 GB: some dozens stay, which need not be sent again


def start_worker(device: str) -> Spawned:
    """Start a worker process; from the main thread, with which it ends.

    Raises:
        OSError: no process can be started.
    """
    return spawn(worker_main.main, device, name="framepackd-worker")


@dataclass(frozen=True)
class _Run:
    """A job that the front began here."""

    number: int
    job: str


@dataclass
class _Coming:
    """A job whose files arrive."""

    run: _Run
    described: bytes
    wanted: dict[str, Entry]
    lacking: list[str]
    there: dict[str, int] = field(default_factory=dict)  # bytes of what arrives, by name
    keep: bool | None = None  # the front's wish to leave it, if it came already: keep what exists?


class Node:
    """The card of this machine as one bridge uses it."""

    def __init__(
        self, wire: Wire, own: NodeFile, device: str, start: Callable[[str], Spawned] = start_worker
    ) -> None:
        """Use a device, in its own part of the scratch folder; nothing is started yet."""
        self._wire, self._own, self._device, self._start = wire, own, device, start
        self._scratch = own.scratch / device.replace(":", "-")
        self._loras = self._scratch / names.LORAS
        self._worker: Spawned | None = None
        self._relaying: threading.Thread | None = None  # what the last worker says
        self._coming: _Coming | None = None
        self._changed = threading.Condition()  # guards the two below; the relaying thread changes them
        self._computed: _Run | None = None
        self._written: _Run | None = None

    def serve(self) -> None:
        """Greet the front, and do its jobs until the connection ends.

        Raises:
            RefusedError, LocatedError: the front sends what it should not.
            OSError: the scratch folder cannot be used.
        """
        with ExitStack() as ending:
            ending.callback(self._end_worker)
            try:
                self._use_scratch(ending)
                self._send(self._hello())
                while (frame := self._wire.receive()) is not None:
                    self._hear(frame)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return  # the front is gone
            except (OSError, RefusedError, LocatedError) as error:
                with suppress(OSError):
                    self._send(Lost(f"its part of framepackd ended: {error}"))
                raise

    def _use_scratch(self, ending: ExitStack) -> None:
        for folder in (self._loras, self._own.cache):
            folder.mkdir(parents=True, exist_ok=True)
        # Until the kernel has ended what served a former bridge: two must never use one device.
        lock = ending.enter_context((self._scratch / "lock").open("a"))
        fcntl.flock(lock, fcntl.LOCK_EX)

    def _hear(self, frame: Frame) -> None:
        match frames.to_node(frame):
            case frames.Begin() as begin:
                self._begin(begin, frame.body)
            case frames.Part() as part:
                self._take(part, frame.body)
            case frames.Go(run):
                self._go(run)
            case frames.Tell() as tell:
                self._tell(tell)

    def _hello(self) -> Hello:
        card = before_torch.card_name(self._device)
        return Hello(
            versions=versions(),
            device=self._device,
            hardware=card or self._device,
            card=card or self._device,
            models=tuple(name for name, spec in self._own.models.items() if _is_whole(spec)),
        )

    def _begin(self, begin: frames.Begin, body: bytes) -> None:
        """Make the job's folder what it is on the front, and say what it lacks."""
        if not JOB_ID.fullmatch(begin.job):
            raise RefusedError(f"{begin.job[:80]!r} is no job")
        described, wanted = frames.described(body)
        for name in wanted:
            names.check_for_node(name)
        with self._changed:
            while begin.job in self._alive():  # left by the front, but not yet by the worker
                if not self._changed.wait(ROUND_SECONDS) and self._wire.is_gone:
                    raise EOFError("the front is gone")
            alive = self._alive()
        folder = self._folder(begin.job)
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.iterdir():
            if other.name not in (*alive, begin.job):
                shutil.rmtree(other)
        lacking = inventory.missing(wanted, folder, self._loras)
        inventory.forget_oldest(self._loras, LORAS_KEPT_BYTES, wanted)
        self._coming = _Coming(_Run(begin.run, begin.job), described, wanted, lacking)
        self._send(frames.Lacks(begin.run, tuple(lacking)))

    def _take(self, part: frames.Part, body: bytes) -> None:
        """Write a part of a file that was lacking."""
        coming = self._coming_of(part.run)
        there = coming.there.get(part.name, 0)
        if part.name not in coming.lacking or part.offset != there:
            raise RefusedError(
                f"a part of {part.name[:80]!r} from byte {part.offset}, which nobody asked for"
            )
        path = inventory.place_of(part.name, self._folder(coming.run.job), self._loras)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab" if there else "wb") as file:
            file.write(body)
        coming.there[part.name] = there + len(body)

    def _go(self, number: int) -> None:
        """Give the job to the worker."""
        coming, self._coming = self._coming_of(number), None
        folder = self._folder(coming.run.job)
        for name in coming.lacking:
            path = inventory.place_of(name, folder, self._loras)
            if files.sha256(path) != coming.wanted[name].sha256:
                raise RefusedError(f"{name} arrived with another content than was announced")
        work = from_json(coming.described, folder, self._loras, self._own)
        if self._worker is None:
            self._worker = self._start(self._device)
            self._relaying = threading.Thread(target=self._relay, args=(self._worker,), daemon=True)
            self._relaying.start()
        with self._changed:
            self._computed = coming.run
        with suppress(OSError):  # it died just now: the relaying thread says so
            self._worker.connection.send(work)
            if coming.keep is not None:
                self._worker.connection.send(Leave(keep=coming.keep))

    def _tell(self, tell: frames.Tell) -> None:
        if self._coming is not None and self._coming.run.number == tell.run:
            self._coming.keep = tell.keep
        with self._changed:
            computes = self._computed is not None and self._computed.number == tell.run
        if computes and self._worker is not None:
            with suppress(OSError):
                self._worker.connection.send(Leave(keep=tell.keep))

    def _relay(self, worker: Spawned) -> None:
        """Send on what the worker says, until it ends; in a thread of its own."""
        ends = False
        with suppress(BrokenPipeError, ConnectionResetError):  # of the wire: the main thread sees it too
            while (message := _received(worker.connection)) is not None:
                ends = leaves_after(message)
                run = self._note(message)
                if run is not None:
                    self._wire.send(*frames.said(run.number, message))
            worker.process.join()
            with self._changed:
                self._worker = self._computed = self._written = None
                self._changed.notify_all()
            if not ends:  # it has not said so itself
                self._send(Died(worker_main.manner_of_death(worker.process.exitcode or 0)))

    def _note(self, message: Message) -> _Run | None:
        """Give the run that a message is about, and note what it changes."""
        with self._changed:
            computed, written = self._computed, self._written
            match message:
                case Kept(job_id=job) | Clear(job_id=job) | Moved(job_id=job):
                    return computed if computed is not None and computed.job == job else written
                case Written():
                    self._written, about = None, written
                case Sampled():
                    self._written, self._computed, about = computed, None, computed
                case _:
                    about = computed
                    if isinstance(message, frames.ENDS):
                        self._computed = None
            self._changed.notify_all()
            return about

    def _alive(self) -> list[str]:
        return [run.job for run in (self._computed, self._written) if run is not None]

    def _coming_of(self, number: int) -> _Coming:
        if self._coming is None or self._coming.run.number != number:
            raise RefusedError(f"run {number} was not begun")
        return self._coming

    def _folder(self, job: str) -> Path:
        return self._scratch / "jobs" / job

    def _send(self, frame: frames.Lacks | Hello | Died | Lost) -> None:
        self._wire.send(frames.header(frame))

    def _end_worker(self) -> None:
        self._wire.shut()
        worker = self._worker
        if worker is not None:
            worker.process.kill()
            worker.process.join()
        if self._relaying is not None:
            self._relaying.join()


def _received(connection: Connection) -> Message | None:
    """Receive what the worker says; None once it has ended."""
    try:
        message: Message = connection.recv()
    except (EOFError, OSError):
        return None
    return message


def _is_whole(spec: ModelSpec) -> bool:
    """Say whether all files of a model are here, and fit."""
    try:
        model_files.look(spec)
    except (FramePackError, OSError, ValueError):
        return False
    return True


def main() -> None:
    """Serve the front at the other end of a socket."""
    descriptor, device = sys.argv[1:]
    Node(Wire(socket.socket(fileno=int(descriptor))), read_node_file(), device).serve()


if __name__ == "__main__":
    main()
