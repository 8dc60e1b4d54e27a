"""Blocks that are streamed: fetched ahead in order, computed with when they are there, never copied back.

A GPU's streams are played by a diary, and copies to the GPU by copies in host memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from framepack_core import memory, planning
from framepack_core.transformer import Blocks

GPU = torch.device("cuda")
BLOCKS = 3


class Diary:
    """Stands for torch.cuda: notes what the side stream fetches, and when it is waited for."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __call__(self, device: object) -> "Diary":
        return self

    def Stream(self) -> "Diary":  # noqa: N802 - as torch calls it
        return self

    def current_stream(self) -> "Diary":
        return self

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    def synchronize(self) -> None:
        if self.notes and self.notes[-1] != "wait":
            self.notes.append("wait")


class Block(nn.Module):
    def __init__(self, diary: Diary, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.linear.weight.number = number  # type: ignore[attr-defined] # so that it can be told what is fetched
        self.diary, self.number = diary, number

    def forward(self, x: torch.Tensor, context: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.diary.notes.append(f"compute {self.number}")
        return self.linear(x), context


class Transformer:
    def __init__(self, diary: Diary) -> None:
        self.transformer_blocks = nn.ModuleList(Block(diary, number) for number in range(BLOCKS))
        self.single_transformer_blocks = nn.ModuleList()


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Diary:
    diary = Diary()

    def fetch(group: Any, tensor: torch.Tensor, source: torch.Tensor, stream: object) -> None:
        tensor.data = source.clone()
        if hasattr(tensor, "number"):
            diary.notes.append(f"fetch {tensor.number}{'' if group.non_blocking else ' at once'}")

    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", diary)
    monkeypatch.setattr(group_offloading, "send_to_device", lambda tensors, *_, **__: tensors)
    monkeypatch.setattr(group_offloading.ModuleGroup, "_transfer_tensor_to_device", fetch)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    return diary


class NoCopyBack(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func is not torch.ops.aten._to_copy.default, "weights go back by dropping the copy"
        return func(*args, **(kwargs or {}))


def test_each_block_is_fetched_while_the_one_before_computes(diary: Diary) -> None:
    transformer = Transformer(diary)
    blocks = Blocks(transformer)  # type: ignore[arg-type] # has what is used of one
    x, context = torch.randn(2, 8), torch.zeros(1)
    rows: Any = [()] * BLOCKS
    expected = blocks(x, context, rows, None)
    host = [parameter.data_ptr() for parameter in blocks.parameters()]
    memory.stream_blocks(blocks, GPU)
    for block in blocks.transformer_blocks:
        # Else what was fetched, to host memory here, would be taken for what was not.
        group_offloading._get_top_level_group_offload_hook(block).group.offload_device = torch.device("meta")
    with torch.inference_mode(), NoCopyBack():
        assert torch.equal(blocks(x, context, rows, None), expected), "the first time they find out the order"
        for _ in range(2):
            diary.notes.clear()
            assert torch.equal(blocks(x, context, rows, None), expected)
            assert diary.notes == [
                "fetch 0",
                "wait",
                "fetch 1",
                "compute 0",
                "wait",
                "fetch 2",
                "compute 1",
                "wait",
                "compute 2",
            ]
    assert [parameter.data_ptr() for parameter in blocks.parameters()] == host


def test_locking_keeps_every_weight_and_leaves_none_where_it_was() -> None:
    module = nn.Sequential(nn.Linear(30, 50), nn.LayerNorm(50), nn.Linear(50, 7).to(torch.bfloat16))
    module[0].bias.data = torch.randn(100)[::2]  # not contiguous
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    memory.lock(module, page_locked=False)  # which takes a GPU
    after = module.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in after.values()}) == 1


def test_slabs_waste_next_to_nothing_at_full_shape() -> None:
    """Of a double block and a single one, as page-locked memory is handed out: in powers of two."""
    wide, narrow = 3072 * 12288 * 2, 3072 * 3072 * 2
    double = [narrow] * 8 + [wide] * 4
    single = [narrow] * 3 + [wide, 3072 * 15360 * 2]
    sizes = double * 20 + single * 40 + [6144] * 900
    places = memory.pack(sizes)
    ends = dict[int, int]()
    for size, (slab, offset) in sorted(zip(sizes, places, strict=True), key=lambda pair: pair[1]):
        assert offset >= ends.get(slab, 0), "no two share a byte"
        assert offset % 256 == 0
        ends[slab] = offset + size
    handed_out = sum(1 << (end - 1).bit_length() for end in ends.values())
    assert handed_out <= sum(sizes) * planning.PINNED_WASTE
