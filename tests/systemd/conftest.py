"""A machine with a real systemd: booted by systemd-nspawn on a throw-away layer over this machine's files.

It has a root of its own. Never boot one in a namespace that shares the real root or its temporary folders:
the clean-up at boot empties them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATE = "systemctl is-system-running"
PACKAGED = ("framepack_core", "framepackd", "systemd", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Machine:
    """Runs commands in the booted machine and keeps a record of what they printed."""

    def __init__(self, root: Path, leader: int, record: Path) -> None:
        self.root, self.leader, self.record = root, leader, record

    def run(self, command: str, *, check: bool = True, note: bool = True) -> str:
        """Run a line of shell as root."""
        ran = subprocess.run(
            ["nsenter", "--all", "--target", str(self.leader), "sh", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=180,
        )
        if note:
            self.say(f"# {command}\n{ran.stdout}")
        if check and ran.returncode != 0:
            journal = self.run("journalctl --no-pager | tail -60", check=False, note=False)
            raise AssertionError(f"{command}: {ran.returncode}\n{ran.stdout}\n{journal}")
        return ran.stdout

    def show(self, key: str) -> str:
        """Give a property of the service."""
        return self.run(f"systemctl show framepackd --property {key} --value", note=False).strip()

    def until(self, true: Callable[[], object], what: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                journal = self.run("journalctl --no-pager | tail -60", note=False)
                raise AssertionError(f"waited {seconds} s for {what}\n{journal}")
            time.sleep(0.5)

    def say(self, text: str) -> None:
        with self.record.open("a") as record:
            record.write(f"{text.rstrip()}\n")


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Boot one, with a Python and the libraries of this environment where a service may see them."""
    folder = tmp_path_factory.mktemp("machine")
    layer, root = folder / "layer", folder / "root"
    layer.mkdir()
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", layer], check=True)
    (layer / "upper").mkdir()
    (layer / "work").mkdir()
    options = f"lowerdir=/,upperdir={layer}/upper,workdir={layer}/work"
    booted = None
    try:
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
        (root / "etc/machine-id").write_text("0" * 31 + "1\n")
        shutil.copytree(build_wheel(folder), root / "opt/wheel")
        with (folder / "console.log").open("wb") as console:
            booted = subprocess.Popen(
                boot(root),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                # As today's systems boot, and with nothing in the way of their device policy.
                env=os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_SECCOMP": "0"},
            )
        machine = Machine(root, leader_of(booted), folder / "record.txt")
        machine.until(
            lambda: "running" in machine.run("systemctl is-system-running", check=False, note=False),
            "the boot",
        )
        yield machine
        print(machine.record.read_text())
        machine.run("systemctl poweroff --force --force", check=False)
        booted.wait(30)
    finally:
        if booted is not None and booted.poll() is None:
            booted.kill()
            booted.wait()
        # Lazily: the last processes of the machine may still be ending.
        subprocess.run(["umount", "--lazy", root, layer], check=False)


def build_wheel(folder: Path) -> Path:
    """Build it from a copy: what an earlier build left in the checkout must not get in."""
    source, wheels = folder / "source", folder / "wheels"
    source.mkdir()
    for name in PACKAGED:
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, source]
    subprocess.run(pip, check=True)
    return wheels


def boot(root: Path) -> list[str]:
    return [
        *("systemd-nspawn", "--quiet", "--directory", str(root), "--register=no", "--keep-unit"),
        *("--private-network", "--link-journal=no", "--console=pipe"),
        "--capability=all",  # as on a real machine
        f"--bind-ro={sys.base_prefix}:/opt/python",
        f"--bind-ro={sysconfig.get_path('purelib')}:/opt/libraries",
        *("--boot", "systemd.unit=basic.target"),
    ]


def leader_of(nspawn: "subprocess.Popen[bytes]") -> int:
    """Give the process that is number 1 in there, once there is one."""
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and nspawn.poll() is None:
        for child in children.read_text().split():
            inside = Path(f"/proc/{child}/status").read_text()
            if "\nNSpid:" in inside and inside.split("\nNSpid:")[1].splitlines()[0].split()[-1] == "1":
                return int(child)
        time.sleep(0.1)
    raise AssertionError("systemd-nspawn did not boot")


def reason_not_to_boot() -> str | None:
    if os.environ.get("BOOT_SYSTEMD") != "1":
        return "boots a machine: set BOOT_SYSTEMD=1 to have it (docs/operations.md)"
    if os.geteuid() != 0:
        return "only root can boot a machine"
    missing = [name for name in ("systemd-nspawn", "nsenter") if shutil.which(name) is None]
    return f"{', '.join(missing)} is not here: apt-get install systemd-container" if missing else None
