"""The main job for real, anywhere: the daemon, the bundled demo model, a bundled picture."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from rich.live import Live

from framepackd import control, display

FOLDERS = ("inbox", "outbox", "failed", "state")
NAME = "lake"
START_SECONDS, JOB_SECONDS = 30.0, 300.0


class DemoError(Exception):
    """The demo did not end with a video."""


def run_demo(folder: Path) -> Path:
    """Start a daemon on fresh folders, drop a picture and its text, show progress; returns the video.

    Raises:
        DemoError: the folder is somebody's, or the job did not end well.
    """
    folder = folder.absolute()
    _make_fresh(folder)
    state = folder / "state"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FRAMEPACKD_")}
    environment |= {f"FRAMEPACKD_{key.upper()}": str(folder / key) for key in ("inbox", "outbox", "failed")}
    environment |= {
        "FRAMEPACKD_STATE_DIR": str(state),
        "FRAMEPACKD_MODEL": "demo",
        "FRAMEPACKD_SETTLE_SECONDS": "0.5",
        "FRAMEPACKD_CONFIG": str(_write_config(folder)),
    }
    with (folder / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "framepackd", "run"], env=environment, stderr=log, start_new_session=True
        )
    try:
        _wait_for_daemon(daemon, state)
        for file in files("framepackd").joinpath("demo").iterdir():
            (folder / "inbox" / file.name).write_bytes(file.read_bytes())
        return _wait_for_video(daemon, state)
    except DemoError as error:
        raise DemoError(f"{error}; its log is {folder / 'daemon.log'}") from error
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()


def _make_fresh(folder: Path) -> None:
    """Clear away an earlier demo, and nothing else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "state/framepackd.db").exists():
        raise DemoError(f"{folder} is there already and is not an earlier demo: move it, or use --folder")
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)


def _write_config(folder: Path) -> Path:
    """Write a configuration of the demo's own, so that none on this machine plays a part."""
    config = folder / "state/config.toml"
    config.write_text("# Written by framepackd demo; all its settings come by the environment.\n")
    return config


def _wait_for_daemon(daemon: "subprocess.Popen[bytes]", state: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (state / control.SOCKET).exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise DemoError("the daemon did not start")
        time.sleep(0.05)


def _wait_for_video(daemon: "subprocess.Popen[bytes]", state: Path) -> Path:
    deadline = time.monotonic() + JOB_SECONDS
    with Live(console=display.console(), auto_refresh=False, transient=True) as live:
        while time.monotonic() < deadline:
            if daemon.poll() is not None:
                raise DemoError(f"the daemon ended with exit code {daemon.returncode}")
            report = control.ask(state, {"command": "status"})
            live.update(display.status(report), refresh=True)
            job = next(iter(report["jobs"]), None)
            if job is not None and job["state"] == "done":
                return Path(job["output"])
            if job is not None and job["state"] == "failed":
                raise DemoError(f"the job failed: {job['error']}")
            time.sleep(0.2)
    raise DemoError(f"no video after {JOB_SECONDS:.0f} s")
