"""Measures what it costs that the front keeps each step of a node's job, by real Ray over loopback.

The node's end, Ray, link, bridge and mirror are real. In place of the worker stands a process that computes
nothing: it sleeps as long as a step takes, and writes a checkpoint of the real size with the real calls. Rows
"beside computing" have a process for each core of this machine that counts all the time.
"""

import contextlib
import math
import multiprocessing
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

from benchmarks import Row
from framepack_core.models.registry import BUILT_IN
from framepack_core.request import Request
from framepackd import files
from framepackd.cluster import bridge
from framepackd.cluster.node import Node
from framepackd.cluster.node_file import read_node_file
from framepackd.cluster.wire import Wire
from framepackd.worker.finishing import SharedConnection
from framepackd.worker.kept import Mirrored
from framepackd.worker.main import die_with
from framepackd.worker.messages import Hello, Lost, Resumed, SectionDecoded, StepDone, Stopped, Work
from framepackd.worker.spawning import Spawned, spawn

SMALL = os.environ.get("FRAMEPACKD_BENCHMARK") == "tiny"
STEP_BYTES = 1 << 20 if SMALL else 14_800_000  # a checkpoint of a step at 640x640, window 9
STEPS = 5 if SMALL else 50
REAL_STEP_SECONDS = 2.0  # the fastest cards
PAUSE_SECONDS = 0.3  # between two steps; a real one takes two or more
START_SECONDS = 120.0  # for the node's Ray to come up, and a bridge to be greeted
HOST = "here"
JOBS = ("20260101-000000-aaaaaa", "20260101-000000-bbbbbb")


# the process in place of the worker


def write_steps(connection: Connection, parent: int, _device: str) -> None:
    """Answer each job with so many steps as it has, of so many bytes as its seed says.

    A step's seconds are when its writing began, on the monotonic clock; a section's are how long the last
    writing took, with all that is told of it.
    """
    die_with(parent)
    shared = SharedConnection(connection)
    mirrored = Mirrored(shared.send)
    files.observe(mirrored)
    shared.send_behind()
    with contextlib.suppress(EOFError):
        while isinstance(work := connection.recv(), Work):
            mirrored.begin(work)
            content = os.urandom(work.request.seed)
            shared.send(Resumed(0))
            for step in range(1, work.request.steps + 1):
                time.sleep(PAUSE_SECONDS)
                begun = time.monotonic()
                keep_step(work.checkpoint, step, content)
                took = time.monotonic() - begun
                shared.send(StepDone(1, step, begun))
                shared.send(SectionDecoded(1, took))
            shared.send(Stopped())


def keep_step(folder: Path, step: int, content: bytes) -> None:
    """Do to a checkpoint's folder what a step does."""
    files.make_folder(folder)
    files.write_bytes(folder / f"state-{step:08}", content)
    files.remove(folder / f"state-{max(step - 2, 0):08}")  # two stay


def start_writer(device: str) -> Spawned:
    """Start it as a node's end starts a worker."""
    return spawn(write_steps, device, name="writer")


# the machine: front, head and node in one


