"""framepackd run --web, demo --web: the page is a process of its own beside the daemon, and ends with it."""

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from framepackd.cli.main import main
from framepackd.control import socket
from framepackd.jobs import lock
from tests.acceptance.conftest import Daemon, environment
from tests.daemon.web.conftest import free_port


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_page_is_served_beside_the_daemon_and_ends_with_it(tmp_path: Path, how: signal.Signals) -> None:
    port = free_port()
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


def test_demo_with_web_opens_the_page_on_the_demo_model_until_ctrl_c(tmp_path: Path) -> None:
    port = free_port()
    others = {"FRAMEPACKD_WEB__PORT": str(port), "FRAMEPACKD_MODEL": "f1"}  # the model is not for the demo
    with subprocess.Popen(
        [sys.executable, "-m", "framepackd", "demo", "--web"],
        cwd=tmp_path,
        env=environment() | others,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as demo:
        assert demo.stdout is not None
        try:
            assert f":{port} until Ctrl-C" in demo.stdout.readline()
            deadline = time.monotonic() + 120
            while not answers(port):
                assert demo.poll() is None
                assert time.monotonic() < deadline, "no page"
                time.sleep(0.1)
            daemon = socket.ask(tmp_path / "demo/state", {"command": "status"})["daemon"]
            assert (daemon["model"], daemon["inbox"]) == ("demo-f1", str(tmp_path / "demo/inbox"))
        finally:
            demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
    assert not lock.is_held(tmp_path / "demo/state"), "the daemon ended with it"
    assert not answers(port)


def test_without_gradio_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("os.umask", lambda mask: 0)  # the command sets it for the rest of the process
    config = tmp_path / "config.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\n')
    result = CliRunner().invoke(main, ["run", "--web", "--config", str(config)])
    assert result.exit_code == 1
    assert "the page needs gradio" in result.output
    assert not (tmp_path / "state/framepackd.db").exists()
