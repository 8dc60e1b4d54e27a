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
from typing import Any

import torch

from benchmarks.first_light import Figure, SkippedError

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
        from framepack_core import memory
        from framepack_core.engine import Engine
    except ImportError as error:
        yield Figure("our own packages", f"{type(error).__name__}: {error}", good=False)
        return
    yield Figure(
        "our own packages", memory.describe(memory.choose_device("auto")), says=Engine.__name__, good=True
    )


def _available() -> int:
    told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(told["MemAvailable"].split()[0]) << 10


def page_locked() -> Iterator[Figure]:
    """Stream the model at full shape, drop its engine, and see the host get its memory back."""
    from benchmarks.full_shape import shared
    from benchmarks.placements import Model, release
    from framepack_core.planning import Card

    before = _available()
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder), shared(), torch.device("cpu"))
        model.card = Card.assumed(CARD_GB)
        model.engine.prepare(model.video)
        rung = model.rung.text
        model.section()
        used = _locked()
        during = _available()
        del model
    release()
    kept, after = _locked(), _available()
    yield Figure("page-locked while it is streamed", used / 2**30, "GiB", says=rung, good=used > 0)
    yield Figure(
        "page-locked after the engine is dropped", kept / 2**30, "GiB", good=kept <= (1 - GIVEN_BACK) * used
    )
    yield Figure("the host's memory that it took", (before - during) / 2**30, "GiB")
    yield Figure(
        "the host's memory that it still takes", (before - after) / 2**30, "GiB", says="with libraries"
    )


def _locked() -> int:
    """Count the bytes that torch has page-locked, with those that it keeps for later."""
    told: dict[str, Any] = torch.cuda.host_memory_stats()
    for name in ("segment_bytes.current", "allocated_bytes.current", "allocated_bytes.all.current"):
        if name in told:
            return int(told[name])
    raise SkippedError(
        f"torch {torch.__version__} does not count page-locked bytes: it counts {sorted(told)}"
    )


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
