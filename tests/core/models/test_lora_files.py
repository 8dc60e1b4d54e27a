"""LoRAs as trainers write them: merged as by hand, refused by name."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.transformer import FULL
from framepack_core.engine import Engine
from framepack_core.errors import RequestError
from framepack_core.models import lora_files, model_files
from framepack_core.models.headers import Header, Tensor, read_header
from framepack_core.models.registry import find
from framepack_core.request import Lora
from tests.conftest import tiny_spec
from tests.core.models.loras import (
    FAMILIES,
    RANK,
    Weights,
    by_hand,
    differing,
    hunyuan_modules,
    latents,
    linear_weights,
    make_lora,
    merge,
    stored,
    weights_of,
)
from tests.core.requests import request_for


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return stored(tiny_spec())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(tiny_spec(), device="cpu")


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_weights_and_the_video_of_merging_by_hand(
    family: str, alpha: float | None, base: Weights, engine: Engine, tmp_path: Path
) -> None:
    added = make_lora(tmp_path / "a.safetensors", family, base, alpha=alpha)
    expected = by_hand(base, (0.75, added))
    request = request_for(tmp_path, loras=[{"file": tmp_path / "a.safetensors", "weight": 0.75}])
    made = latents(engine, request)
    now = weights_of(engine)
    assert len(added) > 20
    for name, tensor in now.items():
        assert (tensor - expected[name]).abs().max() < 1e-6, name
    changed = {name for name, tensor in now.items() if not tensor.equal(base[name].to(tensor.dtype))}
    assert changed == added.keys()

    spec = tiny_spec()
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "config.json").write_bytes((find(spec).transformer / "config.json").read_bytes())
    save_file(expected, folder / "diffusion_pytorch_model.safetensors")
    elsewhere = replace(spec, transformer=replace(spec.transformer, location=str(folder)))
    plain = request.model_copy(update={"loras": ()})
    assert (latents(Engine.load(elsewhere, device="cpu"), plain) - made).abs().max() < 1e-5
    assert (latents(engine, plain) - made).abs().max() > 1e-3


def full_shapes() -> dict[str, Tensor]:
    with torch.device("meta"):
        transformer = HunyuanVideoFramepackTransformer3DModel(**FULL)
    return {
        name: Tensor(Path("base"), "BF16", tuple(tensor.shape), 2 * tensor.numel())
        for name, tensor in transformer.state_dict().items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_shape_every_key_of_a_family_matches(family: str) -> None:
    base = full_shapes()
    hunyuan, named, (down, up) = FAMILIES[family]
    shapes = {name: tensor.shape for name, tensor in base.items()}
    modules = hunyuan_modules(shapes) if hunyuan else linear_weights(shapes)
    tensors = dict[str, Tensor]()
    for module, weights in modules.items():
        rows = sum(shapes[name][0] for name in weights)
        for side, shape in ((down, (16, shapes[weights[0]][1])), (up, (rows, 16))):
            tensors[f"{named(module)}.{side}.weight"] = Tensor(Path("lora"), "F32", shape, 0)
        if module.endswith("linear1"):
            assert rows == 3 * 3072 + 12288 == 21504
    found = lora_files.fit("full.safetensors", Header(tensors, {}), base)
    assert (found.matched, found.unmatched) == (len(tensors), ())
    assert Counter(part.weight for part in found.parts) == Counter(chain(*modules.values()))
    assert all(part.rows == shapes[part.weight][0] for part in found.parts)
    blocks = re.compile(r"(single_)?transformer_blocks\..*\.weight")
    linear = {name for name, shape in shapes.items() if blocks.fullmatch(name) and len(shape) == 2}
    assert linear <= found.changed.keys(), "of the blocks none is missing"


def test_original_keys_match_as_diffusers_converts_them() -> None:
    """Diffusers' converter knows only this family, ignores alpha, and is right for blocks only."""
    base = full_shapes()
    shapes = {name: tensor.shape for name, tensor in base.items()}
    modules = hunyuan_modules({name: shape for name, shape in shapes.items() if ".1." in name})
    tensors = dict[str, torch.Tensor]()
    for module, weights in modules.items():
        if not module.startswith("txt_in"):
            key = "transformer." + module.replace("_attn.", "_attn_")
            tensors[f"{key}.lora_A.weight"] = torch.randn(1, shapes[weights[0]][1])
            tensors[f"{key}.lora_B.weight"] = torch.randn(sum(shapes[name][0] for name in weights), 1)
    header = {name: Tensor(Path("lora"), "F32", tuple(tensor.shape), 0) for name, tensor in tensors.items()}
    found = lora_files.fit("theirs.safetensors", Header(header, {}), base)
    ours = {
        f"transformer.{part.weight.removesuffix('.weight')}.{side}.weight": tensor
        for part in found.parts
        for side, tensor in (
            ("lora_A", tensors[part.down]),
            ("lora_B", tensors[part.up][part.first : part.first + part.rows]),
        )
    }
    assert not differing(ours, _convert_hunyuan_video_lora_to_diffusers(dict(tensors)))


