"""What loading a model takes of host memory: that nothing can take away, and of files that are read in place.

python -m benchmarks.loading

A model with the real layout and random weights of some hundred MB is written to a temporary folder and loaded
in a process of its own, once as it is stored and once converted.
"""

import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from transformers import LlamaConfig, LlamaModel

from benchmarks import Row
from framepack_core import loading
from framepack_core.models import BUILT_IN, ModelSpec, Source

DEMO = BUILT_IN["demo"]
MB = 1e6


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        spec, size = write_model(Path(folder))
        for dtype, wanted in ((torch.bfloat16, "as stored"), (torch.float32, "converted to float32")):
            before, peak, after = in_own_process(spec, dtype)
            proves = f"{size / MB:.0f} MB of files, {wanted}"
            baseline = size / MB * (1 if dtype == torch.bfloat16 else 2)
            yield Row("private memory after loading", (after[0] - before[0]) / MB, baseline, "MB", proves)
            yield Row("private memory at the peak of it", (peak[0] - before[0]) / MB, baseline, "MB", proves)
            yield Row("files mapped after loading", (after[1] - before[1]) / MB, None, "MB", proves)


def write_model(folder: Path) -> tuple[ModelSpec, int]:
    """Write a larger transformer and Llama beside the demo model's other parts; gives the bytes of both."""
    config = json.loads((DEMO.transformer.folder / "config.json").read_text())
    config |= {"num_attention_heads": 8, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56)}
    config |= {"num_layers": 4, "num_single_layers": 6}
    transformer: Any = HunyuanVideoFramepackTransformer3DModel.from_config(config)
    randomized(transformer)
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="150MB")
    (folder / "base").mkdir()
    for part in DEMO.base.folder.iterdir():
        if part.name != "text_encoder":
            (folder / "base" / part.name).symlink_to(part)
    llama = LlamaConfig.from_pretrained(DEMO.base.folder / "text_encoder")
    llama.hidden_size, llama.intermediate_size, llama.num_attention_heads, llama.head_dim = 1024, 4096, 8, 128
    llama.num_key_value_heads, llama.num_hidden_layers = 8, 8
    text_encoder: Any = randomized(LlamaModel(llama))
    text_encoder.to(torch.bfloat16)
    text_encoder.save_pretrained(folder / "base/text_encoder", max_shard_size="100MB")
    written = [*folder.glob("transformer/*.safetensors"), *folder.glob("base/text_encoder/*.safetensors")]
    spec = ModelSpec(
        "scaled",
        "framepack",
        Source(str(folder / "transformer")),
        Source(str(folder / "base")),
        DEMO.image_encoder,
    )
    return spec, sum(file.stat().st_size for file in written)


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


Memory = tuple[int, int]  # bytes: private, mapped from files


def in_own_process(spec: ModelSpec, dtype: torch.dtype) -> tuple[Memory, Memory, Memory]:
    """Load in a new process: its memory before, at the peak and after."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=load, args=(spec, dtype, theirs))
    process.start()
    measured: tuple[Memory, Memory, Memory] = ours.recv()
    process.join()
    return measured


def load(spec: ModelSpec, dtype: torch.dtype, connection: Connection) -> None:
    loading.load(
        DEMO, dtype=dtype, encoder_dtype=dtype
    )  # what libraries take at first use is not the model's
    before, seen = memory(), [memory()]
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(memory())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    models = loading.load(spec, dtype=dtype, encoder_dtype=dtype)
    over.set()
    watcher.join()
    for module in (models.transformer, models.text_encoder):  # as using them would: every page is read
        for parameter in module.parameters():
            parameter.sum()
    connection.send((before, (max(s[0] for s in seen), max(s[1] for s in seen)), memory()))


def memory() -> Memory:
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0]) << 10, int(told["RssFile"].split()[0]) << 10


if __name__ == "__main__":
    for row in rows():
        baseline = "" if row.baseline is None else f"   (weights: {row.baseline:.0f})"
        print(f"{row.proves:<32} {row.name:<34} {row.ours:8.1f} {row.unit}{baseline}")
