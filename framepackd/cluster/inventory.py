"""Lists the files that a job needs on a node, by name, size and SHA-256; both ends list in the same way."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from framepack_core.request import Lora, Request
from framepackd import files
from framepackd.cluster import names
from framepackd.jobs import aside
from framepackd.worker.messages import Work


@dataclass(frozen=True)
class Entry:
    """A file as it has to be on the node."""

    name: str  # below the work folder, or LORAS/SHA256/NAME
    size: int  # bytes
    sha256: str  # hex


def of_folder(folder: Path) -> dict[Entry, Path]:
    """List what a job's work folder holds that goes to a node; through no symbolic link.

    Of a checkpoint that was given up only the mark is listed: nothing else in it is read again.

    Raises:
        OSError: a file cannot be read.
    """
    return {_entry(name, path): path for name, path in sorted(_walk(folder))}


def of_loras(work: Work) -> dict[Entry, Path]:
    """List the LoRAs of a job, which lie outside its work folder.

    Raises:
        OSError: one cannot be read.
    """
    found: dict[Path, Entry] = {}
    for lora in _loras(work):
        if lora.file not in found:
            sha256 = files.sha256(lora.file)
            name = lora_name(lora.file, sha256)
            found[lora.file] = Entry(name, lora.file.stat().st_size, sha256)
    return {entry: path for path, entry in found.items()}


def lora_name(file: Path, sha256: str) -> str:
    """Name a LoRA on a node: files of one name may have several contents."""
    return f"{names.LORAS}/{sha256}/{file.name}"


def missing(wanted: Mapping[str, Entry], here: Path, loras: Path) -> list[str]:
    """Make a node's folder of a job hold nothing but what is wanted, and name what it lacks.

    Args:
        wanted: what has to be there, by name.
        here: the job's folder; what else it holds is removed.
        loras: the folder for the contents of ``LORAS``; other jobs use it too.

    Raises:
        OSError: a file cannot be read or removed.
    """
    lacking = []
    for parent, _, found in os.walk(here, topdown=False):
        for name in found:
            path = Path(parent, name)
            if path.is_symlink() or path.relative_to(here).as_posix() not in wanted:
                path.unlink()
        if Path(parent) != here and not any(Path(parent).iterdir()):
            Path(parent).rmdir()
    for name, entry in wanted.items():
        path = place_of(name, here, loras)
        if not path.is_file() or _entry(name, path) != entry:
            lacking.append(name)
    return lacking


def forget_oldest(loras: Path, most: int, wanted: Mapping[str, Entry]) -> None:
    """Remove the LoRAs that were used longest ago, until the others have at most so many bytes.

    What is wanted now stays, and is the newest from now on.

    Raises:
        OSError: one cannot be removed.
    """
    used = {place_of(name, loras, loras) for name in wanted if name.startswith(f"{names.LORAS}/")}
    there = sorted(loras.glob("*/*"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in there)
    for path in there:
        if path in used:
            os.utime(path)
        elif total > most:
            total -= path.stat().st_size
            path.unlink()


def place_of(name: str, here: Path, loras: Path) -> Path:
    """Give the path on a node of a file that was checked by :func:`names.check_for_node`."""
    above = f"{names.LORAS}/"
    return loras / name.removeprefix(above) if name.startswith(above) else here / name


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, folders, found in os.walk(folder):
        given_up = aside.is_given_up(Path(parent))
        folders[:] = [] if given_up else folders
        for name in found:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            wanted = names.is_for_node(relative) and not path.is_symlink()
            if wanted and (not given_up or relative.endswith("/given-up")):
                yield relative, path


def _entry(name: str, path: Path) -> Entry:
    return Entry(name, path.stat().st_size, files.sha256(path))


def _loras(work: Work) -> Iterator[Lora]:
    clips: tuple[Request, ...] = work.clips
    for request in clips:
        yield from request.loras
