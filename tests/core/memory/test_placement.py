"""Weights are copied to the device, and the originals in host memory are never written."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framepack_core.engine import Engine
from framepack_core.memory.devices import visiting
from framepack_core.networks import quantization
from tests.conftest import tiny_spec
from tests.core.networks.precisions import needs_bitsandbytes

DEVICE = torch.device("meta")  # replaces a GPU: copying from it is an error, and is counted here


class Bus(TorchDispatchMode):
    """Counts the bytes that cross from the host to the device and back."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device = self.to_host = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        sources = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if sources == {DEVICE} and torch.device((kwargs or {}).get("device") or DEVICE) != DEVICE:
            self.to_host += 1
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and sources == {torch.device("cpu")}:
            self.to_device += result.nbytes if result.device == DEVICE else 0
        return result


class Model(nn.Module):
    """A model with shared weights, buffers, and an absent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("forgotten", torch.ones(2), persistent=False)
        self.register_buffer("absent", None)


def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@needs_bitsandbytes
@pytest.mark.parametrize("refused", [False, True])
def test_nf4_scales_are_copied_to_the_device_and_the_originals_stay(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a visit the scales of the host's weights stayed on the card: the host could not compute."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantization.reduce(model, "nf4", torch.float32)  # type: ignore[arg-type] # as much of blocks as it takes
    states = [layer.weight.quant_state for layer in model]
    if refused:
        monkeypatch.setattr(torch.Tensor, "to", refuse)
    with (
        nullcontext() if not refused else pytest.raises(torch.OutOfMemoryError),
        visiting(model, device=DEVICE),
    ):
        assert {scales(layer).device for layer in model} == {DEVICE}
    monkeypatch.undo()
    for layer, state in zip(model, states, strict=True):
        assert layer.weight.quant_state is state
        assert scales(layer).device == state.absmax.device == torch.device("cpu")
    assert model(torch.ones(1, 64)).isfinite().all()


def scales(layer: Any) -> torch.Tensor:
    """Give the scales of an nf4 layer's scales, which are quantized too."""
    found: torch.Tensor = layer.weight.quant_state.state2.absmax
    return found


def refuse(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("planted")


def test_weights_and_buffers_are_on_the_device_inside_the_block_and_the_originals_after_it() -> None:
    model = Model()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with visiting(model, device=DEVICE):
        assert {tensor.device for tensor in tensors(model)} == {DEVICE}
        assert isinstance(model.first.weight, nn.Parameter)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, (tensor, _) in before.items())
    assert all(after[name].data_ptr() == address for name, (_, address) in before.items())


def test_shared_weights_are_copied_once() -> None:
    model = Model()
    with Bus() as bus, visiting(model, device=DEVICE):
        assert model.first.weight is model.second.weight
    assert bus.to_device == sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def test_nothing_is_copied_back() -> None:
    model = Model()
    with Bus() as bus:
        for _ in range(3):
            with visiting(model, device=DEVICE):
                pass
    assert bus.to_device > 0
    assert bus.to_host == 0


def test_a_module_whose_move_fails_half_way_is_whole_in_host_memory() -> None:
    class Full(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].shape == (4,):
                raise torch.OutOfMemoryError("too large")
            return func(*args, **(kwargs or {}))

    model = Model()
    with pytest.raises(torch.OutOfMemoryError), Full(), visiting(model, device=DEVICE):
        raise AssertionError("nothing to use is here")
    assert {tensor.device for tensor in tensors(model)} == {torch.device("cpu")}


def test_a_staying_module_is_copied_once_and_dropped_without_copying_back() -> None:
    engine = Engine.load(tiny_spec(), device="cpu")
    places = engine.places
    places.device = DEVICE
    vae = engine.models.vae
    with Bus() as bus:
        for _ in range(2):
            with places.on_device(vae):
                assert vae.device == DEVICE
        assert bus.to_device == sum(tensor.nbytes for tensor in tensors(vae))
        assert vae.device == DEVICE
        places.device = torch.device("cpu")  # to which hooks can be put
        engine.take_level(len(engine.levels) - 1)
    assert vae.device == torch.device("cpu")
    assert bus.to_host == 0


def test_on_level_core_the_sampling_loop_and_the_vae_stay_and_the_rest_visits() -> None:
    engine = Engine.load(tiny_spec(), device="cpu")
    engine.take_level(2)
    assert engine.levels[2].placement == "core"
    places, models = engine.places, engine.models
    places.device = DEVICE
    for module in (engine.core, models.vae, models.text_encoder_2, models.image_encoder):
        with places.on_device(module):
            assert {tensor.device for tensor in tensors(module)} == {DEVICE}
    with places.for_a_moment(engine.embedders.image_projection):
        assert {tensor.device for tensor in tensors(engine.embedders.image_projection)} == {DEVICE}
    stayed = [
        module
        for module in (engine.core, models.vae, models.text_encoder_2, models.image_encoder, engine.embedders)
        if {tensor.device for tensor in tensors(module)} != {torch.device("cpu")}
    ]
    assert stayed == [engine.core, models.vae]
