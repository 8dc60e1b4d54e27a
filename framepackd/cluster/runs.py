"""The jobs that a bridge has given to its node: what is sent, what is written here, what is passed on."""

import math
from dataclasses import dataclass
from pathlib import Path

from framepackd.cluster import frames, inventory
from framepackd.cluster.inventory import Entry
from framepackd.cluster.located import LocatedError, to_json
from framepackd.cluster.mirror import Mirror
from framepackd.cluster.names import RefusedError
from framepackd.cluster.wire import PART_BYTES, Wire
from framepackd.jobs.folder import VIDEO
from framepackd.worker.main import DISK_ERRORS
from framepackd.worker.messages import (
    Blocked,
    Clear,
    Failed,
    Finished,
    Kept,
    Lowered,
    Message,
    Moved,
    Resumed,
    Sampled,
    SectionDecoded,
    StepDone,
    Work,
    Written,
)

MAX_LEVEL = 64  # of memory levels, of which a model has about ten
# No file of a job has as many bytes as all its frames in float32 RGB, but for headers and the noise of one
# latent frame, which take less than this.
PIXEL_BYTES, LEAST_BYTES = 12, 64 << 20


@dataclass
class _Run:
    """A job that the node does."""

    number: int
    work: Work
    mirror: Mirror
    sent: dict[Entry, Path]  # what the node may lack
    gone: bool = False  # the node has all
    keep: bool | None = None  # the daemon wishes that the node leaves it: keep what exists?
    instead: Message | None = None  # how it ends here, whatever the node says: a file could not be written
    over: bool = False  # the daemon knows how it has ended


class Runs:
    """At most one job that is computed and one that is written, and the number of each."""

    def __init__(self, wire: Wire, device: str) -> None:
        """Begin nothing yet; ``device`` is the node's name for it."""
        self._wire, self._device = wire, device
        self._last = 0
        self._computed: _Run | None = None
        self._written: _Run | None = None

    def begin(self, work: Work) -> Message | None:
        """Announce a job to the node; gives the message that ends it if it cannot be sent.

        Raises:
            ConnectionError: the link is gone.
        """
        self._last += 1
        folder = work.result.parent
        try:
            of_loras = inventory.of_loras(work)
            described = to_json(work, self._device, {path: entry.sha256 for entry, path in of_loras.items()})
            sent = {**inventory.of_folder(folder), **of_loras}
        except LocatedError as error:
            return Failed(str(error), retry=False)
        except OSError as error:
            return _failure(error, folder)
        largest = math.prod(work.size) * work.frames * PIXEL_BYTES + LEAST_BYTES
        self._computed = _Run(self._last, work, Mirror(folder, largest), sent)
        header = frames.header(frames.Begin(self._last, work.job_id))
        self._wire.send(header, frames.description(described, sent))
        return None

    def leave(self, *, keep: bool) -> None:
        """Have the node leave the job that it computes, at the next step."""
        run = self._computed
        if run is not None:
            run.keep = keep
            if run.gone:
                self._wire.send(frames.header(frames.Tell(run.number, keep)))

    def send_lacking(self, number: int, lacking: tuple[str, ...]) -> Message | None:
        """Send the node what it lacks of a job's files, and have it begin.

        Gives the message that ends the job if a file cannot be read.

        Raises:
            RefusedError: it asks for something else.
            ConnectionError: the link is gone.
        """
        run = self._computed
        if run is None or run.number != number:
            return None  # it has ended here meanwhile
        if run.gone:
            raise RefusedError(f"it lacks files of run {number}, which has begun")
        paths = {entry.name: (entry, path) for entry, path in run.sent.items()}
        for name in lacking:
            if name not in paths:
                raise RefusedError(f"it asks for {name[:80]!r}, which is no file of the job")
            try:
                self._send_file(number, *paths[name])
            except ConnectionError:
                raise
            except OSError as error:
                self._computed = None
                return _failure(error, run.work.result.parent)
        run.gone = True
        self._wire.send(frames.header(frames.Go(number)))
        if run.keep is not None:
            self.leave(keep=run.keep)
        return None

    def _send_file(self, number: int, entry: Entry, path: Path) -> None:
        with path.open("rb") as file:
            for offset in range(0, max(entry.size, 1), PART_BYTES):
                body = file.read(min(PART_BYTES, entry.size - offset))
                self._wire.send(frames.header(frames.Part(number, entry.name, offset)), body)

    def hear(self, said: frames.Said) -> Message | None:
        """Write what the node says of files; gives what the daemon is to hear of the rest.

        What is of a run that has ended is dropped.

        Raises:
            RefusedError: no worker says this.
        """
        run = next((run for run in (self._computed, self._written) if run and run.number == said.run), None)
        if run is None:
            return None
        match said.message:
            case Kept() | Clear() | Moved() as change:
                self._write(run, change)
                return None
            case Written(reply):
                return self._hear_written(run, reply)
        if run is not self._computed or not run.gone:
            raise RefusedError(f"it says {type(said.message).__name__} of a job that it does not compute")
        if isinstance(said.message, Sampled):
            if self._written is not None:
                raise RefusedError("it has sampled a job while it writes the video of another")
            self._written, self._computed = run, None
        elif isinstance(said.message, frames.ENDS):
            _check_end(run, said.message)
            self._computed = None
        else:
            _check_progress(run.work, said.message)
            return None if run.instead else said.message
        run.over = run.instead is not None
        return run.instead or said.message

    def _hear_written(self, run: _Run, reply: Message) -> Message | None:
        if run is not self._written:
            raise RefusedError("it has written the video of a job that it does not write")
        _check_end(run, reply)
        self._written = None
        return None if run.over else Written(run.instead or reply)

    def _write(self, run: _Run, change: Kept | Clear | Moved) -> None:
        if change.job_id != run.work.job_id:
            raise RefusedError(f"it tells of files of {change.job_id[:80]!r} in a run of {run.work.job_id}")
        if run.instead is not None:
            return
        try:
            match change:
                case Kept():
                    run.mirror.keep(change)
                case Clear():
                    run.mirror.clear(change)
                case Moved():
                    run.mirror.move(change)
        except OSError as error:
            run.instead = _failure(error, run.work.result.parent)
            if run is self._computed:
                self.leave(keep=False)


