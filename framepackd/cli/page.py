"""Runs the page beside the daemon, for ``framepackd run --web``."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from framepackd.problems import CommandError

STOP_SECONDS = 10.0  # that the page may take to end


@contextmanager
def page(
    config_file: Path | None, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Serve the page from a process of its own, which ends with the block, and if this process is killed.

    Raises:
        CommandError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise CommandError('the page needs gradio: pip install "framepackd[web]", or leave out --web')
    named = ["--config", str(config_file)] if config_file else []
    command = [sys.executable, "-m", "framepackd", "web", *named, "--ends-with", str(os.getpid())]
    process = subprocess.Popen(command, env=environment)  # noqa: S603 - it is framepackd
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
