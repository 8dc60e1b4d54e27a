"""All measurements as one table: ``python -m benchmarks [NAME ...]``; see RESULTS.md for those on record."""

import importlib
import os
import pkgutil
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks import Row
from benchmarks.first_light import CHECKS
from benchmarks.first_light.run import first_light

NAMES = sorted(
    module.name
    for module in pkgutil.iter_modules(benchmarks.__path__)
    if module.name != "__main__" and not module.ispkg
)
CHECK = click.Choice([check.name for check in CHECKS])


def table(title: str) -> Table:
    """Make the table with its column heads."""
    drawn = Table(title=title, title_justify="left")
    for column, justify in (
        ("", "left"),
        ("ours", "right"),
        ("baseline", "right"),
        ("ours / baseline", "right"),
        ("", "left"),
        ("proves", "left"),
    ):
        drawn.add_column(column, justify=justify)  # type: ignore[arg-type] # these are two of its words
    return drawn


def cells(row: Row) -> tuple[str, ...]:
    """Give the cells of a row."""
    baseline = "" if row.baseline is None else f"{row.baseline:.4g}"
    ratio = f"{row.ours / row.baseline:.3g}" if row.baseline else ""
    return row.name, f"{row.ours:.4g}", baseline, ratio, row.unit, row.proves


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[NAME]...")
@click.option("--tiny", is_flag=True, help="Small, only to check that it runs; as FRAMEPACKD_BENCHMARK=tiny.")
@click.option("--first-light", "first", is_flag=True, help="With gpu: what to run first on a new machine.")
@click.option("--only", multiple=True, type=CHECK, metavar="ROW", help="Of first light, these rows.")
@click.option("--skip", multiple=True, type=CHECK, metavar="ROW", help="Of first light, not these rows.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for first light's files."
)
@click.option("--minutes", default=9.0, show_default=True, help="That first light may take.")
@click.option(
    "--disk",
    type=click.Path(path_type=Path, file_okay=False),
    help="With loading: write a checkpoint of the full shape to this folder, and load that.",
)
@click.option(
    "--holes", is_flag=True, help="With --disk: zeros that take no disk in place of random numbers."
)
@click.option("--step", is_flag=True, help="With --disk: encode, and sample a step at 64x64.")
def main(names: tuple[str, ...], **options: Any) -> None:
    """Measure everything, or the modules named; each row has its baseline from the same run."""
    if options["tiny"]:
        os.environ["FRAMEPACKD_BENCHMARK"] = "tiny"  # before any of the modules is imported
    if options["first"]:
        if names != ("gpu",):
            raise click.UsageError("--first-light goes with gpu: python -m benchmarks gpu --first-light")
        out = options["out"] or Path(tempfile.mkdtemp(prefix="first-light-"))
        wanted = {name: options[name] for name in ("only", "skip", "tiny", "minutes")}
        sys.exit(0 if first_light(out, **wanted) else 1)
    if options["disk"] and names != ("loading",):
        raise click.UsageError("--disk goes with loading: python -m benchmarks loading --disk DIR")
    import torch  # not for first light, which goes on where it cannot be imported

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}"
    drawn = table(f"{datetime.now(UTC):%Y-%m-%d}, {where}")
    for name in names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        if options["disk"]:
            found = module.on_disk(options["disk"], filled=not options["holes"], step=options["step"])
        else:
            found = module.rows()
        for row in found:
            if options["disk"]:  # where minutes lie between two
                click.echo(f"{row.name}: {row.ours:.4g} {row.unit}")
            drawn.add_row(*cells(row))
        drawn.add_section()
    Console(width=None if Console().is_terminal else 200).print(drawn)


if __name__ == "__main__":
    main()
