"""What ``framepackd node`` is to a daemon, without Ray: a socket, and node ends on this machine."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from framepack_core.models.registry import BUILT_IN, BUNDLED
from framepackd.cluster.node_file import FILE, NodeFile, write_node_file
from framepackd.cluster.wire import Wire

SIGN_SECONDS = 1.0
MODELS = {name: BUILT_IN[name] for name in BUNDLED}


class Link:
    """Answers who asks for the machines, and gives a bridge a node end of its own."""

    def __init__(self, root: Path, *hosts: str) -> None:
        self.path = root / "bridges.sock"
        self.alive = dict.fromkeys(hosts, True)
        self.nodes: dict[str, list[subprocess.Popen[bytes]]] = {host: [] for host in hosts}
        self._root = root
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._open = socket.socket(socket.AF_UNIX)
        self._open.bind(str(self.path))
        self._open.listen()
        self._begin(self._accept)

    def kill(self, host: str) -> None:
        """End a machine: it answers no more."""
        self.alive[host] = False
        for node in self.nodes[host]:
            node.kill()

    def end(self) -> None:
        self._ending.set()
        self._open.shutdown(socket.SHUT_RDWR)
        for host in self.nodes:
            self.kill(host)
        for thread in self._threads:
            thread.join(10)
        self._open.close()

    def _begin(self, run: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._begin(self._serve, Wire(self._open.accept()[0]))

    def _serve(self, wire: Wire) -> None:
        with contextlib.suppress(EOFError, OSError), contextlib.closing(wire):
            frame = wire.receive(10)
            assert frame is not None
            if frame.kind == "Open":
                self._relay(wire, frame.header["host"], frame.header["device"])
                return
            while not self._ending.is_set():
                wire.send({"kind": "Nodes", "nodes": [self._told(host) for host in self.nodes]})
                self._ending.wait(0.3)

    def _told(self, host: str) -> dict[str, Any]:
        return {"host": host, "address": "10.0.0.7", "alive": self.alive[host], "devices": ["cpu"]}

    def _relay(self, front: Wire, host: str, device: str) -> None:
        ours, theirs = socket.socketpair()
        file = self._root / f"{host}.json"
        write_node_file(file, NodeFile(MODELS, self._root / host / "scratch", self._root / host / "cache"))
        with theirs:
            node = subprocess.Popen(
                [sys.executable, "-m", "framepackd.cluster.node", str(theirs.fileno()), device],
                pass_fds=[theirs.fileno()],
                env={**os.environ, FILE: str(file), "OMP_NUM_THREADS": "1"},
            )
        self.nodes[host].append(node)
        wire = Wire(ours)
        with contextlib.closing(wire), node:
            self._begin(self._relay_down, front, wire)
            with contextlib.suppress(EOFError, OSError):
                while (frames := front.receive_packed()) is not None:
                    wire.send_packed(frames)
            wire.shut()
            node.kill()

    def _relay_down(self, front: Wire, node: Wire) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                frames = node.receive_packed(SIGN_SECONDS)
                front.send({"kind": "Alive"}) if frames is None else front.send_packed(frames)
        front.shut()
