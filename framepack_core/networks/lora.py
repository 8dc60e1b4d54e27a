"""Merges LoRAs into the transformer's weights, and restores the model's own weights.

A changed weight is computed from the model's file, of which only that weight is read; nothing is subtracted.
So the result does not depend on what was merged before, and no second copy of the weights is kept.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from framepack_core.errors import RequestError
from framepack_core.memory import devices
from framepack_core.memory.placement import Places
from framepack_core.models import model_files
from framepack_core.models.headers import Tensor
from framepack_core.models.lora_files import Fit, Part, fit_all, sha256
from framepack_core.models.registry import ModelSpec
from framepack_core.models.tensor_files import TensorFiles
from framepack_core.networks import fp8, quantization
from framepack_core.request import Lora

log = logging.getLogger(__name__)


class Merger:
    """Merges LoRAs into the weights of a transformer, and takes them out again."""

    def __init__(self, transformer: nn.Module, spec: ModelSpec, dtype: torch.dtype) -> None:
        """Remember a transformer's layers, before it is split.

        Args:
            transformer: with its own weights.
            spec: names its files.
            dtype: of the weights as they were loaded.
        """
        self._spec, self._dtype = spec, dtype
        self.layers = {name: layer for name, layer in transformer.named_modules() if _has_weight(layer)}
        # A weight that is kept in fp8 is rounded to the loading dtype first, as when it was loaded.
        self._dtypes = {
            name: dtype if isinstance(layer, fp8.Fp8Linear) else layer.weight.dtype
            for name, layer in self.layers.items()
        }
        self._changed = set[str]()  # weights that are not the model's own
        self._merged: tuple[tuple[str, float], ...] | None = ()  # hash and weight; None: failed half way

    def follow(self, blocks: nn.Module) -> None:
        """Find the layers that have replaced the blocks' own, after quantization."""
        self.layers |= {
            name: layer
            for name, layer in blocks.named_modules()
            if name in self.layers and _has_weight(layer)
        }

    @torch.inference_mode(mode=False)  # inference tensors would make torch compile the blocks again
    @torch.no_grad()
    def merge(self, loras: Sequence[Lora], places: Places) -> None:
        """Merge these LoRAs and no others: in float32, rounded once, before weights are quantized.

        Raises:
            RequestError: a file cannot be read, has changed, or does not fit.
            ModelError: the model's files are gone or damaged.
        """
        # Sorted: the sum is rounded, so the order must not depend on the request.
        loras = sorted(map(_identified, loras), key=lambda lora: (str(lora.sha256), lora.weight))
        wanted = tuple((str(lora.sha256), lora.weight) for lora in loras)
        if wanted == self._merged:
            return
        for lora in loras:
            _verify(lora)
        fits = fit_all(loras, self._spec)
        sources = dict[str, list[tuple[Lora, Fit, Part]]]()
        for lora, fit in zip(loras, fits, strict=True):
            log.info("LoRA %s, weight %g: %s", lora.file.name, lora.weight, fit.text)
            for part in fit.parts:
                sources.setdefault(part.weight, []).append((lora, fit, part))
        base = model_files.read_transformer(self._spec).tensors
        self._merged = None
        places.leave(*(self._layer(name) for name in sources.keys() | self._changed))
        with TensorFiles() as files:
            for name in sorted(sources.keys() | self._changed):
                layer, own = self._layer(name), base[name]
                if name not in sources and isinstance(layer, fp8.Fp8Linear):
                    made: Any = fp8.read(files, own, self._dtype)
                else:
                    made = self._value(name, own, sources.get(name, ()), files, places.device)
                self._changed.add(name)
                _write(layer, made, places)
                if name not in sources:
                    self._changed.remove(name)
        devices.release_unused(places.device)  # before the weights are moved there again
        self._merged = wanted

    def _layer(self, name: str) -> Any:
        return self.layers[name.removesuffix(".weight")]

    def _value(
        self,
        name: str,
        own: Tensor,
        sources: Sequence[tuple[Lora, Fit, Part]],
        files: TensorFiles,
        device: torch.device,
    ) -> torch.Tensor:
        """Compute the new value of a weight, before it is quantized; in host memory."""
        value = files.weight(own)
        dtype = self._dtypes[name.removesuffix(".weight")]
        if not sources:
            return value.to(self._dtype).to(dtype)  # the same roundings as when it was loaded
        value = value.to(device, torch.float32, copy=True)
        for lora, fit, part in sources:
            down = files.read(lora.file, part.down).to(device, torch.float32).flatten(1)
            up = files.read(lora.file, part.up).to(device, torch.float32).flatten(1)
            up = up[part.first : part.first + part.rows]
            if part.swapped:
                up = torch.cat(up.chunk(2)[::-1])
            rank = down.shape[0]
            # Through float64: converters also write alpha as an integer.
            alpha = files.read(lora.file, part.alpha).double().item() if part.alpha else fit.alpha
            value += (lora.weight * (rank if alpha is None else alpha) / rank) * (up @ down).view(value.shape)
        merged = value.to(dtype)
        if not merged.isfinite().all():
            names = ", ".join(lora.file.name for lora, *_ in sources)
            raise RequestError(f"LoRA {names} makes numbers in {name} infinite or NaN: get it again")
        return merged.cpu()


def _write(layer: Any, made: Any, places: Places) -> None:
    """Write a weight into a layer, and with fp8 its scales."""
    if isinstance(layer, fp8.Fp8Linear):
        numbers, scale = made if isinstance(made, tuple) else fp8.quantize(made)
        put(layer.weight, numbers, places)
        put(layer.scale, scale, places)
    elif hasattr(layer.weight, "quant_state"):
        layer.weight = quantization.quantize(made)
    else:
        put(layer.weight, made, places)


def put(parameter: nn.Parameter, value: torch.Tensor, places: Places) -> None:
    """Write a value into a parameter, or into the host memory that it is streamed from."""
    home = places.home(parameter)
    if home is not None:
        home.copy_(value)
    else:
        parameter.data = value.to(parameter.dtype)


def _has_weight(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight", None), nn.Parameter)


def _identified(lora: Lora) -> Lora:
    """Give a LoRA with its hash; a hash in the request is checked later, when the file is read."""
    return lora if lora.sha256 else lora.model_copy(update={"sha256": _hash(lora)})


def _verify(lora: Lora) -> None:
    if _hash(lora) != lora.sha256:
        raise RequestError(
            f"LoRA {lora.file} has changed since the job was taken in: put the earlier file back and retry "
            "the job, or drop the job's files again to use this one"
        )


def _hash(lora: Lora) -> str:
    try:
        return sha256(lora.file)
    except OSError as error:
        raise RequestError(
            f"LoRA {lora.file} cannot be read ({error.strerror}): put it back, or leave it out of loras"
        ) from error
