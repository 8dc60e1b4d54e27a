"""framepackd run --web: the page is a process of its own beside the daemon, and ends with it."""

import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from framepackd.cli.main import main
from tests.acceptance.conftest import Daemon


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_page_is_served_beside_the_daemon_and_ends_with_it(tmp_path: Path, how: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    daemon = Daemon(tmp_path, models=f"[web]\nport = {port}\n")
    daemon.start("--web")
    try:
        daemon.until(lambda: answers(port), "the page", 120)
    finally:
        daemon.stop(how)
    deadline = time.monotonic() + 20
    while answers(port):
        assert time.monotonic() < deadline, "the page is still served"
        time.sleep(0.1)


def test_without_gradio_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = tmp_path / "config.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\n')
    result = CliRunner().invoke(main, ["run", "--web", "--config", str(config)])
    assert result.exit_code == 1
    assert "the page needs gradio" in result.output
    assert not (tmp_path / "state/framepackd.db").exists()
