"""Makes one job's video in the worker, from its request or from its checkpoint."""

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Self

from framepack_core.engine import Clip, Engine, Step
from framepack_core.errors import CompileError, FramePackError, FreshProcessError, ModelError
from framepack_core.media import extend, pictures
from framepack_core.memory import before_torch, devices
from framepack_core.memory.device_errors import Verdict, judge
from framepack_core.models.lora_files import fit_all
from framepack_core.networks import compiling
from framepack_core.progress import HostCopy, Progress
from framepackd import files
from framepackd.worker import identity, messages, source_video
from framepackd.worker.checkpoint import Checkpoints
from framepackd.worker.engines import Engines, device_of
from framepackd.worker.finishing import SharedConnection
from framepackd.worker.messages import AheadError, Work
from framepackd.worker.previews import Previews
from framepackd.worker.quality import Measures
from framepackd.worker.video import Video

log = logging.getLogger(__name__)


class BackgroundWriter:
    """Saves and encodes in a thread while the sampling goes on; one task at a time."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._task: Future[None] | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Start a task when the last one is done; raises what the last one raised."""
        self.wait()
        self._task = self._thread.submit(task)

    def wait(self) -> None:
        """Wait until the task is done; raises, once, what it raised."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the task end, whatever failed elsewhere."""
        self._thread.shutdown()


