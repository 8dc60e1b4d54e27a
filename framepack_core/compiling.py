"""The blocks compiled: the many small operations between the large ones become a few."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from framepack_core.errors import ModelError

log = logging.getLogger(__name__)

WORTH_SECTIONS = 3  # compiling takes half a minute the first time: of fewer sections it would be a large part


def decide(wanted: bool | Literal["auto"], device: torch.device, sections: int, *, exact: bool) -> bool:
    """Say whether a video of so many sections is made by compiled blocks; ``exact``: of unreduced weights.

    Raises:
        ModelError: it is wanted and cannot be.
    """
    missing = _missing(device) if exact else "weights as they were published"
    if wanted is True and missing:
        raise ModelError(f'compile = true needs {missing}: set compile = "auto", or provide it')
    worth = device.type == "cuda" and sections >= WORTH_SECTIONS
    return not missing and (wanted is True or (wanted == "auto" and worth))


def _missing(device: torch.device) -> str | None:
    if device.type == "cuda" and find_spec("triton") is None:
        return "triton"
    compilers = (os.environ.get("CC"), os.environ.get("CXX"), "gcc", "g++", "clang", "clang++")
    return None if any(shutil.which(name) for name in compilers if name) else "a C++ compiler (g++)"


class CompiledBlocks:
    """A switch between blocks as they are and compiled; hooks put on them later stay outside."""

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
            if compiled is None:
                # For all sizes and lengths at once: else each new prompt would be waited for.
                compiled = torch.compile(eager, fullgraph=True, dynamic=True)
            return compiled(*arguments)

        return forward


def set_up(cache: Path) -> None:
    """Have what is compiled kept in a folder, and compute as near to the blocks as they are as can be."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_own_folder(cache))
    import torch._inductor.config as settings

    settings.emulate_precision_casts = True  # bfloat16 is rounded where the blocks as they are round it
    settings.deterministic = True  # nothing is chosen by timing it, which would be another choice tomorrow
    settings.compile_threads = 1  # no processes of its own, which a killed worker would leave behind


def _own_folder(cache: Path) -> Path:
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
