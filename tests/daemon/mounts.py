"""Disks of their own in memory, mounted and unmounted while something runs."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount a small empty disk over a folder."""
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", folder], check=True)
