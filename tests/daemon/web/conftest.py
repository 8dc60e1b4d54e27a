"""A real page beside a real daemon, with a tiny model."""

import contextlib
import random
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.conftest import TINY_MODEL, Daemon, environment

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
EVERYBODY = "0.0.0.0"  # noqa: S104 - that is what is tested


class Web:
    """Runs framepackd web."""

    def __init__(self, daemon: Daemon, *options: str, first: str = "", **settings: str) -> None:
        """Run it with settings under [web], after a line of Python if one is given."""
        self.log = daemon.root / "web.log"
        own = {f"FRAMEPACKD_WEB__{name.upper()}": value for name, value in settings.items()}
        arguments = daemon.arguments("web", "--port", str(free_port()), *options)
        if first:
            code = f"{first}; from framepackd.cli.main import main; main()"
            arguments[1:3] = ["-c", code]  # instead of -m framepackd
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments,
                stdout=log,
                stderr=log,
                env=environment() | {"PYTHONUNBUFFERED": "1"} | own,
            )
        daemon.until(lambda: "page: " in self.log.read_text() or self.process.poll() is not None, "the page")
        found = re.search(r"page: (\S+)", self.log.read_text())
        assert found, self.log.read_text()
        self.url = found[1]


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 - the page's own address
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def free_port() -> int:
    """Give a free port that the kernel gives to no outgoing connection meanwhile."""
    while True:
        port = random.randint(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextmanager
def tiny_daemon_in(folder: Path) -> Iterator[Daemon]:
    """Run a daemon; videos are of 32 x 32 pixels unless a job asks otherwise."""
    daemon = Daemon(folder, settle_seconds=0.1)
    text = daemon.config.read_text().replace('model = "demo"', 'model = "tiny"')
    daemon.config.write_text(text.replace("steps = 2\n", "") + TINY_MODEL)
    daemon.start()
    yield daemon
    assert daemon.stop() == 0


@contextmanager
def running(daemon: Daemon, *options: str, first: str = "", **settings: str) -> Iterator[Web]:
    """Run the page."""
    web = Web(daemon, *options, first=first, **settings)
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
