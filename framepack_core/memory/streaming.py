"""Streams weights to the GPU block by block: while one computes, those of the next are fetched.

On the GPU are two slots that hold a layer each, and as many layers as there is room for that stay while the
module is used. A layer's weights lie side by side in host memory, so that one copy fetches them. The copies
have a stream of their own, and what must not be overtaken is told to the GPU by events: a copy waits until
its slot is free, computing waits for the copy. The host waits for neither. However far it runs ahead, the
slots are all the memory that is taken.
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

ALIGNMENT = 256  # bytes; torch's own tensors are aligned so
PIECE = 2 << 20  # bytes, of which the allocator makes what is large


class Streamer:
    """Has layers fetch their weights when they are called: always in the same order, none left out."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, *, lock: bool) -> None:
        """Take layers in host memory.

        Args:
            layers: no two share a tensor.
            device: where they compute; the CPU has nothing to fetch.
            lock: move their weights to page-locked memory, from which they are fetched faster.
        """
        self._device = device
        self._weights = [_Weights.of(layer) for layer in layers]
        self._visit: _Visit | None = None
        if device.type != "cuda":
            return
        if lock:
            for weights in self._weights:
                if not weights.lock(device):
                    break  # the kernel allows no more
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._begin, number))
            layer.register_forward_hook(partial(self._end, number))

    def home(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Give what a layer's parameter or buffer is fetched from, in host memory; None for any other."""
        homes = (zip(weights.tensors, weights.homes, strict=True) for weights in self._weights)
        return next((home for pairs in homes for own, home in pairs if own is tensor), None)

    @contextmanager
    def on_device(self, room: int = 0) -> Iterator[None]:
        """Have layers fetch their weights inside the block; ``room``: bytes on the GPU for some that stay."""
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
    """A layer's parameters and buffers, and where each lies if they lie side by side."""

    tensors: list[torch.Tensor]
    homes: list[torch.Tensor]  # in host memory; what the tensors hold when the layer does not compute
    offsets: list[int]
    size: int  # bytes, of all
    locked: torch.Tensor | None = None  # (size,), uint8, page-locked: the homes lie in it

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        tensors = list({id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}.values())
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tensors, [tensor.data for tensor in tensors], offsets, end)

    def lock(self, device: torch.device) -> bool:
        """Move the homes to page-locked memory; False, and nothing is changed, if there is none."""
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
        """Look at memory (size,), uint8, as the tensors that lie there."""
        return [
            memory[offset : offset + home.nbytes].view(home.dtype).view(home.shape)
            for home, offset in zip(self.homes, self.offsets, strict=True)
        ]

    def use(self, places: Sequence[torch.Tensor]) -> None:
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place


class _Place:
    """Memory on the GPU that holds a layer's weights, and what copies and computing wait for."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.copied, self.left = _event(), _event()
        self.views = dict[int, list[torch.Tensor]]()  # by layer


class _Staging:
    """Host memory on the way of weights that do not lie in page-locked memory themselves."""

    def __init__(self, size: int, device: torch.device) -> None:
        locked = page_locked(size, device)
        self.memory = torch.empty(size, dtype=torch.uint8) if locked is None else locked
        self.read = _event()


@dataclass
class _Visit:
    """Layers are used on the GPU: what of them is there, and what comes next."""

    weights: Sequence[_Weights]
    device: torch.device
    room: int
    places: dict[int, _Place] = field(default_factory=dict)  # by layer: there, or on the way
    done: int = 0  # calls of layers
    fetched: int = 0  # calls that weights were fetched for, or are there for

    def __post_init__(self) -> None:
        sizes = [weights.size for weights in self.weights]
        stay = _evenly(sizes, self.room)
        largest = max((size for number, size in enumerate(sizes) if number not in stay), default=0)
        staged = max((weights.size for weights in self.weights if weights.locked is None), default=0)
        with torch.inference_mode(mode=False), torch.no_grad():  # every visit has the same kind of tensors
            self._staying = {number: _Place(sizes[number], self.device) for number in stay}
            slots = [_Place(largest, self.device) for _ in range(SLOTS if largest else 0)]
            self._stagings = deque(_Staging(staged, self.device) for _ in range(SLOTS if staged else 0))
        self._free = deque(slots)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call] # torch's
        # What was computed before may still use the memory that the places have been given.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._fetch_ahead()

    def begin_layer(self, number: int) -> None:
        """Have a layer, which is called now, compute with weights on the GPU."""
        if number != self.done % len(self.weights):
            raise RuntimeError(f"layer {number} was called where {self.done % len(self.weights)} comes next")
        place, weights = self.places[number], self.weights[number]
        torch.cuda.current_stream(self.device).wait_event(place.copied)
        if number not in place.views:
            place.views[number] = weights.views(place.memory)
        weights.use(place.views[number])

    def end_layer(self, number: int) -> None:
        """Use the slot of a layer, which has been told what to compute, for one to come."""
        self.weights[number].use(self.weights[number].homes)
        if number not in self._staying:
            place = self.places.pop(number)
            place.left.record(torch.cuda.current_stream(self.device))
            self._free.append(place)
        self.done += 1
        self._fetch_ahead()

    def end(self) -> None:
        """Have all weights be in host memory, and nothing on its way."""
        for weights in self.weights:
            weights.use(weights.homes)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._stream.synchronize()  # whoever writes to the homes next must not be overtaken

    def _fetch_ahead(self) -> None:
        """Fetch for the calls that come next, as far as there are places."""
        count = len(self.weights)
        while self.fetched < self.done + count:
            number = self.fetched % count
            if number not in self.places:
                if number not in self._staying and not self._free:
                    return
                self.places[number] = self._staying.get(number) or self._free.popleft()
                self._fetch(self.weights[number], self.places[number])
            self.fetched += 1

    def _fetch(self, weights: _Weights, place: _Place) -> None:
        source, staging = weights.locked, None
        if source is None:
            staging = self._stagings.popleft()
            self._stagings.append(staging)
            staging.read.synchronize()
            weights.copy_to(staging.memory)
            source = staging.memory
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(place.left)
            place.memory[: weights.size].copy_(source[: weights.size], non_blocking=True)
            place.copied.record(self._stream)
            if staging is not None:
                staging.read.record(self._stream)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's


def _evenly(sizes: Sequence[int], room: int) -> list[int]:
    """Choose as many layers to stay as there is room for, evenly among the others: these are hidden best.

    >>> _evenly([100 << 20] * 6, 300 << 20)
    [1, 3, 5]
    """
    total = len(sizes)
    for count in range(total, 0, -1):
        chosen = [n for n in range(total) if (n + 1) * count // total > n * count // total]
        if sum(-(-sizes[n] // PIECE) * PIECE for n in chosen) <= room:
            return chosen
    return []
