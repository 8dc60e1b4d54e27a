"""Finds the files in a folder that hold a part's weights, whatever their names and shards. No torch here."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from framepack_core.errors import ModelError
from framepack_core.models.headers import OtherKindError, read_header

_SHARD = re.compile(
    r"(?P<stem>.*?)[-_.]?(?P<number>[0-9]+)-of-(?P<count>[0-9]+)(?P<rest>.*)\.safetensors", re.IGNORECASE
)
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(\.(?P<variant>.+))?\.json", re.IGNORECASE)
_OTHERS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".sft", ".h5", ".msgpack", ".onnx")


class WeightFiles(NamedTuple):
    """The files that hold the weights of a part: those that are here, and those that are missing."""

    here: tuple[Path, ...]
    missing: tuple[Path, ...]


def visible(folder: Path) -> list[Path]:
    """List the files of a folder, without hidden ones such as macOS's ``._model.safetensors``."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith(".") and path.is_file())


def choose(place: Path, part: str) -> WeightFiles:
    """Find the files that hold a part's weights.

    A file stands for itself, or for all shards of its set. A folder may hold one set of weights under any
    name: in one file, or in shards with an index or numbered names. Of several sets, the one with the
    libraries' name is chosen.

    Args:
        place: a folder, or a file.
        part: of the model; decides the libraries' name.

    Raises:
        ModelError: several sets are there and none has the libraries' name, or an index is damaged.
    """
    folder = place if place.is_dir() else place.parent
    files = visible(folder)
    sets = _sets(folder, [file for file in files if file.suffix.lower() == ".safetensors"])
    if place != folder:
        own = (found for found in sets.values() if place in found.here)
        return next(own, WeightFiles((place,), ()) if place.is_file() else WeightFiles((), (place,)))
    for index in files:
        if named := _INDEX.fullmatch(index.name):
            indexed = _indexed(index)
            inside = {*indexed.here, *indexed.missing}
            sets = {name: found for name, found in sets.items() if inside.isdisjoint(found.here)}
            if indexed.here or not sets:  # else the index is a leftover
                sets[".".join(filter(None, (named["stem"], named["variant"])))] = indexed
    usual = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"  # the libraries' name
    if len(sets) > 1 and usual not in sets:
        names = ", ".join(path.name for found in sets.values() for path in found.here[:1])
        raise ModelError(
            f"{folder} holds several sets of weights ({names}): keep only the one to use"
            + (", or give its file instead of the folder" if part == "transformer" else "")
        )
    if not sets:
        return WeightFiles((), (folder / f"{usual}.safetensors",))
    return sets[usual] if usual in sets else next(iter(sets.values()))


def _sets(folder: Path, files: Iterable[Path]) -> dict[str, WeightFiles]:
    """Group files into sets of shards, by their names without the numbers."""
    sets = dict[str, WeightFiles]()
    numbers = dict[tuple[str, str], dict[int, Path]]()
    for file in files:
        shard = _SHARD.fullmatch(file.name)
        if shard is None:
            sets[file.stem] = WeightFiles((file,), ())
        else:
            key = file.name[: shard.start("number")], file.name[shard.end("number") :]
            numbers.setdefault(key, {})[int(shard["number"])] = file
    for (before, behind), found in numbers.items():
        shard = _SHARD.fullmatch(next(iter(found.values())).name)
        assert shard is not None  # it matched above
        width, count = len(shard["number"]), int(shard["count"])
        first = 0 if 0 in found else 1
        lacking = sorted({*range(first, first + count)} - found.keys())
        sets[f"{shard['stem']}{shard['rest']}"] = WeightFiles(
            tuple(found[number] for number in sorted(found)),
            tuple(folder / f"{before}{number:0{width}}{behind}" for number in lacking),
        )
    return sets


def _indexed(index: Path) -> WeightFiles:
    """Give the files that an index names; never a pickle."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        safe = all(Path(shard).name == shard and shard.endswith(".safetensors") for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{index} is damaged ({error!r}): download it again") from error
    if not safe or not shards:
        raise ModelError(
            f"{index} names files that are not safetensors in its folder: use a model whose index does"
        )
    files = [index.with_name(shard) for shard in shards]
    return WeightFiles(
        tuple(file for file in files if file.is_file()), tuple(file for file in files if not file.is_file())
    )


def instead(lacking: Path) -> str:
    """Name, for a message, a file that is there and may be meant instead of a missing one; else empty."""
    files = visible(lacking.parent)
    if lacking.name == "config.json":
        weights = [file.name for file in files if file.suffix.lower() == ".safetensors"]
        named = ", ".join(weights[:3]) + (" ..." if len(weights) > 3 else "")
        return f" ({named} is there; for a transformer, give its file instead)" if weights else ""
    for file in files if lacking.suffix == ".safetensors" else ():
        if file.suffix.lower() in _OTHERS:
            try:
                read_header(file)
            except OtherKindError as error:
                return f" ({file.name} is there, {error.kind.partition(',')[0]}: no safetensors file)"
            except (OSError, ValueError):
                return f" ({file.name} is there, which is no safetensors file)"
    return ""
