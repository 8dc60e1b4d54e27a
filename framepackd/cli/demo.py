"""framepackd demo: makes a video with the bundled demo model and picture, by a real daemon."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import click
from rich.live import Live

from framepack_core.media import heif
from framepackd.cli import display
from framepackd.cli.options import own_command
from framepackd.cli.page import page
from framepackd.control import socket
from framepackd.inbox.naming import is_picture, picture_types
from framepackd.jobs import lock
from framepackd.problems import CommandError
from framepackd.settings.config import load_config

FOLDERS = ("inbox", "outbox", "failed", "state")
LOG, EARLIER = "daemon.log", "earlier"
PICTURE = "lake.png"
PROMPT = "Night falls over the lake."  # the demo model is best at changes of light
STEPS = 4  # more do not make the demo model's videos better
START_SECONDS = 30.0
STALL_SECONDS = 600.0  # a slow machine may take so long for a decode, the longest part without a report


class DemoError(CommandError):
    """The demo did not end with a video."""


def run_demo(
    folder: Path, image: Path | None = None, prompt: str | None = None, seconds: float = 2.4
) -> Path:
    """Start a daemon on fresh folders, drop a picture and its text, show progress; returns the video.

    Args:
        folder: where the demo's folders go; those of an earlier demo move to ``earlier/`` in it.
        image: the picture; None is the bundled one.
        prompt: what happens; None is night falling.
        seconds: length of the video.

    Raises:
        DemoError: the folder holds something else, there is no such picture, or the job did not end well.
    """
    folder = folder.absolute()
    bundled = files("framepackd").joinpath("demo")
    try:
        picture = bundled.joinpath(PICTURE).read_bytes() if image is None else image.read_bytes()
    except OSError as error:
        raise DemoError(f"{image} cannot be read: {error.strerror}") from error
    name = Path(PICTURE if image is None else image.name)
    if not is_picture(name.name):
        hint = f": {heif.NOT_HERE}" if name.suffix.lower() in heif.ENDINGS else ""
        raise DemoError(f"{name} is no picture of a known type: {picture_types()}{hint}")
    set_aside(folder)
    with _daemon(folder) as daemon:
        settings = f"prompt = {json.dumps(prompt or PROMPT, ensure_ascii=False)}\n"
        settings += f"seconds = {seconds}\nsteps = {STEPS}\n"
        inbox = folder / "inbox"
        (inbox / f"{name.stem}.toml").write_text(settings)
        (inbox / name).write_bytes(picture)
        return _wait_for_video(daemon, folder / "state")


def show_page(folder: Path) -> None:
    """Run a daemon with the demo model on the demo's folders, and its page, until Ctrl-C.

    Raises:
        DemoError: the folder holds something else, or the daemon did not start.
        CommandError: gradio is not installed.
    """
    folder = folder.absolute()
    if not _is_demo(folder):
        set_aside(folder)
    _refuse_running(folder)
    with _daemon(folder) as daemon, page(folder / "state/config.toml", _environment()) as serving:
        web = load_config(folder / "state/config.toml").web
        click.echo(f"The page on the demo model opens at http://{web.server}:{web.port} until Ctrl-C.")
        try:
            while daemon.poll() is None and serving.poll() is None:
                time.sleep(0.2)
        except KeyboardInterrupt:
            return
        raise DemoError("the page ended" if daemon.poll() is None else "the daemon ended")


def what_next() -> str:
    """Say what to do after the demo, in commands to copy."""
    command = own_command()
    has_page = importlib.util.find_spec("gradio") is not None
    install = "" if has_page else f'{Path(command).with_name("pip")} install ".[web]" && '
    return (
        "Next:\n"
        "  # your own picture\n"
        f'  {command} demo --image mine.jpg --prompt "sunset"\n'
        "  # the page, on this demo model\n"
        f"  {install}{command} demo --web\n"
        "  # the real model, about 45 GB: a configuration, its files, a check of this machine\n"
        f"  {command} init && {command} models download && {command} check\n"
    )


def _is_demo(folder: Path) -> bool:
    return (folder / "state/framepackd.db").exists()


def _refuse_running(folder: Path) -> None:
    if lock.is_held(folder / "state"):
        raise DemoError(f"a demo runs in {folder}: end it with Ctrl-C there, or use --folder")


def set_aside(folder: Path) -> None:
    """Make fresh folders; what an earlier demo made moves to ``earlier/1``, ``earlier/2`` ...

    Raises:
        DemoError: the folder holds something else, or a demo runs in it.
    """
    earlier = folder / EARLIER
    if _is_demo(folder):
        _refuse_running(folder)
        numbers = [int(path.name) for path in earlier.glob("*") if path.name.isdecimal()]
        kept = earlier / str(max(numbers, default=0) + 1)
        kept.mkdir(parents=True)
        for name in (*FOLDERS, LOG):
            if (folder / name).exists():
                (folder / name).rename(kept / name)
    elif folder.exists() and any(path != earlier for path in folder.iterdir()):
        raise DemoError(f"{folder} is there already and is not an earlier demo: move it, or use --folder")
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)


def _environment() -> dict[str, str]:
    """Give the environment without settings of framepackd, except for the page's."""
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("FRAMEPACKD_") or key.startswith("FRAMEPACKD_WEB__")
    }