@contextlib.contextmanager
def reached(root: Path) -> Iterator[Connection]:
    """Run ``framepackd node`` with the process above for a worker; give the daemon's end of its bridge."""
    (root / "token").write_text(secrets.token_hex(16))
    (root / "token").chmod(0o600)
    door = root / "bridges.sock"
    (root / "node.toml").write_text(
        f'state_dir = "{root}/state"\n[cluster]\ntoken_file = "token"\nsocket = "{door}"\n'
    )
    code = (
        "from framepackd.cluster import bridges; bridges.NODE_END = 'benchmarks.streamed'; "
        "from framepackd.cli.main import main; main(prog_name='framepackd')"
    )
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{trial.getsockname()[1]}"
    own = ["--config", str(root / "node.toml"), "--head", head, "--name", HOST, "--cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "FRAMEPACKD_BENCHMARK"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    with subprocess.Popen([sys.executable, "-c", code, "node", *own], env=environment) as node:  # noqa: S603 - this one
        try:
            yield greeted(bridge.Way(door, HOST, "cpu", root / "jobs", root / "loras"))
        finally:
            node.send_signal(signal.SIGTERM)


def greeted(way: bridge.Way) -> Connection:
    """Start bridges until one has reached the node."""
    way.jobs.mkdir()
    way.loras.mkdir()
    until = time.monotonic() + START_SECONDS
    while True:
        _, connection = bridge.start(way)
        said = connection.recv()
        if isinstance(said, Hello):
            return connection
        assert time.monotonic() < until, said
        time.sleep(0.5)


def job(folder: Path) -> Work:
    """Give a job of many small steps, which nobody computes."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(inputs / "cat.png")
    return Work(
        job_id=folder.name,
        request=Request(image=inputs / "cat.png", prompt="", steps=STEPS, seed=STEP_BYTES),
        spec=BUILT_IN["framepack"],
        fingerprint="",
        result=folder / "result",
        checkpoint=folder / "checkpoint",
        preview=folder / "preview.mp4",
        sections=4,
        frames=145,
        size=(640, 640),
        crf=16,
        save_section_frames=False,
        keep_latents=False,
        device="cpu",
        dtype="auto",
        precision="exact",
        compile_cache=folder,
        load_lock=folder,
        levels={},
    )


def streamed(daemon: Connection, work: Work) -> tuple[list[float], list[float]]:
    """Have a job done; gives of each step the seconds until it counts, and those that it keeps the worker."""
    counts, keeps = list[float](), list[float]()
    daemon.send(work)
    while not isinstance(message := daemon.recv(), Stopped):
        assert not isinstance(message, Lost), message
        if isinstance(message, StepDone):
            counts.append(time.monotonic() - message.seconds)
        if isinstance(message, SectionDecoded):
            keeps.append(message.seconds)
    return counts, keeps


def alone(folder: Path) -> list[float]:
    """Give the seconds that each step's writing takes where nothing is told of it."""
    taken, content = [], os.urandom(STEP_BYTES)
    for step in range(1, STEPS + 1):
        time.sleep(PAUSE_SECONDS)
        begun = time.monotonic()
        keep_step(folder, step, content)
        taken.append(time.monotonic() - begun)
    return taken


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Keep each core busy."""
    spawning = multiprocessing.get_context("spawn")
    busy = [spawning.Process(target=count, daemon=True) for _ in range(os.cpu_count() or 1)]
    for each in busy:
        each.start()
    time.sleep(1.0)  # until they count
    try:
        yield
    finally:
        for each in busy:
            each.kill()


def count() -> None:
    """Compute until the end."""
    for _ in iter(lambda: math.isqrt(1 << 4000), None):
        pass


def rows(where: str | None = None) -> Iterator[Row]:
    """Measure, in a folder or in the one for temporary files."""
    with tempfile.TemporaryDirectory(prefix="st", dir=where) as folder, reached(Path(folder)) as daemon:
        for job_id, name in zip(JOBS, ("", ", beside computing"), strict=True):
            with computing() if name else contextlib.nullcontext():
                counts, keeps = streamed(daemon, job(Path(folder, "jobs", job_id)))
                local = statistics.median(alone(Path(folder, "alone")))
            kept, share = statistics.median(keeps), (statistics.median(keeps) - local) / REAL_STEP_SECONDS
            proves = f"{share:.1%} of a step of {REAL_STEP_SECONDS:.0f} s more than alone"
            yield Row(f"a step's checkpoint{name}: worker waits", 1e3 * kept, 1e3 * local, "ms", proves)
            counted = 1e3 * statistics.median(counts)
            yield Row(f"the same{name}: counts after", counted, None, "ms", "durable on the front")
            yield Row(f"the same{name}: at most", 1e3 * max(counts), None, "ms", "it does not fall behind")
        daemon.close()


if __name__ == "__main__":
    if len(sys.argv) == 3:  # the node's end: FD DEVICE
        Node(
            Wire(socket.socket(fileno=int(sys.argv[1]))), read_node_file(), sys.argv[2], start_writer
        ).serve()
    else:
        for row in rows(*sys.argv[1:]):
            print(
                f"{row.name:60} {row.ours:10.2f} {row.unit}   {row.baseline or ''} {row.proves}", flush=True
            )
