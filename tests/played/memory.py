"""Memory of the played GPU: allocations on the card and in page-locked memory, and their uses.

The card's allocator keeps what is given back: for its own stream at once, for what others were told of by
``record_stream`` when they are done with it. It loses nothing to gaps, which a real one does.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tests.played.cards import GIB
from tests.played.streams import Order, Stream, join

if TYPE_CHECKING:
    from tests.played.gpu import PlayedGpu

CHUNK = 512  # bytes that the card's allocator rounds up to


@dataclass
class Block:
    """The memory of a storage, and the last operations in each stream that use it."""

    nbytes: int
    home: Stream  # in which it was allocated
    phase: str
    on_card: bool
    address: int = 0  # in host memory
    wrote: tuple[str, int] = ("", 0)  # stream and tick of the last that wrote to it
    used: Order = field(default_factory=Order)
    recorded: dict[str, Stream] = field(default_factory=dict)  # told of by record_stream


def watch(storage: Any, gone: Callable[[], None]) -> None:
    weakref.finalize(storage, gone).atexit = False


class CardMemory:
    """What is allocated on the card."""

    def __init__(self, gpu: "PlayedGpu", capacity: int) -> None:
        self.gpu = gpu
        self.capacity = capacity
        self.live = 0  # in tensors
        self.reserved = 0  # and in what the allocator keeps of those that are gone
        self.peak_live = self.peak_held = self.peak_reserved = 0
        self.peaks: dict[str, Counter[str]] = {"live": Counter(), "held": Counter()}  # by phase
        self.drains = 0  # how often the allocator had to wait for streams to be done
        self._given_back: list[tuple[float, int]] = []  # until when another stream needs it, and bytes

    @property
    def held(self) -> int:
        """Bytes that cannot be allocated now: live, or freed while a stream still uses them."""
        self._given_back = [(until, size) for until, size in self._given_back if until > self.gpu.time]
        return self.live + sum(size for _, size in self._given_back)

    def allocate(self, storage: Any, stream: Stream) -> Block:
        """Allocate memory for a storage.

        Raises:
            OutOfMemoryError: there is not enough.
        """
        size = -(-storage.nbytes() // CHUNK) * CHUNK
        if self.held + size > self.capacity:
            self._drain()
        if self.held + size > self.capacity:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / GIB:.3f} GiB. GPU 0 has a total capacity of "
                f"{self.capacity / GIB:.3f} GiB of which {(self.capacity - self.held) / GIB:.3f} GiB is free."
            )
        block = Block(size, stream, self.gpu.phase, on_card=True)
        self.live += size
        held, phase = self.held, self.gpu.phase
        self.reserved = min(max(self.reserved, held), self.capacity)
        self.peak_live, self.peak_held = max(self.peak_live, self.live), max(self.peak_held, held)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.peaks["live"][phase] = max(self.peaks["live"][phase], self.live)
        self.peaks["held"][phase] = max(self.peaks["held"][phase], held)
        return block

    def free(self, block: Block) -> None:
        """Free memory: its own stream may reuse it at once."""
        self.live -= block.nbytes
        safe = block.home.now()
        join(safe, self.gpu.host)
        for name, tick in block.used.items():
            if name not in block.recorded and safe[name] < tick:
                self.gpu.fault(
                    f"memory of {block.home.name}, allocated in {block.phase}, is given back while {name} "
                    "still uses it, without record_stream"
                )
        until = max((stream.until for stream in block.recorded.values()), default=0.0)
        if until > self.gpu.time:
            self._given_back.append((until, block.nbytes))

    def _drain(self) -> None:
        """Wait for streams, as torch's allocator does before it raises."""
        if self._given_back:
            self.drains += 1
            self.gpu.note("allocator waits")
            self.gpu.time = max(until for until, _ in self._given_back)
            self._given_back = []
        self.reserved = self.held

    def empty_cache(self) -> None:
        """Release cached memory to the driver, after waiting for the whole card."""
        if self.reserved > self.live:
            self.gpu.wait_for_all("empty_cache")
            self._drain()

    def reset_peaks(self) -> None:
        self.peak_live, self.peak_held, self.peak_reserved = self.live, self.held, self.reserved


class HostMemory:
    """Page-locked memory: torch's, in powers of two and cached, or the program's own."""

    def __init__(self, gpu: "PlayedGpu") -> None:
        self.gpu = gpu
        self.locked = self.peak_locked = 0  # bytes of torch's, those that it keeps included
        self.registered = self.peak_registered = 0  # bytes of the program's
        self.refuse_to_register: Callable[[int], bool] = lambda size: False
        self._pinned: set[int] = set()  # storages
        self._kept = Counter[int]()  # size -> how many that are not in use
        self._ranges: dict[int, int] = {}  # address -> bytes

    def is_locked(self, body: torch.Tensor) -> bool:
        storage = body.untyped_storage()
        if storage._cdata in self._pinned:
            return True
        if not self._ranges or body.device.type != "cpu":
            return False
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return any(start <= begin and end <= start + size for start, size in self._ranges.items())

    def lock(self, body: torch.Tensor) -> None:
        """Record that a tensor is in torch's page-locked memory."""
        storage: Any = body.untyped_storage()
        key, size = storage._cdata, 1 << max(storage.nbytes() - 1, 1).bit_length()
        if key in self._pinned:
            return
        if self._kept[size]:
            self._kept[size] -= 1
        else:
            self.locked += size
            self.peak_locked = max(self.peak_locked, self.locked)
        self._pinned.add(key)

        def gone() -> None:
            self._pinned.discard(key)
            self._kept[size] += 1

        watch(storage, gone)

    def empty_cache(self) -> None:
        """Release the memory that torch caches."""
        self.locked -= sum(size * count for size, count in self._kept.items())
        self._kept.clear()

    def register(self, address: int, size: int, flags: int) -> int:
        """Page-lock memory of the program; return CUDA's error, 0 for none."""
        if self.refuse_to_register(size):
            return 2  # cudaErrorMemoryAllocation
        if any(start < address + size and address < start + have for start, have in self._ranges.items()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self._ranges[address] = size
        self.registered += size
        self.peak_registered = max(self.peak_registered, self.registered)
        return 0

    def unregister(self, address: int) -> int:
        """Unlock it; gives CUDA's error, 0 for none."""
        size = self._ranges.pop(address, None)
        if size is None:
            return 713  # cudaErrorHostMemoryNotRegistered
        self.registered -= size
        for block in self.gpu.blocks.values():
            busy = [name for name, tick in block.used.items() if self.gpu.host[name] < tick]
            if busy and address <= block.address < address + size:
                self.gpu.fault(f"host memory is unregistered while {busy[0]} still copies")
        return 0
