"""A job in the worker: what it says, what it leaves on disk, and what it goes on from."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from framepack_core.engine import Engine
from framepack_core.errors import FramePackError
from framepack_core.media.pictures import count_frames
from framepack_core.memory import devices
from framepack_core.networks import vae
from framepack_core.progress import Progress
from framepackd import files
from framepackd.worker import generation, identity
from framepackd.worker.checkpoint import Checkpoints
from framepackd.worker.engines import Engines
from framepackd.worker.generation import Generation
from framepackd.worker.main import answer
from framepackd.worker.messages import (
    Again,
    Blocked,
    Failed,
    Finished,
    Leave,
    Lowered,
    PromptsCut,
    Resumed,
    SectionDecoded,
    SetAside,
    StepDone,
    Stopped,
    Work,
    leaves_after,
)
from tests.core.memory.limited import LimitedMemory
from tests.daemon.worker.jobs import (
    ENGINES,
    Cut,
    Ears,
    LeavingEars,
    PowerCut,
    interrupt_in_the_second_section,
    made,
    run,
    told_steps,
    work_in,
)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return work_in(tmp_path)


def test_stills_are_durable_before_a_checkpoint_says_that_their_section_is_decoded(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves an empty still, and nobody makes it again."""
    durable: list[str] = []
    decoded: list[int] = []
    sync_file, save = files.sync_file, Checkpoints.save

    def noting(path: Path) -> None:
        sync_file(path)
        durable.append(path.name)

    def looking(self: Checkpoints, progress: Progress, notes: Any, segment: Any = None) -> None:
        if segment is not None:
            decoded.append(progress.decoded)
            assert any(f".section-{progress.decoded - 1}.png" in name for name in durable)
        save(self, progress, notes, segment)

    monkeypatch.setattr(files, "sync_file", noting)
    monkeypatch.setattr(Checkpoints, "save", looking)
    answer, _ = run(work)
    assert isinstance(answer, Finished)
    assert decoded == [1, 2]


def test_interrupted_after_any_message_the_result_is_the_same_and_no_step_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = work_in(tmp_path / "whole")
    answer, messages = run(whole)
    assert isinstance(answer, Finished)
    assert sorted(made(whole)) == [".latents.safetensors", ".mp4", *(f".section-{n}.png" for n in range(2))]
    assert told_steps(messages) == [(section, step) for section in (1, 2) for step in (1, 2)]
    for number in range(len(messages)):
        work = work_in(tmp_path / str(number))
        ears = Ears()
        with monkeypatch.context() as patched:
            patched.setattr(ears, "theirs", Cut(ears.theirs, number))
            with pytest.raises(PowerCut):
                Generation(work, ENGINES, ears.theirs).run()
        before = ears.heard()
        answer, after = run(work)
        assert isinstance(answer, Finished)
        assert made(work) == made(whole), f"interrupted at message {number}"
        steps = told_steps(before) + told_steps(after)
        lost = isinstance(messages[number], StepDone)  # it was not told, and may be told again or not
        assert len(steps) - len(set(steps)) <= (0 if lost else 1)
        assert isinstance(after[0], Resumed)
        assert set(told_steps(messages)) - set(steps) <= {told_steps(messages)[after[0].steps - 1]}


