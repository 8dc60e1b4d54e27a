"""An allocator with a limit, instead of a GPU's: counts the bytes of tensors and refuses more."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LimitedMemory(TorchDispatchMode):
    """Inside the block, results of operations may take ``limit`` bytes; more raises torch's own error."""

    def __init__(self, limit: int = 1 << 60) -> None:
        super().__init__()
        self.limit = limit
        self.peak = 0
        self.refusals = 0
        self._held = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._held += storage.nbytes() - self._live.get(storage._cdata, (None, 0))[1]
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self._held > min(self.peak, self.limit):
            self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
            self._held = sum(size for _, size in self._live.values())
            if self._held > self.limit:
                self.refusals += 1
                raise torch.OutOfMemoryError(f"Tried to hold {self._held} bytes of {self.limit}")
            self.peak = max(self.peak, self._held)
        return results
