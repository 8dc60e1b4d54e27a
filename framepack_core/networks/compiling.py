"""Decides whether to compile the transformer's blocks, and compiles them."""

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
from framepack_core.memory.footprint import Precision

log = logging.getLogger(__name__)

WORTH_SECTIONS = 3  # compiling takes half a minute the first time, too much for fewer sections

LEAST = (7, 0)  # compute capability that Triton needs ...
LEAST_BFLOAT16 = (8, 0)  # ... and for bfloat16

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Code that was compiled for another card or driver; the CUDA context is still usable.
_NOT_LOADED = re.compile(
    r"Triton Error \[CUDA\]: .*(kernel image|PTX|ptx|toolchain|invalid (source|device function))"
)
_COMPILER_ERROR = re.compile(r"(fatal )?error: .+")
LONGEST_REASON = 200  # characters


def decide(
    wanted: bool | Literal["auto"],
    device: torch.device,
    sections: int,
    *,
    dtype: torch.dtype,
    precision: Precision = "exact",
    failed: str | None = None,
) -> bool:
    """Decide whether compiled blocks make a video.

    Args:
        wanted: the setting ``compile`` of the configuration.
        device: where the blocks compute.
        sections: of the video.
        dtype: of the blocks.
        precision: of their weights.
        failed: why compiling failed under the same :func:`conditions`; None if it did not.

    Raises:
        ModelError: ``wanted`` is true, and something that compiling needs is missing.
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
        warn_once(f"not compiled, which is slower: compiling {f'needs {lacking}' if lacking else failed}")
    return not lacking and not failed


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, once in the life of the process."""
    log.warning("%s", text)


def missing(device: torch.device, dtype: torch.dtype, precision: Precision = "exact") -> str | None:
    """Name the first thing that compiling needs and that is missing, and the remedy; None if nothing is."""
    if precision == "nf4":
        return 'weights that are not nf4: set precision = "fp8" or "exact"'
    if device.type == "cuda" and (lacking := _missing_on_card(device, dtype)):
        return lacking
    # On a GPU Triton builds a helper in C; on the CPU the blocks themselves become C++.
    own, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    compilers = (os.environ[own],) if os.environ.get(own) else usual
    if not any(map(shutil.which, compilers)):
        return f"a compiler ({' or '.join(compilers)}): install gcc and g++" + (
            f", or correct {own} in the environment" if own in os.environ else ""
        )
    # The folder that Triton and Inductor search: Debian's posix_local has no headers.
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
    """Search for the driver's library in the folders from which Triton links it."""
    folders = (os.environ.get(name, "") for name in ("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"))
    named = (Path(folder, "libcuda.so.1") for path in folders for folder in path.split(":") if folder)
    return find_library("cuda") is not None or any(file.exists() for file in named)


def conditions(device: torch.device, dtype: torch.dtype, precision: Precision, attention: str) -> str:
    """Name everything on which the success of compiling depends; if it changes, compiling is tried again."""
    try:
        triton = version("triton")
    except PackageNotFoundError:  # torch for the CPU comes without it
        triton = "none"
    versions = f"driver {devices.driver_version()}|torch {torch.__version__}|triton {triton}"
    return f"{devices.device_name(device)}|{versions}|{str(dtype)[6:]}|{precision}|{attention}"


class CompiledBlocks:
    """Switches blocks between eager and compiled; hooks that are added later are not compiled.

    Compiled blocks raise a CompileError if compiling fails, possibly in the middle of a step.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        """Add the switch to blocks; each is compiled at its first call while ``on`` is true."""
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
                    # For all sizes and lengths at once: otherwise each new prompt would compile again.
                    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
                return compiled(*arguments)
            except Exception as error:  # compilers raise the errors of many libraries
                _raise_others(error)
                log.debug("compiling failed", exc_info=True)
                reason = _reason(error)
            raise CompileError(reason)  # outside of the handler: the cause would keep tensors alive

        return forward


def _raise_others(error: BaseException) -> None:
    """Raise the cause of an error if it is not the compiler but memory, the device, or the disk."""
    for cause in _causes(error):
        if getattr(cause, "errno", None) in _FULL:
            raise cause
        if judge(cause) is not Verdict.NOTHING and not _NOT_LOADED.search(str(cause)):
            raise cause
    if os.strerror(errno.ENOSPC) in str(error):  # in the output of a compiler
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.environ.get("TORCHINDUCTOR_CACHE_DIR"))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and its causes, the first cause first; PyTorch keeps one in ``inner_exception``."""
    inner = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    if inner is not None:
        yield from _causes(inner)
    yield error


def _reason(error: BaseException) -> str:
    """Give the compiler's error in one line, or the first cause."""
    first = error
    while (inner := getattr(first, "inner_exception", None) or first.__cause__) is not None:
        first = inner
    said = _COMPILER_ERROR.search(str(first))
    line = said[0] if said else next(iter(str(first).strip().splitlines()), "")
    return f"{type(first).__name__}: {line}"[:LONGEST_REASON]


def set_up(cache: Path) -> None:
    """Keep compiled code in a folder, and make compiled blocks compute as exactly as possible.

    Raises:
        CompileError: this torch cannot compile here.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own_folder(cache))
    try:
        import torch._inductor.config as settings
    except Exception as error:  # such as a triton that does not fit torch
        raise CompileError(_reason(error)) from error

    settings.emulate_precision_casts = True  # rounds to bfloat16 where the eager blocks do
    settings.deterministic = True  # chooses no kernel by timing it: another run might choose another
    settings.compile_threads = 1  # starts no processes, which a killed worker would leave behind


def own_folder(cache: Path) -> Path:
    """Make the folder readable for this user alone, because its code is run; else give a temporary one."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if cache.stat().st_uid == os.geteuid():
            cache.chmod(0o700)
            return cache
        reason = "it is another user's"
    except OSError as error:
        reason = str(error.strerror)
    log.warning("%s cannot hold compiled code (%s): each start compiles again", cache, reason)
    return Path(tempfile.mkdtemp(prefix="framepackd-compiled-"))
