"""A real daemon in a real process, on folders of its own, with the demo model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framepackd.control import client
from framepackd.settings.config import load_config
from framepackd.text import printable_json
from tests.golden import TINY_MODELS
from tests.started.forking import worker_of

# The smallest video that has two sections: 32 x 32, window 3, 25 frames, one step each.
TINY = 'model = "demo"\n[defaults]\nseconds = 1\nsteps = 2\nlatent_window_size = 3\nwidth = 32\nheight = 32\n'
# The demo model takes three times as long.
TINY_MODEL = f"""
[models.tiny]
kind = "framepack"
transformer = "{TINY_MODELS / "framepack-i2v"}"
base = "{TINY_MODELS / "hunyuanvideo"}"
image_encoder = "{TINY_MODELS / "flux_redux"}"
"""
# 500 steps: seven seconds or more even where nothing else runs, so that what follows finds the job running.
LONG: dict[str, Any] = {"steps": 100, "seconds": 2}
LONG_SECTIONS = 5


class Daemon:
    """Runs framepackd on a folder and asks it things, as a person would."""

    def __init__(
        self, root: Path, *, settle_seconds: float = 0.3, config: str = "", models: str = ""
    ) -> None:
        self.root = root
        self.inbox, self.outbox, self.failed = (root / name for name in ("inbox", "outbox", "failed"))
        self.state = root / "state"
        self.config = root / "config.toml"
        folders = "".join(f'{name} = "{name}"\n' for name in ("inbox", "outbox", "failed"))
        self.config.write_text(
            f'state_dir = "state"\n{folders}settle_seconds = {settle_seconds}\n{config}{TINY}{models}'
        )
        self.inbox.mkdir(exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = root / "daemon.log"

    def start(self, *options: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.arguments("run", *options), stderr=log, env=environment())
        self.until(lambda: (self.state / "control.sock").exists(), "the daemon to start")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(60)

    def arguments(self, *command: str) -> list[str]:
        return [sys.executable, "-m", "framepackd", command[0], "--config", str(self.config), *command[1:]]

    def command(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*command),
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
            timeout=120,
        )

    def status(self) -> dict[str, Any]:
        """Give what ``framepackd status --json`` prints, without a process that competes with the daemon."""
        report: dict[str, Any] = json.loads(printable_json(client.report(load_config(self.config))[0]))
        return report

    def until(self, true: Callable[[], bool], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                log = self.log.read_text() if self.log.exists() else ""
                raise AssertionError(f"waited {seconds} s for {what}\n{log}")
            time.sleep(0.1)

    def drop(self, name: str, prompt: str = "pan left", **settings: Any) -> None:
        file = self.inbox / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if settings:  # first: on a busy machine they might come too late
            lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
            file.with_name(f"{file.stem}.toml").write_text("".join(lines))
        file.with_name(f"{file.stem}.txt").write_text(prompt)
        picture(file)

    def worker(self) -> int:
        """Give the process id of the worker."""
        assert self.process is not None
        self.until(lambda: worker_of(self.process.pid) is not None, "a worker to run", 10)
        found = worker_of(self.process.pid)
        assert found is not None
        return found


def environment() -> dict[str, str]:
    return {
        key: value for key, value in os.environ.items() if not key.startswith(("FRAMEPACKD_", "STATE_DIR"))
    }


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 48)) -> Path:
    """Write a picture in the format its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@contextmanager
def ending(daemons: Collection[Daemon]) -> Iterator[None]:
    """End at last whatever daemons have become."""
    try:
        yield
    finally:
        for daemon in daemons:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()


MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[MakeDaemon]:
    """Make daemons that are not started yet, and end whatever they become."""
    made: list[Daemon] = []

    def make(**settings: Any) -> Daemon:
        made.append(Daemon(tmp_path, **settings))
        return made[-1]

    with ending(made):
        yield make


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """Give one with nothing special about it."""
    return make_daemon()
