"""The bridge process of a remote card: to the daemon a worker, on its other side the link to a node.

It writes what the node tells of a job's files into the job's work folder, durably, before it passes on what
came after. It opens no network: the link does, which listens on a Unix socket. It ends with the daemon, and
what computes for it ends with its connection.
"""

import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from framepackd.cluster import frames, landlock
from framepackd.cluster.names import RefusedError
from framepackd.cluster.runs import Runs
from framepackd.cluster.wire import Wire, WireError
from framepackd.worker import main as worker_main
from framepackd.worker.messages import Again, Died, Hello, Leave, Lost, Message, Work
from framepackd.worker.spawning import Spawned, spawn
from framepackd.worker.versions import versions

HELLO_SECONDS = 60.0  # for the link to start an actor, which imports Ray; and for a former worker to end
SILENT_SECONDS = 12.0  # the link gives a sign of life every 2 s; 5 health checks of a node fail within 10 s


class _LostError(Exception):
    """The node or the way to it is lost, or what comes from there is wrong."""


@dataclass(frozen=True)
class Way:
    """How to reach a card, and what its bridge uses of this machine."""

    socket: Path  # where the link listens
    host: str
    device: str
    jobs: Path  # folder of the jobs' work folders
    loras: Path  # folder of their LoRAs, which are only read


def start(way: Way) -> Spawned:
    """Start the bridge to a card.

    Raises:
        OSError: no process can be started.
    """
    return spawn(main, way, name="framepackd-bridge")


def main(connection: Connection, parent: int, way: Way) -> None:
    """Serve the daemon as a worker would, until it closes the connection or dies, or the node is lost."""
    worker_main.die_with(parent)
    for number in worker_main.FOR_THE_DAEMON:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, worker_main.FOR_THE_DAEMON)
    with socket.socket(socket.AF_UNIX) as end:
        try:
            end.connect(str(way.socket))
        except OSError as error:
            connection.send(
                Lost(
                    f"{way.host} cannot be reached: nothing answers on {way.socket} ({error.strerror}): "
                    "start framepackd node on this machine, as the service framepackd-node or by hand"
                )
            )
            return
        loras = confine(way)
        Bridge(connection, Wire(end), way.host, way.device, loras).serve()


def confine(way: Way) -> list[Path]:
    """Leave this process its code, the jobs' folders and the LoRAs: it reads what a node sends.

    The database, the configuration, inbox and outbox are out of its reach.

    Returns:
        Where LoRAs can be read: their folder, and what links in it lead to now.
    """
    links = (path.resolve() for path in way.loras.rglob("*") if path.is_symlink())
    loras = [way.loras.resolve(), *links]
    own = [(way.jobs, landlock.WRITE), *((place, landlock.READ) for place in loras)]
    own.append((Path("/proc/self"), landlock.READ))
    system = [(Path(place), landlock.READ) for place in ("/usr", "/lib", "/lib64", "/etc/localtime")]
    landlock.confine([*landlock.code("framepackd", "framepack_core", "torch"), *system, *own])
    return loras


