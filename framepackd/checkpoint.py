"""A job's progress on disk: after any crash it is there, whole, at most one step old.

Latents, segments of video and edges are files of their own, written once; a small state file after each step
names them with their hashes. Everything is written aside, made durable and renamed. The state before the
newest is kept until the newest is safe, and taken up if the newest is damaged.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from framepack_core.cache import BranchState
from framepack_core.progress import Progress
from framepack_core.sampling import SolverState
from framepack_core.sections import Kind, chronological
from framepackd import files

log = logging.getLogger(__name__)

FORMAT = 2
KEPT_STATES = 2
_HASH_BYTES = hashlib.sha256().digest_size


class DamagedError(Exception):
    """A file is not what was written, or belongs to something else."""


@dataclass(frozen=True)
class Checkpoint:
    """What is on disk: how far the video is, and what was noted beside."""

    progress: Progress
    notes: dict[str, Any] = field(default_factory=dict)  # JSON


class Checkpoints:
    """Writes a job's checkpoints, and reads the newest that is whole."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Use a folder; ``identity`` (JSON) says what they are checkpoints of: no others are loaded."""
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._number = 0
        self._hashes: dict[str, str] = {}  # of the files that the newest state names
        self._kept: list[set[str]] = []  # per kept state: its own file and those it names

    def load(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; None to begin at the beginning.

        Those of another request, model or version are not gone on from: mixing would give the video of
        neither. They lie there until a new one is durable.

        Raises:
            OSError: the disk cannot be read just now: nothing is said about what is on it.
        """
        states = sorted(self._folder.glob("state-*"), reverse=True)
        for path in states:
            try:
                return self._load(path)
            except (FileNotFoundError, DamagedError) as error:
                log.warning("checkpoint %s cannot be gone on from: %s", path.name, error)
        self._number = _number(states[0]) if states else 0
        self._hashes, self._kept = {}, []
        return None

    def save(self, progress: Progress, notes: dict[str, Any], segment: bytes | None = None) -> None:
        """Write a checkpoint, durable when it returns; ``segment`` is the video of a section just decoded.

        Raises:
            OSError: it could not be written; the one before holds.
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
        """Remove what no kept state needs; takes milliseconds, and is not urgent."""
        for path in self._folder.iterdir():
            if not any(path.name in names for names in self._kept):
                path.unlink()

    def segments(self, kind: Kind) -> Iterator[bytes]:
        """Give the video of the decoded sections, piece by piece in the order of time.

        Raises:
            DamagedError: they are not what was written.
        """
        names = sorted(name for name in self._hashes if name.startswith("segment-"))
        for name in chronological(kind, names):
            yield self._read(name)

    def _kept_or_written(self, name: str, made: torch.Tensor | bytes | None) -> dict[str, str]:
        if name in self._hashes:
            return {name: self._hashes[name]}
        assert made is not None, f"{name} was written when it was new"
        if isinstance(made, torch.Tensor):
            made = safetensors.torch.save({_kind(name): made.contiguous()})
        # Its name becomes durable with that of the state, which is written next to it and names it.
        files.write_bytes(self._folder / name, made, named=False)
        return {name: hashlib.sha256(made).hexdigest()}

    # reading

    def _load(self, path: Path) -> Checkpoint:
        content = path.read_bytes()
        digest, content = content[:_HASH_BYTES], content[_HASH_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise DamagedError("it is not what was written")
        header = _header(content)
        for key, ours in (("format", FORMAT), ("identity", self._identity)):
            if header[key] != ours:
                raise DamagedError(f"it was made with another {_difference(key, header[key], ours)}")
        self._number, self._hashes = _number(path), header["files"]
        described = header["progress"]
        sampled = [self._read_tensor(_name("latents", number)) for number in range(described["sampled"])]
        progress = _rebuild(safetensors.torch.load(content), described, tuple(sampled))
        try:
            for number in range(progress.decoded):
                self._read(_name("segment", number))
            edge = _name("edge", progress.decoded - 1)
            if edge in self._hashes:
                progress = replace(progress, edge=self._read_tensor(edge))
        except (FileNotFoundError, DamagedError) as error:
            log.warning("decoding all sections again: %s", error)  # their latents are whole
            progress = replace(progress, decoded=0, edge=None)
            self._hashes = {name: sha for name, sha in self._hashes.items() if name.startswith("latents-")}
        self._kept = [{path.name, *self._hashes}]
        return Checkpoint(progress, header["notes"])

    def _read(self, name: str) -> bytes:
        content = (self._folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != self._hashes[name]:
            raise DamagedError(f"{name} is not what was written")
        return content

    def _read_tensor(self, name: str) -> torch.Tensor:
        return safetensors.torch.load(self._read(name))[_kind(name)]


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:04}"


def _kind(name: str) -> str:
    return name.partition("-")[0]


def _number(state: Path) -> int:
    return int(state.name.removeprefix("state-"))


def _header(content: bytes) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")  # as safetensors lays it out
    header: dict[str, Any] = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["checkpoint"])
    return header


def _difference(what: str, theirs: Any, ours: Any) -> str:
    """Name what differs between two formats or identities."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"{what} ({theirs}, now {ours})"
    keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    return ", ".join(f"{key} ({theirs.get(key)}, now {ours.get(key)})" for key in keys)


def _describe(progress: Progress) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Take a state apart into tensors for safetensors, which wants each once, and JSON for the rest."""
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
