"""Ctrl-C at any moment of a command: no traceback, and the exit code of an interrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("seconds", [0.15, 0.6])
def test_ctrl_c_ends_a_command_quietly(tmp_path: Path, seconds: float) -> None:
    environment = os.environ | {"FRAMEPACKD_STATE_DIR": str(tmp_path), "FRAMEPACKD_MODEL": "demo"}
    process = subprocess.Popen(
        [sys.executable, "-m", "framepackd", "sanity-check"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode in (-signal.SIGINT, 130), "a shell gives 130 for both"


def test_ctrl_c_that_a_library_turns_into_another_error_is_still_ctrl_c() -> None:
    """An interrupted import of numpy.linalg ends in a RecursionError."""
    code = """
import os, signal
import click
from framepackd.cli.options import Commands

def interrupted():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise RecursionError

signal.signal(signal.SIGINT, signal.SIG_DFL)
group = Commands("group")
group.add_command(click.Command("interrupted", callback=interrupted))
group.main(["interrupted"])
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"")
