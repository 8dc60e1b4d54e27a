"""A link without Ray: relays between a bridge's Unix socket and a real node process on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from framepackd.cluster.node_file import FILE, NodeFile, write_node_file
from framepackd.cluster.wire import Wire
from tests.daemon.cluster.jobs import PATIENCE
from tests.started.forking import worker_of

ALIVE_SECONDS = 1.0


class Link:
    """Serves one bridge."""

    def __init__(self, folder: Path, own: NodeFile) -> None:
        self.socket = folder / "link.sock"
        self._environment = os.environ | {FILE: str(folder / "node.json"), "OMP_NUM_THREADS": "1"}
        write_node_file(folder / "node.json", own)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.socket))
        self._listening.listen()
        self.node: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        accepted, _ = self._listening.accept()
        ours, theirs = socket.socketpair()
        with accepted, ours, self._listening:
            front, node = Wire(accepted), Wire(ours)
            opened = front.receive(PATIENCE)
            assert opened is not None
            with theirs:
                self.node = subprocess.Popen(
                    [
                        sys.executable,
                        *("-m", "framepackd.cluster.node"),
                        *(str(theirs.fileno()), opened.header["device"]),
                    ],
                    pass_fds=[theirs.fileno()],
                    env=self._environment,
                )
            relays = [(front, node), (node, front)]
            threads = [threading.Thread(target=self._relay, args=pair, daemon=True) for pair in relays]
            for thread in threads:
                thread.start()
            while all(thread.is_alive() for thread in threads):
                time.sleep(ALIVE_SECONDS / 10)
                with contextlib.suppress(OSError):
                    front.send({"kind": "Alive"})
            for thread in threads:
                thread.join(PATIENCE)
            self.node.wait(PATIENCE)

    def _relay(self, source: Wire, target: Wire) -> None:
        with contextlib.suppress(EOFError, OSError):
            while (frame := source.receive_packed()) is not None:
                target.send_packed(frame)
        source.shut()
        target.shut()

    @property
    def worker(self) -> int:
        """The process id of the worker of the node."""
        assert self.node is not None
        worker = worker_of(self.node.pid)
        assert worker is not None
        return worker

    def end(self) -> None:
        """Wait until all has ended, as it does with the connection."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    """Say whether a process has ended, perhaps after a while."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False
