"""Makes several jobs of one drop, each with its own seed, name and copy of the files.

The files are taken into one work folder, whose manifest then names the variations. Each variation gets a work
folder, which is complete when it has its name. Then the first folder is removed, its name first.
Whatever a crash leaves, every variation is made once: from its own folder, or from the first one.
"""

import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from framepack_core.request import MAX_SEED
from framepackd import files
from framepackd.jobs.folder import INPUTS, MANIFEST, DroppedFile, Manifest, Variation
from framepackd.text import rest_of_name

# As delivered: a number follows if the name was taken.
VARIATION = re.compile(r".+_seed_(?P<seed>[0-9]{1,10})(_[0-9]{3})?", re.DOTALL)


def seed_in(name: str) -> int | None:
    """Give the seed in the name of a variation; None if the name is not one.

    >>> seed_in("cat_seed_7"), seed_in("cat_seed_7_001"), seed_in("cat")
    (7, 7, None)
    """
    found = VARIATION.fullmatch(name)
    return int(found["seed"]) if found and int(found["seed"]) <= MAX_SEED else None


def choose_seeds(first: int | None, count: int) -> list[int]:
    """Give the seeds of the variations: counting up from the first one, or drawn if there is none.

    >>> choose_seeds(4294967295, 3)
    [4294967295, 0, 1]
    """
    if first is not None:
        return [(first + number) % (MAX_SEED + 1) for number in range(count)]
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn[secrets.randbelow(MAX_SEED + 1)] = None
    return list(drawn)


def plan(manifest: Manifest, seeds: list[int], ids: list[str]) -> Manifest:
    """Add to a manifest the variations that its files are to become."""
    variations = tuple(
        Variation(id=identity, name=f"{manifest.name}_seed_{seed}", seed=seed)
        for identity, seed in zip(ids, seeds, strict=True)
    )
    return manifest.model_copy(update={"variations": variations})


def spread(work: Path, manifest: Manifest, known: Collection[str]) -> None:
    """Make the work folders of the variations that are not known yet, then remove the one they come from.

    Resumes after a crash at any line.

    Raises:
        OSError: there is no room; nothing is removed.
    """
    for variation in manifest.variations:
        folder = work.with_name(variation.id)
        if variation.id in known or (folder / MANIFEST).exists():
            continue
        if folder.exists():  # half-made by an earlier version
            files.discard_folder(folder)
        making = files.hidden_part(folder)
        if making.exists():  # half-made before a crash
            shutil.rmtree(making)
        (making / INPUTS).mkdir(parents=True)
        copies = []
        for file in manifest.files:
            name = variation.name + rest_of_name(file.taken_name, manifest.name)
            files.copy(work / INPUTS / file.taken_name, making / INPUTS / name)
            copies.append(DroppedFile(path=str(Path(manifest.folder, name)), role=file.role, signature=()))
        files.sync_folder(making / INPUTS)
        own = {"name": variation.name, "seed": variation.seed, "files": tuple(copies), "variations": ()}
        manifest.model_copy(update=own).write(making)
        making.rename(folder)
    files.sync_folder(work.parent)
    files.discard_folder(work)  # its name goes first: from then on only the variations are found


def undo(work: Path, manifest: Manifest) -> None:
    """Remove the variations' work folders, none of which is known yet: the files return to the inbox.

    Raises:
        OSError: they cannot be removed.
    """
    for variation in manifest.variations:
        folder = work.with_name(variation.id)
        if folder.exists():
            files.discard_folder(folder)
        making = files.hidden_part(folder)
        if making.exists():
            shutil.rmtree(making)
    manifest.model_copy(update={"variations": ()}).write(work)
