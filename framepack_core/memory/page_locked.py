"""Allocates page-locked host memory, from which a GPU copies while the host goes on."""

import logging
import mmap
from contextlib import suppress

import torch

log = logging.getLogger(__name__)


class _Region(mmap.mmap):
    """Memory of our own; the driver forgets it before the kernel gets it back."""

    registered_at = 0

    def __del__(self) -> None:
        if self.registered_at:
            torch.cuda.cudart().cudaHostUnregister(self.registered_at)  # type: ignore[no-untyped-call] # torch's


def page_locked(size: int, device: torch.device) -> torch.Tensor | None:
    """Give so many bytes of page-locked memory, (size,), uint8; None where the kernel does not allow it.

    They are the kernel's again when the last tensor that looks at them is gone. torch's own page-locked
    memory comes in powers of two, which would waste a seventh with the published model's blocks, and is
    kept for the next one who asks.
    """
    region = _Region(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    failure = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)  # type: ignore[no-untyped-call] # torch's
    if int(failure) == 0:
        region.registered_at = memory.data_ptr()
        return memory
    with suppress(RuntimeError):  # CUDA tells of a failure once more, at the next kernel: at this one
        torch.zeros(1, device=device)
    log.warning(
        "%d MiB of memory cannot be page-locked (CUDA error %d): weights come to the GPU slower",
        size >> 20,
        int(failure),
    )
    return None
