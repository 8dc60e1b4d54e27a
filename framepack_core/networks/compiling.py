"""Compiles the transformer's blocks: many small operations become a few."""

import errno
import functools
import logging
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from framepack_core.errors import CompileError, ModelError
from framepack_core.memory import devices
from framepack_core.memory.device_errors import Verdict, judge
from framepack_core.networks.quantization import Precision

log = logging.getLogger(__name__)

WORTH_SECTIONS = 3  # compiling takes half a minute the first time: of fewer sections it would be a large part

LEAST = (7, 0)  # of a card's compute capability, for Triton ...
LEAST_BFLOAT16 = (8, 0)  # ... and for what it makes of bfloat16

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of code that was compiled for another card or driver; the context is as good as before.
_NOT_LOADED = re.compile(
    r"Triton Error \[CUDA\]: .*(kernel image|PTX|ptx|toolchain|invalid (source|device function))"
)
_OF_A_COMPILER = re.compile(r"(fatal )?error: .+")
LONGEST_REASON = 200


def decide(
    wanted: bool | Literal["auto"],
    device: torch.device,
    sections: int,
    *,
    dtype: torch.dtype,
    precision: Precision = "exact",
    failed: str | None = None,
) -> bool:
    """Say whether a video of so many sections is made by compiled blocks.

    Args:
        wanted: as in the configuration.
        device: that computes.
        sections: of the video.
        dtype: of the blocks.
        precision: of their weights.
        failed: why compiling failed under the same :func:`conditions`; None if it did not.

    Raises:
        ModelError: it is wanted and cannot be.
    """
    worth = device.type == "cuda" and sections >= WORTH_SECTIONS
    if wanted is False or (wanted == "auto" and not worth):
        return False
    lacking = missing(device, dtype, precision)
    if wanted is True:
        if lacking:
            raise ModelError(f'compile = true needs {lacking}; or set compile = "auto"')
        return True
    if lacking or failed:
        _tell(f"not compiled, which is slower: compiling {f'needs {lacking}' if lacking else failed}")
    return not lacking and not failed


@functools.cache
def _tell(text: str) -> None:
    """Log something once a process."""
    log.warning("%s", text)


def missing(device: torch.device, dtype: torch.dtype, precision: Precision = "exact") -> str | None:
    """Name the first thing that compiling needs and that is not here, with what to do; None if all is."""
    if precision == "nf4":
        return 'weights that are not nf4: set precision = "fp8" or "exact"'
    if device.type == "cuda" and (lacking := _missing_on_card(device, dtype)):
        return lacking
    # Triton builds a helper in C, whatever the card; blocks on the CPU become C++.
    own, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    compilers = (os.environ[own],) if os.environ.get(own) else usual
    if not any(map(shutil.which, compilers)):
        return f"a compiler ({' or '.join(compilers)}): install gcc and g++" + (
            f", or correct {own} in the environment" if own in os.environ else ""
        )
    # Where Triton and Inductor look: Debian's own place for packages has no headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"])
    if not (headers / "Python.h").is_file():
        return f"Python's headers ({headers}/Python.h): install python3-dev, or python3-devel"
    return None


def _missing_on_card(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "triton: install a torch for CUDA on Linux, which comes with it"
    capability = torch.cuda.get_device_capability(device)
    least = LEAST_BFLOAT16 if dtype == torch.bfloat16 else LEAST
    if capability < least and torch.version.hip is None:
        wanted, own = (".".join(map(str, numbers)) for numbers in (least, capability))
        return f"a card of compute capability {wanted} for {str(dtype)[6:]}, this one has {own}"
    if torch.version.hip is None and not _has_libcuda():
        return "the driver's library (libcuda.so.1): run ldconfig, or name its folder in LD_LIBRARY_PATH"
    return None


def _has_libcuda() -> bool:
    """Look for the driver's library where Triton does, which links with it."""
    folders = (os.environ.get(name, "") for name in ("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"))
    named = (Path(folder, "libcuda.so.1") for path in folders for folder in path.split(":") if folder)
    return find_library("cuda") is not None or any(file.exists() for file in named)


def conditions(device: torch.device, dtype: torch.dtype, precision: Precision, attention: str) -> str:
    """Name what it depends on whether compiling works: with others it is worth another try."""
    try:
        triton = version("triton")
    except PackageNotFoundError:  # on the CPU, say
        triton = "none"
    versions = f"driver {devices.driver_version()}|torch {torch.__version__}|triton {triton}"
    return f"{devices.device_name(device)}|{versions}|{str(dtype)[6:]}|{precision}|{attention}"


class CompiledBlocks:
    """A switch between blocks as they are and compiled; hooks put on them later stay outside.

    Compiled blocks raise a CompileError where compiling fails: then a step may be half computed by them.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        """Put the switch into blocks; nothing is compiled before it is needed."""
        self.on = False
        for block in blocks:
            block.forward = self._switched(block.forward)

    def _switched(self, eager: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] | None = None

        def forward(*arguments: Any) -> Any:
            nonlocal compiled
            if not self.on:
                return eager(*arguments)
            try:
                if compiled is None:
                    # For all sizes and lengths at once: else each new prompt would be waited for.
                    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
                return compiled(*arguments)
            except Exception as error:  # compilers fail with errors of many libraries
                _raise_others(error)
                log.debug("compiling failed", exc_info=True)
                reason = _reason(error)
            raise CompileError(reason)  # out here without its cause, which holds on to tensors

        return forward


def _raise_others(error: BaseException) -> None:
    """Raise what went wrong if it was not the compiling: memory, the device, or the disk."""
    for cause in _causes(error):
        if getattr(cause, "errno", None) in _FULL:
            raise cause
        if judge(cause) is not Verdict.NOTHING and not _NOT_LOADED.search(str(cause)):
            raise cause
    if os.strerror(errno.ENOSPC) in str(error):  # said by a compiler
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.environ.get("TORCHINDUCTOR_CACHE_DIR"))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give what led to an error, the first of it first; PyTorch keeps it in an attribute of its own."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    if inner is not None:
        yield from _causes(inner)
    yield error


def _reason(error: BaseException) -> str:
    """Say in a line what a compiler said, or what else went wrong first."""
    first = error
    while (inner := getattr(first, "inner_exception", None) or first.__cause__) is not None:
        first = inner
    said = _OF_A_COMPILER.search(str(first))
    line = said[0] if said else next(iter(str(first).strip().splitlines()), "")
    return f"{type(first).__name__}: {line}"[:LONGEST_REASON]


def set_up(cache: Path) -> None:
    """Have what is compiled kept in a folder, and compute as near to the blocks as they are as can be.

    Raises:
        CompileError: this torch cannot compile here.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own_folder(cache))
    try:
        import torch._inductor.config as settings
    except Exception as error:  # of a triton that does not fit torch, say
        raise CompileError(_reason(error)) from error

    settings.emulate_precision_casts = True  # bfloat16 is rounded where the blocks as they are round it
    settings.deterministic = True  # nothing is chosen by timing it, which would be another choice tomorrow
    settings.compile_threads = 1  # no processes of its own, which a killed worker would leave behind


def own_folder(cache: Path) -> Path:
    """Make the folder, for this user alone: what lies in it is run. Where that cannot be, give a new one."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if cache.stat().st_uid == os.geteuid():
            cache.chmod(0o700)
            return cache
        reason = "it is another user's"
    except OSError as error:
        reason = str(error.strerror)
    log.warning("%s cannot hold what is compiled (%s): it is compiled again after each start", cache, reason)
    return Path(tempfile.mkdtemp(prefix="framepackd-compiled-"))
