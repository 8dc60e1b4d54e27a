"""Makes one job's video in the worker, from its request or from its checkpoint."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Self

from framepack_core.engine import Clip, Engine, Step
from framepack_core.errors import CompileError, FramePackError, FreshProcessError, ModelError
from framepack_core.media import pictures
from framepack_core.memory import before_torch, devices
from framepack_core.memory.device_errors import Verdict, judge
from framepack_core.models.lora_files import fit_all
from framepack_core.networks import compiling
from framepack_core.progress import HostCopy
from framepackd import files
from framepackd.worker import identity, messages, source_video
from framepackd.worker.chain import CannotHelpError, Chain
from framepackd.worker.engines import Engines, device_of
from framepackd.worker.finishing import SharedConnection
from framepackd.worker.messages import AheadError, Work
from framepackd.worker.previews import Previews
from framepackd.worker.quality import Measures
from framepackd.worker.video import Video

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.2  # between two looks at the clips that other workers make


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
        self._writer = BackgroundWriter()
        self._previews = Previews(work)
        self._resume()
        self._loras: tuple[dict[str, int], ...] = ()
        self._leave: messages.Leave | None = None  # the daemon's wish, once it came
        self._next: Work | None = None  # the job after this one
        self._keep_last: Callable[[], None] | None = None  # saves the last section, once it is decoded

    def _resume(self) -> None:
        """Load the checkpoints of an earlier run, if it computed in the same way."""
        model = None if self._work.keep_only else self._engines.model_digest(self._work)
        self._identity = identity.of(self._work, model) | self._computation
        self._chain = Chain(self._work, self._identity, self._report_set_aside)
        self._video = Video(self._work, self._chain)
        self._last_lap = time.monotonic()
        if not self._chain.sections_joined and not self._work.helps:  # perhaps again, after damage
            for preview in (self._work.preview, self._previews.file):
                files.remove(preview)

    def run(self, *, write: bool = True) -> messages.Message:
        """Generate what is missing, then write the video; without ``write``, a whole one is left to that."""
        with contextlib.ExitStack() as leaving:
            leaving.callback(lambda: self._chain.leave())
            with self._previews, self._writer:  # both have ended when the job is left
                left = self._generate_missing()
            if self._keep_last is not None:
                leaving.pop_all()  # no other worker may enter the clip before that is saved
        if left is None and self._leave is None and not write:
            return messages.Sampled()
        return left or self.write()

    def _generate_missing(self) -> messages.Message | None:
        """Generate; gives the message that ends the job if there is no video to write."""
        work = self._work
        files.make_folder(work.result)
        if work.continued is not None:
            source_video.prepare(work.continued)
        if not work.helps:
            self._report_resumed()
        self._listen()
        if work.keep_only:
            self._leave = messages.Leave(keep=True)
        while self._leave is None and self._chain.has_more(self._waits_for_clip):
            try:
                self._generate_within_memory()
            except CompileError as error:
                reason = str(error)  # only the text: the error keeps its frames' tensors alive
            else:
                continue
            self._resume_uncompiled(reason)
        if self._leave is None:
            return messages.Helped() if work.helps else None
        if self._leave.keep:
            self._chain.look_again()
            self._video.forget_after(self._chain.sections_joined)
        if not (self._leave.keep and self._chain.sections_joined):
            self._save_last()
            return messages.Stopped()
        return None

    def _waits_for_clip(self) -> bool:
        """Wait a moment for the clips that other workers make; says whether to go on waiting."""
        self._connection.send(messages.WaitsForClip())
        self._connection.poll(WAIT_SECONDS)
        self._listen()
        self._last_lap = time.monotonic()  # it belongs to no phase
        return self._leave is None

    def _save_last(self) -> None:
        if self._keep_last is not None:
            try:
                self._keep_last()
            finally:
                self._chain.leave()

    def write(self) -> messages.Message:
        """Write the video of all that is generated; uses no device."""
        work = self._work
        self._save_last()
        self._video.write(self._chain.joined[-1].progress.edge, None if self._leave else work.frames)
        self._lap("write")
        seconds, measures = Counter[str](), Measures()
        for clip in self._chain.clips:
            seconds.update(clip.seconds)  # adds, unlike that of a dict
            measures += clip.measures
        request, size = self._work.request, self._work.size
        # Its warnings were logged at intake.
        picture = pictures.crop_to(pictures.open_picture(request.image, request.background, log.debug), size)
        return messages.Finished(
            {phase: round(taken, 3) for phase, taken in seconds.items()},
            identity.versions(),
            self._computation,
            measures.verdict(picture),
            self._loras,
            encoded_anew=work.continued is not None and work.continued.encoded_anew(),
        )

    def _report_resumed(self) -> None:
        steps = self._chain.steps
        self._connection.send(messages.Resumed(sum(steps), steps if len(steps) > 1 else ()))

    def _resume_uncompiled(self, reason: str) -> None:
        """Continue without compiling; steps that compiled blocks computed are set aside.

        A video is computed in one way from start to end. If this process has compiled before, a fresh one
        tries again first: it may have compiled too much, and nothing is lost.
        """
        if self._work.helps:
            raise CannotHelpError(f"compiling failed ({reason})")
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
        self._chain.leave()
        self._resume()
        self._report_resumed()

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
        self._lap("load")
        self._report_ready(engine)
        self._listen()  # it took long
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
        while self._leave is None and self._chain.has_more(self._waits_for_clip):
            self._generate_clip(engine)

    def _generate_clip(self, engine: Engine) -> None:
        """Generate what is missing of the current clip; all that is computed is saved."""
        request = self._work.clips[self._chain.current]
        conditioned = self._engines.encode(request, engine)
        if conditioned.cuts:
            self._connection.send(messages.PromptsCut(conditioned.cuts))
        if not self._work.helps:
            self._previews.fit_to(request, conditioned.start_latents)
        self._lap("encode")
        self._report_ready(engine)
        try:
            for event in engine.sample(request, conditioned, self._chain.clip.progress):
                if isinstance(event, Step):
                    self._engines.compiled |= engine.compiled.on and event.computed
                    self._take_step(event)
                else:
                    self._take_clip(event)
                self._listen()
                if self._leave is not None:
                    if isinstance(event, Step) and not _is_saved(event):
                        copied = event.progress.to_host()
                        self._writer.start(partial(self._save, copied, self._chain.clip.notes()))
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
        self._chain.clip.progress = step.progress
        seconds = self._lap("sample")
        section = self._chain.sections_before + step.section + 1
        self._connection.send(messages.StepDone(section, step.step, seconds))
        if copied is None:
            return
        if step.step < step.steps:
            self._writer.start(partial(self._save, copied, self._chain.clip.notes()))
        else:  # at once: even if decoding kills this process, the section is sampled
            self._chain.clip.checkpoints.save(copied.wait(), self._chain.clip.notes())

    def _take_clip(self, clip: Clip) -> None:
        """Save a decoded section and report it."""
        self._writer.wait()
        self._chain.clip.progress = clip.progress
        seconds = self._lap("decode")
        chain, numbered = self._chain, self._in_chain(clip)
        keep = partial(self._keep, numbered, clip.progress.to_host(), chain.clip.notes())
        if chain.is_last and clip.section + 1 == clip.sections and not self._work.helps:
            self._keep_last = keep  # the video follows at once, and the device may have the next job
        else:
            self._writer.start(partial(keep, preview=chain.joins and not self._work.helps))
        self._connection.send(messages.SectionDecoded(numbered.section + 1, seconds))

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
            section=self._chain.sections_before + clip.section,
            frames=clip.frames[1:] if ends and self._chain.current else clip.frames,
        )

    def work_ahead(self) -> Work | None:
        """Give the work whose inputs are encoded next: the next clip, or the next job."""
        following = self._chain.following
        if following is None:
            return self._next
        return replace(self._work, request=self._work.clips[following], following=())

    def _listen(self) -> None:
        """Read what the daemon has sent meanwhile."""
        while self._connection.poll():
            message = self._connection.recv()
            if isinstance(message, messages.Next):
                self._next = message.work
            else:
                self._leave = message

    def _save(self, copied: HostCopy, notes: dict[str, Any], segment: bytes | None = None) -> None:
        self._chain.clip.checkpoints.save(copied.wait(), notes, segment)
        self._chain.clip.checkpoints.clear()

    def _keep(self, clip: Clip, copied: HostCopy, notes: dict[str, Any], *, preview: bool = False) -> None:
        """Save a section's files; all are durable before a checkpoint says that it is decoded."""
        measures = self._chain.clip.measures
        measures.add(clip.frames, finite=clip.finite)
        notes["quality"] = measures.to_json()
        self._save(copied, notes, self._video.encode(clip))
        if preview:
            self._video.write_preview(clip.progress.edge)

    def _lap(self, phase: str) -> float:
        """Add the time since the last call to a phase of the current clip; gives that time in seconds."""
        now = time.monotonic()
        taken, self._last_lap = now - self._last_lap, now
        seconds = self._chain.clip.seconds
        seconds[phase] = round(seconds.get(phase, 0.0) + taken, 3)
        return taken


def _is_saved(step: Step) -> bool:
    """Say whether a checkpoint is written after a step."""
    return step.computed or step.step == step.steps
