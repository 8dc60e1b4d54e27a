"""A small disk of its own, which can lose its power, fill up and fail; needs root and a loop device."""

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.crash.victim import EXT4_IOC_SHUTDOWN, GOINGDOWN_NOLOGFLUSH

MEBIBYTE = 1 << 20
_CLONE_NEWNS = 0x00020000
# Nothing is to become durable by itself: no flush on rename, no commit of the journal every five seconds.
EXT4_OPTIONS = "loop,noauto_da_alloc,commit=600,errors=remount-ro"


class Disk:
    """A file system in a file, mounted."""

    def __init__(self, folder: Path, kind: str = "ext4", mebibytes: int = 2048, options: str = "") -> None:
        self.image, self.root, self.kind = folder / f"{kind}.img", folder / "mount", kind
        self._options = ",".join(filter(None, [EXT4_OPTIONS if kind == "ext4" else "loop", options]))
        self.root.mkdir(parents=True)
        with self.image.open("wb") as file:
            file.truncate(mebibytes * MEBIBYTE)
        _run(f"mkfs.{kind}", "-q", str(self.image))
        _leave_for_mounts_of_our_own()
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", self._options, str(self.image), str(self.root))
        assert os.path.ismount(self.root)

    def unmount(self) -> None:
        """Take it away; what is not durable by then is written, unless the power went before."""
        deadline = time.monotonic() + 20
        while (
            done := subprocess.run(["umount", str(self.root)], capture_output=True, text=True, check=False)
        ).returncode:
            assert time.monotonic() < deadline, done.stderr  # somebody still holds a file
            time.sleep(0.1)
        assert not os.path.ismount(self.root)

    def again(self) -> None:
        """Take it away and put it back, which also mends what can be mended."""
        self.unmount()
        if self.kind == "ext4":
            # 1: errors were mended; as a machine does when it boots.
            checked = subprocess.run(["e2fsck", "-p", str(self.image)], capture_output=True, check=False)
            assert checked.returncode in (0, 1), checked.stdout
        self.mount()

    def sync(self) -> None:
        """Make all of it durable, and of no other disk: another harness may be at work there."""
        _run("sync", "-f", str(self.root))

    def cut_power(self, mode: int = GOINGDOWN_NOLOGFLUSH) -> None:
        """Drop what is not durable and fail every access from now on, until ``again``."""
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", mode))
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have every write wait without end, as on a share whose server is gone."""
        _run("fsfreeze", "--freeze", str(self.root))
        try:
            yield
        finally:
            _run("fsfreeze", "--unfreeze", str(self.root))

    def turn_read_only(self) -> None:
        """Do what ext4 does when it finds itself damaged; mounted with ``errors=remount-ro``."""
        device = _run("findmnt", "-no", "SOURCE", str(self.root)).strip()
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("1")

    def fill(self) -> Path:
        """Use up all that is free; removing the file that this gives frees it again."""
        ballast = self.root / "ballast"
        descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        size = 0
        for piece in (64 * MEBIBYTE, MEBIBYTE, 4096):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(descriptor, size, piece)  # takes the blocks and writes none
                    size += piece
        os.close(descriptor)
        return ballast


def unusable(kind: str = "ext4") -> str | None:
    """Say why there can be no disk here; None if there can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    if shutil.which(f"mkfs.{kind}") is None:
        return f"mkfs.{kind} is not installed"
    return None


def _leave_for_mounts_of_our_own() -> None:
    """Hide our mounts: a container that is started meanwhile would get copies, and keep them in use."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no mount namespace of our own")
    _run("mount", "--make-rprivate", "/")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
