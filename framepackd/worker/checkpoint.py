"""The checkpoint format: a job's progress on disk, whole after any crash, at most one computed step old.

Latents, segments of video and edges are files of their own, written once; after each computed step a small
state file names them with their hashes. Every file is written aside, made durable and renamed. The last state
but one is kept until the newest is safe, and used if the newest is damaged. Where latents are damaged, the
job resumes from the sections before them. Unusable files are set aside, see :mod:`framepackd.jobs.aside`.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch

from framepack_core.progress import Progress
from framepack_core.sampling.step_cache import BranchState
from framepack_core.sampling.unipc import SolverState
from framepack_core.sections import Kind, chronological
from framepackd import files
from framepackd.jobs import aside
from framepackd.worker import other_device
from framepackd.worker.other_device import OtherDeviceError
from framepackd.worker.state_file import HASH_BYTES, DamagedError, read_header

log = logging.getLogger(__name__)

FORMAT = 2
KEPT_STATES = 2
_NAMES_DAMAGE = "names what is damaged"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk: how far the video is, and the notes saved with it."""

    progress: Progress
    notes: dict[str, Any] = field(default_factory=dict)  # JSON
    rewound: bool = False  # later sections' latents are lost: see Progress.without_later


@dataclass(frozen=True)
class _Reading:
    """A state, and which of the files that it names are whole."""

    state: Path
    checkpoint: Checkpoint
    hashes: dict[str, str]  # of the files that the job resumes from
    named: frozenset[str]  # all files that the state names
    wrong: dict[str, str]  # what is wrong, by file

    @property
    def sections(self) -> int:
        """How many sections need not be sampled again."""
        return len(self.checkpoint.progress.sampled)


