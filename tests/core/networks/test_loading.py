"""Loading trusts nothing: each fault of a model's files is reported with a remedy."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig

from framepack_core.errors import ModelError
from framepack_core.memory.devices import choose_device, choose_dtypes
from framepack_core.models import registry
from framepack_core.models.registry import BUILT_IN, ModelSpec, Source
from framepack_core.networks import loading
from framepack_core.networks.loading import keep_output_in_float32
from tests.conftest import tiny_spec
from tests.golden import HERE, TINY_MODELS


def test_at_full_size_the_transformer_has_the_published_keys_and_shapes() -> None:
    expected = json.loads((HERE / "keys.json").read_text())
    with torch.device("meta"):
        transformer = HunyuanVideoFramepackTransformer3DModel(has_image_proj=True, has_clean_x_embedder=True)
    ours = {name: list(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert len(ours) == 1274
    assert ours == expected


def test_the_published_models_are_pinned_to_a_commit() -> None:
    for name in ("framepack", "f1"):
        spec = BUILT_IN[name]
        for source in (spec.transformer, spec.base, spec.image_encoder):
            assert len(source.revision or "") == 40


@pytest.fixture
def copied(tmp_path: Path) -> ModelSpec:
    """Copy the tiny model, so that a test can damage its files."""
    shutil.copytree(TINY_MODELS, tmp_path / "models")
    return replace(
        tiny_spec(),
        transformer=Source(str(tmp_path / "models/framepack-i2v")),
        base=Source(str(tmp_path / "models/hunyuanvideo")),
        image_encoder=Source(str(tmp_path / "models/flux_redux")),
    )


def load(spec: ModelSpec) -> loading.Models:
    return loading.load(spec, dtype=torch.float32, encoder_dtype=torch.float32)


@pytest.mark.parametrize(
    "missing",
    [
        "framepack-i2v/config.json",
        "framepack-i2v/diffusion_pytorch_model-00002-of-00003.safetensors",
        "hunyuanvideo/vae/diffusion_pytorch_model.safetensors",
        "hunyuanvideo/text_encoder/model.safetensors",
        "hunyuanvideo/tokenizer/tokenizer.json",
        "hunyuanvideo/tokenizer_2/vocab.json",
        "hunyuanvideo/tokenizer_2/merges.txt",
        "flux_redux/feature_extractor/preprocessor_config.json",
    ],
)
def test_a_missing_file_is_named_before_anything_is_loaded(copied: ModelSpec, missing: str) -> None:
    root = copied.base.folder.parent
    (root / missing).unlink()
    with pytest.raises(ModelError, match="is missing: put it there") as raised:
        registry.find(copied)
    assert str(root / missing) in str(raised.value)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.canary,)


WEIGHTS = [
    "framepack-i2v/diffusion_pytorch_model",
    "hunyuanvideo/vae/diffusion_pytorch_model",
    "hunyuanvideo/text_encoder/model",
    "hunyuanvideo/text_encoder_2/model",
    "flux_redux/image_encoder/model",
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_weights_in_pickles_alone_are_refused(
    copied: ModelSpec, tmp_path: Path, weights: str, suffix: str
) -> None:
    stem = copied.base.folder.parent / weights
    for file in stem.parent.glob("*.safetensors*"):
        file.unlink()
    for name in (stem.name, "pytorch_model"):
        torch.save(Bomb(tmp_path / "canary"), stem.with_name(f"{name}{suffix}"))
    with pytest.raises(ModelError, match=r"safetensors is missing: put it there"):
        load(copied)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("shard", ["shard.bin", "../shard.safetensors", "/etc/hostname", 5])
def test_an_index_that_names_anything_but_safetensors_beside_it_is_refused(
    copied: ModelSpec, tmp_path: Path, shard: object
) -> None:
    folder = copied.transformer.folder
    torch.save(Bomb(tmp_path / "canary"), folder / "shard.bin")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    known = json.loads(index.read_text())
    known["weight_map"] = dict.fromkeys(known["weight_map"], shard)
    index.write_text(json.dumps(known))
    with pytest.raises(ModelError, match=r"not safetensors in its folder|is damaged"):
        load(copied)
    assert not (tmp_path / "canary").exists()


def test_code_that_comes_with_a_model_is_not_run(copied: ModelSpec, tmp_path: Path) -> None:
    folders = [copied.base.folder / name for name in ("text_encoder", "text_encoder_2", "vae", "tokenizer")]
    folders += [copied.transformer.folder, copied.image_encoder.folder / "image_encoder"]
    names = ("AutoModel", "AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    for folder in folders:
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
        for file in folder.glob("*config.json"):
            extended = {"auto_map": dict.fromkeys(names, "evil.Evil"), "trust_remote_code": True}
            file.write_text(json.dumps(json.loads(file.read_text()) | extended))
    with contextlib.suppress(ModelError):
        load(copied)
    assert not (tmp_path / "canary").exists()


def test_a_model_that_is_not_here_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = replace(BUILT_IN["framepack"], transformer=Source("nobody/nothing", "main"))
    with pytest.raises(ModelError, match=r"nobody/nothing@main is not on this machine.*framepackd models"):
        registry.find(spec)


def test_a_downloaded_model_is_found_although_unused_files_were_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client knows a repository's files, and misses the unused ones unless patterns are given."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--me--mine"
    shutil.copytree(TINY_MODELS / "framepack-i2v", cached / "snapshots" / revision)
    listed = [path.name for path in (TINY_MODELS / "framepack-i2v").iterdir()] + ["README.md"]
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in listed}
    (cached / "trees").mkdir()
    (cached / "trees" / f"{revision}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = replace(tiny_spec(), transformer=Source("me/mine", revision))
    assert registry.find(spec).transformer == cached / "snapshots" / revision
    (cached / "snapshots" / revision / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match="framepackd models download"):
        registry.find(spec)


def test_a_path_that_is_neither_a_folder_nor_a_hub_id_is_reported() -> None:
    with pytest.raises(ModelError, match="neither an existing folder nor a hub id"):
        registry.find(replace(tiny_spec(), transformer=Source("models/my/transformer")))


def test_a_download_that_breaks_off_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class TransportError(Exception):
        """An error such as HTTP libraries raise: neither an OSError nor one of the hub's."""

    def fail(*_: object, **__: object) -> None:
        raise TransportError("connection reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=r"could not be fetched .*connection reset.*run the command again"):
        list(registry.download(BUILT_IN["framepack"]))


def test_a_truncated_file_is_reported(copied: ModelSpec) -> None:
    file = copied.base.folder / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"safetensors is damaged .*cut off"):
        load(copied)


