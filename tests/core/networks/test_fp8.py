"""Layers in 8 bits: their error, how they are read from files, and how LoRAs change them."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import nn

from benchmarks.transformer import FULL
from framepack_core.engine import Engine
from framepack_core.models.registry import ModelSpec
from framepack_core.networks import fp8, loading, quantization
from framepack_core.networks.fp8 import FP8, Fp8Linear
from framepack_core.networks.lora import put
from framepack_core.networks.transformer import split_transformer
from framepack_core.request import Lora
from tests.conftest import tiny_spec
from tests.core.models import layouts
from tests.core.models.loras import by_hand, differing, make_lora, merge, weights_of

BF16 = torch.bfloat16


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def layer(*, multiplies: bool, dtype: torch.dtype = BF16) -> tuple[nn.Linear, Fp8Linear]:
    torch.manual_seed(1)
    linear = nn.Linear(192, 768, dtype=dtype).requires_grad_(requires_grad=False)
    linear.weight[5] *= 1000  # a row of its own size
    small = Fp8Linear(linear)
    small.multiplies = multiplies
    return linear, small


def test_each_rows_largest_number_becomes_the_largest_e4m3_and_all_are_within_a_sixteenth() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(40, 300, generator=generator) * torch.logspace(-9, 9, 40)[:, None]
    numbers, scale = fp8.quantize(matrix)
    assert (numbers.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (40, 1))
    assert torch.equal(numbers.float().abs().amax(1), torch.full((40,), 448.0))
    assert ((numbers.float() * scale - matrix).abs() <= matrix.abs() / 16 + scale / 2**10).all()


def test_zeros_stay_zeros_and_nan_stays_nan() -> None:
    numbers, scale = fp8.quantize(torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]]))
    made = numbers.float() * scale
    assert torch.equal(made[0], torch.zeros(2))
    assert made[1:, 0].isnan().all()


def test_quantizing_piece_by_piece_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(50, 16)
    whole = fp8.quantize(matrix)
    monkeypatch.setattr(fp8, "PIECE", 7 * 16)
    for made, wanted in zip(fp8.quantize(matrix), whole, strict=True):
        assert torch.equal(made.float(), wanted.float())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_without_8_bit_kernels_a_layer_computes_with_the_converted_weights(dtype: torch.dtype) -> None:
    linear, small = layer(multiplies=False, dtype=dtype)
    inputs = torch.randn(2, 7, 192, dtype=dtype)
    meant = (small.weight.float() * small.scale).to(dtype)
    assert torch.equal(small(inputs), nn.functional.linear(inputs, meant, linear.bias))
    assert relative(meant, linear.weight) < 0.03


def test_multiplying_in_8_bits_costs_no_more_than_two_roundings() -> None:
    linear, small = layer(multiplies=True)
    inputs = torch.randn(2, 7, 192).to(BF16)
    made, exact = small(inputs), linear(inputs)
    assert (made.dtype, made.shape) == (BF16, (2, 7, 768))
    others = torch.arange(768) != 5
    for rows in (others, ~others):
        assert 0.01 < relative(made[..., rows], exact[..., rows]) < 0.05
    numbers, scale = fp8.quantize(inputs.flatten(0, 1))
    meant = (numbers.float() * scale) @ (small.weight.float() * small.scale).t() + linear.bias.float()
    assert relative(made.flatten(0, 1), meant) < 0.004  # a rounding to bfloat16


@pytest.mark.parametrize("multiplies", [False, True])
def test_an_fp8_layer_compiles_to_one_graph_for_all_lengths(multiplies: bool) -> None:
    _, small = layer(multiplies=multiplies)
    graphs = list[object]()

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(small.forward, backend=count, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for length in (5, 9, 33):
            inputs = torch.randn(1, length, 192).to(BF16)
            assert torch.equal(compiled(inputs), small(inputs))
    torch._dynamo.reset()
    assert len(graphs) == 1


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is here")
@pytest.mark.parametrize("multiplies", [False, True])
def test_a_compiled_fp8_layer_computes_the_same_within_rounding(multiplies: bool) -> None:
    _, small = layer(multiplies=multiplies)
    compiled = torch.compile(small.forward, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for length in (5, 33):
            inputs = torch.randn(1, length, 192).to(BF16)
            assert relative(compiled(inputs), small(inputs)) < 0.01
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [((9, 0), BF16, True), ((8, 9), BF16, True), ((8, 6), BF16, False), ((9, 0), torch.float16, False)],
)
def test_cards_from_8_9_on_multiply_bfloat16_in_8_bits(
    capability: tuple[int, int], dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(fp8, "has_kernel", lambda _: True)
    device = torch.device("cuda")
    assert fp8.multiplies(device, dtype) is expected
    assert fp8.manner(device, dtype).startswith("weights and" if expected else "weights, scaled")
    assert not fp8.multiplies(torch.device("cpu"), BF16)


def test_the_kernel_is_tried_first_and_a_card_without_it_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    assert fp8.has_kernel.__wrapped__(cpu)

    refused = NotImplementedError("Rowwise scaling is not currently supported on your device")
    monkeypatch.setattr(fp8, "scaled_mm", mock.Mock(side_effect=refused))
    assert not fp8.has_kernel.__wrapped__(cpu)
    assert "cannot multiply in 8 bits on cpu" in caplog.text


def test_norms_last_layers_and_unsupported_widths_are_not_reduced() -> None:
    named = {
        "transformer_blocks.0.attn.to_q": nn.Linear(32, 48),
        "transformer_blocks.0.norm1.linear": nn.Linear(32, 48),
        "single_transformer_blocks.3.proj_out": nn.Linear(32, 40),
        "context_embedder.proj_in": nn.Linear(32, 48),
        "transformer_blocks.0.attn.norm_q": nn.LayerNorm(32),
    }
    assert [name for name, layer in named.items() if Fp8Linear.fits(name, layer)] == [
        "transformer_blocks.0.attn.to_q"
    ]


# files


def loaded(spec: ModelSpec, dtype: torch.dtype = BF16) -> dict[str, Fp8Linear]:
    models = loading.load(spec, dtype=dtype, encoder_dtype=torch.float32, precision="fp8")
    return fp8.layers(models.transformer)


@pytest.mark.parametrize("scaled", ["no", "once", "by row"])
def test_weights_stored_as_e4m3_keep_their_bits(tmp_path: Path, scaled: str) -> None:
    """A second rounding would double the error."""
    base = layouts.weights()
    file = layouts.fp8(base) if scaled == "no" else layouts.scaled_fp8(base, by_row=scaled == "by row")
    found = loaded(layouts.spec_of(layouts.one_file(tmp_path, file)))
    assert len(found) > 30
    for name, made in found.items():
        assert torch.equal(made.weight.view(torch.uint8), file[f"{name}.weight"].view(torch.uint8))
        scale = {"no": torch.ones(1), "once": file.get(f"{name}.scale_weight")}.get(
            scaled, file.get(f"{name}.weight_scale")
        )
        assert scale is not None
        assert torch.equal(made.scale, scale.reshape(-1, 1).expand(len(made.weight), 1))


def test_other_weights_are_rounded_to_the_dtype_before_they_become_fp8() -> None:
    base = layouts.weights()
    for name, made in loaded(tiny_spec()).items():
        numbers, scale = fp8.quantize(base[f"{name}.weight"].to(BF16))
        assert torch.equal(made.weight.view(torch.uint8), numbers.view(torch.uint8))
        assert torch.equal(made.scale, scale)
        assert made.bias is None or made.bias.dtype == BF16


# LoRAs


@pytest.mark.parametrize("kind", ["float32", "e4m3", "scaled e4m3"])
def test_a_lora_is_merged_into_weight_and_scale_and_taken_out_without_a_trace(
    tmp_path: Path, kind: str
) -> None:
    base = layouts.weights()
    file = {"float32": base, "e4m3": layouts.fp8(base), "scaled e4m3": layouts.scaled_fp8(base)}[kind]
    place = layouts.one_file(tmp_path / "model", file)
    meant = layouts.load(place)
    added = make_lora(tmp_path / "a.safetensors", "diffusers", meant)
    engine = Engine.load(layouts.spec_of(place), device="cpu", dtype="float32", precision="fp8")
    before = weights_of(engine)
    merge(engine, Lora(file=tmp_path / "a.safetensors", weight=0.8))
    merged = by_hand(meant, (0.8, added))
    for name, made in fp8.layers(engine.core.blocks).items():
        numbers, scale = fp8.quantize(merged[f"{name}.weight"])
        assert relative(made.weight.float() * made.scale, numbers.float() * scale) < 1e-3
        assert not torch.equal(made.scale, before[f"{name}.scale"])
    merge(engine)
    assert not differing(weights_of(engine), before)


def test_streamed_fp8_layers_receive_weight_and_scale() -> None:
    _, small = layer(multiplies=False)
    hosts = {id(part): torch.zeros_like(part.data) for part in (small.weight, small.scale)}
    places = SimpleNamespace(home=lambda part: hosts[id(part)])
    for part in (small.weight, small.scale):
        put(part, part.data, places)  # type: ignore[arg-type] # as much of places as it takes
        assert torch.equal(hosts[id(part)].float(), part.float())


# at full shape


def test_at_full_shape_every_layer_is_one_that_cards_multiply() -> None:
    with torch.device("meta"):
        one_of_each = FULL | {"num_layers": 1, "num_single_layers": 1}
        transformer = HunyuanVideoFramepackTransformer3DModel(**one_of_each).to(BF16)
    blocks = split_transformer(transformer)[0].blocks
    quantization.reduce(blocks, "fp8", BF16)
    found = fp8.layers(blocks)
    assert not [part for part in blocks.modules() if isinstance(part, nn.Linear)]
    for small in found.values():
        small.multiplies = True
        rows, columns = small.weight.shape
        inputs = torch.empty(1, 18325, columns, dtype=BF16, device="meta")
        assert small(inputs).shape == (1, 18325, rows)
