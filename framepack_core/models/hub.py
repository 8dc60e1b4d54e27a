"""Finds a model's files on this machine, fetches weights, and checks files against their published hashes.

The hub's cache names a file's content by its hash: SHA-256 for large files, git's SHA-1 for others. So cached
files can be verified without the network.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_hf_file_metadata,
    get_token,
    hf_hub_url,
    is_offline_mode,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name

from framepack_core.errors import ModelError
from framepack_core.models import registry, weight_files
from framepack_core.models.headers import read_header
from framepack_core.models.registry import Components, ModelSpec, Source

SHA256_DIGITS, SHA1_DIGITS = 64, 40
PART = ".part"  # suffix of weights that are being fetched; their name is the hash
COMMIT = re.compile(r"[0-9a-f]{40}")
READ_AT_ONCE = 1 << 20
ANSWER_SECONDS = 10.0  # timeout of the hub's answer when only sizes are asked for

Sizes = dict[str, int | None]  # path in the source -> bytes; None: not known without asking the hub


@dataclass(frozen=True)
class Holding:
    """The files of one of a model's sources that are used: which are here, which are missing."""

    source: Source
    folder: Path  # where it is, or would be
    here: Sizes
    missing: Sizes

    @property
    def size(self) -> int:
        """Bytes that are here."""
        return sum(filter(None, self.here.values()))

    @property
    def to_fetch(self) -> int | None:
        """Bytes that are missing; None if not all sizes are known."""
        known = [size for size in self.missing.values() if size is not None]
        return sum(known) if len(known) == len(self.missing) else None


def offline() -> bool:
    """Return whether the environment forbids requests to the hub (HF_HUB_OFFLINE)."""
    return bool(is_offline_mode())


def cache_folder() -> Path:
    """Give the folder in which the hub's client keeps its files."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def holdings(spec: ModelSpec, *, ask: bool) -> list[Holding]:
    """Find which files of each source of a model are here.

    Args:
        spec: the model.
        ask: whether to ask the hub for names and sizes that are not known here.

    Raises:
        ModelError: the hub does not answer or has no such repository, or an index of weights is damaged.
    """
    return [_holding(source, components, spec, ask=ask) for source, components in registry.parts(spec)]


def _holding(source: Source, components: Components, spec: ModelSpec, *, ask: bool) -> Holding:
    folder = source.folder if source.is_local else _snapshot(source)
    if source.is_local and registry.is_file(folder):
        files = weight_files.choose(folder, "transformer")
        lying_here: Sizes = {path.name: path.stat().st_size for path in files.here}
        return Holding(source, folder.parent, lying_here, dict.fromkeys(path.name for path in files.missing))
    wanted = registry.patterns(components)
    listing = None if source.is_local else _cached_listing(source)
    # Without a listing: at least the files that every model needs.
    missing: Sizes = {str(path.relative_to(folder)): None for path in registry.missing(folder, components)}
    if listing is None and missing and ask and not source.is_local:
        listing = _listing(source, spec)
    if listing is not None:
        missing = {}  # the listing has the real names of the weights
    lying = (path for component in components for path in (folder / component).glob("*"))
    sizes: Sizes = {str(path.relative_to(folder)): None for path in lying if not path.is_dir()}
    sizes |= listing or {}
    here: Sizes = {}
    for name in sizes:
        hidden = any(fnmatch(name, pattern) for pattern in registry.HIDDEN)
        if hidden or not any(fnmatch(name, pattern) for pattern in wanted):
            continue
        path = folder / name
        if path.is_file():
            here[name] = path.stat().st_size
        else:  # not here, or a dangling link
            missing[name] = sizes[name]
    return Holding(source, folder, here, missing)


def _storage(source: Source) -> Path:
    return cache_folder() / repo_folder_name(repo_id=source.location, repo_type="model")


def _snapshot(source: Source) -> Path:
    """Give the folder in the hub's cache with a repository's files at a revision."""
    storage = _storage(source)
    revision = source.revision or constants.DEFAULT_REVISION
    reference = storage / "refs" / revision
    if not COMMIT.fullmatch(revision) and reference.is_file():
        revision = reference.read_text().strip()
    return storage / "snapshots" / revision


def _cached_listing(source: Source) -> dict[str, int] | None:
    """List a repository's files as the cache remembers them; None if it does not."""
    try:
        files = get_cached_repo_tree(source.location, revision=source.revision)
        return {file.path: file.size for file in files}
    except CachedRepoTreeNotFoundError:
        return None


