"""Streams weights to the GPU layer by layer: while one computes, the weights of the next are fetched.

The GPU holds two slots for a layer each, and as many layers as fit stay there while the module is used. A
layer's weights are contiguous in host memory, so that one copy fetches them. Copies run in their own stream
and are ordered by events: a copy waits until its slot is free, computing waits for the copy. The host waits
for neither, and however far it runs ahead, the slots are all the memory that is taken.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from framepack_core.memory.footprint import SLOTS
from framepack_core.memory.page_locked import page_locked

ALIGNMENT = 256  # bytes, as torch aligns its own tensors
PIECE = 2 << 20  # bytes; the allocator rounds large tensors up to multiples of this


class Streamer:
    """Fetches the weights of layers when they are called: always all of them, in the same order."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, *, lock: bool) -> None:
        """Take layers in host memory.

        Args:
            layers: in the order of their calls; no two share a tensor.
            device: where they compute; on the CPU nothing is fetched.
            lock: whether to move their weights to page-locked memory, from which copies are faster.
        """
        self._device = device
        self._weights = [_Weights.of(layer) for layer in layers]
        self._visit: _Visit | None = None
        if device.type != "cuda":
            return
        if lock:
            for weights in self._weights:
                if not weights.lock(device):
                    break  # the kernel allows no more page-locked memory
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._begin, number))
            layer.register_forward_hook(partial(self._end, number))

    def home(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Give the host memory that a layer's parameter or buffer is fetched from; None for other tensors."""
        homes = (zip(weights.tensors, weights.homes, strict=True) for weights in self._weights)
        return next((home for pairs in homes for own, home in pairs if own is tensor), None)

    @contextmanager
    def on_device(self, room: int = 0) -> Iterator[None]:
        """Stream the layers inside the block; ``room``: bytes on the GPU for layers that stay."""
        if self._device.type != "cuda":
            yield
            return
        visit = self._visit = _Visit(self._weights, self._device, room)
        try:
            yield
        finally:
            self._visit = None
            visit.end()

    def _begin(self, number: int, *_: Any) -> None:
        if self._visit is not None:
            self._visit.begin_layer(number)

    def _end(self, number: int, *_: Any) -> None:
        if self._visit is not None:
            self._visit.end_layer(number)


@dataclass
class _Weights:
    """A layer's parameters and buffers, and their offsets in contiguous memory."""

    tensors: list[torch.Tensor]
    homes: list[torch.Tensor]  # in host memory: the tensors' data while the layer does not compute
    offsets: list[int]  # bytes
    size: int  # bytes, of all of them
    locked: torch.Tensor | None = None  # (size,), uint8, page-locked memory that holds the homes

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        tensors = list({id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}.values())
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tensors, [tensor.data for tensor in tensors], offsets, end)

    def lock(self, device: torch.device) -> bool:
        """Move the homes to page-locked memory; return False and change nothing if there is none."""
        memory = page_locked(self.size, device)
        if memory is None:
            return False
        self.copy_to(memory)
        self.homes, self.locked = self.views(memory), memory
        self.use(self.homes)
        return True

    def copy_to(self, memory: torch.Tensor) -> None:
        for place, home in zip(self.views(memory), self.homes, strict=True):
            place.copy_(home)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """View memory (size,), uint8, as the tensors of the layer."""
        return [
            memory[offset : offset + home.nbytes].view(home.dtype).view(home.shape)
            for home, offset in zip(self.homes, self.offsets, strict=True)
        ]

    def use(self, places: Sequence[torch.Tensor]) -> None:
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place


class _Slot:
    """Memory on the GPU for a layer's weights, and the events that copies and computing wait for."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.copied, self.left = _event(), _event()
        self.views = dict[int, list[torch.Tensor]]()  # by layer


class _Staging:
    """Page-locked host memory through which other weights pass on their way to the GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        locked = page_locked(size, device)
        self.memory = torch.empty(size, dtype=torch.uint8) if locked is None else locked
        self.read = _event()


@dataclass
class _Visit:
    """The layers while they are used on the GPU: which are there, and which comes next."""

    weights: Sequence[_Weights]
    device: torch.device
    room: int
    slots: dict[int, _Slot] = field(default_factory=dict)  # by layer: fetched, or being fetched
    done: int = 0  # calls of layers
    fetched: int = 0  # calls whose weights are fetched, or being fetched

    def __post_init__(self) -> None:
        sizes = [weights.size for weights in self.weights]
        stay = choose_staying(sizes, self.room)
        largest = max((size for number, size in enumerate(sizes) if number not in stay), default=0)
        staged = max((weights.size for weights in self.weights if weights.locked is None), default=0)
        # Never inference tensors: torch would compile the blocks again for another kind of tensor.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._staying = {number: _Slot(sizes[number], self.device) for number in stay}
            self._free = deque(_Slot(largest, self.device) for _ in range(SLOTS if largest else 0))
            self._stagings = deque(_Staging(staged, self.device) for _ in range(SLOTS if staged else 0))
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call] # torch's
        # Earlier work on the GPU may still use the memory that the slots have been given.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._fetch_ahead()

    def begin_layer(self, number: int) -> None:
        """Point a layer that is called now to its weights on the GPU."""
        if number != self.done % len(self.weights):
            raise RuntimeError(f"layer {number} was called where {self.done % len(self.weights)} comes next")
        slot, weights = self.slots[number], self.weights[number]
        torch.cuda.current_stream(self.device).wait_event(slot.copied)
        if number not in slot.views:
            slot.views[number] = weights.views(slot.memory)
        weights.use(slot.views[number])

    def end_layer(self, number: int) -> None:
        """Free the slot of a layer whose work is queued on the GPU, and fetch the next."""
        self.weights[number].use(self.weights[number].homes)
        if number not in self._staying:
            slot = self.slots.pop(number)
            slot.left.record(torch.cuda.current_stream(self.device))
            self._free.append(slot)
        self.done += 1
        self._fetch_ahead()

    def end(self) -> None:
        """Point all layers to host memory again, and wait for the copies."""
        for weights in self.weights:
            weights.use(weights.homes)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._stream.synchronize()  # the next writer to the homes must not disturb a copy

    def _fetch_ahead(self) -> None:
        """Fetch the weights of the next calls, while slots are free."""
        count = len(self.weights)
        while self.fetched < self.done + count:
            number = self.fetched % count
            if number not in self.slots:
                if number not in self._staying and not self._free:
                    return
                self.slots[number] = self._staying.get(number) or self._free.popleft()
                self._fetch(self.weights[number], self.slots[number])
            self.fetched += 1

    def _fetch(self, weights: _Weights, slot: _Slot) -> None:
        source, staging = weights.locked, None
        if source is None:
            staging = self._stagings.popleft()
            self._stagings.append(staging)
            staging.read.synchronize()
            weights.copy_to(staging.memory)
            source = staging.memory
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.left)
            slot.memory[: weights.size].copy_(source[: weights.size], non_blocking=True)
            slot.copied.record(self._stream)
            if staging is not None:
                staging.read.record(self._stream)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's


def choose_staying(sizes: Sequence[int], room: int) -> list[int]:
    """Choose the layers that stay: as many as ``room`` bytes hold, spread evenly.

    Evenly spread, the copies of the others overlap best with computing.

    >>> choose_staying([100 << 20] * 6, 300 << 20)
    [1, 3, 5]
    """
    total = len(sizes)
    for count in range(total, 0, -1):
        chosen = [n for n in range(total) if (n + 1) * count // total > n * count // total]
        if sum(-(-sizes[n] // PIECE) * PIECE for n in chosen) <= room:
            return chosen
    return []
