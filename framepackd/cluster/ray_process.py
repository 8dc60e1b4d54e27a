"""Runs Ray's processes on this machine, and starts them again when they end.

``python -m framepackd.cluster.ray_process PARENT ray-arguments`` is ``ray``, which ends when its parent does.
"""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from framepackd.problems import CommandError
from framepackd.worker.main import die_with

log = logging.getLogger(__name__)

OBJECTS_BYTES = 1_000_000_000  # shared memory for what is on its way: a few frames at a time for each card
LONGEST_FOLDER = 40  # characters: Ray's sockets lie 62 characters deeper, and the kernel takes 107
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before Ray is started again; the last one again and again
STEADY_SECONDS = 60.0  # after that it counts as having run well
STOP_SECONDS = 5.0
PORTS = 1000  # how many each machine uses from the first on
# What a machine's own processes listen at, counted from its first port.
LISTENERS = (
    "node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port", "metrics-export-port",
)  # fmt: skip
# Settings of Ray without an option. A machine that is gone is noticed within seconds. One whose head is gone
# ends within five, to join the next. Nothing is ended for want of memory: the worker knows what fits. What
# computes has the priority of a worker on the front: Ray's own is the lowest but four.
SETTINGS = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ROTATION_MAX_BYTES": "1000000",
    "RAY_ROTATION_BACKUP_COUNT": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}
# What Ray says when it ends, and what it means; the first that is found counts.
CAUSES = (
    ("Authentication", "the head has another token: token_file must hold the same one on every machine"),
    (
        "[Vv]ersion mismatch",
        "the head has another version of Ray or Python: install the same on every machine",
    ),
    (r"gcs_server \[exit code", "the head's main process ended"),
    ("marked as dead", "the head took this machine for dead: it was frozen, cut off or very busy"),
    ("subscription_failure|[Ww]rong cluster ID", "the head is gone, or was started anew"),
    ("connect to GCS|GCS has been unavailable", "the head does not answer: does framepackd node run there?"),
)


class AddressError(CommandError):
    """The head's address cannot be used; the text says why and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Head:
    """Where Ray's head is: the machine that all others join."""

    address: str  # IP
    port: int

    @classmethod
    def at(cls, text: str) -> "Head":
        """Read ``HOST:PORT``.

        Raises:
            AddressError: it is none, or the host has no address.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise AddressError(f"--head {text!r}: give HOST:PORT, as in front:6379")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            raise AddressError(
                f"--head {text!r}: {host} has no address ({error.strerror}): give its IP address, or put "
                "the name into /etc/hosts"
            ) from error
        return cls(str(found[0][4][0]), int(port))

    @property
    def is_here(self) -> bool:
        """Whether the address is one of this machine."""
        with socket.socket(self._family) as trial:
            try:
                trial.bind((self.address, 0))
            except OSError:
                return False
        return True

    @property
    def own_address(self) -> str:
        """The address of this machine by which the head reaches it."""
        with socket.socket(self._family, socket.SOCK_DGRAM) as trial:
            try:
                trial.connect((self.address, self.port))  # sends nothing
            except OSError as error:
                raise AddressError(
                    f"no network leads to the head at {self.address}: {error.strerror}"
                ) from error
            return str(trial.getsockname()[0])

    @property
    def _family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class RayProcess:
    """Ray on this machine: the head or a node of it."""

    def __init__(
        self,
        head: Head,
        name: str,
        cards: list[str],
        folder: Path,
        first_port: int,
        environment: Mapping[str, str],
    ) -> None:
        """Start nothing yet.

        Args:
            head: where the head is; if that is here, this is it
            name: what this machine is called
            cards: names of its resources, one for each card that it lends
            folder: for Ray's sockets and logs; what is in there goes
            first_port: the first of the ports that it listens at
            environment: what Ray's processes get beside :data:`SETTINGS`

        Raises:
            AddressError: the folder's path is too long for sockets.
        """
        if len(str(folder)) > LONGEST_FOLDER:
            raise AddressError(
                f"{folder}: Ray's sockets need a folder whose path has at most {LONGEST_FOLDER} characters: "
                "give another one with --runtime-dir"
            )
        self._head, self._name, self._cards, self._folder = head, name, cards, folder
        self._first_port, self._environment = first_port, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._next = 0.0
        self._failures = 0

    def round(self, now: float) -> bool:
        """Start Ray, or start it again if it has ended and waited long enough; ``now`` is monotonic.

        Returns:
            Whether it is there, as far as is known; False once it has ended.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return True
            self._process = None
            self._failures = 0 if now - self._started > STEADY_SECONDS else self._failures
            wait = WAITS[min(self._failures, len(WAITS) - 1)]
            self._failures, self._next = self._failures + 1, now + wait
            last = self._said.replace(self._said.with_suffix(".last.log"))
            cause = cause_of_end(last.read_text(errors="replace"))
            log.warning("Ray ended: %s; again in %.0f s. Its own words: %s", cause, wait, last)
        if now < self._next:
            return False
        self._start(now)
        return True

    def stop(self) -> None:
        """End it, and all processes of Ray with it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def arguments(self) -> list[str]:
        """Give the options of ``ray start``."""
        listeners = [f"--{name}={self._first_port + number}" for number, name in enumerate(LISTENERS)]
        own = [f"--head --port={self._head.port} --no-monitor --include-dashboard=false"]
        address = self._head.address if self._head.is_here else self._head.own_address
        return [
            "start",
            *(own[0].split() if self._head.is_here else [f"--address={self._head}"]),
            f"--node-ip-address={address}",
            f"--node-name={self._name}",
            f"--resources={json.dumps(dict.fromkeys(self._cards, 1))}",
            "--num-cpus=0",
            "--num-gpus=0",
            f"--object-store-memory={OBJECTS_BYTES}",
            *([f"--temp-dir={self._folder}"]),
            *listeners,
            f"--min-worker-port={self._first_port + 10}",
            f"--max-worker-port={self._first_port + PORTS - 1}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
            "--block",
        ]

    def _start(self, now: float) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # sessions of former lives
        self._folder.mkdir(mode=0o700)
        module = [sys.executable, "-P", "-m", "framepackd.cluster.ray_process", str(os.getpid())]
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(  # noqa: S603 - all from here
                [*module, *self.arguments()],
                env={**os.environ, **SETTINGS, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        self._started = now
        where = "as the head" if self._head.is_here else "and joins the head"
        log.info("Ray starts %s at %s, as %s", where, self._head, self._name)

    @property
    def _said(self) -> Path:
        return self._folder.with_suffix(".log")


def cause_of_end(said: str) -> str:
    """Give in words why Ray ended, from what it said."""
    return next((words for pattern, words in CAUSES if re.search(pattern, said)), "it does not say why")


def main() -> None:
    """Be ``ray`` until the parent ends."""
    die_with(int(sys.argv[1]))
    from ray.scripts.scripts import main as ray

    sys.argv = ["ray", *sys.argv[2:]]
    ray()


if __name__ == "__main__":
    main()
