"""The model files that people have: accepted, or recognized and refused, before torch is loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, LlamaModel, SiglipVisionModel

from framepack_core.errors import ModelError
from framepack_core.memory import footprint
from framepack_core.models import model_files, registry, shapes
from framepack_core.models.registry import Source
from framepack_core.networks import loading
from tests.conftest import tiny_spec
from tests.core.models import layouts
from tests.core.models.layouts import FP8, LAYOUTS, is_layer, one_file, spec_of, weights
from tests.golden import TINY_MODELS

LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128320}
CLIP = {"hidden_size": 768, "intermediate_size": 3072}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
UNUSUAL = {"attention_bias": True, "mlp_bias": True, "head_dim": 80, "num_hidden_layers": 2}


def built(component: Any, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a class's own weights."""
    with torch.device("meta"):
        if hasattr(component, "config_class"):
            module = component(component.config_class(**config))
        else:
            module = component.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("part", "component", "config"),
    [
        ("transformer", HunyuanVideoFramepackTransformer3DModel, shapes.TRANSFORMER_CONFIG),
        ("transformer", HunyuanVideoFramepackTransformer3DModel, {"guidance_embeds": False, "num_layers": 1}),
        ("vae", AutoencoderKLHunyuanVideo, {}),
        ("text_encoder", LlamaModel, LLAMA),
        ("text_encoder", LlamaModel, LLAMA | UNUSUAL),
        ("text_encoder_2", CLIPTextModel, CLIP),
        ("image_encoder", SiglipVisionModel, SIGLIP | {"image_size": 384, "vision_use_head": False}),
    ],
)
def test_the_shapes_derived_from_a_config_are_those_of_the_class(
    part: str, component: Any, config: dict[str, Any]
) -> None:
    assert shapes.expected(part, config) == built(component, config)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_give_the_weights_of_the_published_one(tmp_path: Path, layout: str) -> None:
    assert same(layouts.load(LAYOUTS[layout](tmp_path / "model")), weights())


def test_an_unused_key_is_reported_and_the_model_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = LAYOUTS["a key too many"](tmp_path)
    layouts.load(place)
    assert f"{place} has 1 key that is no weight of the model (pos_embed_cache): ignored" in caplog.text


def test_fp8_gives_the_bits_of_casting_up_first(tmp_path: Path) -> None:
    stored = layouts.fp8(weights())
    assert {tensor.dtype for tensor in stored.values()} == {FP8, torch.bfloat16}
    loaded = layouts.load(one_file(tmp_path, stored), torch.bfloat16)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}
    assert same({name: tensor.to(torch.bfloat16) for name, tensor in loaded.items()}, expected)
    assert any(not torch.equal(expected[name], tensor.bfloat16()) for name, tensor in weights().items())


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", [str, lambda name: f"{layouts.PREFIX}{name}"])
def test_scaled_fp8_is_scaled_in_float32_and_rounded_once(
    tmp_path: Path, name: Callable[[str], str], *, by_row: bool
) -> None:
    stored = layouts.scaled_fp8(weights(), by_row=by_row)
    file = one_file(tmp_path, {name(key): tensor for key, tensor in stored.items()})
    loaded = layouts.load(file, torch.bfloat16)
    for key, tensor in weights().items():
        if is_layer(key, tensor):
            module = key.removesuffix(".weight")
            scale = stored[f"{module}.weight_scale" if by_row else f"{module}.scale_weight"]
            assert torch.equal(loaded[key], (stored[key].float() * scale).bfloat16())
            assert (loaded[key].float() - tensor).abs().max() < tensor.abs().max() / 16
    assert model_files.read(file, "transformer").left_over == ()


def test_scaled_weights_must_have_their_scales(tmp_path: Path) -> None:
    stored = layouts.scaled_fp8(weights())
    gone = next(key for key in stored if key.endswith(".scale_weight"))
    del stored[gone]
    with pytest.raises(ModelError, match="without the scale that others have"):
        model_files.read(one_file(tmp_path, stored), "transformer")
    stored[gone] = torch.ones(7)
    with pytest.raises(ModelError, match=r"scale_weight \(F32, 7\), which is not supported"):
        model_files.read(one_file(tmp_path, stored), "transformer")