def _listing(source: Source, spec: ModelSpec) -> dict[str, int]:
    """Ask the hub for a list of a repository's files."""
    with registry.explained(source, spec):
        found = HfApi().model_info(
            source.location, revision=source.revision, files_metadata=True, timeout=ANSWER_SECONDS
        )
        return {file.rfilename: file.size or 0 for file in found.siblings or []}


@dataclass(frozen=True)
class StoredFile:
    """One file of a model, and its published hash."""

    path: Path
    size: int
    digest: str | None  # SHA-256 or git's SHA-1; None: it is not in the hub's cache

    def fault(self, content: BinaryIO) -> str | None:
        """Read the whole file and describe its fault; None if it has none.

        ``content`` is the opened file, or a reader of it that shows progress.
        """
        if self.digest is None:
            return self._header_fault()
        sha = hashlib.sha256() if len(self.digest) == SHA256_DIGITS else hashlib.sha1(usedforsecurity=False)
        if len(self.digest) == SHA1_DIGITS:
            sha.update(b"blob %d\0" % self.size)
        while block := content.read(READ_AT_ONCE):
            sha.update(block)
        found = sha.hexdigest()
        return None if found == self.digest else f"has hash {found[:12]}…, published is {self.digest[:12]}…"

    def _header_fault(self) -> str | None:
        if self.path.suffix != ".safetensors":
            return None
        try:
            read_header(self.path)
        except ValueError as error:
            return str(error)
        return None


def fetch_weights(held: Holding, spec: ModelSpec) -> None:
    """Fetch the missing weights; an interrupted file is resumed where its download stopped.

    The hub's client would begin such a file again. A file gets its name only after its hash is checked.

    Raises:
        ModelError: the hub does not answer, or sent something else than was published.
    """
    for name in sorted(name for name in held.missing if name.endswith(".safetensors")):
        with registry.explained(held.source, spec):
            _fetch(held.source, name)


def _fetch(source: Source, name: str) -> None:
    url = hf_hub_url(source.location, name, revision=source.revision)
    token = get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    published = get_hf_file_metadata(url, headers=headers)
    digest, size = published.etag or "", published.size or 0
    blob = _storage(source) / "blobs" / digest
    if len(digest) != SHA256_DIGITS or size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # download() leaves it to the client
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(source, digest)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if blob.exists():
            return  # the client will link to it
        part = blob.with_name(f"{digest}{PART}")
        with part.open("r+b" if part.exists() else "w+b") as file:
            begun = file.seek(0, os.SEEK_END)
            if begun > size:
                begun = file.truncate(file.seek(0))
            http_get(
                url, file, resume_size=begun, headers=headers, expected_size=size, displayed_filename=name
            )
        with part.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != digest:
            part.unlink()
            raise ModelError(f"{source}: {name} arrived damaged and was removed: run the command again")
        part.rename(blob)


def _lock(source: Source, digest: str) -> Path:
    """Give the file that the client locks while it fetches the content with this hash."""
    return cache_folder() / ".locks" / _storage(source).name / f"{digest}.lock"


def begun(source: Source) -> int:
    """Count the bytes of missing weights that an interrupted download has left."""
    return sum(part.stat().st_size for part in (_storage(source) / "blobs").glob(f"*{PART}"))


def clear_leftovers(source: Source) -> int:
    """Remove the client's own interrupted downloads, which cannot be resumed; return their bytes.

    A download that is running in another process stays: that process holds the client's lock.
    """
    freed = 0
    for part in (_storage(source) / "blobs").glob("*.incomplete"):
        lock = _lock(source, part.name.partition(".")[0])
        with contextlib.suppress(OSError), lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = part.stat().st_size
            part.unlink()
            freed += size
    return freed


def stored_files(holding: Holding) -> Iterator[StoredFile]:
    """List the files of a source that are here."""
    for name, size in holding.here.items():
        path = holding.folder / name
        # One link only: the cache's blob may itself be a link into a shared store.
        linked = path.is_symlink() and not holding.source.is_local
        blob = path.readlink().name if linked else ""
        known = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob)
        yield StoredFile(path, size or 0, blob if known else None)
