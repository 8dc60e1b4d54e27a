"""Makes several jobs of one drop, each with a seed, a name and a copy of the files of its own.

Taken in, the files lie in one work folder. Its manifest is made to say which variations there are to be; then
each gets a work folder, complete when it has its name; then the first one goes, its name before all. Whatever
a crash leaves, every variation is made once: from its own folder, or from the first one.
"""

import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from framepack_core.request import MAX_SEED
from framepackd import files
from framepackd.text import rest_of_name, taken_name

# As delivered: beside others of the name it got a number.
VARIATION = re.compile(r".+_seed_(?P<seed>[0-9]{1,10})(_[0-9]{3})?", re.DOTALL)


def seed_in(name: str) -> int | None:
    """Give the seed in the name of a variation, which was delivered and comes back.

    >>> seed_in("cat_seed_7"), seed_in("cat_seed_7_001"), seed_in("cat")
    (7, 7, None)
    """
    found = VARIATION.fullmatch(name)
    return int(found["seed"]) if found and int(found["seed"]) <= MAX_SEED else None


def choose_seeds(first: int | None, count: int) -> list[int]:
    """Give the seeds of the variations: from the first one on, or, if there is none, drawn, each another.

    >>> choose_seeds(4294967295, 3)
    [4294967295, 0, 1]
    """
    if first is not None:
        return [(first + number) % (MAX_SEED + 1) for number in range(count)]
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn[secrets.randbelow(MAX_SEED + 1)] = None
    return list(drawn)


def plan(manifest: dict[str, Any], seeds: list[int], ids: list[str]) -> dict[str, Any]:
    """Give the manifest of files that are taken in, with the variations that they are to become."""
    return manifest | {
        "variations": [
            {"id": identity, "name": f"{manifest['name']}_seed_{seed}", "seed": seed}
            for identity, seed in zip(ids, seeds, strict=True)
        ]
    }


def spread(work: Path, manifest: dict[str, Any], known: Collection[str], *, inputs: str, file: str) -> None:
    """Make the work folders of the variations that are not known yet, and remove the one they are made from.

    Goes on after a crash at any line. ``inputs`` and ``file`` are the names of the files' folder and of the
    manifest.

    Raises:
        OSError: there is no room; nothing is removed.
    """
    for variation in manifest["variations"]:
        folder = work.with_name(variation["id"])
        if variation["id"] in known or (folder / file).exists():
            continue
        if folder.exists():  # half-made by an earlier version
            files.discard_folder(folder)
        making = files.hidden_part(folder)
        if making.exists():  # half-made before a crash
            shutil.rmtree(making)
        (making / inputs).mkdir(parents=True)
        entries = []
        for entry in manifest["files"]:
            taken = taken_name(entry)
            name = variation["name"] + rest_of_name(taken, manifest["name"])
            files.copy(work / inputs / taken, making / inputs / name)
            path = str(Path(manifest["folder"]) / name)
            entries.append({"path": path, "role": entry["role"], "signature": []})
        files.sync_folder(making / inputs)
        own = {key: value for key, value in manifest.items() if key != "variations"}
        own |= {"name": variation["name"], "seed": variation["seed"], "files": entries}
        files.write_json(making / file, own)
        making.rename(folder)
    files.sync_folder(work.parent)
    files.discard_folder(work)  # without its name, from then on each variation stands for itself


def undo(work: Path, manifest: dict[str, Any], *, file: str) -> None:
    """Remove the variations' work folders, of which none is known yet: the files are to be given back.

    Raises:
        OSError: they cannot be removed.
    """
    for variation in manifest.pop("variations", ()):
        folder = work.with_name(variation["id"])
        if folder.exists():
            files.discard_folder(folder)
        making = files.hidden_part(folder)
        if making.exists():
            shutil.rmtree(making)
    files.write_json(work / file, manifest)
