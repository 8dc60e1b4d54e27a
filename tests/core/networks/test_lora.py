"""LoRAs are merged and removed without a trace, in every precision and on every memory level."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from framepack_core.engine import Engine, Step
from framepack_core.errors import RequestError
from framepack_core.memory import devices, footprint, planning, streaming
from framepack_core.memory.footprint import GIB, PUBLISHED, Video
from framepack_core.memory.planning import Card, Host
from framepack_core.models import tensor_files
from framepack_core.models.registry import BUILT_IN
from framepack_core.networks import loading, quantization
from framepack_core.networks.quantization import Precision
from framepack_core.request import Lora, Request
from tests.conftest import tiny_spec
from tests.core.models import layouts
from tests.core.models.loras import RANK, differing, latents, make_lora, merge, stored, weights_of
from tests.core.networks.precisions import needs_bitsandbytes
from tests.core.requests import everything, request_for

MODES: list[Any] = [
    ("exact", "float32"),
    ("exact", "bfloat16"),
    ("fp8", "float32"),
    pytest.param("nf4", "float32", marks=needs_bitsandbytes),
]


def test_a_lora_gives_weights_read_as_fp8_the_bits_of_weights_reduced_after_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = stored(tiny_spec())
    make_lora(tmp_path / "a.safetensors", "diffusers", base)
    lora = Lora(file=tmp_path / "a.safetensors", weight=0.8)
    found = []
    for at_once in (True, False):
        if not at_once:
            unreduced = SimpleNamespace(reduce=lambda _: None, layers=lambda _: {})
            monkeypatch.setattr(loading, "fp8", unreduced)
        engine = Engine.load(tiny_spec(), device="cpu", dtype="bfloat16", precision="fp8")
        merge(engine, lora)
        found.append(weights_of(engine))
    read, reduced = found
    assert all(torch.equal(read[name].float(), tensor.float()) for name, tensor in reduced.items())


def test_loras_are_merged_into_scaled_fp8_with_a_prefix_as_into_the_converted_weights(tmp_path: Path) -> None:
    scaled = layouts.scaled_fp8(layouts.weights())
    file = layouts.one_file(tmp_path / "scaled", layouts.prefixed(scaled))
    meant = dict(layouts.load(file))
    plain = layouts.one_file(tmp_path / "plain", meant)
    make_lora(tmp_path / "a.safetensors", "diffusers", meant)
    lora = Lora(file=tmp_path / "a.safetensors", weight=0.8)
    found = []
    for place in (file, plain):
        engine = Engine.load(layouts.spec_of(place), device="cpu")
        merge(engine, lora)
        merge(engine)
        merge(engine, lora)
        found.append(weights_of(engine))
    assert not differing(*found)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [MODES[0], *(pytest.param(*mode, marks=pytest.mark.long) for mode in MODES[1:-1]), MODES[-1]],
)
def test_whatever_was_merged_before_leaves_no_trace(precision: Precision, dtype: str, tmp_path: Path) -> None:
    spec = BUILT_IN["demo"]
    base = stored(spec)
    make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", base, seed=1, alpha=1.0)
    make_lora(tmp_path / "b.safetensors", "diffusers", base, seed=2, only="attn")
    a = Lora(file=tmp_path / "a.safetensors", weight=0.8)
    b = Lora(file=tmp_path / "b.safetensors", weight=-0.5)
    request = request_for(tmp_path, steps=1)

    def load() -> Engine:
        return Engine.load(spec, device="cpu", dtype=dtype, precision=precision)

    def asking_for(loras: Sequence[Lora]) -> Request:
        return request.model_copy(update={"loras": tuple(loras)})

    switched = load()
    fresh = dict[tuple[Lora, ...], tuple[dict[str, torch.Tensor], torch.Tensor]]()
    for loras in ((a,), (b,), (a, b), (), (b, a), (a,)):
        if loras not in fresh:
            once = load()
            merge(once, *loras)
            fresh[loras] = weights_of(once), latents(once, asking_for(loras))
        weights, made = fresh[loras]
        merge(switched, *loras)
        assert differing(weights_of(switched), weights) == []
        assert torch.equal(latents(switched, asking_for(loras)), made)
    assert differing(fresh[a, b][0], fresh[b, a][0]) == [], "their order does not matter"
    assert differing(fresh[()][0], weights_of(load())) == []
    assert len(differing(fresh[a,][0], fresh[b,][0])) > 20


@pytest.mark.parametrize("reduced", ["fp8", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_loras_are_merged_before_the_weights_are_quantized(reduced: Precision, tmp_path: Path) -> None:
    spec = BUILT_IN["demo"]
    make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", stored(spec))
    exact, small = Engine.load(spec, device="cpu"), Engine.load(spec, device="cpu", precision=reduced)
    for engine in (exact, small):
        merge(engine, Lora(file=tmp_path / "a.safetensors"))
    quantization.reduce(exact.core.blocks, reduced, torch.float32)
    exact.merger.follow(exact.core.blocks)
    assert not differing(weights_of(exact), weights_of(small))
    assert {tensor.dtype for tensor in weights_of(small).values()} > {torch.float32}


class CountedFile:
    """An open file that counts what is read of it."""

    read = Counter[str]()  # file -> bytes

    def __init__(self, file: Path, **arguments: Any) -> None:
        self._name, self._opened = file.name, safe_open(file, **arguments)

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened.get_tensor(name)
        self.read[self._name] += tensor.nbytes
        return tensor


def test_switching_loras_reads_and_replaces_only_the_changed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BUILT_IN["demo"]
    base = stored(spec)
    in_q = make_lora(tmp_path / "q.safetensors", "diffusers", base, only="attn.to_q").keys()
    in_k = make_lora(tmp_path / "k.safetensors", "diffusers", base, only="attn.to_k").keys()
    engine = Engine.load(spec, device="cpu")
    layers = engine.merger.layers
    addresses = {f"{name}.weight": layer.weight.data_ptr() for name, layer in layers.items()}
    monkeypatch.setattr(loading, "load", None)
    monkeypatch.setattr(tensor_files, "safe_open", CountedFile)
    switches: list[tuple[str, set[str]]] = [
        ("q", set(in_q)),
        ("q", set()),
        ("k", in_q | in_k),
        ("kq", in_q | in_k),
        ("", in_q | in_k),
    ]
    for loras, read in switches:
        CountedFile.read.clear()
        merge(engine, *(Lora(file=tmp_path / f"{name}.safetensors") for name in loras))
        own = CountedFile.read["diffusion_pytorch_model.safetensors"]
        assert own == sum(base[name].nbytes for name in read)
    moved = {name for name, layer in layers.items() if layer.weight.data_ptr() != addresses[f"{name}.weight"]}
    assert {f"{name}.weight" for name in moved} <= in_q | in_k


@pytest.mark.parametrize("placement", ["all", "core", "streamed"])
def test_a_lora_gives_the_same_video_on_every_memory_level(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(tensor: torch.Tensor, _: torch.device) -> torch.Tensor:
        """Copy as if to a GPU: later changes of the original do not change the copy."""
        with torch.inference_mode(mode=False):
            clone = tensor.data.clone()
        return nn.Parameter(clone, requires_grad=False) if isinstance(tensor, nn.Parameter) else clone

    monkeypatch.setattr(devices, "copy_to", copy)
    make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", stored(tiny_spec()))
    plain = request_for(tmp_path, steps=1)
    merged = request_for(tmp_path, steps=1, loras=[{"file": tmp_path / "a.safetensors"}])
    resident, engine = (Engine.load(tiny_spec(), device="cpu") for _ in range(2))
    latents(engine, merged)  # what is placed has a LoRA in it
    engine.take_level(next(n for n, level in enumerate(engine.levels) if level.placement == placement))
    for request in (merged, plain, merged, plain):
        assert torch.equal(latents(engine, request), latents(resident, request))
    engine.take_level(len(engine.levels) - 1)
    assert torch.equal(latents(engine, plain), latents(resident, plain)), "the host has none of it either"


def test_another_process_resumes_with_the_same_loras_and_bits(tmp_path: Path) -> None:
    make_lora(tmp_path / "a.safetensors", "diffusers", stored(tiny_spec()))
    request = request_for(tmp_path, loras=[{"file": tmp_path / "a.safetensors", "weight": 0.8}])
    events = list(Engine.load(tiny_spec(), device="cpu").generate(request))
    third = events[2]
    assert isinstance(third, Step)
    rest = Engine.load(tiny_spec(), device="cpu").generate(request, resume=third.progress)
    assert everything(list(rest)) == everything(events[3:])


@pytest.mark.parametrize("precision", ["exact", "fp8"])
def test_streamed_weights_have_the_loras_merged(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "page_locked", lambda size, _: torch.empty(size, dtype=torch.uint8))
    added = make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", stored(tiny_spec()))
    expected, engine = (Engine.load(tiny_spec(), device="cpu", precision=precision) for _ in range(2))
    places = engine.places
    places.device = torch.device("cuda")
    engine.take_level(len(engine.levels) - 1)
    places.device = torch.device("cpu")  # where there is something to merge with
    blocks = {f"{name}.weight": layer.weight for name, layer in engine.merger.layers.items()}
    for loras in ([Lora(file=tmp_path / "a.safetensors")], []):
        merge(engine, *loras)
        merge(expected, *loras)
        wanted = weights_of(expected)
        fetched = {name: home for name, weight in blocks.items() if (home := places.home(weight)) is not None}
        assert len(fetched.keys() & added.keys()) > 15
        assert not differing(fetched, {name: wanted[name] for name in fetched})
        assert all(blocks[name].data_ptr() == home.data_ptr() for name, home in fetched.items())


def test_only_modules_with_a_changed_layer_leave_the_device() -> None:
    engine = Engine.load(tiny_spec(), device="cpu")
    places, projection = engine.places, engine.embedders.image_projection
    for module in (engine.core, engine.models.vae, projection):
        with places.on_device(module):
            pass
    places.leave(engine.core.blocks.transformer_blocks[0].attn.to_q)
    assert list(places.staying) == [engine.models.vae, projection]


def test_a_merge_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    engine, base = Engine.load(tiny_spec(), device="cpu"), stored(tiny_spec())
    before = weights_of(engine)
    embedder = base["x_embedder.proj.weight"]
    broken = {
        "transformer.x_embedder.proj.lora_A.weight": torch.full((RANK, embedder[0].numel()), torch.nan),
        "transformer.x_embedder.proj.lora_B.weight": torch.ones(len(embedder), RANK),
    }
    make_lora(tmp_path / "a.safetensors", "diffusers", base, extra=broken)
    said = "a.safetensors makes numbers in x_embedder.proj.weight infinite or NaN"
    with pytest.raises(RequestError, match=said):
        merge(engine, Lora(file=tmp_path / "a.safetensors"))
    assert differing(weights_of(engine), before), "it had begun"
    merge(engine)
    assert not differing(weights_of(engine), before)


def test_merged_weights_count_as_ram_unless_blocks_are_page_locked_anyway() -> None:
    """They are not pages of a file any more, which the kernel could drop."""
    card, video = {gib: Card.assumed(gib) for gib in (6, 24)}, Video(640, 608)
    core = PUBLISHED.core.parameters

    def ram(gib: int, changed: dict[str, int]) -> float:
        plan = planning.make_plan(PUBLISHED, card[gib], Host.assumed(64), video, changed=changed)
        return plan.ram / GIB

    assert ram(24, {"core": core}) - ram(24, {}) == pytest.approx(16.9, abs=0.1)
    assert ram(6, {"core": core}) == pytest.approx(ram(6, {}), abs=0.01)
    assert ram(6, {"core": core, "embedders": GIB}) - ram(6, {}) == pytest.approx(2, abs=0.01)


def test_the_parameters_that_a_lora_changes_are_counted_by_part(tmp_path: Path) -> None:
    base = stored(tiny_spec())
    added = make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", base)
    told = footprint.changed([Lora(file=tmp_path / "a.safetensors")], tiny_spec())
    assert sum(told.values()) == sum(base[name].numel() for name in added)
    assert told["core"] > 0 < told["embedders"]
    assert footprint.changed([], tiny_spec()) == {}
