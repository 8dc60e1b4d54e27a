"""Rows of first light about the machine: what is installed, what it gives back, how it fails."""

import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.first_light import Figure

LIBRARIES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "numpy",
    "pillow",
    "einops",
    "pydantic",
    "av",
    "sqlalchemy",
    "bitsandbytes",
)
CARD_GB = 8  # of a card whose plan streams: what it locks is looked at
GIVEN_BACK = 0.9  # of what was locked
OF_CUDA = 2 << 30  # bytes of the host that CUDA and the libraries keep
WAYS = ("assert", "illegal")


def versions() -> Iterator[Figure]:
    """Tell what is here, and that our own packages can be imported."""
    yield Figure("python", f"{platform.python_version()}, {platform.platform()}")
    for name in LIBRARIES:
        try:
            yield Figure(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Figure(name, "not installed")
    here, cudnn = torch.cuda.is_available(), getattr(torch.backends.cudnn, "version")  # noqa: B009 # untyped
    yield Figure("CUDA", f"built for {torch.version.cuda}, {'there' if here else 'not there'}")
    if here:
        properties = torch.cuda.get_device_properties(0)
        yield Figure("memory of the card", properties.total_memory / 2**30, "GiB")
        yield Figure("cuDNN", str(cudnn()))
        yield Figure("generations torch is built for", " ".join(torch.cuda.get_arch_list()))
    yield Figure("memory of the host", _available() / 2**30, "GiB", says="available")
    yield Figure("C compiler", shutil.which("gcc") or shutil.which("cc") or "none", says="for compile")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    yield Figure("Python.h", str(header) if header.exists() else "none", says="for compile")
    try:
        from framepack_core.engine import Engine
        from framepack_core.memory import devices
    except ImportError as error:
        yield Figure("our own packages", f"{type(error).__name__}: {error}", good=False)
        return
    yield Figure(
        "our own packages", devices.describe(devices.choose_device("auto")), says=Engine.__name__, good=True
    )


def _available() -> int:
    told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(told["MemAvailable"].split()[0]) << 10


def page_locked() -> Iterator[Figure]:
    """Stream the model at full shape, drop its engine, and see the host get its memory back."""
    from benchmarks.full_shape import SMALL, shared
    from benchmarks.placements import Model, release
    from framepack_core.memory.planning import Card

    with tempfile.TemporaryDirectory() as folder:
        before = _private()
        model = Model(Path(folder), shared(), torch.device("cpu"))
        made = _private()
        model.card = Card.assumed(CARD_GB)
        model.engine.prepare(model.video)
        model.engine.take_level(len(model.engine.levels) - 1)
        level = model.level.text
        model.section()
        locked = next(model.engine.core.blocks.parameters()).is_pinned()
        during = _private()
        del model
    release()
    after = _private()
    taken, kept = during - made, max(after - before, 0)
    yield Figure("blocks lie in page-locked memory", str(locked), says=level, good=locked)
    yield Figure("the host's memory that they take", taken / 2**30, "GiB", says="with CUDA's own")
    gone = None if SMALL else kept <= (1 - GIVEN_BACK) * taken + OF_CUDA
    yield Figure("what is still taken when the engine is dropped", kept / 2**30, "GiB", good=gone)


def _private() -> int:
    """Count this process's memory that nothing can take away, in bytes."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0]) << 10


def broken_context() -> Iterator[Figure]:
    """Break the CUDA context of a process, and see that it is judged so; what comes after in it fails too."""
    for way in WAYS:
        done = subprocess.run(  # noqa: S603 # our own
            [sys.executable, "-m", "benchmarks.first_light.broken", way],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        told = done.stdout.strip().splitlines()
        if not told:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            yield Figure(way, f"ended with exit code {done.returncode}", says=last, good=False)
            continue
        for name, figure in json.loads(told[-1]).items():
            yield Figure(f"{way}: {name}", figure["verdict"], says=figure["error"], good=figure["good"])
