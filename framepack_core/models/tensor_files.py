"""Reads single tensors from safetensors files."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from framepack_core.errors import ModelError
from framepack_core.models.headers import Tensor


class TensorFiles(ExitStack):
    """Files that stay open inside the block, while tensors are read from them."""

    def __init__(self) -> None:
        """Begin without open files."""
        super().__init__()
        self._opened = dict[Path, Any]()

    def read(self, file: Path, key: str) -> torch.Tensor:
        """Map a tensor as it is stored: the kernel can drop its pages.

        Raises:
            ModelError: the file cannot be read, or has no such key.
        """
        try:
            if file not in self._opened:
                self._opened[file] = self.enter_context(safe_open(file, framework="pt"))
            tensor: torch.Tensor = self._opened[file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read ({error}): get it again") from error
        return tensor

    def weight(self, stored: Tensor) -> torch.Tensor:
        """Read a weight: multiplied by its scale, in float32, if it has one, else as it is stored.

        Raises:
            ModelError: its file cannot be read.
        """
        tensor = self.read(stored.file, stored.key)
        if stored.scale is None:
            return tensor
        scale = self.read(stored.scale.file, stored.scale.key).float()  # one number, or one a row
        return tensor.float() * scale.reshape(-1, *[1] * (tensor.dim() - 1))
