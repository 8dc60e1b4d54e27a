"""All measurements as one table: ``python -m benchmarks [NAME ...]``; see RESULTS.md for those on record."""

import importlib
import pkgutil
import platform
from datetime import UTC, datetime

import click
import torch
from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks import Row

NAMES = sorted(
    module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name != "__main__"
)


def table(title: str) -> Table:
    """Head the columns."""
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
    """Write a row out."""
    baseline = "" if row.baseline is None else f"{row.baseline:.4g}"
    ratio = f"{row.ours / row.baseline:.3g}" if row.baseline else ""
    return row.name, f"{row.ours:.4g}", baseline, ratio, row.unit, row.proves


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[NAME]...")
def main(names: tuple[str, ...]) -> None:
    """Measure everything, or what is named; each row beside its baseline of the same run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}"
    drawn = table(f"{datetime.now(UTC):%Y-%m-%d}, {where}")
    for name in names or NAMES:
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            drawn.add_row(*cells(row))
        drawn.add_section()
    Console(width=None if Console().is_terminal else 200).print(drawn)


if __name__ == "__main__":
    main()