class Generation:
    """A running job; all that it has computed is on disk after every computed step."""

    def __init__(self, work: Work, engines: Engines, connection: Connection | SharedConnection) -> None:
        """Resume from what an earlier run of the job has left."""
        self._work = work
        self._engines = engines
        self._connection = connection
        self._computation = identity.computation(work)
        self._clips: list[Checkpoints] = []  # of the clips up to the current one
        self._video = Video(work, self._clips)
        self._writer = BackgroundWriter()
        self._previews = Previews(work)
        self._resume()
        self._loras: tuple[dict[str, int], ...] = ()
        self._leave: messages.Leave | None = None  # the daemon's wish, once it came
        self._next: Work | None = None  # the job after this one
        self._keep_last: Callable[[], None] | None = None  # saves the last section, once it is decoded

    def _resume(self) -> None:
        """Load the checkpoints of an earlier run, if it computed in the same way."""
        self._identity = identity.of(self._work) | self._computation
        self._clips.clear()
        self._clock = _PhaseClock()
        self._measures = Measures()
        self._enter_next()
        if self._progress.decoded == 0:  # perhaps again, after a segment was damaged
            for preview in (self._work.preview, self._previews.file):
                preview.unlink(missing_ok=True)
        self._has_more()  # enters the clip in which the chain was left

    def run(self, *, write: bool = True) -> messages.Message:
        """Generate what is missing, then write the video; without ``write``, a whole one is left to that."""
        with self._previews, self._writer:  # both have ended when the job is left
            left = self._generate_missing()
        if left is None and self._leave is None and not write:
            return messages.Sampled()
        return left or self.write()

    def _generate_missing(self) -> messages.Message | None:
        """Generate; gives the message that ends the job if there is no video to write."""
        work = self._work
        files.make_folder(work.result)
        if work.continued is not None:
            source_video.prepare(work.continued)
        self._report_resumed()
        if work.keep_only:
            self._leave = messages.Leave(keep=True)
        while self._leave is None and self._has_more():
            try:
                self._generate_within_memory()
            except CompileError as error:
                reason = str(error)  # only the text: the error keeps its frames' tensors alive
            else:
                continue
            self._resume_uncompiled(reason)
        exists = self._sections_before + self._progress.decoded
        if self._leave is not None and self._leave.keep:
            self._video.forget_after(exists)
        if self._leave is not None and not (self._leave.keep and exists):
            self._save_last()
            return messages.Stopped()
        return None

    def _save_last(self) -> None:
        if self._keep_last is not None:
            self._keep_last()

    def write(self) -> messages.Message:
        """Write the video of all that is generated; uses no device."""
        work = self._work
        self._save_last()
        self._video.write(self._progress.edge, None if self._leave else work.frames)
        self._clock.lap("write")
        request, size = self._work.request, self._work.size
        # Its warnings were logged at intake.
        picture = pictures.crop_to(pictures.open_picture(request.image, request.background, log.debug), size)
        return messages.Finished(
            self._clock.seconds,
            identity.versions(),
            self._computation,
            self._measures.verdict(picture),
            self._loras,
            encoded_anew=work.continued is not None and work.continued.encoded_anew(),
        )

    def _report_resumed(self) -> None:
        sampled = self._sections_before + len(self._progress.sampled)
        self._connection.send(messages.Resumed(sampled * self._work.request.steps + self._progress.step))

    def _resume_uncompiled(self, reason: str) -> None:
        """Continue without compiling; steps that compiled blocks computed are set aside.

        A video is computed in one way from start to end. If this process has compiled before, a fresh one
        tries again first: it may have compiled too much, and nothing is lost.
        """
        if self._engines.compiled:
            raise FreshProcessError(f"compiling failed ({reason})")
        work = self._work
        if work.compile is True:
            raise ModelError(
                f"compile = true, and the blocks cannot be compiled ({reason}): put that right, or set "
                'compile = "auto" and retry the job'
            )
        self._connection.send(messages.Uncompiled(identity.conditions(work), reason))
        self._computation["compiled"] = False
        self._resume()
        self._report_resumed()

    @property
    def _clip(self) -> int:
        """The current clip, from 0."""
        return len(self._clips) - 1

    @property
    def _sections_per_clip(self) -> int:
        return self._work.sections // len(self._work.clips)

    @property
    def _sections_before(self) -> int:
        return self._clip * self._sections_per_clip

    def _has_more(self) -> bool:
        """Say whether anything is left to generate; enters the clip in which it is."""
        while self._progress.decoded == self._sections_per_clip:
            if len(self._clips) == len(self._work.clips):
                return False
            self._enter_next()
        return True

    def _enter_next(self) -> None:
        """Load the next clip's checkpoint; its measures include the clips before it."""
        folder = self._work.checkpoint
        if self._work.following:
            folder /= f"clip-{len(self._clips) + 1:04}"
        self._clips.append(
            Checkpoints(
                folder,
                self._identity,
                self._report_set_aside,
                former=identity.former(self._work),
                to_write=self._work.keep_only,
                elsewhere=self._work.elsewhere,
                moves=self._work.moves,
            )
        )
        found = self._clips[-1].load()
        self._progress = found.progress if found else Progress.start(self._work.request.seed)
        if found is not None and found.rewound:
            self._progress = found.progress.without_later(self._work.request.seed, _noises_before(self._work))
        if found is not None:
            self._clock.seconds = dict(found.notes["seconds"])
            if self._progress.decoded:
                self._measures = Measures.from_json(found.notes["quality"])

    def _report_set_aside(self, text: str) -> None:
        """Report what happens to an unusable checkpoint, before it is moved."""
        self._connection.send(messages.SetAside(text))

    def _generate_within_memory(self) -> None:
        """Generate; each time the device runs out of memory, take the next memory level."""
        device, levels = device_of(self._work), self._work.levels
        key = self._level_key(devices.card_id(device))
        of_its_kind = levels.get(self._level_key(devices.device_name(device)), 0)
        engine = self._engines.get(self._work, levels.get(key, of_its_kind))
        self._loras = tuple(fit.counts for fit in fit_all(self._work.request.loras, self._work.spec))
        engine.compiled.on = self._computation["compiled"] is True
        if engine.compiled.on:
            compiling.set_up(self._work.compile_cache)
        self._clock.lap("load")
        self._report_ready(engine)
        refused = ""
        for level in range(engine.level, len(engine.levels)):
            if level > engine.level:
                log.warning("out of memory (%s): continuing with %s", refused, engine.levels[level].text)
                self._connection.send(messages.Lowered(key, level, engine.levels[level].text))
            try:
                engine.take_level(level)
                self._generate(engine)
            except RuntimeError as error:
                verdict = judge(error)
                if verdict not in (Verdict.MEMORY, Verdict.MEMORY_AND_CONTEXT):
                    raise
                # Only the text: the error keeps its frames' tensors alive.
                refused = str(error).partition("\n")[0]
                self._writer.wait()
                if verdict is Verdict.MEMORY_AND_CONTEXT and level + 1 < len(engine.levels):
                    self._connection.send(messages.Lowered(key, level + 1, engine.levels[level + 1].text))
                    raise FreshProcessError(f"out of memory ({refused})") from error
            else:
                return
        raise FramePackError(
            f"the device has not enough memory, even with {engine.levels[-1].text} ({refused}): "
            "make the video smaller (resolution), or the latent_window_size"
        )

    def _level_key(self, card: str) -> str:
        """Name what a memory level is remembered for."""
        key = f"{card}|{self._work.spec.name}|{self._work.size[1]}x{self._work.size[0]}"
        if self._work.vae_tiling == "auto":
            return key
        return f"{key}|tiles" if self._work.vae_tiling else f"{key}|whole"  # these have other levels

    def _report_ready(self, engine: Engine) -> None:
        name = before_torch.name_outside(str(engine.device))
        card = devices.device_name(engine.device)
        self._connection.send(messages.Ready(name, devices.describe(engine.device), card))

    def _generate(self, engine: Engine) -> None:
        """Generate from the progress to the end, or until the daemon says to leave."""
        while self._leave is None and self._has_more():
            self._generate_clip(engine)

    def _generate_clip(self, engine: Engine) -> None:
        """Generate what is missing of the current clip; all that is computed is saved."""
        request = self._work.clips[self._clip]
        conditioned = self._engines.encode(request, engine)
        if conditioned.cuts:
            self._connection.send(messages.PromptsCut(conditioned.cuts))
        self._previews.fit_to(request, conditioned.start_latents)
        self._clock.lap("encode")
        self._report_ready(engine)
        try:
            for event in engine.sample(request, conditioned, self._progress):
                if isinstance(event, Step):
                    self._engines.compiled |= engine.compiled.on and event.computed
                    self._take_step(event)
                else:
                    self._take_clip(event)
                self._listen()
                if self._leave is not None:
                    if isinstance(event, Step) and not _is_saved(event):
                        self._writer.start(partial(self._save, event.progress.to_host(), self._notes()))
                    break
                if isinstance(event, Clip) and self._keep_last is None and (coming := self.work_ahead()):
                    self._encode_ahead(coming)
        finally:
            self._writer.wait()

    def _take_step(self, step: Step) -> None:
        """Save a step's result and report it; a skipped step is repeated sooner than saved."""
        copied = step.progress.to_host() if _is_saved(step) else None
        if copied is not None:
            # At most one computed step may be lost: the one before is saved before this one is reported.
            self._writer.wait()
            self._previews.offer(copied)
        self._progress = step.progress
        seconds = self._clock.lap("sample")
        self._connection.send(messages.StepDone(self._sections_before + step.section + 1, step.step, seconds))
        if copied is None:
            return
        if step.step < step.steps:
            self._writer.start(partial(self._save, copied, self._notes()))
        else:  # at once: even if decoding kills this process, the section is sampled
            self._clips[-1].save(copied.wait(), self._notes())

    def _take_clip(self, clip: Clip) -> None:
        """Save a decoded section and report it."""
        self._writer.wait()
        self._progress = clip.progress
        seconds = self._clock.lap("decode")
        keep = partial(self._keep, self._in_chain(clip), clip.progress.to_host(), self._notes())
        if self._clip + 1 == len(self._work.clips) and self._progress.decoded == self._sections_per_clip:
            self._keep_last = keep  # the video follows at once, and the device may have the next job
        else:
            self._writer.start(keep)
        self._connection.send(messages.SectionDecoded(self._sections_before + clip.section + 1, seconds))

    def _encode_ahead(self, work: Work) -> None:
        try:
            self._engines.encode_ahead(work)
        except AheadError:
            with contextlib.suppress(Exception):  # it may need the device; what is not saved is made again
                self._writer.wait()
            raise

    def _in_chain(self, clip: Clip) -> Clip:
        """Number a clip's section within the chain, and drop the frame that two clips share."""
        ends = clip.section + 1 == clip.sections
        return replace(
            clip,
            section=self._sections_before + clip.section,
            frames=clip.frames[1:] if ends and self._clip else clip.frames,
        )

    def work_ahead(self) -> Work | None:
        """Give the work whose inputs are encoded next: the next clip, or the next job."""
        following = self._work.clips[self._clip + 1 :]
        return replace(self._work, request=following[0], following=()) if following else self._next

    def _listen(self) -> None:
        """Read what the daemon has sent meanwhile."""
        while self._connection.poll():
            message = self._connection.recv()
            if isinstance(message, messages.Next):
                self._next = message.work
            else:
                self._leave = message

    def _save(self, copied: HostCopy, notes: dict[str, Any], segment: bytes | None = None) -> None:
        self._clips[-1].save(copied.wait(), notes, segment)
        self._clips[-1].clear()

    def _keep(self, clip: Clip, copied: HostCopy, notes: dict[str, Any]) -> None:
        """Save a section's files; all are durable before a checkpoint says that it is decoded."""
        self._measures.add(clip.frames, finite=clip.finite)
        notes["quality"] = self._measures.to_json()
        self._save(copied, notes, self._video.encode(clip))
        if clip.section + 1 < self._work.sections:  # else the whole video follows at once
            self._video.write_preview(clip.progress.edge)

    def _notes(self) -> dict[str, Any]:
        """Give, as JSON, what a checkpoint holds besides the progress."""
        return {"seconds": dict(self._clock.seconds), "quality": self._measures.to_json()}


def _is_saved(step: Step) -> bool:
    """Say whether a checkpoint is written after a step."""
    return step.computed or step.step == step.steps


def _noises_before(work: Work) -> int:
    """Count the sections of the video that the job extends: their noise is drawn and dropped."""
    if work.continued is None:
        return 0
    return extend.sections_taken(work.continued.known, work.request.latent_window_size)


class _PhaseClock:
    """Adds up how long each phase of a job took, over all its runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> float:
        now = time.monotonic()
        taken, self._last = now - self._last, now
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + taken, 3)
        return taken
