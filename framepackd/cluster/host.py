"""``framepackd node``: runs this machine's Ray and, beside the daemon, the socket for its bridges."""

import fcntl
import json
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from framepackd.cluster import landlock
from framepackd.cluster.actor import ENVIRONMENT
from framepackd.cluster.bridges import Bridges, user_ids
from framepackd.cluster.link import CARDS
from framepackd.cluster.node_file import FILE, NodeFile, write_node_file
from framepackd.cluster.ray_process import SETTINGS, Head, RayProcess
from framepackd.cluster.trust import Trust
from framepackd.problems import CommandError

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.5


class RunsAlreadyError(CommandError):
    """Another ``framepackd node`` has the folder."""

    exit_code = 75


@dataclass(frozen=True)
class Host:
    """What this machine is in the cluster."""

    head: Head
    name: str  # by which the configuration of the daemon names it
    devices: tuple[str, ...]  # that it lends: cuda:0, cpu
    folder: Path  # of this process and of Ray: sockets, logs
    socket: Path  # for bridges, if the head is here
    front_user: str  # who may connect to it
    trust: Trust
    first_port: int
    own: NodeFile  # its models and caches


def run(host: Host) -> None:
    """Run until SIGTERM or Ctrl-C.

    Raises:
        CommandError: the address, the files of trust or the folder cannot be used.
    """
    host.trust.check(host.head.address)
    host.folder.mkdir(mode=0o755, exist_ok=True, parents=True)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with (host.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunsAlreadyError(
                f"another framepackd node has {host.folder}: --runtime-dir names another"
            ) from error
        _run(host, ended)


def _run(host: Host, ended: threading.Event) -> None:
    own = host.folder / "node.json"
    write_node_file(own, host.own)
    before = json.dumps({**os.environ, FILE: str(own)})
    trust = host.trust.environment()
    folder = host.folder / "ray"
    cards = [f"{CARDS}{device}" for device in host.devices]
    ray = RayProcess(host.head, host.name, cards, folder, host.first_port, {**trust, ENVIRONMENT: before})
    bridges = None
    if host.head.is_here:
        if not landlock.version():
            log.warning(
                "links to nodes run without Landlock: this kernel has none, or what started this refuses it"
            )
        users = user_ids(host.front_user)
        bridges = Bridges(host.socket, users, str(host.head), folder, {**SETTINGS, **trust})
    lent = ", ".join(host.devices) or "no card"
    log.info("this machine is %s and lends %s", host.name, lent)
    try:
        while not ended.is_set():
            runs = ray.round(time.monotonic())
            if bridges is None:
                ended.wait(ROUND_SECONDS)
                continue
            if not runs:
                bridges.end_links()
            bridges.round(ROUND_SECONDS, ray_runs=runs)
    finally:
        if bridges is not None:
            bridges.close()
        ray.stop()