@pytest.mark.parametrize(
    "transformer", ["framepack-i2v", pytest.param("framepack-f1", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_where_a_sections_latents_are_damaged_those_before_it_are_not_sampled_again(
    tmp_path: Path, transformer: str, damaged: int
) -> None:
    """A bit of one section had the whole video begin again."""
    work = work_in(tmp_path, transformer, latent_window_size=2, cache="teacache")
    assert work.sections == 4
    assert isinstance(run(work)[0], Finished)
    whole = made(work)
    (work.checkpoint / f"latents-{damaged:04}").write_bytes(b"damaged")
    answer, (told, resumed, *messages) = run(work)
    assert isinstance(answer, Finished)
    assert isinstance(told, SetAside)
    assert f"latents-{damaged:04} is not what was written" in told.text
    assert resumed == Resumed(2 * damaged)
    assert told_steps(messages)[0] == (damaged + 1, 1)
    assert made(work) == whole


@pytest.mark.parametrize(("words", "cut"), [(10, []), (100, ["clip"]), (400, ["llama", "clip"])])
def test_prompts_that_are_cut_are_reported_before_the_first_step(
    tmp_path: Path, words: int, cut: list[str]
) -> None:
    work = work_in(tmp_path, prompt="cat " * words)
    answer, messages = run(work)
    assert isinstance(answer, Finished)
    told = [message for message in messages if isinstance(message, PromptsCut)]
    assert [found.encoder for message in told for found in message.cuts] == cut
    first = next(n for n, message in enumerate(messages) if isinstance(message, StepDone))
    assert all(messages.index(message) < first for message in told)


def test_a_checkpoint_of_other_versions_is_kept_and_nothing_of_it_gets_into_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, whole = work_in(tmp_path / "job"), work_in(tmp_path / "whole")
    run(whole)
    interrupt_in_the_second_section(work, monkeypatch, versions={"torch": "1.0"})
    before = {path.name: path.read_bytes() for path in work.checkpoint.iterdir()}
    answer, (told, resumed, *messages) = run(work)
    assert isinstance(answer, Finished)
    assert isinstance(told, SetAside)
    assert "was made with another" in told.text
    assert "torch (1.0, now " in told.text
    assert f"kept in {work.checkpoint}.aside-1" in told.text
    assert resumed == Resumed(0)
    assert len(told_steps(messages)) == 4
    assert made(work) == made(whole)
    aside = work.checkpoint.with_name("checkpoint.aside-1")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before


def test_what_fp8_computed_before_it_had_scales_is_not_resumed(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = replace(work, precision="fp8")
    with monkeypatch.context() as patched:
        patched.setattr(identity, "computation", as_before(identity.computation))
        interrupt_in_the_second_section(work, monkeypatch, versions=identity.versions())
    answer, (told, resumed, *_) = run(work)
    assert isinstance(answer, Finished)
    assert isinstance(told, SetAside)
    assert "fp8 (None, now weights, scaled by row)" in told.text
    assert resumed == Resumed(0)
    assert answer.computation["fp8"] == "weights, scaled by row"


def as_before(computation: Callable[[Work], dict[str, Any]]) -> Callable[[Work], dict[str, Any]]:
    return lambda work: {key: value for key, value in computation(work).items() if key != "fp8"}


def test_what_exists_is_written_whatever_version_made_it(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is generated any more that would have to fit it."""
    interrupt_in_the_second_section(work, monkeypatch, versions={"torch": "1.0"})
    monkeypatch.setattr(Engines, "get", fail)
    answer, messages = run(replace(work, keep_only=True))
    assert isinstance(answer, Finished)
    assert messages == [Resumed(3)]
    assert count_frames(work.result / ".mp4") == 4 * 3 - 3


@pytest.mark.parametrize("sections", [0, 1])
def test_what_exists_holds_nothing_of_an_attempt_that_was_abandoned(
    work: Work, monkeypatch: pytest.MonkeyPatch, sections: int
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(identity, "versions", lambda: {"torch": "1.0"})
        assert isinstance(run(work)[0], Finished)
    assert {".mp4", ".section-1.png", ".latents.safetensors"} <= made(work).keys()
    ears = Ears()

    def leave(self: Any, saving: Any, start: Any = generation.BackgroundWriter.start) -> None:
        start(self, saving)
        if sections == sum(isinstance(message, SectionDecoded) for message in ears.heard()):
            ears.ours.send(Leave(keep=True))

    with monkeypatch.context() as patched:
        patched.setattr(generation.BackgroundWriter, "start", leave)
        reply = answer(work, ENGINES, ears.theirs)
    if sections:
        assert isinstance(reply, Finished)
        assert count_frames(work.result / ".mp4") == 4 * 3 - 3
        assert made(work).keys() == {".mp4", ".section-0.png", ".latents.safetensors"}
    else:
        assert reply == Stopped()
        assert not made(work)


def test_sampling_is_not_repeated_because_decoding_failed(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("framepack_core.networks.vae.decode", fail)
        assert not isinstance(run(work)[0], Finished)
    answer, messages = run(work)
    assert isinstance(answer, Finished)
    assert messages[0] == Resumed(2)
    assert told_steps(messages)[0] == (2, 1)


def test_nothing_is_generated_again_because_writing_the_video_failed(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("framepack_core.media.pictures.count_frames", fail)
        assert not isinstance(run(work)[0], Finished)
    monkeypatch.setattr(Engines, "get", fail)  # not even the model is loaded
    answer, messages = run(work)
    assert isinstance(answer, Finished)
    assert messages == [Resumed(4)]


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("planted")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_is_full_or_fails_is_not_the_jobs_fault(
    work: Work, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    calls = iter(range(1000))

    def failing(
        path: Path, content: bytes, write: Callable[..., None] = files.write_bytes, **named: bool
    ) -> None:
        if next(calls) == 7:
            raise OSError(code, os.strerror(code), str(path))
        write(path, content, **named)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_bytes", failing)
        answer, _ = run(work)
    assert isinstance(answer, Blocked)
    assert os.strerror(code) in answer.reason
    assert isinstance(run(work)[0], Finished)


def test_asked_to_leave_it_stops_at_the_next_step_and_can_be_resumed(work: Work) -> None:
    ears = LeavingEars(lambda told: isinstance(told, StepDone))
    assert answer(work, ENGINES, ears.theirs) == Stopped()
    assert told_steps(ears.heard()) == [(1, 1)]
    reply, messages = run(work)
    assert isinstance(reply, Finished)
    assert told_steps(messages)[0] == (1, 2)


@pytest.mark.parametrize("where", ["running", "queued"])
def test_what_exists_is_kept_as_a_video_if_wished(
    work: Work, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ears = Ears()
    sent = [0]

    def start_and_ask(self: Any, saving: Any, start: Any = generation.BackgroundWriter.start) -> None:
        start(self, saving)
        sent[0] += 1
        if sent[0] == 3:  # the first step of the second section: a section's last step is saved at once
            ears.ours.send(Leave(keep=where == "running"))

    with monkeypatch.context() as patched:
        patched.setattr(generation.BackgroundWriter, "start", start_and_ask)
        reply = answer(work, ENGINES, ears.theirs)
    if where == "queued":
        assert reply == Stopped()
        reply, messages = run(replace(work, keep_only=True))
        assert messages == [Resumed(3)]
    assert isinstance(reply, Finished)
    assert count_frames(work.result / ".mp4") == 4 * 3 - 3, "a section, without what the last one brings"


def test_with_nothing_decoded_there_is_nothing_to_keep(work: Work) -> None:
    assert run(replace(work, keep_only=True))[0] == Stopped()


def test_the_kept_latents_are_those_of_the_whole_video(work: Work) -> None:
    run(work)
    latents = safetensors.torch.load_file(work.result / ".latents.safetensors")["latents"]
    assert latents.shape == (1, 16, (work.frames + 3) // 4, 4, 6)


@pytest.fixture
def own_engines() -> Engines:
    return Engines()


BETWEEN = 57_000_000  # bytes: decoding whole frames took 60.6 million, in tiles of 256 pixels 53.9 million


def test_out_of_memory_is_no_failure_but_a_lower_memory_level_and_the_section_again(
    tmp_path: Path, own_engines: Engines
) -> None:
    work = work_in(tmp_path, width=320, height=64, steps=1)
    own_engines.get(work, 0)  # weights are not what is limited here
    with LimitedMemory(BETWEEN) as memory:
        answer, messages = run(work, own_engines)
    assert memory.refusals == 1
    assert isinstance(answer, Finished)
    assert len(told_steps(messages)) == len(set(told_steps(messages))), "no step is repeated"
    lowered = [message for message in messages if isinstance(message, Lowered)]
    assert [(message.key, message.level) for message in lowered] == [("cpu|framepack-i2v|320x64", 1)]
    assert "tiles of 256 pixels" in lowered[0].text


def failing(error: Exception, times: int = 99) -> Callable[..., Any]:
    """Give a decoder that fails so many times."""
    decode, left = vae.decode, iter(range(times))

    def fail(*arguments: Any) -> Any:
        if next(left, None) is not None:
            raise error
        return decode(*arguments)

    return fail


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_memory_that_a_library_lacks_takes_a_lower_memory_level_too_but_in_another_process(
    work: Work, own_engines: Engines, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The context may be broken: what goes on in it could be wrong."""
    monkeypatch.setattr(vae, "decode", failing(error, times=1))
    answer, messages = run(work, own_engines)
    assert isinstance(answer, Again)
    assert leaves_after(answer)
    assert str(error).partition("\n")[0] in answer.reason
    (lowered,) = (message for message in messages if isinstance(message, Lowered))
    assert lowered.level == 1
    answer, messages = run(replace(work, levels={lowered.key: lowered.level}), Engines())
    assert isinstance(answer, Finished)
    assert Resumed(work.request.steps) in messages, "what was sampled is not lost"


def test_a_tensor_that_is_too_large_for_a_kernel_takes_a_lower_memory_level(
    work: Work, own_engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("Expected canUse32BitIndexMath(input) to be true, but got false.")
    monkeypatch.setattr(vae, "decode", failing(error, times=1))
    answer, messages = run(work, own_engines)
    assert isinstance(answer, Finished)
    assert [message.level for message in messages if isinstance(message, Lowered)] == [1]


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_after_an_error_the_worker_leaves_and_says_whether_it_was_the_devices(
    work: Work, own_engines: Engines, monkeypatch: pytest.MonkeyPatch, error: Exception, *, device: bool
) -> None:
    monkeypatch.setattr(vae, "decode", failing(error))
    answer, _ = run(work, own_engines)
    assert answer == Failed(f"{type(error).__name__}: {error}", retry=True, device=device)
    assert leaves_after(answer)


def test_the_next_job_begins_on_the_memory_level_that_worked(work: Work, own_engines: Engines) -> None:
    answer, messages = run(replace(work, levels={"cpu|framepack-i2v|48x32": 1}), own_engines)
    assert isinstance(answer, Finished)
    assert own_engines.get(work, 1).level == 1
    assert not [message for message in messages if isinstance(message, Lowered)]


def test_a_job_begun_when_checkpoints_named_their_model_by_its_folder_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_in(tmp_path / "job")
    with monkeypatch.context() as patched:
        patched.setattr(Engines, "model_digest", lambda *_: identity.former(work)["model"])
        interrupt_in_the_second_section(work, patched, identity.versions())
    answer, messages = run(work)
    assert isinstance(answer, Finished)
    assert Resumed(3) in messages
    assert not [message for message in messages if isinstance(message, SetAside)]


@pytest.mark.parametrize(
    ("known", "level"),
    [
        ({"GPU-a": 1, "RTX 3060": 2}, 1),
        ({"RTX 3060": 1}, 1),
        ({"GPU-b": 1}, 0),
    ],
    ids=["its own", "that of its kind", "not that of another card of its kind"],
)
def test_a_card_begins_on_the_memory_level_that_it_needed_before(
    work: Work, monkeypatch: pytest.MonkeyPatch, known: dict[str, int], level: int
) -> None:
    """Two cards of one kind: a screen hangs on the one, which has less memory left."""
    asked = []

    class Asked(Engines):
        def get(self, work: Work, level: int) -> Engine:
            asked.append(level)
            return ENGINES.get(work, 0)

    monkeypatch.setattr(devices, "card_id", lambda _: "GPU-a")
    monkeypatch.setattr(devices, "device_name", lambda _: "RTX 3060")
    run(replace(work, levels={f"{card}|framepack-i2v|48x32": of for card, of in known.items()}), Asked())
    assert asked == [level]


def test_where_the_last_memory_level_is_not_enough_the_reason_is_reported(
    work: Work, own_engines: Engines
) -> None:
    own_engines.get(work, 0)
    ears = Ears()
    with LimitedMemory(100_000), pytest.raises(FramePackError, match="not enough memory, even with") as error:
        Generation(work, own_engines, ears.theirs).run()
    assert "tiles of 128 pixels" in str(error.value)
    assert "make the video smaller" in str(error.value)


def test_sections_are_reported_when_they_are_decoded(work: Work) -> None:
    _, messages = run(work)
    assert [m.section for m in messages if isinstance(m, SectionDecoded)] == [1, 2]
