"""Reads tensors from safetensors files one by one; what is not asked for is not read."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from framepack_core.errors import ModelError
from framepack_core.models.headers import Tensor


class TensorFiles:
    """Files that stay open while tensors are read from them."""

    def __init__(self, stack: ExitStack) -> None:
        """Take what closes the files."""
        self._stack = stack
        self._open = dict[Path, Any]()

    def read(self, file: Path, key: str) -> torch.Tensor:
        """Give a tensor as it is stored, in place: from pages that the kernel can drop.

        Raises:
            ModelError: the file cannot be read, or has no such key.
        """
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            tensor: torch.Tensor = self._open[file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read ({error}): get it again") from error
        return tensor

    def weight(self, stored: Tensor) -> torch.Tensor:
        """Give a weight as it is meant: scaled, in float32, where it has a scale, else as it is stored.

        Raises:
            ModelError: its file cannot be read.
        """
        tensor = self.read(stored.file, stored.key)
        if stored.scale is None:
            return tensor
        scale = self.read(stored.scale.file, stored.scale.key).float()  # one number, or one a row
        return tensor.float() * scale.reshape(-1, *[1] * (tensor.dim() - 1))
