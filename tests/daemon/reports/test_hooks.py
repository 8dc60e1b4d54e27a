"""Who is told what became of jobs: real processes and stores, a server that fails, hangs, then accepts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from framepackd.control import client
from framepackd.jobs.job import State
from framepackd.reports import hooks
from framepackd.reports.hooks import Event, Follower
from framepackd.settings.config import Config, ConfigError, load_config
from tests.acceptance.conftest import environment
from tests.daemon.reports.queue import Queue, until


class Receiver:
    """A webhook's other end: answers as it is told, 200 when nothing is left of that."""

    def __init__(self, *answers: int | str) -> None:
        self.answers = list(answers)
        self.tried = 0
        self.heard: list[dict[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.tried += 1
                answer = receiver.answers.pop(0) if receiver.answers else 200
                if answer == "hang":
                    time.sleep(5)
                    return
                if answer == "dribble":
                    for _ in range(50):
                        self.wfile.write(b"H")
                        time.sleep(0.1)
                    return
                if answer == 200:
                    receiver.heard.append(said)
                self.send_response(int(answer))
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

            def handle_error(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign] # who hung up is no news
        self.address = f"http://127.0.0.1:{self.server.server_port}/secret-path"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def told(self) -> list[str]:
        return [
            f"{said['event']} {said['job']['name'] if said['job'] else ''}".strip() for said in self.heard
        ]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def jobs(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "state")


def configured(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(f'state_dir = "state"\n[notify]\n{text}\n')
    return file


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "BACKOFF_SECONDS", 0.05)


def look(config: Config, name: str = "webhook") -> Follower:
    """Follow as the process does, one look; gives the follower for more."""
    tell = hooks.call_webhook if name == "webhook" else hooks.run_command
    follower = Follower(
        config,
        config.state_dir / f"{name}.json",
        lambda event, stop: tell(config.notify, event, stop),
        threading.Event(),
    )
    follower.look()
    return follower


def test_each_end_is_reported_once_and_not_what_ended_before_the_first_start(
    tmp_path: Path, jobs: Queue, receiver: Receiver
) -> None:
    config = load_config(configured(tmp_path, f'webhook = "{receiver.address}"'))
    jobs.add("old")
    jobs.end("old")
    follower = look(config)
    assert receiver.heard == []
    jobs.add("cat")
    jobs.add("dog")
    jobs.end("cat")
    follower.look()
    assert receiver.told() == ["done cat"]
    jobs.end("dog", State.FAILED, error="no such picture", output=None)
    look(config).look()  # another process, later
    assert receiver.told() == ["done cat", "failed dog", "queue_empty"]
    assert receiver.heard[0]["job"]["output"] == "/out/cat.mp4"
    assert receiver.heard[1]["job"]["error"] == "no such picture"
    assert jobs.store.retry("id-dog")
    jobs.store.brought_back(jobs.store.get("id-dog"))
    look(config)
    assert len(receiver.heard) == 3
    job = jobs.store.get("id-dog")
    job.delivery = None
    jobs.store.brought_back(job)
    jobs.end("dog", State.FAILED, error="again", output=None)
    look(config)
    assert receiver.told()[3:] == ["failed dog", "queue_empty"], "a second end is news"
    look(config)
    assert len(receiver.heard) == 5


def test_the_job_is_reported_as_framepackd_show_prints_it(
    tmp_path: Path, jobs: Queue, receiver: Receiver
) -> None:
    config = load_config(configured(tmp_path, f'webhook = "{receiver.address}"'))
    follower = look(config)
    jobs.add("cat")
    jobs.end("cat")
    follower.look()
    assert receiver.heard[0]["job"] == client.show(config, "cat")[0]


def test_only_the_events_asked_for_are_reported(tmp_path: Path, jobs: Queue, receiver: Receiver) -> None:
    config = load_config(configured(tmp_path, f'webhook = "{receiver.address}"\nevents = ["queue_empty"]'))
    follower = look(config)
    for name in ("cat", "dog"):
        jobs.add(name)
    jobs.end("cat")
    follower.look()
    assert receiver.tried == 0
    jobs.end("dog", State.CANCELLED, error="by hand")
    follower.look()
    assert receiver.told() == ["queue_empty"]


def test_a_server_that_fails_hangs_dribbles_and_then_accepts_hears_it_once(
    tmp_path: Path, jobs: Queue, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with Receiver(500, "hang", "dribble", 302) as receiver:
        settings = f'webhook = "{receiver.address}"\ntimeout_seconds = 0.3\nevents = ["done"]'
        config = load_config(configured(tmp_path, settings))
        follower = look(config)
        jobs.add("cat")
        jobs.end("cat")
        began = time.monotonic()
        follower.look()
        assert time.monotonic() - began < 4
        assert receiver.told() == ["done cat"]
    reasons = [record.getMessage() for record in caplog.records]
    assert ["answered 500" in reasons[0], "no answer within 0.3 s" in reasons[1]] == [True, True]
    assert "no answer within 0.3 s" in reasons[2]
    assert "answered 302, a redirect: set webhook" in reasons[3]
    assert not any("secret-path" in reason for reason in reasons)


def test_after_so_many_attempts_it_is_abandoned_and_the_next_event_is_reported(
    tmp_path: Path, jobs: Queue, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with Receiver(500, 500) as receiver:
        settings = f'webhook = "{receiver.address}"\nattempts = 2\nevents = ["done"]'
        config = load_config(configured(tmp_path, settings))
        follower = look(config)
        for name in ("cat", "dog"):
            jobs.add(name)
            jobs.end(name)
        follower.look()
        assert receiver.told() == ["done dog"]
        assert "given up" in caplog.text


def script(tmp_path: Path, text: str) -> str:
    """Write a program for the command; gives it as TOML."""
    file = tmp_path / "hook.py"
    file.write_text(f"import json, os, subprocess, sys, time\n{text}")
    return f"command = {json.dumps([sys.executable, str(file), '$HOME; rm -rf /', str(tmp_path)])}"


def test_a_command_gets_variables_and_the_job_and_no_shell_reads_its_arguments(
    tmp_path: Path, jobs: Queue
) -> None:
    told = tmp_path / "told"
    command = script(
        tmp_path,
        "seen = {k: v for k, v in os.environ.items() if k.startswith('FRAMEPACKD_')}\n"
        f"with open({str(told)!r}, 'a') as file:\n"
        "    print(json.dumps([sys.argv[1], seen, json.load(sys.stdin)]), file=file)\n"
        # Its variables are no keys of the configuration to a framepackd that it asks.
        "subprocess.run([sys.executable, '-m', 'framepackd', 'check', '--help'], check=True)\n",
    )
    config = load_config(configured(tmp_path, command))
    follower = look(config, "command")
    jobs.add("c a\nt")
    jobs.end("c a\nt", State.FAILED, error='it\'s "broken"', output=None)
    follower.look()
    failed, empty = map(json.loads, told.read_text().splitlines())
    assert failed[0] == "$HOME; rm -rf /"
    assert failed[1] == {
        "FRAMEPACKD_EVENT": "failed",
        "FRAMEPACKD_JOB": "id-c a\nt",
        "FRAMEPACKD_NAME": "c a\nt",
        "FRAMEPACKD_OUTPUT": "",
        "FRAMEPACKD_ERROR": 'it\'s "broken"',
    }
    assert failed[2]["job"]["error"] == 'it\'s "broken"'
    assert empty[1]["FRAMEPACKD_EVENT"] == "queue_empty"
    assert empty[2]["job"] is None


def test_a_framepackd_that_the_command_asks_takes_its_variables_for_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in Event("done", None).variables().items():
        monkeypatch.setenv(name, value)
    load_config(configured(tmp_path, ""))


def test_a_command_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, jobs: Queue, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    children = tmp_path / "children"
    command = script(
        tmp_path,
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(children)!r}, 'a').write(f'{{child.pid}}\\n')\n"
        "time.sleep(60)",
    )
    config = load_config(
        configured(tmp_path, f'{command}\ntimeout_seconds = 1\nattempts = 2\nevents = ["done"]')
    )
    follower = look(config, "command")
    jobs.add("cat")
    jobs.end("cat")
    began = time.monotonic()
    follower.look()
    assert time.monotonic() - began < 10
    assert "took more than 1 s" in caplog.text
    assert "given up" in caplog.text

    def gone(pid: int) -> bool:
        try:
            return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True

    for pid in map(int, children.read_text().split()):
        until(lambda pid=pid: gone(pid), f"{pid} to end")  # type: ignore[misc] # bound at once


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[bytes]"]]:
    """Start framepackd notify as systemd would."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin() -> "subprocess.Popen[bytes]":
        arguments = [sys.executable, "-m", "framepackd", "notify", "--config", str(tmp_path / "config.toml")]
        with (tmp_path / "log").open("ab") as log:
            processes.append(subprocess.Popen(arguments, env=environment(), stderr=log))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def test_killed_in_between_it_tells_nothing_twice_and_loses_nothing(
    tmp_path: Path, jobs: Queue, receiver: Receiver, start: Callable[[], "subprocess.Popen[bytes]"]
) -> None:
    configured(tmp_path, f'webhook = "{receiver.address}"')
    memory = tmp_path / "state/notify/webhook.json"
    process = start()
    until(memory.exists, "the first look")
    names = [f"job-{number}" for number in range(3)]
    for name in names:
        jobs.add(name)
    jobs.end(names[0])
    until(lambda: "id-job-0" in memory.read_text(), "the first to be told")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    jobs.end(names[1])  # while nobody looks
    process = start()
    until(lambda: "id-job-1" in memory.read_text(), "the second to be told")
    second = subprocess.run(process.args, env=environment(), capture_output=True, text=True, check=False)
    assert second.returncode == 75, "who tells is alone"
    jobs.end(names[2])
    until(lambda: len(receiver.heard) >= 4, "the rest")
    process.terminate()
    assert process.wait(10) == 0
    assert receiver.told() == ["done job-0", "done job-1", "done job-2", "queue_empty"]


def test_a_stop_while_the_other_end_hangs_is_quick_and_the_event_is_reported_later(
    tmp_path: Path, jobs: Queue, start: Callable[[], "subprocess.Popen[bytes]"]
) -> None:
    with Receiver("hang") as receiver:
        configured(tmp_path, f'webhook = "{receiver.address}"\nevents = ["done"]')
        process = start()
        until((tmp_path / "state/notify/webhook.json").exists, "the first look")
        jobs.add("cat")
        jobs.end("cat")
        until(lambda: receiver.tried == 1, "an attempt")
        process.terminate()
        assert process.wait(3) == 0
        start()
        until(lambda: receiver.told() == ["done cat"], "it to be told")


def test_with_nobody_to_tell_it_says_so(
    tmp_path: Path, start: Callable[[], "subprocess.Popen[bytes]"]
) -> None:
    configured(tmp_path, "")
    assert start().wait(10) == 2
    assert "set command or webhook under [notify]" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('webhook = "ftp://x/y"', "webhook must be an address that starts with http:// or https://"),
        ('events = ["doen"]', "notify.events"),
        ("timeout_seconds = 0", "notify.timeout_seconds"),
        ('command = "mail me"', "notify.command"),
    ],
)
def test_a_mistake_in_the_settings_is_reported(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(configured(tmp_path, text))


def test_a_memory_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    config = load_config(configured(tmp_path, 'webhook = "http://127.0.0.1:9/"'))
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(hooks.NotifyError, match=r"memory.json is damaged .*remove it"):
        Follower(config, tmp_path / "memory.json", lambda *_: None, threading.Event())
