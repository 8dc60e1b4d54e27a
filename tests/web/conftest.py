"""A real page beside a real daemon, with a tiny model."""

import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.conftest import Daemon, environment
from tests.golden import TINY_MODELS

MODEL = f"""
[models.tiny]
kind = "framepack"
transformer = "{TINY_MODELS / "framepack-i2v"}"
base = "{TINY_MODELS / "hunyuanvideo"}"
image_encoder = "{TINY_MODELS / "flux_redux"}"
"""


class Web:
    """Runs framepackd web."""

    def __init__(self, daemon: Daemon, *options: str, password: str = "") -> None:
        self.log = daemon.root / "web.log"
        own = {"FRAMEPACKD_WEB__PASSWORD": password} if password else {}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                daemon.arguments("web", "--port", str(free_port()), *options),
                stdout=log,
                stderr=log,
                env=environment() | {"PYTHONUNBUFFERED": "1"} | own,
            )
        daemon.until(lambda: "page: " in self.log.read_text() or self.process.poll() is not None, "the page")
        found = re.search(r"page: (\S+)", self.log.read_text())
        assert found, self.log.read_text()
        self.url = found[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def tiny_daemon_in(folder: Path) -> Iterator[Daemon]:
    """Run a daemon; videos are of 32 x 32 pixels unless a job asks otherwise."""
    daemon = Daemon(folder, settle_seconds=0.1)
    text = daemon.config.read_text().replace('model = "demo"', 'model = "tiny"')
    daemon.config.write_text(text.replace("steps = 2\n", "") + MODEL)
    daemon.start()
    yield daemon
    assert daemon.stop() == 0


@contextmanager
def running(daemon: Daemon, *options: str, password: str = "") -> Iterator[Web]:
    """Run the page."""
    web = Web(daemon, *options, password=password)
    yield web
    web.process.send_signal(signal.SIGTERM)
    web.process.wait(20)


# One daemon and one page for all tests of a module: they are not what is tested.
@pytest.fixture(scope="module")
def tiny_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with tiny_daemon_in(tmp_path_factory.mktemp("web")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def web(tiny_daemon: Daemon) -> Iterator[Web]:
    with running(tiny_daemon) as web:
        yield web