def _failure(error: OSError, folder: Path) -> Message:
    """Say how a job ends whose files cannot be read or written here; as a worker of this machine would."""
    if error.errno in DISK_ERRORS:
        return Blocked(f"{folder}: {error}")
    return Failed(f"{type(error).__name__}: {error}", retry=True)


def _check_progress(work: Work, message: Message) -> None:
    """Refuse numbers that no job like this has: the daemon counts with them."""
    steps = work.sections * work.request.steps
    match message:
        case StepDone(section, step, seconds):
            fits = 1 <= section <= work.sections and 1 <= step <= work.request.steps and seconds >= 0
        case SectionDecoded(section, seconds):
            fits = 1 <= section <= work.sections and seconds >= 0
        case Resumed(done, clips):
            own = clips or (done,)
            number = len(work.clips)
            fits = len(own) == number and sum(own) == done
            fits = fits and all(0 <= each <= steps // number for each in own)
        case Lowered(_, level):
            fits = 0 <= level <= MAX_LEVEL
        case _:
            fits = True
    if not fits:
        raise RefusedError(f"{message} is not of a job of {work.sections} sections")


def _check_end(run: _Run, message: Message) -> None:
    """Refuse a video that has not come, and counts of LoRAs' keys that are not those of the job's LoRAs."""
    if isinstance(message, Finished):
        if run.instead is None and not (run.work.result / VIDEO).is_file():
            raise RefusedError("it says that the video is made, and has not sent it")
        fits = len(message.loras) in (0, len(run.work.request.loras))
        if not fits or any(counts.keys() != {"matched", "unmatched", "keys"} for counts in message.loras):
            raise RefusedError(f"it counts keys of LoRAs that the job has not: {message.loras}"[:200])