class Bridge:
    """Between the daemon and one device of a node."""

    def __init__(
        self, daemon: Connection, wire: Wire, host: str, device: str, loras: Sequence[Path] = (Path("/"),)
    ) -> None:
        """Use a connection to the daemon and one to the link; ``loras``: where LoRAs can be read."""
        self._daemon, self._wire = daemon, wire
        self._host, self._device = host, device
        self._loras = loras
        self._runs = Runs(wire, device)
        self._greeted = False
        self._early: list[object] = []  # what the daemon said before the node had greeted
        self._heard = time.monotonic()

    def serve(self) -> None:
        """Relay until one side ends."""
        with suppress(BrokenPipeError, ConnectionResetError):  # of the daemon, which is gone
            try:
                self._relay()
            except _LostError as error:
                self._daemon.send(Lost(str(error)))
            except (RefusedError, WireError) as error:
                self._daemon.send(
                    Lost(
                        f"{self._host} sends what no node sends ({error}): install the same framepackd on "
                        "both machines; if it is the same, this node is not to be trusted"
                    )
                )
        self._wire.shut()

    def _relay(self) -> None:
        with self._sending():
            self._wire.send(frames.header(frames.Open(self._host, self._device)))
        node = self._wire.fileno()
        while True:
            patience = SILENT_SECONDS if self._greeted else HELLO_SECONDS
            ready = wait([self._daemon, node], max(self._heard + patience - time.monotonic(), 0))
            if not ready:
                raise _LostError(self._silence())
            if self._daemon in ready and not self._hear_daemon():
                return
            if node in ready and not self._hear_node():
                return

    def _silence(self) -> str:
        if self._greeted:
            return f"{self._host} is silent for {SILENT_SECONDS:.0f} s: look whether it runs and is reachable"
        return (
            f"{self._host} did not greet within {HELLO_SECONDS:.0f} s: look whether framepackd node runs "
            f"there and has {self._device}, and into its log"
        )

    def _hear_daemon(self) -> bool:
        """Do what the daemon says; False once it is done with this card."""
        try:
            message = self._daemon.recv()
        except (EOFError, OSError):
            return False
        if self._greeted:
            self._do(message)
        else:
            self._early.append(message)
        return True

    def _do(self, message: object) -> None:
        answer = None
        with self._sending():
            if isinstance(message, Work):
                answer = self._unreachable(message) or self._runs.begin(message)
            elif isinstance(message, Leave):
                self._runs.leave(keep=message.keep)
        self._tell_daemon(answer)

    def _unreachable(self, work: Work) -> Message | None:
        """Have another bridge do a job with a LoRA that is out of reach: its link came after this bridge."""
        for request in work.clips:
            for lora in request.loras:
                file = lora.file.resolve()
                if not any(file.is_relative_to(place) for place in self._loras):
                    return Again(f"{lora.file} leads to {file}, which its bridge could not know of")
        return None

    def _hear_node(self) -> bool:
        """Take all that has arrived; False once the node has nothing more to say."""
        while True:
            try:
                frame = self._wire.receive(0)
            except (EOFError, OSError) as error:
                raise _LostError(f"the connection to {self._host} ended") from error
            if frame is None:
                return True
            if self._greeted or frame.kind != "Alive":  # the link is there before the node is
                self._heard = time.monotonic()
            if not self._take(frames.to_front(frame)) or (self._daemon.poll() and not self._hear_daemon()):
                return False

    def _take(self, frame: frames.ToFront) -> bool:
        """Do what a frame says; False for the last one."""
        answer: Message | None = None
        match frame:
            case frames.Lacks(run, lacking):
                with self._sending():
                    answer = self._runs.send_lacking(run, lacking)
            case frames.Said():
                with self._sending():
                    answer = self._runs.hear(frame)
            case Hello():
                self._greet(frame)
            case Died():
                self._daemon.send(frame)
                return False
            case Lost(reason):
                raise _LostError(f"{self._host} is lost: {reason}")
        self._tell_daemon(answer)
        return True

    def _greet(self, hello: Hello) -> None:
        ours = versions()
        others = [name for name in ours if hello.versions.get(name) != ours[name]]
        if others:
            named = ", ".join(f"{name} {hello.versions.get(name)}, here {ours[name]}" for name in others)
            raise _LostError(f"{self._host} has {named}: install the same versions on both machines")
        self._daemon.send(hello)
        self._greeted = True
        early, self._early = self._early, []
        for message in early:
            self._do(message)

    def _tell_daemon(self, message: Message | None) -> None:
        if message is not None:
            self._daemon.send(message)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """Have an error of the connection to the link mean what it means."""
        try:
            yield
        except ConnectionError as error:
            raise _LostError(f"the connection to {self._host} ended") from error
