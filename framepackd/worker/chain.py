"""The clips of a job: what exists of each, and which one this worker makes.

Other workers may make clips of the same job. Each locks the one that it makes. The kernel ends the lock with
the process, however that ends; what was made is then in the clip's checkpoint.
"""

import fcntl
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framepack_core.errors import FramePackError
from framepack_core.media import extend
from framepack_core.progress import Progress
from framepackd import files
from framepackd.worker import identity
from framepackd.worker.checkpoint import Checkpoints
from framepackd.worker.messages import Work
from framepackd.worker.quality import Measures


class CannotHelpError(FramePackError):
    """Only the worker that computes the job decides what becomes of what exists of it."""


@dataclass
class ClipMade:
    """What exists of one clip."""

    checkpoints: Checkpoints
    progress: Progress
    whole: bool = False  # decoded to its end; its latents are then in its checkpoint only
    seconds: dict[str, float] = field(default_factory=dict)  # how long each phase took, over all runs
    measures: Measures = field(default_factory=Measures)

    def notes(self) -> dict[str, Any]:
        """Give, as JSON, what a checkpoint holds besides the progress."""
        return {"seconds": dict(self.seconds), "quality": self.measures.to_json()}


class Chain:
    """The clips of a job in the order of time; a job without a chain has one."""

    def __init__(self, work: Work, computed: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        """Load what exists of the clips, and enter the first that is not whole.

        Args:
            work: the job. A worker that only helps loads no more than the clip that it enters.
            computed: JSON that names what the video's bits depend on.
            tell: gets, before it happens, a text about what is set aside and why.

        Raises:
            OtherDeviceError: only another device can resume it; nothing was changed.
            OSError: the disk cannot be read or written now.
        """
        self._work = work
        self._computed, self._tell = computed, _refuse if work.helps else tell
        self._lock = ExitStack()  # of the current clip
        self._entered = False
        self.current = 0  # from 0
        self.clips = [self._nothing_of(number) for number in range(len(work.clips))]
        if work.helps:
            self.enter_next()
            return
        for number in range(len(self.clips)):
            with ExitStack() as lock:
                if self._take(number, lock):
                    self._load(number)
                    if not self._entered and not self.clips[number].whole:
                        self.current, self._entered, self._lock = number, True, lock.pop_all()
            if self._entered and work.keep_only:  # a video ends with its first gap
                return

    @property
    def clip(self) -> ClipMade:
        """The current clip, or the one that was current last."""
        return self.clips[self.current]

    @property
    def sections_per_clip(self) -> int:
        """The sections of each clip."""
        return self._work.sections // len(self.clips)

    @property
    def sections_before(self) -> int:
        """The sections of the clips before the current one."""
        return self.current * self.sections_per_clip

    @property
    def steps(self) -> tuple[int, ...]:
        """How many steps of each clip are done."""
        steps = self._work.request.steps
        return tuple(
            self.sections_per_clip * steps
            if clip.whole
            else len(clip.progress.sampled) * steps + clip.progress.step
            for clip in self.clips
        )

    @property
    def is_last(self) -> bool:
        """Whether all other clips are whole."""
        return all(clip.whole for clip in self.clips if clip is not self.clip)

    @property
    def joined(self) -> list[ClipMade]:
        """The clips of the video that exists: those from the first on, up to one that is not whole."""
        gap = next((number for number, clip in enumerate(self.clips) if not clip.whole), None)
        return self.clips if gap is None else self.clips[: gap + 1]

    @property
    def joins(self) -> bool:
        """Whether the current clip is part of the video that exists."""
        return self.current < len(self.joined)

    @property
    def following(self) -> int | None:
        """The clip that this worker probably makes next."""
        later = range(self.current + 1, len(self.clips))
        return (
            None if self._work.helps else next((each for each in later if not self.clips[each].whole), None)
        )

    @property
    def sections_joined(self) -> int:
        """The sections of the video that exists."""
        *whole, last = self.joined
        decoded = self.sections_per_clip if last.whole else last.progress.decoded
        return len(whole) * self.sections_per_clip + decoded

    def has_more(self, waits: Callable[[], bool] = lambda: False) -> bool:
        """Say whether something is left to make here; enters the next clip once the current one is whole.

        ``waits`` is called again and again while other workers make all that is left; it waits a moment, and
        says whether to go on waiting.
        """
        if self._entered and self.clip.progress.decoded < self.sections_per_clip:
            return True
        if self._entered and self.is_last:
            return False  # it stays locked until its last section is saved
        while not self.enter_next():
            if self._work.helps or all(clip.whole for clip in self.clips) or not waits():
                return False
        return True

    def enter_next(self) -> bool:
        """Enter a clip that is not whole and that no other worker makes; False if there is none."""
        self.leave()
        numbers = [number for number, clip in enumerate(self.clips) if not clip.whole]
        # Those who help begin at the end: the video is seen from its start on while it grows.
        for number in reversed(numbers) if self._work.helps else numbers:
            with ExitStack() as lock:
                if self._take(number, lock):
                    self._load(number)
                    if not self.clips[number].whole:
                        self.current, self._entered, self._lock = number, True, lock.pop_all()
                        return True
        return False

    def leave(self) -> None:
        """Let other workers make the current clip."""
        if self._entered:
            self._note_whole(self.clip)
        self._entered = False
        self._lock.close()

    def look_again(self) -> None:
        """Load what other workers have made of the video that exists, once they have left it."""
        self.leave()
        for number, clip in enumerate(self.clips):
            if not clip.whole:
                with ExitStack() as lock:
                    self._take(number, lock, wait=True)
                    self._load(number)
            if not self.clips[number].whole:
                return

    def _take(self, number: int, lock: ExitStack, *, wait: bool = False) -> bool:
        """Lock a clip, unless another worker has it; says whether this one has."""
        if not self._work.following:
            return True
        path = self._folder(number).with_suffix(".lock")
        files.make_folder(path.parent)
        file = lock.enter_context(path.open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _folder(self, number: int) -> Path:
        folder = self._work.checkpoint
        return folder / f"clip-{number + 1:04}" if self._work.following else folder

    def _nothing_of(self, number: int) -> ClipMade:
        work = self._work
        checkpoints = Checkpoints(
            self._folder(number),
            self._computed,
            self._tell,
            former=identity.former(work),
            to_write=work.keep_only,
            elsewhere=work.elsewhere,
            moves=work.moves,
        )
        return ClipMade(checkpoints, Progress.start(work.request.seed))

    def _load(self, number: int) -> None:
        """Load what exists of a clip; another worker may have made some of it."""
        clip = self.clips[number] = self._nothing_of(number)
        found = clip.checkpoints.load()
        if found is None:
            return
        clip.progress = found.progress
        if found.rewound:
            clip.progress = found.progress.without_later(self._work.request.seed, _noises_before(self._work))
        clip.seconds = dict(found.notes["seconds"])
        if clip.progress.decoded:
            clip.measures = Measures.from_json(found.notes["quality"])
        self._note_whole(clip)

    def _note_whole(self, clip: ClipMade) -> None:
        if clip.progress.decoded == self.sections_per_clip:
            clip.whole, clip.progress = True, Progress.start(self._work.request.seed)


def _refuse(why: str) -> None:
    raise CannotHelpError(why)


def _noises_before(work: Work) -> int:
    """Count the sections of the video that the job extends: their noise is drawn and dropped."""
    if work.continued is None:
        return 0
    return extend.sections_taken(work.continued.known, work.request.latent_window_size)
