"""framepackd demo: makes a video with the bundled demo model and picture, by a real daemon."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from rich.live import Live

from framepack_core.media import heif
from framepackd.cli import display
from framepackd.control import socket
from framepackd.inbox.naming import is_picture, picture_types
from framepackd.problems import CommandError

FOLDERS = ("inbox", "outbox", "failed", "state")
PICTURE, PROMPT = "lake.png", "lake.txt"
STEPS = 4  # more do not make the demo model's videos better
START_SECONDS, JOB_SECONDS = 30.0, 300.0


class DemoError(CommandError):
    """The demo did not end with a video."""


def run_demo(
    folder: Path, image: Path | None = None, prompt: str | None = None, seconds: float = 2.4
) -> Path:
    """Start a daemon on fresh folders, drop a picture and its text, show progress; returns the video.

    Args:
        folder: where the demo's folders go; those of an earlier demo are removed.
        image: the picture; None is the bundled one.
        prompt: what happens; None is the bundled prompt.
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
    text = bundled.joinpath(PROMPT).read_text(encoding="utf-8").strip() if prompt is None else prompt
    _make_fresh(folder)
    state, config = folder / "state", folder / "state/config.toml"
    config.write_text("# Written by framepackd demo, so that no other configuration is used.\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FRAMEPACKD_")}
    environment |= {f"FRAMEPACKD_{key.upper()}": str(folder / key) for key in ("inbox", "outbox", "failed")}
    environment |= {
        "FRAMEPACKD_STATE_DIR": str(state),
        "FRAMEPACKD_MODEL": "demo-f1",  # sharper than "demo": each section sees the one before
        "FRAMEPACKD_SETTLE_SECONDS": "0.5",
        "FRAMEPACKD_CONFIG": str(config),
    }
    with (folder / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "framepackd", "run"], env=environment, stderr=log, start_new_session=True
        )
    try:
        _wait_for_daemon(daemon, state)
        inbox = folder / "inbox"
        settings = f"prompt = {json.dumps(text, ensure_ascii=False)}\nseconds = {seconds}\nsteps = {STEPS}\n"
        (inbox / f"{name.stem}.toml").write_text(settings)
        (inbox / name).write_bytes(picture)
        return _wait_for_video(daemon, state)
    except DemoError as error:
        raise DemoError(f"{error}; its log is {folder / 'daemon.log'}") from error
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()


def _make_fresh(folder: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "state/framepackd.db").exists():
        raise DemoError(f"{folder} is there already and is not an earlier demo: move it, or use --folder")
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)


def _wait_for_daemon(daemon: "subprocess.Popen[bytes]", state: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (state / socket.SOCKET).exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise DemoError("the daemon did not start")
        time.sleep(0.05)


def _wait_for_video(daemon: "subprocess.Popen[bytes]", state: Path) -> Path:
    deadline = time.monotonic() + JOB_SECONDS
    with Live(console=display.console(), auto_refresh=False, transient=True) as live:
        while time.monotonic() < deadline:
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
    raise DemoError(f"no video after {JOB_SECONDS:.0f} s")
