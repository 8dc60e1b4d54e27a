"""Allocates page-locked host memory, from which a GPU copies without the host."""

import logging
import mmap
from contextlib import suppress

import torch

log = logging.getLogger(__name__)


class _Region(mmap.mmap):
    """A memory mapping that is unregistered from CUDA before it is freed."""

    registered_at = 0

    def __del__(self) -> None:
        if self.registered_at:
            torch.cuda.cudart().cudaHostUnregister(self.registered_at)  # type: ignore[no-untyped-call] # torch's


def page_locked(size: int, device: torch.device) -> torch.Tensor | None:
    """Allocate ``size`` bytes of page-locked memory, (size,), uint8; None if the kernel does not allow it.

    It is freed with the last tensor that views it. torch's own page-locked memory comes in powers of two,
    which would waste a seventh with the published model's blocks, and torch caches it instead of freeing it.
    """
    region = _Region(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    failure = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)  # type: ignore[no-untyped-call] # torch's
    if int(failure) == 0:
        region.registered_at = memory.data_ptr()
        return memory
    with suppress(RuntimeError):  # CUDA reports the failure again at the next kernel: let it be this one
        torch.zeros(1, device=device)
    log.warning(
        "%d MiB of memory cannot be page-locked (CUDA error %d): weights are copied to the GPU slower",
        size >> 20,
        int(failure),
    )
    return None