def test_shift_and_scale_of_the_last_layer_are_exchanged(
    base: Weights, engine: Engine, tmp_path: Path
) -> None:
    weight = base["norm_out.linear.weight"]
    shift, scale = torch.full((len(weight) // 2, 1), 2.0), torch.full((len(weight) // 2, 1), 3.0)
    sides = {"lora_up": torch.cat([shift, scale]), "lora_down": torch.ones(1, weight.shape[1])}
    key = "lora_unet_final_layer_adaLN_modulation_1"
    save_file({f"{key}.{side}.weight": tensor for side, tensor in sides.items()}, tmp_path / "a.safetensors")
    merge(engine, Lora(file=tmp_path / "a.safetensors"))
    added = weights_of(engine)["norm_out.linear.weight"] - weight
    assert added[: len(shift)].allclose(torch.tensor(3.0)), "diffusers has the scale first"
    assert added[len(shift) :].allclose(torch.tensor(2.0))


def test_a_lora_of_the_modulation_alone_changes_the_video(
    base: Weights, engine: Engine, tmp_path: Path
) -> None:
    """Its rows are computed once, before the first step."""
    added = make_lora(tmp_path / "a.safetensors", "diffusion-pipe", base, only="img_mod")
    assert all(name.endswith("norm1.linear.weight") for name in added)
    request = request_for(tmp_path, loras=[{"file": tmp_path / "a.safetensors"}])
    changed, plain = latents(engine, request), latents(engine, request.model_copy(update={"loras": ()}))
    assert (changed - plain).abs().max() > 1e-3


def fit_of(file: Path, *, allow_partial: bool = False) -> lora_files.Fit:
    (found,) = lora_files.fit_all([Lora(file=file, allow_partial=allow_partial)], tiny_spec())
    return found


def test_keys_for_text_encoders_are_ignored_and_unmatched_ones_outside_blocks_counted(
    base: Weights, tmp_path: Path
) -> None:
    text_encoders = (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder.layers.0.lora_A.weight",
    )
    extra = {key: torch.ones(1, 1) for key in (*text_encoders, "bundle_emb", "whatever")}
    make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", base, only="linear2", extra=extra)
    found = fit_of(tmp_path / "a.safetensors")
    assert found.ignored == 2
    matched = 2 * len(found.parts)
    assert found.counts == {"matched": matched, "unmatched": 2, "keys": matched + 4}
    assert found.text == (
        f"matched {matched} of {matched + 4} keys, 2 match no weight (bundle_emb, whatever), "
        "2 for text encoders are ignored"
    )


@pytest.mark.parametrize(
    "strange",
    [
        "lora_unet_double_blocks_77_img_mlp_fc1.lora_down.weight",  # of a deeper model
        "diffusion_model.double_blocks.0.img_attn.k.lora_A.weight",  # of another kind of block
        "transformer.single.blocks.0.linear9.lora_A.weight",
        "lora_unet_transformer_blocks_0_attn_to_x.alpha",
        "transformer_blocks.0.attn.to_x.weight",  # a whole weight
    ],
)
def test_an_unmatched_key_of_a_block_is_refused_unless_allow_partial(
    strange: str, base: Weights, engine: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    added = make_lora(file, "kohya-hunyuan", base, only="linear2", extra={strange: torch.ones(1, 1)})
    keys = 2 * len(added)
    told = f"a.safetensors fits the model only in part: {keys} of {keys + 1} keys matched, and some keys of"
    with pytest.raises(RequestError, match=told) as refused:
        fit_of(file)
    assert f"({strange}): use one that was made for this model, or write allow_partial = true" in str(
        refused.value
    )
    assert fit_of(file, allow_partial=True).counts == {"matched": keys, "unmatched": 1, "keys": keys + 1}
    merge(engine, Lora(file=file, allow_partial=True))
    now = weights_of(engine)
    assert all(
        (now[name] - tensor).abs().max() < 1e-6
        for name, tensor in by_hand(base, (1, added)).items()
        if name in added
    )


PREFIXES = (
    "",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "unet.",
    "_orig_mod.",
    "lora_unet_",
)
PREFIXES += ("base_model.model.", "base_model.model.transformer.", "lora_transformer_", "lycoris_")
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "without dots": lambda name: name.replace(".", "_"),
    "without underscores": lambda name: name.replace("_", "."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("hunyuan", [True, False], ids=["HunyuanVideo's", "diffusers'"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_keys_match_with_any_prefix_and_spelling(
    prefix: str, hunyuan: bool, spelling: str, base: Weights
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    tensors = dict[str, Tensor]()
    modules = hunyuan_modules(shapes) if hunyuan else linear_weights(shapes)
    for module, weights in modules.items():
        name = prefix + SPELLINGS[spelling](module)
        rows = sum(shapes[weight][0] for weight in weights)
        for side, shape in (("down", (RANK, shapes[weights[0]][1])), ("up", (rows, RANK))):
            tensors[f"{name}.lora_{side}.weight"] = Tensor(Path("lora"), "F32", shape, 0)
        tensors[f"{name}.alpha"] = Tensor(Path("lora"), "I64", (), 0)
    found = lora_files.fit("a", Header(tensors, {}), model_files.read_transformer(tiny_spec()).tensors)
    assert (found.matched, found.unmatched) == (len(tensors), ())
    assert Counter(part.weight for part in found.parts) == Counter(chain(*modules.values()))


def assert_merged_as_by_hand(engine: Engine, base: Weights, file: Path, added: Weights) -> None:
    merge(engine, Lora(file=file))
    now, expected = weights_of(engine), by_hand(base, (1, added))
    assert all((now[name] - expected[name]).abs().max() < 1e-6 for name in added)


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(4),
        torch.tensor([4], dtype=torch.int32),
        torch.tensor(4, dtype=torch.uint8),
        torch.tensor(4, dtype=torch.bfloat16),
        torch.tensor([4], dtype=torch.float64),
        torch.tensor(4).to(torch.float8_e4m3fn),
    ],
    ids=lambda alpha: str(alpha.dtype),
)
def test_alpha_may_have_any_number_type(
    alpha: torch.Tensor, base: Weights, engine: Engine, tmp_path: Path
) -> None:
    added = make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", base, only="linear2", alpha=alpha)
    assert_merged_as_by_hand(engine, base, tmp_path / "a.safetensors", added)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_loras_in_8_bits_are_merged_by_their_values(
    dtype: torch.dtype, base: Weights, engine: Engine, tmp_path: Path
) -> None:
    added = make_lora(tmp_path / "a.safetensors", "diffusers", base, only="to_q", dtype=dtype)
    assert_merged_as_by_hand(engine, base, tmp_path / "a.safetensors", added)


OTHER_FAMILIES = [
    ("modelspec.architecture", "flux-1-dev/lora", "FLUX.1"),
    ("modelspec.architecture", "Flux.1-dev/lora", "FLUX.1"),
    ("ss_base_model_version", "flux1", "FLUX.1"),
    ("ss_base_model_version", "flux_kontext", "FLUX.1"),
    ("ss_network_module", "networks.lora_flux", "FLUX.1"),
    ("modelspec.architecture", "Flux.2-klein-4b/lora", "FLUX.2"),
    ("modelspec.architecture", "chroma/lora", "Chroma"),
    ("ss_base_model_version", "sdxl_base_v1-0", "SDXL"),
    ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "SDXL"),
    ("ss_base_model_version", "sd_v1", "Stable Diffusion 1.5"),
    ("ss_base_model_version", "sd_1.5", "Stable Diffusion 1.5"),
    ("modelspec.architecture", "stable-diffusion-v2-768-v/lora", "Stable Diffusion 2"),
    ("ss_base_model_version", "sd3m", "Stable Diffusion 3"),
    ("modelspec.architecture", "stable-diffusion-3-5-large/lora", "Stable Diffusion 3"),
    ("modelspec.architecture", "wan2.1/lora", "Wan"),
    ("ss_base_model_version", "wan", "Wan"),
    ("ss_base_model_version", "Wan-AI/Wan2.2-T2V-A14B", "Wan"),
    ("ss_network_module", "networks.lora_wan", "Wan"),
    ("ss_base_model_version", "hunyuan_video_1_5", "HunyuanVideo 1.5"),
    ("modelspec.architecture", "hunyuan-video-1.5/lora", "HunyuanVideo 1.5"),
    ("ss_network_module", "networks.lora_hv_1_5", "HunyuanVideo 1.5"),
    ("modelspec.architecture", "hunyuan-image-2.1/lora", "HunyuanImage"),
    ("modelspec.architecture", "Qwen-Image-Edit/lora", "Qwen-Image"),
    ("ss_network_module", "networks.lora_qwen_image", "Qwen-Image"),
    ("ss_base_model_version", "ltxv", "LTX-Video"),
    ("ss_base_model_version", "CogVideoX-5b", "CogVideoX"),
    ("ss_base_model_version", "mochi-1-preview", "Mochi"),
    ("modelspec.architecture", "hidream-i1/lora", "HiDream"),
    ("modelspec.architecture", "lumina-2/lora", "Lumina"),
    ("modelspec.architecture", "Z-Image/lora", "Z-Image"),
    ("modelspec.architecture", "Kandinsky-5/lora", "Kandinsky"),
]


@pytest.mark.parametrize(("key", "value", "family"), OTHER_FAMILIES)
def test_a_lora_of_another_family_is_refused_although_it_fits(
    key: str, value: str, family: str, base: Weights, tmp_path: Path
) -> None:
    make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", base, only="linear2", metadata={key: value})
    told = rf"a.safetensors was made for {re.escape(family)} \({key} = '{re.escape(value)}' in its metadata\)"
    with pytest.raises(RequestError, match=told):
        fit_of(tmp_path / "a.safetensors", allow_partial=True)


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_module": "networks.lora"},
        {"ss_network_module": "lycoris.kohya", "ss_base_model_version": "my own model"},
        {"modelspec.architecture": "framepack/lora", "ss_network_module": "networks.lora_framepack"},
        {"modelspec.architecture": "hunyuan-video/lora", "ss_base_model_version": "hunyuan_video"},
        {"modelspec.architecture": "HunyuanVideo-I2V", "modelspec.title": "flux capacitor"},
        {"modelspec.architecture": "swan/lora"},  # contains the name of a family without being one
        {"modelspec.architecture": ""},
    ],
)
def test_a_lora_of_our_or_an_unknown_family_is_accepted(
    metadata: dict[str, str], base: Weights, tmp_path: Path
) -> None:
    make_lora(tmp_path / "a.safetensors", "kohya-hunyuan", base, only="linear2", metadata=metadata)
    assert fit_of(tmp_path / "a.safetensors").unmatched == ()


def test_an_extension_in_capitals_is_accepted(base: Weights, tmp_path: Path) -> None:
    make_lora(tmp_path / "A.SAFETENSORS", "diffusers", base)
    assert fit_of(tmp_path / "A.SAFETENSORS").matched > 50


def test_the_alpha_in_diffusers_metadata_is_used(base: Weights, engine: Engine, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": RANK})}
    added = make_lora(tmp_path / "a.safetensors", "diffusers", base, only="to_q", metadata=metadata)
    merge(engine, Lora(file=tmp_path / "a.safetensors"))
    expected = by_hand(base, (6 / RANK, added))
    now = weights_of(engine)
    assert all((now[name] - expected[name]).abs().max() < 1e-6 for name in added)


def matrices(rows: int, columns: int, rank: int = RANK) -> dict[str, torch.Tensor]:
    return {"lora_A.weight": torch.ones(rank, columns), "lora_B.weight": torch.ones(rows, rank)}


Q = "transformer.transformer_blocks.0.attn.to_q"
WRONG: dict[str, tuple[Callable[[int], dict[str, torch.Tensor]], str]] = {
    "of another model": (
        lambda width: {f"down_blocks.0.{side}": tensor for side, tensor in matrices(width, width).items()},
        r"none of its 2 keys matches \(down_blocks.0.lora_A.weight, down_blocks.0.lora_B.weight\)",
    ),
    "empty": (lambda _: {}, "none of its 0 keys matches"),
    "of another width": (
        lambda width: {f"{Q}.{side}": tensor for side, tensor in matrices(width, width + 8).items()},
        rf"{Q}.lora_B.weight \(\d+, 2\) times {Q}.lora_A.weight \(2, \d+\) cannot change "
        r"transformer_blocks.0.attn.to_q \(\d+, \d+\)",
    ),
    "of two ranks": (
        lambda width: {
            f"{Q}.lora_A.weight": torch.ones(2, width),
            f"{Q}.lora_B.weight": torch.ones(width, 3),
        },
        rf"{Q}.lora_B.weight \(\d+, 3\) times {Q}.lora_A.weight \(2, \d+\)",
    ),
    "of too few rows": (
        lambda width: {
            f"lora_unet_single_blocks_0_linear1.{side}": tensor
            for side, tensor in matrices(3 * width, width).items()
        },
        r"attn.to_q \+ .*proj_mlp \(\d+, \d+\): use one",
    ),
    "half": (
        lambda width: {f"{Q}.lora_A.weight": torch.ones(2, width)},
        f"not whole: {Q}.lora_A.weight has no lora_up",
    ),
    "quantized": (
        lambda width: {
            f"{Q}.{side}": tensor.to(torch.int8) for side, tensor in matrices(width, width).items()
        },
        rf"{Q}.lora_(A|B|up|down).weight holds numbers of type I8",
    ),
    "of an alpha that is no number": (
        lambda width: {
            **{f"{Q}.{side}": tensor for side, tensor in matrices(width, width).items()},
            f"{Q}.alpha": torch.tensor(True),
        },
        f"{Q}.alpha holds numbers of type BOOL",
    ),
    "fp8 with a scale beside it": (
        lambda width: {
            **{
                f"{Q}.{side}": tensor.to(torch.float8_e4m3fn)
                for side, tensor in matrices(width, width).items()
            },
            f"{Q}.lora_A.scale_weight": torch.tensor(0.5),
        },
        rf"not a plain LoRA \({Q}.lora_A.scale_weight\)",
    ),
    "with a factor of its own": (
        lambda width: {
            **{f"{Q}.{side}": tensor for side, tensor in matrices(width, width).items()},
            f"{Q}.scalar": torch.tensor(0.5),
        },
        rf"not a plain LoRA \({Q}.scalar\)",
    ),
    "two adapters": (
        lambda width: {
            **{f"{Q}.{side}": tensor for side, tensor in matrices(width, width).items()},
            f"{Q}.lora_A.other.weight": torch.ones(RANK, width),
        },
        rf"holds {Q}.lora_A.*weight and {Q}.lora_A.*weight for the same weight",
    ),
    "one weight under two names": (
        lambda width: {
            f"{name}.{side}": tensor
            for name in (Q, f"diffusion_model.{Q}")
            for side, tensor in matrices(width, width).items()
        },
        "changes transformer_blocks.0.attn.to_q.weight twice",
    ),
    "a DoRA": (
        lambda width: {
            **{f"{Q}.{side}": tensor for side, tensor in matrices(width, width).items()},
            f"{Q}.dora_scale": torch.ones(width),
        },
        rf"not a plain LoRA \({Q}.dora_scale\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_lora_is_refused_and_its_keys_are_named(
    wrong: str, base: Weights, engine: Engine, tmp_path: Path
) -> None:
    make, said = WRONG[wrong]
    width = base["transformer_blocks.0.attn.to_q.weight"].shape[0]
    save_file(make(width), tmp_path / "wrong.safetensors")
    merge(engine)
    before = weights_of(engine)
    with pytest.raises(RequestError, match=said) as refused:
        merge(engine, Lora(file=tmp_path / "wrong.safetensors"))
    assert "wrong.safetensors" in str(refused.value)
    assert not differing(weights_of(engine), before)


def test_files_that_are_gone_changed_or_something_else_are_refused(
    base: Weights, engine: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    make_lora(file, "diffusers", base)
    known = Lora(file=file, sha256=lora_files.sha256(file))
    merge(engine)
    make_lora(file, "diffusers", base, seed=2)
    with pytest.raises(RequestError, match=r"a.safetensors has changed since the job was taken in"):
        merge(engine, known)
    file.unlink()
    with pytest.raises(RequestError, match=r"a.safetensors cannot be read \(No such file or directory\)"):
        merge(engine, known)
    file.write_bytes(b"PK\x03\x04 a pickle in a zip, by another name")
    with pytest.raises(RequestError, match="it is a pickle, which can run code"):
        merge(engine, Lora(file=file))
    pickle = file.rename(tmp_path / "a.pt")
    with pytest.raises(RequestError, match=r"a.pt is no .safetensors file: convert it"):
        merge(engine, Lora(file=pickle))


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "?", None]),
        "shape": st.lists(st.integers(-2, 1 << 40) | st.text(), max_size=3),
        "data_offsets": st.lists(st.integers(-2, 1 << 40), max_size=3),
    }
)
anything = st.recursive(st.none() | st.integers() | st.text(), st.lists) | entries


@given(st.binary(max_size=64) | st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), anything))
@settings(max_examples=200, deadline=None)
def test_any_damaged_header_is_refused(
    tmp_path_factory: pytest.TempPathFactory, told: bytes | dict[str, object]
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    header = told if isinstance(told, bytes) else json.dumps(told).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with contextlib.suppress(ValueError):
        assert sum(tensor.nbytes for tensor in read_header(file).tensors.values()) == 0


def test_headers_give_names_shapes_and_types_of_tensors(base: Weights) -> None:
    told = model_files.read_transformer(tiny_spec()).tensors
    assert {name: tensor.shape for name, tensor in told.items()} == {
        name: tuple(tensor.shape) for name, tensor in base.items()
    }
    assert all(told[name].nbytes == tensor.nbytes for name, tensor in base.items())
