"""The link process: relays between a bridge's Unix socket and an actor on a node, as a driver of Ray.

``python -m framepackd.cluster.link FD ADDRESS FOLDER MODULE PARENT``, started before it is needed, for that
takes seconds: over FD it is given one connection to serve. ADDRESS is Ray's head, FOLDER Ray's own, MODULE
what speaks to the bridge on the node. The first frame says what is wanted: ``Open`` one card, or ``Nodes``, a
list that is sent anew whenever it changes.
"""

import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framepackd.cluster import landlock
from framepackd.cluster.actor import Relay
from framepackd.cluster.wire import Frame, Wire, WireError
from framepackd.text import HOST_NAME
from framepackd.worker.main import die_with

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CARDS = "framepackd:"  # the resources of Ray that a node lends are so named: framepackd:cuda:0
CARD = re.compile(rf"{CARDS}(cpu|cuda:[0-9]{{1,3}})", re.ASCII)
FIRST_FRAME_SECONDS = 10.0
START_SECONDS = 45.0  # the most until the actor answers; an actor of a bridge that died goes first
SIGN_SECONDS = 1.0  # between two signs of life
FROZEN_SECONDS = 10.0  # without one the node counts as lost
ROUND_SECONDS = 0.25
LOOK_SECONDS = 0.5  # between two looks for the head, and that it has to answer one
UNDER_WAY = 2  # calls for frames: while one is on its way the next is made
NODES_SECONDS = 4.0  # between two lists of nodes that are the same
# What Ray and Python read outside of their own folders, and nothing else of /etc.
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/proc", "/sys", "/dev", "/run/systemd/resolve")
OF_ETC = (
    "ssl", "pki", "ca-certificates", "hosts", "host.conf", "resolv.conf", "nsswitch.conf", "gai.conf",
    "services", "passwd", "group", "localtime", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "machine-id",
    "alternatives",
)  # fmt: skip
SHOWN = re.compile(HOST_NAME, re.ASCII)  # names of nodes that are told
TRUST_FILES = ("RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


class LostError(Exception):
    """There is no way to the card, or no longer; the text says why and what to do."""


def main() -> None:
    """Serve one connection until either end is gone."""
    descriptor, address, folder, module, parent = sys.argv[1:]
    die_with(int(parent))
    confine(Path(folder))
    wire = _given(int(descriptor), address)
    try:
        asked = wire.receive(FIRST_FRAME_SECONDS)
        if asked is not None:
            _connect(address)
            _serve(wire, asked, module)
    except LostError as error:
        _say_lost(wire, str(error))
    except (WireError, EOFError, OSError) as error:
        _say_lost(wire, f"the link to Ray ended: {error}")
    finally:
        wire.shut()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # Ray's own end waits for a node that does not answer; its actors end with this process


def _given(descriptor: int, address: str) -> Wire:
    """Wait for the connection to serve; meanwhile connect to Ray's head, as soon as that is there."""
    with socket.socket(fileno=descriptor) as waiting:
        while not wait([waiting], LOOK_SECONDS):
            if _answers(address):
                with suppress(LostError):  # whoever comes later is told
                    _connect(address)
                break
        _, given, _, _ = socket.recv_fds(waiting, 1, 1)
    if not given:
        sys.exit(0)  # framepackd node has ended
    return Wire(socket.socket(fileno=given[0]))


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LOOK_SECONDS).close()
    except OSError:
        return False
    return True


def _say_lost(wire: Wire, reason: str) -> None:
    try:
        wire.send({"kind": "Lost", "reason": reason})
    except (OSError, WireError):
        return


def confine(folder: Path) -> None:
    """Leave this process its code, Ray's folder and the files of trust: a node may take it over."""
    reads = [*map(Path, SYSTEM), *(Path("/etc", name) for name in OF_ETC)]
    reads += [Path(os.environ[name]) for name in TRUST_FILES if name in os.environ]
    writes = [folder, Path("/dev/shm"), Path("/dev/null"), Path("/dev/tty")]  # noqa: S108 - Ray's objects lie there
    landlock.confine(
        [
            *landlock.code("framepackd", "framepack_core", "ray"),
            *((place, landlock.READ) for place in reads),
            *((place, landlock.WRITE) for place in writes),
        ]
    )