def test_a_file_of_full_size_is_checked_against_the_published_config(tmp_path: Path) -> None:
    """Only the header of the 13 GB is on the disk, and only the header is read."""
    file = layouts.full_size(tmp_path / "FramePackI2V_HY_fp8_e4m3fn.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "another"}')
    found = model_files.read(file, "transformer")
    assert len(found.tensors) == 1274
    assert found.config == shapes.TRANSFORMER_CONFIG
    assert found.warning is None
    held = footprint.weights(spec_of(file))
    assert held.core.item_bytes == 1
    assert held.core.parameters + held.embedders.parameters == sum(
        torch.Size(shape).numel() for shape in shapes.expected("transformer", found.config).values()
    )
    wrong = layouts.full_size(file, **{"proj_out.bias": ("BF16", (65,))})
    with pytest.raises(ModelError, match=r"proj_out.bias has the shape 65 where the model has 64"):
        model_files.read(wrong, "transformer")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(ModelError, match="is damaged"):
        model_files.read(file, "transformer")


KINDS = {
    "GGUF": (b"GGUF\3\0\0\0" + bytes(100), "is a GGUF file: .*FramePackI2V_HY_fp8_e4m3fn.safetensors"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "is a Git LFS pointer.*: run git lfs pull",
    ),
    "a page": (b"\n<!DOCTYPE html><html>", "is an HTML page: download the file itself; .*/resolve/"),
    "an answer": (b'{"error":"Repository not found"}', "is a text: most likely an error message of a server"),
    "a sentence": (b"Invalid username or password.", "is a text: most likely an error message of a server"),
    "an archive": (b"PK\3\4" + bytes(100), "is a pickle, which can run code: and is never read"),
    "a pickle": (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is a pickle, which can run code"),
    "empty": (b"", "is empty: download it again"),
    "cut off": (b"\x80\2\0\0\0\0\0\0{", "is damaged .no safetensors file, or cut off.: download it again"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    content, said = KINDS[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=said) as raised:
        model_files.look(spec_of(file))
    assert str(raised.value).startswith(f"model framepack-i2v: {file} is ")
    assert "config.json" not in str(raised.value)


def test_a_missing_file_is_named_and_no_config_below_it() -> None:
    with pytest.raises(ModelError, match=r"/nowhere/x.safetensors is missing: put it there"):
        registry.find(spec_of(Path("/nowhere/x.safetensors")))
    with pytest.raises(ModelError, match=r"models/x.gguf is missing: put it there"):
        registry.find(replace(tiny_spec(), transformer=Source("models/x.gguf")))


def test_other_files_in_place_of_weights_are_named_with_what_is_wanted(tmp_path: Path) -> None:
    shutil.copy(layouts.PUBLISHED / "config.json", tmp_path)
    (tmp_path / "framepack-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    wanted = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError) as raised:
        registry.find(spec_of(tmp_path))
    assert f"{wanted} is missing: put it there" in str(raised.value)
    assert "framepack-Q4_K_M.gguf is there, a GGUF file" in str(raised.value)


def test_a_folder_without_a_config_is_refused_and_its_file_suggested(tmp_path: Path) -> None:
    one_file(tmp_path, weights())
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=rf"config.json is missing: .*\({layouts.FILE} is there"):
        registry.find(spec_of(tmp_path))


def test_a_file_in_place_of_a_folder_of_several_parts_is_refused(tmp_path: Path) -> None:
    file = one_file(tmp_path, weights())
    with pytest.raises(ModelError, match="is a file; wanted is a folder that holds text_encoder, "):
        registry.find(replace(tiny_spec(), base=Source(str(file))))


SINGLE_FILES = {  # of ComfyUI: a key of each
    "llava_llama3_fp8_scaled": ("model.layers.0.mlp.gate_proj.weight", "a language model such as Llama"),
    "clip_l": ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder"),
    "hunyuan_video_vae_bf16": ("decoder.up.0.block.0.conv1.conv.weight", "a VAE with the original names"),
    "sigclip_vision_patch14_384": ("vision_model.embeddings.patch_embedding.weight", "an image encoder"),
    "hunyuan_video_720_bf16": ("model.double_blocks.0.img_attn.qkv.weight", "the original names of Hunyuan"),
    "a_lora": ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA, which goes into loras"),
    "something": ("a.b", r"something else \(a.b\)"),
}


@pytest.mark.parametrize("name", SINGLE_FILES)
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_of_another_part_are_named_with_what_is_wanted(tmp_path: Path, name: str, part: str) -> None:
    key, what = SINGLE_FILES[name]
    folder = TINY_MODELS / ("framepack-i2v" if part == "transformer" else f"hunyuanvideo/{part}")
    shutil.copy(folder / "config.json", tmp_path)
    save_file({key: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=f"{name}.safetensors holds .*{what}") as raised:
        model_files.read(tmp_path, part)
    assert f"wanted is {model_files.PARTS[part]}" in str(raised.value)


Spoil = Callable[[dict[str, torch.Tensor]], object]
SPOILT: dict[str, tuple[Spoil, str]] = {
    "one is missing": (
        lambda held: held.pop("proj_out.bias"),
        "has 1 missing weights of 148, the first proj_out",
    ),
    "not FramePack's": (
        lambda held: [held.pop(key) for key in [*held] if key.startswith("clean_x_embedder.")],
        "holds a transformer that is not FramePack's",
    ),
    "one block more": (
        lambda held: held.update({"transformer_blocks.2.norm1.linear.bias": torch.zeros(192)}),
        "has 1 unexpected weights, such as transformer_blocks.2.norm1.linear.bias",
    ),
    "something beside a weight": (
        lambda held: held.update({"proj_out.weight.absmax": torch.zeros(1)}),
        "packed in an unsupported way",
    ),
    "whole numbers": (
        lambda held: held.update({"proj_out.weight": held["proj_out.weight"].to(torch.int8)}),
        r"numbers of type I8 \(proj_out.weight\)",
    ),
    "another shape": (
        lambda held: held.update({"proj_out.weight": torch.zeros(1, 32)}),
        "proj_out.weight has the shape 1x32 where the model has 64x32",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_weights_that_do_not_make_the_model_are_refused_by_name(tmp_path: Path, spoilt: str) -> None:
    spoil, said = SPOILT[spoilt]
    held = weights()
    spoil(held)
    with pytest.raises(ModelError, match=said):
        model_files.read(one_file(tmp_path, held), "transformer")


def test_several_sets_of_weights_are_refused(tmp_path: Path) -> None:
    file = one_file(tmp_path, weights(), "a.safetensors")
    shutil.copy(file, tmp_path / "b.safetensors")
    said = r"several sets of weights \(a.safetensors, b.safetensors\): keep only the one .*or give its file"
    with pytest.raises(ModelError, match=said):
        model_files.look(spec_of(tmp_path))
    assert model_files.read(file, "transformer").tensors
    shards = layouts.shards(tmp_path / "shards")
    names = sorted(shards.glob("*.safetensors"))
    save_file(load_file(names[0]) | load_file(names[1]), names[1])
    with pytest.raises(ModelError, match=r"00001-of-00003.safetensors and .* both hold context_embedder"):
        model_files.read(shards, "transformer")


def test_a_shard_that_is_missing_without_an_index_is_named(tmp_path: Path) -> None:
    folder = layouts.shards(tmp_path / "model")
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model-00002-of-00003.safetensors is missing"):
        registry.find(spec_of(folder))


def test_in_the_hubs_folder_the_requested_revision_is_used(tmp_path: Path) -> None:
    above = layouts.hub_folder(tmp_path)
    assert Source(str(above)).folder == above / "snapshots" / layouts.COMMIT
    assert Source(str(above / "snapshots")).folder == above / "snapshots" / layouts.COMMIT
    assert Source(str(above), "f" * 40).folder == above / "snapshots" / ("f" * 40)
    with pytest.raises(ModelError, match="has no snapshot of v9, or several"):
        registry.find(replace(tiny_spec(), transformer=Source(str(above), "v9")))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae", "image_encoder"])
def test_weights_of_other_parts_may_have_other_names(tmp_path: Path, part: str) -> None:
    root = shutil.copytree(TINY_MODELS, tmp_path / "models")
    folder = root / ("flux_redux" if part == "image_encoder" else "hunyuanvideo") / part
    (file,) = folder.glob("*.safetensors")
    stored = {f"some.{name}": tensor.half() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(stored | {"logit_scale": torch.zeros(1)}, folder / "mine.fp16.safetensors")
    (folder / "._mine.fp16.safetensors").write_bytes(b"\0\5\26\7")
    spec = replace(
        tiny_spec(),
        base=Source(str(root / "hunyuanvideo")),
        image_encoder=Source(str(root / "flux_redux")),
    )
    loaded, published = (
        loading.load(each, dtype=torch.float32, encoder_dtype=torch.float16) for each in (spec, tiny_spec())
    )
    assert same(getattr(loaded, part).state_dict(), getattr(published, part).state_dict())


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"num_layers": "many", "has_image_proj": 1, "has_clean_x_embedder": 1}']
)
def test_an_invalid_config_is_named(tmp_path: Path, config: str) -> None:
    folder = shutil.copytree(layouts.PUBLISHED, tmp_path / "model")
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config.json (is damaged|makes no sense)"):
        model_files.read(folder, "transformer")
    told = json.loads((layouts.PUBLISHED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"has_clean_x_embedder": False}))
    with pytest.raises(ModelError, match="holds a transformer that is not FramePack's"):
        model_files.read(folder, "transformer")
