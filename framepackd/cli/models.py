"""framepackd models: lists, fetches and verifies models."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from framepackd.cli.options import EXIT_USAGE, config_option, fail, load
from framepackd.text import printable, printable_json, size_text

if TYPE_CHECKING:
    from framepack_core.models.hub import Holding, StoredFile
    from framepack_core.models.registry import ModelSpec, Source
    from framepackd.cli.display import ModelRow, SourceRow
    from framepackd.settings.config import Config

# Kept free on the disk of the downloads: jobs and the system write there too.
RESERVE_BYTES = 1 << 30
ROLES = ("transformer", "base", "image_encoder")

names_argument = click.argument("names", metavar="[NAME]...", nargs=-1)
offline_option = click.option(
    "--offline", is_flag=True, help="Never ask the hub; the same as HF_HUB_OFFLINE=1 in the environment."
)


@click.group()
def models() -> None:
    """See, fetch and verify the models."""


@models.command("list")
@config_option
@offline_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def list_models(config_file: Path | None, *, offline: bool, as_json: bool) -> None:
    """List the models that jobs can name: their sources, what of them is here and where, what is missing.

    Asks the hub for the size of what is missing.
    """
    config = load(config_file)
    from framepack_core.models import hub

    ask = not (offline or hub.offline())
    rows = [_row(config, name, ask=ask) for name in config.model_names()]
    if as_json:
        click.echo(printable_json({"cache": str(hub.cache_folder()), "models": rows}))
        return
    from framepackd.cli import display

    display.show(display.models(rows))
    for row in rows:
        if row["error"]:
            prefix = f"model {row['name']}: "
            click.echo(printable(prefix + row["error"].removeprefix(prefix)))
    click.echo(f"hub ids lie in {printable(str(hub.cache_folder()))}")
    sys.exit(1 if any(row["error"] for row in rows) else 0)


def _row(config: "Config", name: str, *, ask: bool) -> "ModelRow":
    """Describe one model."""
    from framepack_core.errors import ModelError
    from framepack_core.models import hub

    spec, error = config.spec(name), None
    try:
        held = hub.holdings(spec, ask=ask)
    except ModelError as problem:  # look again without the hub: a damaged file is reported all the same
        held, error = [], str(problem)
        if ask:
            row = _row(config, name, ask=False)
            row["error"] = row["error"] or error
            return row
    sources = [_source(role, part) for role, part in zip(ROLES, held, strict=False)]
    complete = bool(sources) and not any(source["missing"] for source in sources)
    if complete:
        error = error or next(iter(_unfit([spec])), None)
    return {
        "name": name,
        "kind": spec.kind,
        "default": name == config.model,
        "complete": complete,
        "sources": sources,
        "error": error,
    }


def _source(role: str, held: "Holding") -> "SourceRow":
    return {
        "role": role,
        "source": str(held.source),
        "folder": str(held.folder),
        "bytes_here": held.size,
        "bytes_to_fetch": held.to_fetch,
        "missing": sorted(held.missing),
    }


@models.command("download")
@config_option
@names_argument
@offline_option
def download(config_file: Path | None, names: tuple[str, ...], *, offline: bool) -> None:
    """Fetch the files of models from the Hugging Face hub: those NAMED, else the config's.

    About 45 GB for the first; what is here already is not fetched again. Says before how much it is, and
    refuses what does not fit on the disk.
    """
    config = load(config_file)
    specs = _chosen(config, names)
    from framepack_core.models import hub
    from framepack_core.models.registry import download as fetch

    ask = not (offline or hub.offline())
    held = _distinct(specs, ask=ask)
    if not ask:
        _list_missing(held)
        return
    _check_room(held)
    for name, part in held:
        if not part.source.is_local:
            hub.fetch_weights(part, config.spec(name))
    for spec in specs:
        for source, folder in fetch(spec):
            click.echo(f"{spec.name}: {source} is in {folder}")


def _chosen(config: "Config", names: tuple[str, ...]) -> "list[ModelSpec]":
    for name in names:
        if name not in config.model_names():
            fail(config.unknown_model(name), EXIT_USAGE)
    return [config.spec(name) for name in names or (config.model,)]


def _distinct(specs: "list[ModelSpec]", *, ask: bool) -> "list[tuple[str, Holding]]":
    """List the sources of several models, each once, with the name of a model that uses it."""
    from framepack_core.models import hub

    found: dict[Source, tuple[str, Holding]] = {}
    for spec in specs:
        for part in hub.holdings(spec, ask=ask):
            found.setdefault(part.source, (spec.name, part))
    return list(found.values())


def _list_missing(held: "list[tuple[str, Holding]]") -> None:
    """List what a download would fetch if it might ask the hub; end with 1 if something is missing."""
    lacking = [part for _, part in held if part.missing]
    for part in lacking:
        for name in sorted(part.missing):
            click.echo(f"missing: {part.source}: {name}")
    if lacking:
        fail("files are missing and offline none is fetched: run it without --offline and HF_HUB_OFFLINE", 1)
    click.echo("every file is here")


def _check_room(held: "list[tuple[str, Holding]]") -> None:
    """Say how much is to be fetched, and end with 1 if the disk has too little room."""
    from framepack_core.models import hub

    parts = [part for _, part in held if not part.source.is_local]
    freed = sum(hub.clear_leftovers(part.source) for part in parts)
    if freed:
        click.echo(f"{size_text(freed)} removed that an interrupted download left")
    for part in parts:
        here = f"{size_text(part.size)} here" if part.size else ""
        rest = f"{size_text(part.to_fetch)} to fetch" if part.missing else ""
        click.echo(f"{part.source}: {', '.join(filter(None, (here, rest)))}")
    total = sum(part.to_fetch or 0 for part in parts)
    cache = hub.cache_folder()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if not total:
        return
    click.echo(f"{size_text(total)} to fetch into {cache}, {size_text(free)} free there")
    begun = sum(hub.begun(part.source) for part in parts)
    if begun:
        click.echo(f"{size_text(begun)} of that are here from an interrupted download")
        total = max(total - begun, 0)
    if total + RESERVE_BYTES > free:
        short = size_text(total + RESERVE_BYTES - free)
        fail(
            f"{cache} has {size_text(free)} free, {size_text(total)} are to be fetched and "
            f"{size_text(RESERVE_BYTES)} are kept free: make {short} of room, or set HF_HOME to a folder "
            "on a larger disk, for the daemon too",
            1,
        )


@models.command("verify")
@config_option
@names_argument
def verify(config_file: Path | None, names: tuple[str, ...]) -> None:
    """Read every file of the models and compare it with what was published: those NAMED, else the config's.

    Works without the network: the cache records the hashes. For your own folders and files none is known.
    The names, shapes and lengths in all headers are compared with the model's. Nothing is changed.
    """
    config = load(config_file)
    specs = _chosen(config, names)
    from framepack_core.models import hub

    held = _distinct(specs, ask=False)
    stored = [(name, part, file) for name, part in held for file in hub.stored_files(part)]
    faults = _read_through([file for _, _, file in stored])
    lines = [
        line
        for name, part, file in stored
        if file.path in faults
        for line in (f"damaged: {file.path}: {faults[file.path]}", f"  {_mend(name, part, file)}")
    ]
    for name, part in held:
        remedy = "put it there" if part.source.is_local else f"run: framepackd models download {name}"
        lines += [f"missing: {part.folder / lacking}\n  {remedy}" for lacking in sorted(part.missing)]
    reported = {name for name, _, file in stored if file.path in faults} | {
        name for name, part in held if part.missing
    }
    lines += _unfit([spec for spec in specs if spec.name not in reported])
    for line in lines:
        click.echo("\n".join(map(printable, line.split("\n"))), err=True)
    if lines:
        sys.exit(1)
    hashed = sum(file.digest is not None for _, _, file in stored)
    known = f"{hashed} as published" + (
        f", {len(stored) - hashed} without a hash" if hashed < len(stored) else ""
    )
    click.echo(f"{len(stored)} files, {size_text(sum(file.size for _, _, file in stored))}: {known}")


def _unfit(specs: "list[ModelSpec]") -> list[str]:
    """List the parts of models whose files are whole but do not hold what the model has."""
    from framepack_core.errors import ModelError
    from framepack_core.models.model_files import faults

    found: list[str] = []
    for spec in specs:
        try:
            found += faults(spec)
        except ModelError as error:
            found.append(str(error))
    return [f"unfit: {fault}" for fault in dict.fromkeys(found)]


def _read_through(stored: "list[StoredFile]") -> dict[Path, str]:
    """Read files, with a progress bar, and say what is wrong with them."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    total = sum(file.size for file in stored)
    faults = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("verifying", total=total)
        for file in stored:
            progress.update(task, description=printable(file.path.name))
            try:
                with file.path.open("rb") as opened:
                    fault = file.fault(progress.wrap_file(opened, total, task_id=task))
            except OSError as error:
                fault = f"cannot be read: {error.strerror}"
            if fault is not None:
                faults[file.path] = fault
    return faults


def _mend(name: str, part: "Holding", file: "StoredFile") -> str:
    if part.source.is_local:
        return "put it there again"
    blob = shlex.quote(str(file.path.resolve()))
    return f"to fetch it again: rm {blob} && framepackd models download {name}"
