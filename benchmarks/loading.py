"""Measures the host memory that loading a model takes: private memory, and files that are mapped.

python -m benchmarks.loading

A model with the real layout and random weights of some hundred MB is written to a temporary folder and loaded
in a process of its own, once as it is stored and once converted. ``python -m benchmarks loading --disk DIR``
does so at full shape, 43 GB; with ``--step`` it goes on to the first step on the CPU.
"""

import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from PIL import Image
from transformers import LlamaConfig, LlamaModel

from benchmarks import Row, full_shape
from framepack_core.engine import Engine
from framepack_core.memory import footprint, planning
from framepack_core.memory.footprint import GIB, Video
from framepack_core.models.registry import BUILT_IN, ModelSpec, Source
from framepack_core.networks import loading
from framepack_core.request import Request
from framepackd.worker.main import set_environment

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
    """Write a larger transformer and Llama, and the demo model's other parts; gives the bytes of both."""
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
    )  # memory that libraries take at first use is not the model's
    before = memory()
    with Watch() as watch:
        models = loading.load(spec, dtype=dtype, encoder_dtype=dtype)
    for module in (models.transformer, models.text_encoder):  # as using them would: every page is read
        for parameter in module.parameters():
            parameter.sum()
    connection.send((before, watch.peak, memory()))


class Watch:
    """The peak of memory inside a ``with``."""

    def __enter__(self) -> "Watch":
        self.peak = memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.0005):
            private, mapped = memory()
            self.peak = max(self.peak[0], private), max(self.peak[1], mapped)


def memory() -> Memory:
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0]) << 10, int(told["RssFile"].split()[0]) << 10


def on_disk(folder: Path, *, filled: bool, step: bool) -> Iterator[Row]:
    """Write a checkpoint of the full shape in the hub's layout, unless it is there, and load it.

    Args:
        folder: to write it to; it stays there.
        filled: with random numbers; else with holes, which read as zeros, take no disk and no time to read.
        step: whether to encode a picture and a prompt, and to sample a step at 64x64, on the CPU.

    Raises:
        SystemExit: there is too little room.
    """
    wanted, name = full_shape.size(), f"{full_shape.size() / 1e9:.1f} GB in {folder}"
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if filled and not (folder / "written").exists() and free < wanted * 1.05:
        sys.exit(f"a checkpoint takes {name}, where {free / 1e9:.1f} GB are free: name another folder")
    print(f"writing {name}, unless it is there")
    began = time.monotonic()
    spec = full_shape.write(folder, filled=filled)
    yield Row("writing", time.monotonic() - began, None, "s", name)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=use, args=(spec, folder, step, theirs))
    process.start()
    theirs.close()
    while True:
        try:
            what, seconds, peak, after = ours.recv()
        except EOFError:
            break
        yield Row(what, seconds, None, "s", "")
        yield Row(f"{what}: private memory", after[0] / GIB, None, "GiB", f"{peak[0] / GIB:.2f} at the peak")
        yield Row(f"{what}: files mapped", after[1] / GIB, None, "GiB", "the kernel drops them for others")
    process.join()


def use(spec: ModelSpec, folder: Path, step: bool, connection: Connection) -> None:
    """Load the model as it is stored and, if that is wanted, use it; tells seconds and memory over before."""
    set_environment()
    loading.load(DEMO, dtype=torch.bfloat16, encoder_dtype=torch.float16)
    before = memory()

    def measured(what: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        with Watch() as watch:
            result = call()
        peak, after = ((now[0] - before[0], now[1] - before[1]) for now in (watch.peak, memory()))
        connection.send((what, time.monotonic() - began, peak, after))
        return result

    models = measured(
        "loading", lambda: loading.load(spec, dtype=torch.bfloat16, encoder_dtype=torch.float16)
    )
    if not step:
        return
    cpu, picture = torch.device("cpu"), folder / "picture.png"
    Image.new("RGB", (64, 64), "teal").save(picture)
    request = Request(image=picture, prompt="a boat on a lake", seconds=1, steps=1, width=64, height=64)

    def plan(video: Video, keep_free: int, _: object) -> planning.Plan:
        host = planning.host_memory()
        return planning.make_plan(footprint.weights(spec), None, host, video, keep_free=keep_free)

    engine = Engine(models, cpu, plan, pinnable=False)
    engine.prepare(Video(64, 64))
    conditioned = measured("encoding", lambda: engine.encode(request))
    measured("a step at 64x64", lambda: next(iter(engine.sample(request, conditioned))))


if __name__ == "__main__":
    for row in rows():
        baseline = "" if row.baseline is None else f"   (weights: {row.baseline:.0f})"
        print(f"{row.proves:<32} {row.name:<34} {row.ours:8.1f} {row.unit}{baseline}")
