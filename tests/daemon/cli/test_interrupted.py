"""Ctrl-C at any moment of a command: no traceback, and the exit code of an interrupted one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def catches_ctrl_c(process: int) -> bool:
    """Tell whether it has a handler, as Python sets one before it runs any of our code."""
    caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) & 1 << (signal.SIGINT - 1))


def hear_ctrl_c() -> None:
    """Undo what a shell does to commands in its background, to these tests too: they ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.5])
def test_ctrl_c_ends_a_command_quietly(tmp_path: Path, seconds: float) -> None:
    """From our first line on: before it Python itself would print where it was."""
    environment = os.environ | {"FRAMEPACKD_STATE_DIR": str(tmp_path), "FRAMEPACKD_MODEL": "demo"}
    process = subprocess.Popen(
        [sys.executable, "-m", "framepackd", "sanity-check"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=hear_ctrl_c,
    )
    while not catches_ctrl_c(process.pid):
        time.sleep(0.001)
    while catches_ctrl_c(process.pid):
        time.sleep(0.001)
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
