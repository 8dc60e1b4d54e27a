"""Carry what first light needs to a machine that no package registry can be reached from.

Where there is a registry: ``python -m benchmarks.first_light.carry pack .first-light`` downloads the wheels
that ``benchmarks/wheels.txt`` names and packs what is in them, without what only a compiler reads, into one
archive: two thirds of their size. On the other machine, in the same tree::

    python3 -m benchmarks.first_light.carry unpack .first-light /tmp/packages
    PYTHONPATH=/tmp/packages python3 -m benchmarks gpu --first-light --out OUT

No pip is needed there, and no package but what comes with Python.
"""

import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

LIST = Path(__file__).parents[1] / "wheels.txt"
ARCHIVE = "packages.tar.xz"
PYTHON = "3.12"
FOR_COMPILERS = (".pyi", ".pyx", ".pxd", ".h", ".c")
# Machine code is made more alike before it is packed, which saves a tenth.
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def wheels() -> Iterator[tuple[str, int]]:
    """Give the wheels of the list, with their bytes."""
    for line in LIST.read_text().splitlines():
        if line and not line.startswith("#"):
            name, size = line.split()
            yield name, int(size)


def pack(folder: Path) -> Path:
    """Download the wheels and pack them; gives the archive."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        here, unpacked = Path(made), Path(made) / "unpacked"
        for name, _ in wheels():
            _download(name, here)
            with zipfile.ZipFile(here / name) as wheel:
                wheel.extractall(unpacked)  # noqa: S202 # zipfile leaves out ..
        archive = folder / ARCHIVE
        with (
            lzma.open(archive, "wb", filters=FILTERS) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for file in sorted(unpacked.rglob("*")):
                if file.is_file() and file.suffix not in FOR_COMPILERS:
                    tar.add(file, file.relative_to(unpacked))
    return archive


def _download(name: str, folder: Path) -> None:
    project, version, _, _, platforms = name.removesuffix(".whl").split("-")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", PYTHON, "--dest", str(folder)]
    for platform in platforms.split("."):
        command += ["--platform", platform]
    subprocess.run([*command, f"{project}=={version}"], check=True)  # noqa: S603 # what the list names


def unpack(folder: Path, target: Path) -> None:
    """Unpack the archive, for PYTHONPATH."""
    with lzma.open(folder / ARCHIVE) as packed, tarfile.open(fileobj=packed) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none yet
        tar.extractall(target)  # noqa: S202 - ours


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pack", folder]:
            archive = pack(Path(folder))
            print(f"{archive}: {archive.stat().st_size} bytes")
        case ["unpack", folder, target]:
            unpack(Path(folder), Path(target))
        case _:
            sys.exit(__doc__)
