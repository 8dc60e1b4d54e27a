"""What goes over the bus at every step where blocks are streamed: bytes, counted on a device that is none.

A narrow model of full depth runs; each tensor that is fetched counts with its size at full shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers.hooks import apply_group_offloading, group_offloading
from torch import nn

from benchmarks import Row
from benchmarks.transformer import FULL, Pair
from framepack_core import memory
from framepack_core.precision import Precision, reduce
from framepack_core.transformer import take_apart

GPU = torch.device("cuda")


class NoDevice:
    """Stands for torch.cuda: there are streams, and nothing in them takes time."""

    def __init__(self, *_: object) -> None:
        """Be any device."""

    def Stream(self) -> "NoDevice":  # noqa: N802 - as torch calls it
        """Give a stream."""
        return self

    def current_stream(self) -> "NoDevice":
        """Give the stream."""
        return self

    def stream(self, _: object) -> Any:
        """Enter a stream."""
        return nullcontext()

    def synchronize(self) -> None:
        """Wait for nothing."""


@contextmanager
def counted() -> Iterator[list[torch.Tensor]]:
    """Have what diffusers would copy to the device listed instead."""
    fetched: list[torch.Tensor] = []

    def fetch(_: object, tensor: torch.Tensor, source: torch.Tensor, __: object) -> None:
        fetched.append(tensor)
        tensor.data = source

    with (
        mock.patch.object(group_offloading, "TorchDeviceBackend", NoDevice),
        mock.patch.object(group_offloading, "send_to_device", lambda tensors, *_, **__: tensors),
        mock.patch.object(group_offloading.ModuleGroup, "_transfer_tensor_to_device", fetch),
        mock.patch.object(torch.Tensor, "is_pinned", return_value=True),
    ):
        yield fetched


def rows() -> Iterator[Row]:
    """Count a step of ours, and one of diffusers' transformer as it is, both streamed."""
    with torch.no_grad():
        whole = as_it_is()
        for precision in ("exact", "fp8"):
            ours = ours_in(precision)
            name = f"over the bus a step, streamed, {precision}"
            yield Row(name, ours / 1e9, whole / 1e9, "GB", "only blocks travel, each once a step")


def as_it_is() -> float:
    """Count the bytes that a step of diffusers' transformer fetches."""
    pair = Pair((32, 32), 8, 8)
    with counted() as fetched:
        apply_group_offloading(
            pair.transformer,
            GPU,
            offload_type="leaf_level",
            use_stream=True,
            record_stream=True,
            low_cpu_mem_usage=True,
        )
        return _second_call(pair.whole, fetched, pair.transformer, full_shape())


def ours_in(precision: Precision) -> float:
    """Count the bytes that a step of ours fetches."""
    pair = Pair((32, 32), 8, 8)
    step = pair.take_apart()
    core, _ = take_apart(full_shape())
    reduce(core.blocks, precision, torch.bfloat16)
    with counted() as fetched:
        memory.stream_blocks(pair.core.blocks, GPU)
        return _second_call(step, fetched, pair.core.blocks, core.blocks)


def full_shape() -> Any:
    """Give the published transformer, without weights."""
    with torch.device("meta"):
        return HunyuanVideoFramepackTransformer3DModel(**FULL).to(torch.bfloat16)


def _second_call(
    step: Callable[[], None], fetched: list[torch.Tensor], module: nn.Module, full: nn.Module
) -> float:
    names = {id(tensor): name for name, tensor in _tensors(module)}
    for part in module.modules():
        hook = group_offloading._get_top_level_group_offload_hook(part)
        # Else what was fetched, to host memory here, would be taken for what was not, and fetched again.
        if hook is not None and not [*_buffers(hook.group)]:
            hook.group.offload_device = torch.device("meta")
    step()  # in it diffusers learns the order
    fetched.clear()
    step()
    sizes = {name: tensor.nbytes for name, tensor in _tensors(full)}
    return float(sum(sizes.get(names[id(tensor)], 0) for tensor in fetched))


def _buffers(group: Any) -> Iterator[torch.Tensor]:
    yield from group.buffers
    for part in group.modules:
        yield from part.buffers()


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


if __name__ == "__main__":
    for row in rows():
        print(row)
