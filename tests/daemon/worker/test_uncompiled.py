"""A job whose blocks cannot be compiled: it goes on without, and is made in one way only."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from framepack_core.errors import CompileError
from framepack_core.memory.devices import choose_dtypes
from framepack_core.networks import compiling
from framepack_core.networks.compiling import CompiledBlocks
from framepackd.worker.engines import Engines
from framepackd.worker.generation import Generation
from framepackd.worker.messages import (
    Again,
    Failed,
    Finished,
    Lowered,
    Message,
    Resumed,
    SetAside,
    StepDone,
    Uncompiled,
    Work,
)
from tests.daemon.worker.jobs import Cut, Ears, PowerCut, made, run, told_steps, work_in

ENGINES = Engines()  # the tiny model is loaded once
SAID = "gcc: fatal error: Python.h: No such file\nmore"


class Compiler:
    """Compiles blocks, which compute a little else then; from the n-th on it fails, with torch's error."""

    def __init__(self) -> None:
        self.take(0)

    def take(self, fails_from: int, error: Exception | None = None) -> None:
        """Begin anew, as another process does; so many blocks are to be had."""
        self.left, self._error = fails_from, error or RuntimeError(SAID)
        self._compiled = set[Any]()
        ENGINES.compiled = False

    def __call__(self, block: Callable[..., Any], **_: object) -> Callable[..., Any]:
        def compiled(*inputs: Any) -> Any:
            if block not in self._compiled:
                if self.left == 0:
                    raise BackendCompilerFailed(self, self._error, None)
                self.left -= 1
                self._compiled.add(block)
            return tuple(result * 1.001 for result in block(*inputs))

        return compiled


COMPILER = Compiler()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Have blocks be compiled as on a GPU."""

    def decide(wanted: object, *_: object, failed: str | None = None, **__: object) -> bool:
        return wanted is True or (wanted == "auto" and failed is None)

    monkeypatch.setattr(compiling, "decide", decide)
    monkeypatch.setattr(compiling, "set_up", lambda _: None)
    monkeypatch.setattr(torch, "compile", COMPILER)
    COMPILER.take(0)
    return COMPILER


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What blocks as they are make of the work."""
    work = replace(work_in(tmp_path_factory.mktemp("eager")), compile=False)
    assert isinstance(run(work, ENGINES)[0], Finished)
    return made(work)


def interrupted(work: Work, step: tuple[int, int]) -> list[Message]:
    """Run a job until the power goes after a step; gives what was told."""
    ears = Ears()

    class AfterStep(Cut):
        def send(self, message: Message) -> None:
            if isinstance(message, StepDone) and (message.section, message.step) == step:
                self.left = 1
            super().send(message)

    with pytest.raises(PowerCut):
        Generation(work, ENGINES, AfterStep(ears.theirs, 1000)).run()  # type: ignore[arg-type] # a connection
    return ears.heard()


def told(messages: list[Message], kind: type) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


def test_where_compiling_fails_the_job_continues_uncompiled(
    compiler: Compiler, tmp_path: Path, eager: dict[str, bytes]
) -> None:
    """It failed, and so did every other one: Python's headers are missing on many machines."""
    compiler.take(1)  # in the middle of the first step: blocks of one kind are compiled then
    work = work_in(tmp_path / "job")
    answer, messages = run(work, ENGINES)
    assert isinstance(answer, Finished)
    assert answer.computation["compiled"] is False
    (uncompiled,) = told(messages, Uncompiled)
    assert uncompiled.reason == "RuntimeError: fatal error: Python.h: No such file"
    assert made(work) == eager
    assert not told(messages, SetAside)
    again, messages = run(
        replace(work_in(tmp_path / "next"), uncompiled={uncompiled.key: "it failed"}), ENGINES
    )
    assert isinstance(again, Finished)
    assert not told(messages, Uncompiled), "the next worker does not try"