def _connect(address: str) -> None:
    import ray

    if ray.is_initialized():
        return
    if not _answers(address):  # Ray itself would try for half a minute
        raise LostError(f"Ray's head at {address} does not answer: look whether framepackd node runs here")
    try:
        ray.init(address=address, namespace="framepackd", log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises many kinds
        raise LostError(
            f"Ray's head at {address} does not answer this machine: {_first_line(error)}. "
            "Check that framepackd node runs here, and what it logs"
        ) from error


def _serve(wire: Wire, asked: Frame, module: str) -> None:
    if asked.kind == "Nodes":
        _tell_nodes(wire)
    elif asked.kind == "Open":
        host, device = (asked.header.get(key) for key in ("host", "device"))
        if not isinstance(host, str) or not isinstance(device, str):
            raise LostError(f"the first frame names no host and device: {asked.header!r}")
        _relay(wire, host, device, module)
    else:
        raise LostError(f"the first frame is {asked.kind}: it must be Open or Nodes")


def _tell_nodes(wire: Wire) -> None:
    """Send the list of nodes whenever it changes, and as a sign of life, until the other end is gone."""
    told, when = None, 0.0
    while True:
        now = time.monotonic()
        found = nodes()
        if found != told or now - when >= NODES_SECONDS:
            wire.send({"kind": "Nodes", "nodes": found})
            told, when = found, now
        if wire.receive(1.0) is not None:
            return  # nothing else is asked here


def nodes() -> list[dict[str, Any]]:
    """List the nodes that lend cards, as :func:`listed` does."""
    import ray

    return listed(ray.nodes())


def listed(told: "Iterable[Mapping[str, Any]]") -> list[dict[str, Any]]:
    """List the nodes that lend cards: of each host the living one, or else the last that was there.

    ``others``: the addresses of further living ones that call themselves like it, and are not used.
    """
    found: dict[str, dict[str, Any]] = {}
    for node in told:
        devices = sorted(name.removeprefix(CARDS) for name in node["Resources"] if CARD.fullmatch(name))
        host = node["NodeName"]
        if not SHOWN.fullmatch(host):  # a node calls itself what it likes
            continue
        alive, address, before = node["Alive"], node["NodeManagerAddress"], found.get(host, {})
        if before.get("alive"):
            if alive and devices and address not in (before["address"], *before["others"]):
                before["others"].append(address)
        elif devices or not alive:
            found[host] = {
                "host": host, "address": address, "alive": alive, "devices": devices, "others": [],
            }  # fmt: skip
    return [found[host] for host in sorted(found)]


def _relay(wire: Wire, host: str, device: str, module: str) -> None:
    """Start an actor for the card and relay until either end is gone."""
    actor = _start(host, device, module)
    ended = threading.Event()
    giving = threading.Thread(target=_give, args=(wire, actor, ended), daemon=True)
    giving.start()
    _take(wire, actor, device, ended)


def _start(host: str, device: str, module: str) -> Any:
    """Start the actor on the node of that name.

    Raises:
        LostError: no living node has this name, or it does not lend this card.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resource = f"{CARDS}{device}"
    there = [node for node in ray.nodes() if node["NodeName"] == host and node["Alive"]]
    if not there:
        others = ", ".join(node["host"] for node in nodes() if node["alive"]) or "none"
        raise LostError(
            f"no machine that calls itself {host} is connected (connected: {others}). Start "
            f"framepackd node there, or give it this name with --name"
        )
    fitting = [node for node in there if resource in node["Resources"]]
    if not fitting:
        raise LostError(f"{host} lends no card {device}: {_lent(there[0]['Resources'])}")
    affinity = NodeAffinitySchedulingStrategy(fitting[-1]["NodeID"], soft=False)
    remote = ray.remote(
        num_cpus=0,
        resources={resource: 1},
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=affinity,
        concurrency_groups={"take": 1, "give": 1, "sign": 1},
    )(Relay)
    return remote.remote(device, module)


def _lent(resources: "Mapping[str, float]") -> str:
    devices = sorted(name.removeprefix(CARDS) for name in resources if name.startswith(CARDS))
    return f"it lends {', '.join(devices)}" if devices else "it lends none"


def _give(wire: Wire, actor: Any, ended: threading.Event) -> None:
    """Pass on what the bridge sends, one call after the other; end the actor when the bridge is gone."""
    import ray

    try:
        while not ended.is_set():
            frame = wire.receive_packed()
            if frame is None:
                continue
            call = actor.give.options(concurrency_group="give").remote(frame)
            while not ended.is_set() and not ray.wait([call], timeout=ROUND_SECONDS)[0]:
                pass
            del frame
    except (EOFError, WireError, OSError):
        pass
    ended.set()
    ray.kill(actor, no_restart=True)


def _take(wire: Wire, actor: Any, device: str, ended: threading.Event) -> None:
    """Pass on what the node sends, and say that it lives.

    Raises:
        LostError: it is gone, or gave no sign of life for a while.
    """
    import ray

    take, sign = actor.take.options(concurrency_group="take"), actor.sign.options(concurrency_group="sign")
    calls, signs, next_sign = [take.remote()], [sign.remote()], 0.0
    heard, patience = time.monotonic(), START_SECONDS
    while not ended.is_set():
        now = time.monotonic()
        if not signs and now >= next_sign:
            signs = [sign.remote()]
        # For a value that is not there yet, get holds a lock that all other calls need: wait asks first.
        come, _ = ray.wait([*calls[:1], *signs], num_returns=1, timeout=ROUND_SECONDS)
        for call in come:
            try:
                frames = ray.get(call)
            except ray.exceptions.RayError as error:
                if ended.is_set():
                    return
                raise LostError(_cause(error)) from error
            heard, patience = time.monotonic(), FROZEN_SECONDS
            if call in signs:
                signs, next_sign = [], now + SIGN_SECONDS
                wire.send({"kind": "Alive"})
                continue
            calls.remove(call)
            calls += [take.remote() for _ in range(UNDER_WAY - len(calls))]
            if frames:
                wire.send_packed(frames)
            del frames
        del come
        if time.monotonic() - heard > patience:
            raise LostError(
                f"no sign of life for {patience:.0f} s: the machine is frozen or cut off"
                if patience == FROZEN_SECONDS
                else f"{device} did not start within {patience:.0f} s: another process may still hold it"
            )


def _cause(error: Exception) -> str:
    """Say in words how a call of an actor failed."""
    import ray

    if isinstance(error, ray.exceptions.ActorUnavailableError) or "node" in _first_line(error):
        return "the machine is gone or cut off"
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "the process there was killed: the kernel does so when memory runs out"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


if __name__ == "__main__":
    main()