@contextmanager
def _daemon(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a daemon on the demo's folders."""
    config = folder / "state/config.toml"
    settings = {"state_dir": str(folder / "state")} | {key: str(folder / key) for key in FOLDERS[:3]}
    settings["model"] = "demo-f1"  # sharper than "demo": each section sees the one before
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    config.write_text("\n".join(["# Written by framepackd demo.", *lines, "settle_seconds = 0.5", ""]))
    command = [sys.executable, "-m", "framepackd", "run", "--config", str(config)]
    with (folder / LOG).open("ab") as log:
        daemon = subprocess.Popen(  # noqa: S603 - it is framepackd
            command, env=_environment(), stderr=log, start_new_session=True
        )
    try:
        _wait_for_daemon(daemon, folder / "state")
        yield daemon
    except DemoError as error:
        raise DemoError(f"{error}; its log is {folder / LOG}") from error
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()


def _wait_for_daemon(daemon: "subprocess.Popen[bytes]", state: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (state / socket.SOCKET).exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise DemoError("the daemon did not start")
        time.sleep(0.05)


class Patience:
    """Is over when nothing has changed for too long, however long all of it takes."""

    def __init__(self, now: float) -> None:
        """Begin to wait."""
        self._seen: object = None
        self._since = now

    def is_over(self, seen: object, now: float) -> bool:
        """Say whether what is seen now was seen all the time."""
        if seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since > STALL_SECONDS


def _wait_for_video(daemon: "subprocess.Popen[bytes]", state: Path) -> Path:
    patience, job = Patience(time.monotonic()), None
    with Live(console=display.console(), auto_refresh=False, transient=True) as live:
        while not patience.is_over(job and (job["state"], job["stage"], job["attempts"]), time.monotonic()):
            if daemon.poll() is not None:
                raise DemoError(f"the daemon ended with exit code {daemon.returncode}")
            try:
                report = socket.ask(state, {"command": "status"})
            except (ConnectionError, FileNotFoundError):  # it is starting, or ending
                time.sleep(0.05)
                continue
            live.update(display.status(report), refresh=True)
            job = next(iter(report["jobs"]), None)
            if job is not None and job["state"] == "done":
                return Path(job["output"])
            if job is not None and job["state"] == "failed":
                raise DemoError(f"the job failed: {job['error']}")
            time.sleep(0.2)
    raise DemoError(f"nothing has happened for {STALL_SECONDS / 60:.0f} minutes")
