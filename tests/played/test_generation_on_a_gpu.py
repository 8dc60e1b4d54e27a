"""A job in the worker on a played GPU: its video, and its end when the GPU fails."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from framepack_core import engine
from framepack_core.networks import loading
from framepackd.worker.generation import Engines
from framepackd.worker.messages import (
    Again,
    Failed,
    Finished,
    Lowered,
    Message,
    Ready,
    Resumed,
    Work,
    leaves_after,
)
from tests.daemon.worker.jobs import made, run, told_steps, work_in
from tests.played.cards import H100_80
from tests.played.gpu import PlayedGpu
from tests.played.models import played
from tests.played.streams import PLAYING, Event, Stream

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
CUDNN = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
LADDER = range(6)


@pytest.fixture(autouse=True)
def models_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load models that a played GPU can take; encoders and the VAE in float32."""
    load = loading.load

    def loaded(spec: Any, **settings: Any) -> loading.Models:
        models = load(spec, **settings | {"encoder_dtype": torch.float32})
        return played(models) if PLAYING else models

    monkeypatch.setattr(engine.loading, "load", loaded)


@pytest.fixture
def gpu() -> Iterator[PlayedGpu]:
    with PlayedGpu(H100_80) as gpu:
        yield gpu


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Give the results of the job on the CPU."""
    work = work_in(tmp_path_factory.mktemp("on the cpu"))
    answer, _ = run(replace(work, dtype="bfloat16"), Engines())
    assert isinstance(answer, Finished)
    return made(work)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return replace(work_in(tmp_path), device="cuda", dtype="bfloat16")


def lowered(messages: list[Message]) -> list[int]:
    return [message.level for message in messages if isinstance(message, Lowered)]


def test_a_job_finishes_with_the_video_of_the_cpu(
    gpu: PlayedGpu, work: Work, on_the_cpu: dict[str, bytes]
) -> None:
    answer, messages = run(work, Engines())
    assert isinstance(answer, Finished)
    assert made(work) == on_the_cpu
    assert told_steps(messages) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    ready = next(message for message in messages if isinstance(message, Ready))
    assert H100_80.name in ready.hardware
    assert not lowered(messages)
    assert not gpu.faults


def test_if_memory_runs_out_on_every_other_level_the_last_makes_the_same_video(
    gpu: PlayedGpu, work: Work, on_the_cpu: dict[str, bytes]
) -> None:
    """Each level fails in another part of the work."""
    for within in ("precompute", "sample_unipc", "decode", "decode", "sample_unipc"):
        gpu.fail(OUT_OF_MEMORY, within)
    answer, messages = run(work, Engines())
    assert isinstance(answer, Finished)
    assert lowered(messages) == [*LADDER[1:]]
    assert made(work) == on_the_cpu
    assert len(told_steps(messages)) == len(set(told_steps(messages))), "no step is repeated"
    assert not gpu.faults


def test_if_the_last_level_needs_too_much_the_job_fails_with_the_reason(gpu: PlayedGpu, work: Work) -> None:
    gpu.fail(OUT_OF_MEMORY, "decode", times=99)
    answer, messages = run(work, Engines())
    assert lowered(messages) == [*LADDER[1:]]
    assert isinstance(answer, Failed)
    assert not answer.retry
    assert "make the video smaller" in answer.error


@pytest.mark.parametrize(("error", "within"), [(CUBLAS, "sample_unipc"), (CUDNN, "decode")])
def test_a_failed_allocation_of_a_library_uses_the_next_level_in_another_process(
    work: Work, on_the_cpu: dict[str, bytes], error: Exception, within: str
) -> None:
    with PlayedGpu(H100_80) as gpu:
        gpu.fail(error, within)
        answer, messages = run(work, Engines())
        assert isinstance(answer, Again)
        assert leaves_after(answer)
        assert lowered(messages) == [1]
        assert not gpu.faults
    (key,) = {message.key for message in messages if isinstance(message, Lowered)}
    with PlayedGpu(H100_80) as gpu:
        answer, messages = run(replace(work, levels={key: 1}), Engines())
        assert not gpu.faults
    assert isinstance(answer, Finished)
    assert made(work) == on_the_cpu


@pytest.mark.parametrize(
    "within",
    ["decode", *(pytest.param(name, marks=pytest.mark.long) for name in ("_encode_prompts", "sample_unipc"))],
)
def test_a_broken_context_fails_the_job_for_now_and_another_process_goes_on(
    work: Work, on_the_cpu: dict[str, bytes], within: str
) -> None:
    with PlayedGpu(H100_80) as gpu:
        gpu.fail(ILLEGAL, within, after=20, breaks=True)
        answer, messages = run(work, Engines())
    assert answer == Failed(f"AcceleratorError: {ILLEGAL}", retry=True, device=True)
    assert leaves_after(answer)
    assert not lowered(messages)
    done = told_steps(messages)
    with PlayedGpu(H100_80) as gpu:
        answer, messages = run(work, Engines())
        assert not gpu.faults
    assert isinstance(answer, Finished)
    assert made(work) == on_the_cpu
    if within == "decode":
        assert messages[0] == Resumed(len(done))


@pytest.mark.parametrize("level", [0, 4])
def test_a_dropped_engine_releases_its_memory(gpu: PlayedGpu, work: Work, level: int) -> None:
    engines = Engines()
    work = replace(work, levels={f"{H100_80.name}|framepack-i2v|48x32": level})
    assert isinstance(run(work, engines)[0], Finished)
    assert bool(gpu.host_memory.registered) is (level == 4)
    assert bool(gpu.memory.live) is (level == 0)
    del engines
    gc.collect()
    torch.cuda.empty_cache()
    torch.accelerator.empty_host_cache()
    assert (gpu.memory.live, gpu.memory.reserved) == (0, 0)
    assert (gpu.host_memory.registered, gpu.host_memory.locked) == (0, 0)


def test_the_played_gpu_reports_a_copy_that_is_used_too_early(
    gpu: PlayedGpu, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress that a thread saves during sampling."""
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    run(work, Engines())
    assert any("the host uses what" in fault and "checkpoint" in fault for fault in gpu.faults)


def test_the_played_gpu_reports_a_copy_that_does_not_wait_for_the_computing(
    gpu: PlayedGpu, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "wait_stream", lambda *_: None)
    run(work, Engines())
    assert any(
        "reads what default may still be writing" in fault and "progress" in fault for fault in gpu.faults
    )
