"""framepackd prepare: its options, its progress bar and its summary."""

import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framepackd.cli.options import EXIT_USAGE, config_option, fail, load
from framepackd.text import path_of, printable

if TYPE_CHECKING:
    from framepackd.prepare.datasets import Writer
    from framepackd.prepare.items import ItemResult, ItemStream, Options
    from framepackd.settings.config import Config

EXIT_INTERRUPTED = 130  # as shells have it


@click.command(short_help="Make jobs from videos or a data set.")
@config_option
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path), required=False)
@click.option("--frames", type=click.IntRange(2, 256), metavar="N", help="Chains of N frames, not pairs.")
@click.option("--prompt", metavar="TEXT", help="One prompt for all, instead of captions.")
@click.option(
    "--max-difference",
    type=click.FloatRange(min=0, min_open=True),
    metavar="D",
    help="Leave out what differs by D or more between neighbouring pictures; FramePack's scripts use 0.9.",
)
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A setting of each job; repeatable.")
@click.option("--split", metavar="NAME", help="Which split of a data set.")
@click.option("--skip-done", is_flag=True, help="Leave out what is done or queued already.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option(
    "--save-dataset", type=click.Path(path_type=Path), metavar="DIR", help="Save it as a data set too."
)
@click.option(
    "--push", metavar="ORG/NAME", help="Push the data set to the Hugging Face hub, with your token."
)
@click.option("--private", is_flag=True, help="Push it so that only you see it.")
def prepare(
    config_file: Path | None,
    target: Path | None,
    pairs: tuple[str, ...],
    save_dataset: Path | None,
    push: str | None,
    *,
    private: bool,
    **asked: Any,
) -> None:
    """Make jobs from videos or a data set: SOURCE into TARGET, which is the inbox unless given.

    Of each video in SOURCE, and in the folders below it, the first and the last frame are taken, and the
    caption NAME.txt beside it. Or SOURCE is a data set, saved by the library datasets or as parquet, with
    the columns first_frame and last_frame, frame_0, frame_1 ..., or image; and text. Run it again to go on.
    """
    config = load(config_file)
    from framepackd.prepare.items import Options
    from framepackd.prepare.prepare import find, read_settings

    if (save_dataset or push) and asked["dry_run"]:
        fail("--dry-run writes nothing: leave it out to save or push a data set", EXIT_USAGE)
    if private and not push:
        fail("--private is for --push ORG/NAME", EXIT_USAGE)
    try:
        options = Options(target=target or config.inbox, settings=read_settings(pairs), **asked)
        with _writer(source := find(options), save_dataset, push) as writer:
            counts = _work(source, options, config, writer)
            if writer is not None:
                _save_and_push(writer, save_dataset, push, private=private)
    except KeyboardInterrupt:
        hint = "" if asked["skip_done"] else ", and --skip-done leaves out what a daemon has taken meanwhile"
        fail(f"interrupted: run the same command to resume{hint}", EXIT_INTERRUPTED)
    sys.exit(1 if counts["bad"] else 0)


def _work(
    source: "ItemStream", options: "Options", config: "Config", writer: "Writer | None"
) -> Counter[str]:
    """Prepare everything with a progress bar; print how many were prepared or left out, and the errors."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from framepackd.prepare import items
    from framepackd.prepare import prepare as preparing

    counts: Counter[str] = Counter()
    bad: list[ItemResult] = []
    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = options.dry_run or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
        bar = progress.add_task("", total=source.total)
        for result in preparing.prepare(source, options, config, writer):
            counts[result.outcome] += 1
            if result.error is not None:
                bad.append(result)
            if options.dry_run:
                click.echo(_in_words(result))
            progress.advance(bar)
    for outcome in items.ItemOutcome:
        if counts[outcome]:
            where = f" in {options.target}" if outcome is items.ItemOutcome.PREPARED else ""
            would = "would be " if options.dry_run else ""
            click.echo(printable(f"{counts[outcome]} {would}{outcome}{where}"))
    for result in bad:
        click.echo(printable(f"framepackd: {result.item.origin}: {result.error}"), err=True)
    return counts


def _in_words(result: "ItemResult") -> str:
    item = result.item
    differences = "".join(f" {each:.4f}" for each in result.differences)
    path = path_of(item.folder, item.name)
    return printable(f"{path}: would be {result.outcome}{': difference' if differences else ''}{differences}")


@contextlib.contextmanager
def _writer(source: "ItemStream", save: Path | None, push: str | None) -> Iterator["Writer | None"]:
    """Open the writer of a data set, if one is wanted; mistakes in its options show before any work."""
    from framepackd.prepare.items import UsageError

    if save is None and push is None:
        yield None
        return
    from framepackd.prepare import datasets

    if save is not None and save.exists():
        raise UsageError(f"{save} is there already: move it away, or give another --save-dataset")
    if save is not None and not save.absolute().parent.is_dir():
        raise UsageError(f"{save.absolute().parent} is not a folder: make it, or give another --save-dataset")
    if push is not None:
        datasets.check_push(push)
    beside = save.absolute().parent if save is not None else None
    with tempfile.TemporaryDirectory(prefix=".framepackd-", dir=beside) as folder:
        yield datasets.Writer(source.endings, Path(folder))


def _save_and_push(writer: "Writer", save: Path | None, push: str | None, *, private: bool) -> None:
    if not writer.count:
        fail("there is nothing for a data set: none was written", 1)
    rows = writer.finish()
    if save is not None:
        writer.save(rows, save)
        click.echo(f"{writer.count} rows in {save}")
    if push is not None:
        try:
            writer.push(rows, push, private=private)
        except Exception as error:  # of the network, the hub or its library
            kept = f"it is in {save}" if save else "run it again with --save-dataset DIR to keep it"
            fail(f"{push} could not be pushed ({error}): {kept}", 1)
        click.echo(f"{writer.count} rows pushed to {push}")