@pytest.mark.parametrize("remembered", [True, False])
def test_a_job_that_was_begun_where_compiling_fails_is_resumed_to_the_bit(
    compiler: Compiler, tmp_path: Path, eager: dict[str, bytes], remembered: bool
) -> None:
    """Also where the daemon had no time to remember it."""
    work = work_in(tmp_path / "job")
    (uncompiled,) = told(interrupted(work, (2, 1)), Uncompiled)
    known = {uncompiled.key: uncompiled.reason} if remembered else {}
    answer, messages = run(replace(work, uncompiled=known), ENGINES)
    assert isinstance(answer, Finished)
    assert told(messages, Resumed)[-1].steps >= 2
    assert (2, 2) in told_steps(messages)
    assert (1, 1) not in told_steps(messages)
    assert made(work) == eager


def test_where_it_fails_later_another_process_compiles_and_continues(
    compiler: Compiler, tmp_path: Path
) -> None:
    """What is compiled in a process grows with its jobs, up to a limit."""
    whole, work = work_in(tmp_path / "whole"), work_in(tmp_path / "job")
    compiler.take(100)
    assert isinstance(run(whole, ENGINES)[0], Finished)
    interrupted(work, (1, 2))
    compiler.take(0)
    ENGINES.compiled = True  # by another job
    answer, messages = run(work, ENGINES)
    assert answer == Again("compiling failed (RuntimeError: fatal error: Python.h: No such file)")
    assert not told(messages, Uncompiled)
    compiler.take(100)
    answer, messages = run(work, ENGINES)
    assert isinstance(answer, Finished)
    assert answer.computation["compiled"] is True
    assert (1, 1) not in told_steps(messages)
    assert made(work) == made(whole)


def test_what_compiled_blocks_have_computed_is_not_resumed_without_them(
    compiler: Compiler, tmp_path: Path, eager: dict[str, bytes]
) -> None:
    """The video would be that of neither; it is kept beside and the video begins anew."""
    compiler.take(100)
    work = work_in(tmp_path / "job")
    interrupted(work, (2, 1))
    compiler.take(0)
    answer, messages = run(work, ENGINES)
    assert isinstance(answer, Finished)
    (aside,) = told(messages, SetAside)
    assert "compiled (True, now False)" in aside.text
    first, second = told(messages, Resumed)
    assert first.steps >= 2
    assert second.steps == 0
    assert made(work) == eager


def test_who_wants_it_compiled_is_reported_and_nothing_is_lost(compiler: Compiler, tmp_path: Path) -> None:
    work = replace(work_in(tmp_path / "job"), compile=True)
    answer, messages = run(work, ENGINES)
    assert isinstance(answer, Failed)
    assert not answer.retry
    assert (
        "compile = true, and the blocks cannot be compiled (RuntimeError: fatal error: Python.h"
        in answer.error
    )
    assert not told(messages, Uncompiled)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")],
)
def test_too_little_memory_while_compiling_is_no_failure_of_compiling(
    compiler: Compiler, tmp_path: Path, error: Exception
) -> None:
    compiler.take(0, error)
    answer, messages = run(work_in(tmp_path / "job"), ENGINES)
    assert told(messages, Lowered)
    assert not told(messages, Uncompiled)
    assert isinstance(answer, (Failed, Again))


def test_it_is_remembered_for_a_card_its_versions_and_what_is_computed_there() -> None:
    cpu = torch.device("cpu")
    dtype, _ = choose_dtypes(cpu, "auto")
    key = compiling.conditions(cpu, dtype, "exact", "native")
    assert f"torch {torch.__version__}" in key
    others = {
        compiling.conditions(cpu, torch.bfloat16, "exact", "native"),
        compiling.conditions(cpu, dtype, "fp8", "native"),
        compiling.conditions(cpu, dtype, "exact", "sage"),
    }
    assert len(others | {key}) == 4
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "__version__", "9.0")
        assert compiling.conditions(cpu, dtype, "exact", "native") != key


def test_of_a_real_compiler_that_is_not_there_it_is_told_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/bin/false",))
    block = nn.Sequential(nn.Linear(3, 5), nn.GELU())
    blocks = CompiledBlocks(block)
    blocks.on = True
    with pytest.raises(CompileError, match=r"InvalidCxxCompiler: No working C\+\+ compiler found"):
        block(torch.ones(2, 3))
    blocks.on = False
    assert block(torch.ones(2, 3)).shape == (2, 5)