class Checkpoints:
    """Writes a job's checkpoints, and reads the newest that is whole."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        tell: Callable[[str], None] = log.warning,
        *,
        former: Mapping[str, Any] = MappingProxyType({}),
        to_write: bool = False,
        elsewhere: Collection[str] = (),
        moves: bool = False,
    ) -> None:
        """Use a folder.

        Args:
            folder: where the checkpoints are; it need not exist.
            identity: JSON that names what the video's bits depend on; only equal checkpoints are loaded.
            former: parts of it as former versions wrote them; these are loaded too.
            tell: gets, before it happens, a text about what is set aside and why.
            to_write: only write what exists: any identity will do, and no latents are needed.
            elsewhere: the cards of other devices here: what they made waits for them.
            moves: it waits no longer, and is set aside.
        """
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._tell = tell
        self._former = self._identity | json.loads(json.dumps(dict(former)))
        self._to_write, self._elsewhere, self._moves = to_write, elsewhere, moves
        self._number = 0
        self._hashes: dict[str, str] = {}  # of the files that the newest state names
        self._kept: list[set[str]] = []  # per kept state: its own file and those it names

    def load(self) -> Checkpoint | None:
        """Read the newest whole checkpoint, or the whole part of one; None if the job must begin anew.

        A checkpoint of another request, model or version is never resumed: the mix would be neither video.
        It is set aside, as is a damaged one; a set aside one that fits again is restored.

        Raises:
            OtherDeviceError: only another device can resume it.
            OSError: the disk cannot be read or written now; that says nothing about its files.
        """
        found, wrong = self._read_best(self._folder)
        if found is not None and wrong:
            self._put_away(found, wrong)
        elif found is None:
            if wrong:
                self._put_all_away(wrong)
            found = self._restore()
        if found is None:
            self._number, self._hashes, self._kept = 0, {}, []
            return None
        self._number, self._hashes = _number(found.state), found.hashes
        self._kept = [{found.state.name, *found.named} - wrong.keys()]
        return found.checkpoint

    def save(self, progress: Progress, notes: dict[str, Any], segment: bytes | None = None) -> None:
        """Write a checkpoint, durable on return; ``segment`` is the video of a section just decoded.

        Raises:
            OSError: it could not be written; the one before still holds.
        """
        files.make_folder(self._folder)
        last = progress.decoded - 1
        hashes: dict[str, str] = {}
        for number, latents in enumerate(progress.sampled):
            hashes |= self._kept_or_written(_name("latents", number), latents)
        for number in range(progress.decoded):
            hashes |= self._kept_or_written(_name("segment", number), segment)
        if progress.edge is not None:
            hashes |= self._kept_or_written(_name("edge", last), progress.edge)
        tensors, described = _describe(progress)
        header = {
            "format": FORMAT,
            "identity": self._identity,
            "files": hashes,
            "progress": described,
            "notes": notes,
        }
        content = safetensors.torch.save(tensors, {"checkpoint": json.dumps(header)})
        own = f"state-{self._number + 1:08}"
        files.write_bytes(self._folder / own, hashlib.sha256(content).digest() + content)
        self._number, self._hashes = self._number + 1, hashes
        self._kept = [*self._kept[1 - KEPT_STATES :], {own, *hashes}]

    def clear(self) -> None:
        """Remove files that no kept state names; takes milliseconds, and is not urgent."""
        for path in self._folder.iterdir():
            if not any(path.name in names for names in self._kept):
                files.remove(path)

    def segments(self, kind: Kind) -> Iterator[bytes]:
        """Give the segments of the decoded sections in the order of time.

        Raises:
            DamagedError: one is not what was written.
        """
        names = sorted(name for name in self._hashes if name.startswith("segment-"))
        for name in chronological(kind, names):
            yield _read(self._folder / name, self._hashes[name])

    def _kept_or_written(self, name: str, made: torch.Tensor | bytes | None) -> dict[str, str]:
        if name in self._hashes:
            return {name: self._hashes[name]}
        assert made is not None, f"{name} must exist already"
        if isinstance(made, torch.Tensor):
            made = safetensors.torch.save({_kind(name): made.contiguous()})
        # Its name becomes durable with that of the state, which lies in the same folder and names it.
        files.write_bytes(self._folder / name, made, named=False)
        return {name: hashlib.sha256(made).hexdigest()}

    # reading

    def _read_best(self, folder: Path) -> tuple[_Reading | None, dict[str, str]]:
        """Read the newest whole state, else the one with the most whole sections.

        Also says what is wrong with each unusable file.
        """
        wrong: dict[str, str] = {}
        partly: list[_Reading] = []
        for path in sorted(folder.glob("state-*"), reverse=True):
            try:
                reading = self._load(path)
            except (FileNotFoundError, DamagedError) as error:
                wrong[path.name] = str(error)
                continue
            wrong |= reading.wrong
            if not reading.checkpoint.rewound:
                return reading, wrong
            partly.append(reading)
            wrong[path.name] = _NAMES_DAMAGE
        best = max(partly, key=lambda reading: reading.sections, default=None)
        if best is None or not best.sections:
            return None, wrong
        del wrong[best.state.name]
        return best, wrong

    def _load(self, path: Path) -> _Reading:
        content = path.read_bytes()
        header = read_header(content)
        self._verify(header)
        described, named = header["progress"], _Files(path.parent, header["files"])
        sampled = named.tensors("latents", described["sampled"])
        progress = _rebuild(safetensors.torch.load(content[HASH_BYTES:]), described, sampled)
        rewound = len(sampled) < described["sampled"] and not self._to_write
        progress = _as_decoded(progress, named)
        if rewound and progress.decoded > len(sampled):
            progress = replace(progress, decoded=0, edge=None)
        hashes = {name: sha for name, sha in named.hashes.items() if _is_part_of(progress, name)}
        checkpoint = Checkpoint(progress, header["notes"], rewound=rewound)
        return _Reading(path, checkpoint, hashes, frozenset(named.hashes), named.wrong)

    def _verify(self, header: Mapping[str, Any]) -> None:
        """Refuse what is of another format or identity."""
        theirs, ours = header.get("identity"), self._identity
        if header.get("format") != FORMAT:
            raise DamagedError(f"was made with another {_difference('format', header.get('format'), FORMAT)}")
        if not self._to_write and not self._moves:
            done = header["progress"]
            what = f"{self._folder} holds {done['sampled']} sections and {done.get('step', 0)} steps"
            other_device.refuse(theirs or {}, ours, what, self._elsewhere)
        if theirs not in (ours, self._former) and not self._to_write:
            raise DamagedError(f"was made with another {_difference('identity', theirs, ours)}")

    # unusable files

    def _put_away(self, found: _Reading, wrong: Mapping[str, str]) -> None:
        """Set aside the damaged files, and resume from the rest."""
        place = aside.next_place(self._folder)
        progress = found.checkpoint.progress
        steps = 0 if found.checkpoint.rewound else progress.step
        then = f"resuming after {len(progress.sampled)} sections and {steps} steps"
        if any(_kind(name) in ("segment", "edge") for name in wrong):
            then += ", whose pixels are decoded again"
        self._tell(f"{_reasons(wrong)}: {then}; the unusable files are kept in {place}")
        aside.move_files(self._folder, wrong, place)

    def _put_all_away(self, wrong: Mapping[str, str]) -> None:
        """Set aside the whole checkpoint, and begin anew."""
        place = aside.next_place(self._folder)
        self._tell(f"{_reasons(wrong)}: beginning anew; the old checkpoint is kept in {place}")
        aside.move(self._folder, place)

    def _restore(self) -> _Reading | None:
        """Restore a set aside checkpoint that fits again, as after a return to an older version."""
        for place in reversed(aside.places(self._folder)):
            if aside.is_given_up(place):
                continue
            try:
                found, wrong = self._read_best(place)
            except OtherDeviceError:
                continue
            if found is not None:
                self._tell(f"{place} can be used again: resuming from there")
                if self._folder.exists():  # without a state
                    aside.move(self._folder, aside.next_place(self._folder))
                aside.move(place, self._folder)
                if wrong:
                    self._put_away(found, wrong)
                return found
        return None


class _Files:
    """The files that a state names; notes which are unusable."""

    def __init__(self, folder: Path, hashes: dict[str, str]) -> None:
        self.hashes = hashes
        self.wrong: dict[str, str] = {}
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        """Read a file; None if it is not what was written, or is missing."""
        try:
            return _read(self._folder / name, self.hashes[name])
        except FileNotFoundError:
            self.wrong[name] = "is missing"
        except DamagedError as error:
            self.wrong[name] = str(error)
        return None

    def tensors(self, kind: str, count: int) -> tuple[torch.Tensor, ...]:
        """Read the first files of a kind, up to an unusable one; the later ones are checked too."""
        contents = [self.read(_name(kind, number)) for number in range(count)]
        whole = takewhile(lambda content: content is not None, contents)
        return tuple(safetensors.torch.load(content)[kind] for content in whole if content is not None)


def _as_decoded(progress: Progress, named: _Files) -> Progress:
    """Add the edge of the decoded sections; if any of their files is unusable, decode all again."""
    whole = [named.read(_name("segment", number)) is not None for number in range(progress.decoded)]
    edge_name = _name("edge", progress.decoded - 1)
    edge = named.read(edge_name) if edge_name in named.hashes else b""
    if not all(whole) or edge is None:
        return replace(progress, decoded=0)
    return replace(progress, edge=safetensors.torch.load(edge)["edge"]) if edge else progress


def _is_part_of(progress: Progress, name: str) -> bool:
    """Say whether a resume from this progress needs a file."""
    kind, _, number = name.partition("-")
    return int(number) < (len(progress.sampled) if kind == "latents" else progress.decoded)


def _read(path: Path, sha256: str) -> bytes:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedError("is not what was written")
    return content


def _reasons(wrong: Mapping[str, str]) -> str:
    told: dict[str, str] = {}
    for name, why in wrong.items():
        told.setdefault(why, name)
    return ", ".join(f"{name} {why}" for why, name in told.items() if why != _NAMES_DAMAGE)


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:04}"


def _kind(name: str) -> str:
    return name.partition("-")[0]


def _number(state: Path) -> int:
    return int(state.name.removeprefix("state-"))


def _difference(what: str, theirs: Any, ours: Any) -> str:
    """Name what differs between two formats or identities."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"{what} ({theirs}, now {ours})"
    keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    return ", ".join(f"{key} ({theirs.get(key)}, now {ours.get(key)})" for key in keys)


