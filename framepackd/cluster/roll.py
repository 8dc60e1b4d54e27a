"""Keeps the list of the other machines and their cards, as ``framepackd node`` on this machine tells it."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from framepackd.cluster.wire import Wire, WireError
from framepackd.text import HOST_NAME, printable

SILENT_SECONDS = 20.0  # the server tells its list at least every 5 s, once it has imported Ray
AGAIN_SECONDS = 2.0  # before the server is asked again
LOST_SECONDS = 5.0  # the same while Ray is away: each time another link starts
ANSWER_SECONDS = 20.0  # for a link to import Ray and to ask it
MOST_WORDS = 500  # characters of a reason
ROUND_SECONDS = 0.5  # at most, until an end is noticed
MOST_NODES, MOST_DEVICES = 4096, 1024  # more is no list of machines
DEVICE = r"^(?:cpu(?::[0-9]{1,3})?|cuda:[0-9]{1,3})$"

_Host = Annotated[str, StringConstraints(pattern=f"^{HOST_NAME}$")]
_Device = Annotated[str, StringConstraints(pattern=DEVICE)]
_Address = Annotated[str, StringConstraints(max_length=255, pattern=r"^[\x20-\x7e]*$")]


@dataclass(frozen=True)
class Node:
    """Another machine: its name, its address, whether it answers, its devices in their order.

    ``others``: the addresses of machines that have the same name.
    """

    host: _Host
    address: _Address
    alive: bool
    devices: Annotated[tuple[_Device, ...], Field(max_length=MOST_DEVICES)]
    others: Annotated[tuple[_Address, ...], Field(max_length=MOST_NODES)] = ()


class RayLostError(Exception):
    """Ray does not answer the link; the text is what the link says of it."""


_NODES = TypeAdapter(Annotated[list[Node], Field(max_length=MOST_NODES)])


class Roll:
    """Asks for the machines in a thread of its own, and keeps asking."""

    def __init__(self, path: Path, wake: Callable[[], None]) -> None:
        """Ask nothing yet; ``wake`` is called whenever something has changed.

        ``path``: the socket of ``framepackd node``.
        """
        self._path = path
        self._wake = wake
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self.nodes: Mapping[str, Node] = {}  # by name
        self.last_signs: Mapping[str, float] = {}  # when each answered last, in Unix time
        self.trouble: str | None = None  # why nothing is known now
        self.answered = False  # it has been told who is there, or why that is not known

    def start(self) -> None:
        """Begin to ask; once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="framepackd-roll", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Ask no more."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(2 * ROUND_SECONDS)

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                with _asking(self._path) as wire:
                    self._hear(wire)
            except (OSError, EOFError, WireError, RayLostError) as error:
                self._note({}, trouble_of(error, self._path))
                self._ending.wait(LOST_SECONDS if isinstance(error, RayLostError) else AGAIN_SECONDS)

    def _hear(self, wire: Wire) -> None:
        heard = time.monotonic()
        while not self._ending.is_set():
            frame = wire.receive(ROUND_SECONDS)
            if frame is not None:
                heard = time.monotonic()
                self._note({node.host: node for node in nodes_in(frame.header)}, None)
            elif time.monotonic() - heard > SILENT_SECONDS:
                raise TimeoutError(f"it is silent for {SILENT_SECONDS:.0f} s")

    def _note(self, nodes: Mapping[str, Node], trouble: str | None) -> None:
        now = time.time()
        self.last_signs = {**self.last_signs, **{node.host: now for node in nodes.values() if node.alive}}
        is_new = not self.answered or (nodes, trouble) != (self.nodes, self.trouble)
        self.nodes, self.trouble, self.answered = nodes, trouble, True
        if is_new:
            self._wake()


def ask(path: Path, seconds: float = ANSWER_SECONDS) -> list[Node]:
    """Ask once which machines there are.

    Raises:
        OSError: nobody answers, or what answers is no list of machines; the text says what to do.
    """
    try:
        with _asking(path) as wire:
            frame = wire.receive(seconds)
        if frame is None:
            raise TimeoutError(f"it does not answer within {seconds:.0f} s")
        return nodes_in(frame.header)
    except (OSError, EOFError, WireError, RayLostError) as error:
        raise OSError(trouble_of(error, path)) from error


@contextlib.contextmanager
def _asking(path: Path) -> Iterator[Wire]:
    """Connect, and ask for the machines."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as end:
        end.settimeout(AGAIN_SECONDS)
        end.connect(str(path))
        wire = Wire(end)
        wire.send({"kind": "Nodes"})
        yield wire


def nodes_in(header: Mapping[str, Any]) -> list[Node]:
    """Read a frame that tells the machines.

    Raises:
        RayLostError: they are not known.
        WireError: it tells something else, or names that no machine has.
    """
    reason = header.get("reason")
    if header.get("kind") == "Lost" and isinstance(reason, str):
        raise RayLostError(printable(reason[:MOST_WORDS]))
    if header.get("kind") != "Nodes":
        raise WireError(f"it answers with {str(header)[:80]!r} instead of the list of machines")
    try:
        return _NODES.validate_json(json.dumps(header.get("nodes")), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise WireError(f"its list of machines is wrong: {first['loc']}: {first['msg']}") from None


def trouble_of(error: Exception, path: Path) -> str:
    """Say why the list of machines is not known, and what to do."""
    start = "systemctl start framepackd-node (or framepackd node in a terminal)"
    match error:
        case RayLostError():
            return str(error)
        case FileNotFoundError() | ConnectionRefusedError():
            return f"framepackd node does not run on this machine ({path}): {start}"
        case PermissionError():
            return (
                f"{path} may not be used by this user: set front_user under [cluster] to it, and restart "
                "framepackd-node"
            )
        case EOFError():
            return f"framepackd node on this machine has ended ({path}): {start}"
    said = getattr(error, "strerror", None) or str(error)
    return f"framepackd node on this machine cannot be asked ({path}: {said}): restart framepackd-node"
