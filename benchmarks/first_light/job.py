"""A row of first light: a job through daemon and worker, the worker killed in the middle of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from benchmarks.first_light import Figure
from benchmarks.full_shape import SMALL
from framepackd.control import socket

STEPS, SECONDS = (8, 1.5) if SMALL else (60, 2)
KILLED_IN = 2  # the section, from 1, of three or five
WAIT = 200.0 if SMALL else 60.0  # seconds, for anything; where all is small other tests may run beside
CONFIG = f"""
model = "demo"
state_dir = "state"
inbox = "inbox"
outbox = "outbox"
failed = "failed"
settle_seconds = 0.3
[defaults]
seed = 7
seconds = {SECONDS}
steps = {STEPS}
latent_window_size = 3
width = 32
height = 32
keep_latents = true
embed_metadata = false
"""


class Daemon:
    """A daemon on folders of its own, that computes on a device."""

    def __init__(self, folder: Path, device: str) -> None:
        """Start it."""
        (folder / "inbox").mkdir()
        self._folder, config = folder, folder / "config.toml"
        config.write_text(f'{CONFIG}\n[gpu]\ndevice = "{device}"\n')
        own = {name: value for name, value in os.environ.items() if not name.startswith("FRAMEPACKD_")}
        command = [sys.executable, "-m", "framepackd", "run", "--config", str(config)]
        self._log = folder / "daemon.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=own, stderr=log)  # noqa: S603 # our own

    def drop(self, name: str) -> None:
        """Drop the demo's picture under a name."""
        inbox = self._folder / "inbox"
        (inbox / f"{name}.txt").write_text("pan left")
        (inbox / f"{name}.png").write_bytes(files("framepackd").joinpath("demo/lake.png").read_bytes())

    def job(self, name: str) -> dict[str, Any] | None:
        """Give what the daemon says of a job."""
        try:
            report = socket.ask(self._folder / "state", {"command": "status"})
        except (ConnectionError, FileNotFoundError):  # it is just starting
            return None
        return next((job for job in report["jobs"] if job["name"].startswith(name)), None)

    def section(self, name: str) -> int:
        """Give the section that a job is in, from 1; 0 before."""
        return (self.job(name) or {}).get("section") or 0

    def until(self, true: Callable[[], Any], what: str) -> None:
        """Wait for something."""
        deadline = time.monotonic() + WAIT
        while not true():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"waited in vain for {what}: {self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    def until_done(self, name: str) -> dict[str, Any]:
        """Wait for a job's end, and give it."""
        self.until(lambda: (self.job(name) or {}).get("state") in ("done", "failed"), f"the job {name}")
        job = self.job(name)
        assert job is not None
        if job["state"] != "done":
            raise RuntimeError(f"the job {name} failed: {job['error']}")
        return job

    def worker(self) -> int:
        """Give the process id of the worker."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return next(
            child
            for child in map(int, children)
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        )

    def end(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def killed_worker() -> Iterator[Figure]:
    """Make a video undisturbed, and once more with the worker killed: both must be the same to the bit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="first-light-job-") as made:
        folder = Path(made)
        daemon = Daemon(folder, device)
        try:
            began = time.monotonic()
            daemon.drop("undisturbed")
            undisturbed = daemon.until_done("undisturbed")
            yield Figure("from the start to a video", time.monotonic() - began, "s")
            began = time.monotonic()
            daemon.drop("killed")
            daemon.until(lambda: daemon.section("killed") >= KILLED_IN, "its second section")
            os.kill(daemon.worker(), signal.SIGKILL)
            killed = daemon.until_done("killed")
            yield Figure("to a video with the worker killed", time.monotonic() - began, "s")
            lost = killed["attempts"] - undisturbed["attempts"]
            yield Figure("attempts that were lost", lost, good=lost == 1)
            yield from _compared(folder / "outbox")
        finally:
            daemon.end()


def _compared(outbox: Path) -> Iterator[Figure]:
    for ending in (".latents.safetensors", ".mp4"):
        first, second = ((outbox / f"{name}{ending}") for name in ("undisturbed", "killed"))
        same = first.read_bytes() == second.read_bytes()
        yield Figure(f"*{ending} of both", "equal" if same else "different", good=same)
    told = json.loads((outbox / "killed.json").read_text())
    yield Figure("made on", str(told.get("device", told.get("computation"))))