def _describe(progress: Progress) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split a state into tensors for safetensors, each stored once, and JSON for the rest."""
    solver, cache = progress.solver, progress.cache
    named = {"noise": progress.noise}
    described: dict[str, Any] = {"sampled": len(progress.sampled), "decoded": progress.decoded}
    if solver is not None:
        described["step"] = solver.step
        described["denoised"] = len(solver.denoised)
        named |= {"latents": solver.latents}
        named |= {f"denoised.{number}": tensor for number, tensor in enumerate(solver.denoised)}
    if cache is not None:
        described["cache"] = {}
        for branch, state in cache.items():
            described["cache"][branch] = {"accumulated": state.accumulated, "computed": state.computed}
            named |= {f"{branch}.last": state.last, f"{branch}.last_computed": state.last_computed}
    tensors: dict[str, torch.Tensor] = {}
    described["stored"] = {}
    stored_at: dict[int, str] = {}
    for name, tensor in named.items():
        described["stored"][name] = stored_at.setdefault(tensor.data_ptr(), name)
        tensors[described["stored"][name]] = tensor.contiguous()
    return tensors, described


def _rebuild(
    tensors: dict[str, torch.Tensor], described: dict[str, Any], sampled: tuple[torch.Tensor, ...]
) -> Progress:
    named = {name: tensors[stored] for name, stored in described["stored"].items()}
    solver, cache = None, None
    if "step" in described:
        denoised = tuple(named[f"denoised.{number}"] for number in range(described["denoised"]))
        solver = SolverState(described["step"], named["latents"], denoised)
    if "cache" in described:
        cache = {
            branch: BranchState(
                accumulated=state["accumulated"],
                computed=tuple(state["computed"]),
                last=named[f"{branch}.last"],
                last_computed=named[f"{branch}.last_computed"],
            )
            for branch, state in described["cache"].items()
        }
    return Progress(named["noise"], sampled, described["decoded"], solver=solver, cache=cache)
