"""Streamed layers on a played GPU: fetched ahead, and used only when their copy is complete."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from framepack_core.memory.footprint import SLOTS
from framepack_core.memory.streaming import PIECE, Streamer, choose_staying
from tests.played.gpu import PlayedGpu
from tests.played.streams import Event, Stream
from tests.played.tensors import CUDA, play

WIDTH, LAYERS, PASSES = 16, 7, 3
SIZE = 1280  # of a layer: a weight of 1024 bytes, a bias that takes 256


class Model(nn.Module):
    """Layers, the largest of which is twice as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.layers[2].register_buffer("beside", torch.arange(SIZE / 4))
        self.requires_grad_(requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Streamed:
    """A model whose layers are streamed to a played GPU."""

    def __init__(self, gpu: PlayedGpu, *, lock: bool = True) -> None:
        torch.manual_seed(0)
        self.gpu, self.model = gpu, play(Model())
        self.streamer = Streamer([*self.model.layers], CUDA, lock=lock)
        self.homes = [tensor.data.data_ptr() for tensor in self.tensors]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def passes(self, room: int = 0) -> list[torch.Tensor]:
        x = torch.ones(1, WIDTH).to(CUDA)
        made = []
        with torch.inference_mode(), self.streamer.on_device(room):
            for _ in range(PASSES):
                with self.gpu.during("a pass"):
                    x = self.model(x)
                made.append(x)
        return [x.cpu() for x in made]


@pytest.fixture
def gpu() -> Iterator[PlayedGpu]:
    with PlayedGpu() as gpu:
        yield gpu
        assert not gpu.faults


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model, x = Model(), torch.ones(1, WIDTH)
    return [x := model(x) for _ in range(PASSES)]


def same(made: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("stay", [0, 1, 3, LAYERS])
def test_streamed_layers_compute_the_same_bits(
    gpu: PlayedGpu, expected: list[torch.Tensor], lock: bool, stay: int
) -> None:
    streamed = Streamed(gpu, lock=lock)
    for _ in range(2):
        assert same(streamed.passes(stay * PIECE), expected)
    assert {tensor.device.type for tensor in streamed.tensors} == {"cpu"}
    assert [tensor.data.data_ptr() for tensor in streamed.tensors] == streamed.homes, "none is copied back"


@pytest.mark.parametrize("stay", [0, 3, LAYERS])
def test_a_pass_copies_each_streamed_layer_once_and_the_host_waits_for_nothing(
    gpu: PlayedGpu, stay: int
) -> None:
    streamed = Streamed(gpu)
    streamed.passes(stay * PIECE)
    counts = gpu.counts["a pass"]
    # The first come before the passes; those of a pass that does not come are fetched all the same.
    ahead = min(SLOTS, LAYERS - stay)
    assert counts["copies to the card"] <= PASSES * (LAYERS - stay) + stay
    assert counts["copies to the card"] >= PASSES * (LAYERS - stay) - ahead
    assert not counts["host waits"]


def test_streaming_holds_two_slots_and_the_staying_layers_however_far_the_host_runs_ahead(
    gpu: PlayedGpu,
) -> None:
    streamed = Streamed(gpu)
    for stay in (0, 2):
        gpu.memory.reset_peaks()
        before = gpu.memory.live
        streamed.passes(stay * PIECE)
        slots = SLOTS * 2 * SIZE  # the largest layer's
        assert gpu.memory.peak_held - before <= slots + stay * SIZE + 4096, "without activations"
        assert gpu.memory.live == before


def test_the_played_gpu_reports_missing_events(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, forgotten, lock in ((Stream, "wait_event", True), (Event, "synchronize", False)):
        with PlayedGpu() as gpu, monkeypatch.context() as patched:
            patched.setattr(kind, forgotten, lambda *_: None)
            Streamed(gpu, lock=lock).passes()
        assert gpu.faults, forgotten


def test_weights_that_cannot_be_page_locked_pass_through_page_locked_memory(
    gpu: PlayedGpu, expected: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = list[int]()

    def refuse(size: int) -> bool:
        sizes.append(size)
        return len(sizes) == 3

    gpu.host_memory.refuse_to_register = refuse
    streamed = Streamed(gpu)
    assert len(sizes) == 3, "the rest is not asked for"
    assert same(streamed.passes(), expected)
    assert len(sizes) == 3 + SLOTS
    assert [record.message for record in caplog.records] == [
        "0 MiB of memory cannot be page-locked (CUDA error 2): weights are copied to the GPU slower"
    ]


def test_streaming_works_without_any_page_locked_memory(gpu: PlayedGpu, expected: list[torch.Tensor]) -> None:
    gpu.host_memory.refuse_to_register = lambda size: True
    assert same(Streamed(gpu).passes(), expected)


def test_page_locked_memory_has_the_weights_size_and_is_freed_with_them(gpu: PlayedGpu) -> None:
    streamed = Streamed(gpu)
    weights = (LAYERS + 1) * SIZE
    assert gpu.host_memory.registered == weights
    streamed.passes()
    assert gpu.host_memory.peak_registered == weights
    assert gpu.host_memory.peak_locked == 0, "none of torch's"
    del streamed
    assert gpu.host_memory.registered == 0


@contextmanager
def breaking(model: nn.Module, number: int) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("planted")

    handle = model.layers[number].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_a_layer_that_fails_leaves_all_weights_in_host_memory(
    gpu: PlayedGpu, expected: list[torch.Tensor]
) -> None:
    streamed = Streamed(gpu)
    with breaking(streamed.model, 3), pytest.raises(torch.OutOfMemoryError):
        streamed.passes()
    assert [tensor.data.data_ptr() for tensor in streamed.tensors] == streamed.homes
    assert same(streamed.passes(), expected)


def test_without_room_for_the_slots_nothing_is_left_behind(gpu: PlayedGpu) -> None:
    streamed = Streamed(gpu)
    before, gpu.memory.capacity = gpu.memory.live, SIZE
    with pytest.raises(torch.OutOfMemoryError):
        streamed.passes()
    assert gpu.memory.live == before


def test_layers_out_of_order_are_refused(gpu: PlayedGpu) -> None:
    streamed = Streamed(gpu)
    x = torch.ones(1, WIDTH).to(CUDA)
    with streamed.streamer.on_device(), pytest.raises(RuntimeError, match="layer 1 was called where 0 comes"):
        streamed.model.layers[1](x)


def test_the_host_memory_of_a_streamed_parameter_can_be_written(gpu: PlayedGpu) -> None:
    streamed = Streamed(gpu)
    weight = streamed.model.layers[4].weight
    first = streamed.passes()[0]
    home = streamed.streamer.home(weight)
    assert home is not None
    home.zero_()
    assert not torch.equal(streamed.passes()[0], first)
    assert streamed.streamer.home(torch.ones(1)) is None


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 800))
def test_as_many_layers_stay_as_fit_and_are_spread_evenly(sizes: list[int], room: int) -> None:
    chosen = choose_staying([size * PIECE for size in sizes], room * PIECE)
    assert sum(sizes[number] for number in chosen) <= room
    if sum(sizes) <= room:
        assert chosen == [*range(len(sizes))]
    gaps = [later - earlier for earlier, later in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