def test_a_transformer_without_one_of_its_weights_is_refused(copied: ModelSpec) -> None:
    file = copied.transformer.folder / "diffusion_pytorch_model-00003-of-00003.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file)
    # diffusers 0.42 reports nothing here: it goes by the index.
    with pytest.raises(ModelError, match=r"has 1 missing weights of 148, the first "):
        load(copied)


def test_a_tokenizer_that_loses_spaces_is_refused(copied: ModelSpec) -> None:
    """transformers 5 turns LlamaTokenizerFast's pre-tokenizer into Metaspace without an error."""
    file = copied.base.folder / "tokenizer/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "never",
        "split": False,
    }
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"into \d+ tokens, not 95"):
        load(copied)


def test_a_tokenizer_that_pads_on_the_left_is_refused(copied: ModelSpec) -> None:
    file = copied.base.folder / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ModelError, match="pads on the left"):
        load(copied)


def test_in_bfloat16_the_last_layer_alone_is_float32() -> None:
    transformer = loading.load(tiny_spec(), dtype=torch.bfloat16, encoder_dtype=torch.float32).transformer
    dtypes = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "proj_out.weight",
        "proj_out.bias",
    }
    assert transformer.proj_out(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_output_hook_rounds_nothing() -> None:
    holder = torch.nn.Module()
    holder.proj_out = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    keep_output_in_float32(holder)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    exact = x.double() @ holder.proj_out.weight.double().T + holder.proj_out.bias.double()
    assert (holder.proj_out(x).double() - exact).abs().max() < 1e-6


def test_unknown_devices_and_dtypes_are_reported() -> None:
    with pytest.raises(ModelError, match="device 'gpu' is unknown"):
        choose_device("gpu")
    with pytest.raises(ModelError, match="nvidia-smi"):
        choose_device("cuda:99")
    with pytest.raises(ModelError, match="dtype 'int8' is unknown"):
        choose_dtypes(torch.device("cpu"), "int8")
    assert choose_dtypes(torch.device("cpu"), "auto") == (torch.float32, torch.float32)
    assert choose_dtypes(torch.device("cuda"), "auto") == (torch.bfloat16, torch.float16)
    assert choose_dtypes(torch.device("cuda"), "float32") == (torch.float32, torch.float32)


def test_weights_stored_in_the_wanted_dtype_are_mapped_not_copied() -> None:
    """Otherwise the published model would take 26 GB of memory that the kernel cannot drop."""
    loaded = loading.load(BUILT_IN["demo"], dtype=torch.float16, encoder_dtype=torch.float16)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        [int(address, 16) for address in line[0].split("-")]
        for line in maps
        if line[-1].endswith(".safetensors")
    ]
    for component in vars(loaded).values():
        if isinstance(component, torch.nn.Module):
            for name, tensor in component.named_parameters():
                in_place = any(start <= tensor.data_ptr() < end for start, end in mapped)
                assert in_place is not name.startswith("proj_out."), name  # the last layer is in float32


def test_the_part_of_the_image_encoder_that_is_not_used_is_not_loaded() -> None:
    encoder = load(tiny_spec()).image_encoder
    assert not [name for name, _ in encoder.named_parameters() if "head" in name]


def test_the_unused_part_is_not_loaded_although_transformers_ignores_unknown_config_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers 5.17 does so, and the published config, like the tiny model's, does not name the head."""
    read = SiglipVisionConfig.from_pretrained.__func__

    def dropping(cls: type[SiglipVisionConfig], place: Path, **words: Any) -> SiglipVisionConfig:
        known = json.loads((place / "config.json").read_text()).keys() | {"local_files_only"}
        return read(cls, place, **{name: word for name, word in words.items() if name in known})

    monkeypatch.setattr(SiglipVisionConfig, "from_pretrained", classmethod(dropping))
    assert not hasattr(load(tiny_spec()).image_encoder, "head")
