"""The crash harness by hand: ``python -m tests.crash kill --kills 200``; see ``--help``."""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

from tests.crash import faults
from tests.crash.disk import Disk, unusable
from tests.crash.harness import Campaign, undisturbed
from tests.crash.jobs import JOBS, MODELS, Folders, batch_of
from tests.crash.nodes import Harmed, cluster_of

MEMORY = "/dev/shm"  # noqa: S108 - what is made there has a name of its own


@click.group()
def main() -> None:
    """Harm a daemon again and again over a mixed queue; nothing may be lost."""


@main.command()
@click.option("--kills", default=200, show_default=True, help="How often the daemon is killed.")
@click.option("--seed", default=1, show_default=True, help="Decides where and when.")
@click.option(
    "--power-loss", type=click.Choice(["ext4", "xfs"]), help="Cut the power of such a disk (as root)."
)
@click.option(
    "--across",
    type=click.Choice(["state", "targets"]),
    help="Have the state folder, or outbox and failed folder, in /dev/shm: another file system.",
)
@click.option("--jobs", type=click.IntRange(len(JOBS)), default=len(JOBS), help="How many are queued.")
@click.option("--devices", default=1, help="How many CPU devices; of several, workers are killed too.")
@click.option("--waiting", default=0, help="How many texts wait in the inbox, for pictures that never come.")
@click.option("--quiet", is_flag=True, help="Only the numbers at the end.")
def kill(
    kills: int,
    seed: int,
    power_loss: str | None,
    across: str | None,
    jobs: int,
    devices: int,
    waiting: int,
    *,
    quiet: bool,
) -> None:
    """Kill it at every point between two durable calls, and at random times."""
    began = time.monotonic()
    with _folders(power_loss, across) as (folders, disk):
        folders = replace(folders, jobs=batch_of(jobs), waiting=waiting)
        baseline = undisturbed(folders)  # with one device: several make the same
        folders = replace(folders, devices=devices)
        click.echo(
            f"{baseline.points.total()} points, {len(baseline.points)} different, {baseline.seconds:.0f} s"
        )
        tell = (lambda _: None) if quiet else click.echo
        campaign = Campaign(folders, baseline, random.Random(seed), disk, tell)
        campaign.run(kills)
    click.echo(campaign.report())
    click.echo(f"{time.monotonic() - began:.0f} s")
    sys.exit(0 if campaign.good else 1)


@main.command()
@click.option("--times", default=4, show_default=True, help="How often in a queue.")
@click.option("--seed", default=1, show_default=True, help="Decides when.")
@click.argument("kinds", nargs=-1, type=click.Choice(sorted(faults.HARMS)))
def harm(kinds: tuple[str, ...], times: int, seed: int) -> None:
    """Fill the disk, have it fail, hang, go away or turn read-only, send signals, have the clock jump.

    A queue for each of KINDS, or for all of them.
    """
    good = True
    for kind in kinds or sorted(faults.HARMS):
        began = time.monotonic()
        wanted = "ext4" if kind in (*faults.ON_A_DISK, *faults.TARGETS_ON_A_DISK) else None
        with _folders(wanted) as (folders, disk):
            if disk is not None and kind in faults.TARGETS_ON_A_DISK:
                folders = replace(folders, root=folders.own, targets=disk.root)
            trial = faults.Trial(folders, undisturbed(folders), random.Random(seed), disk)
            outcome = trial.run([faults.HARMS[kind]] * times)
        good &= outcome.clean and outcome.repeated <= times + trial.restarts
        click.echo(
            f"{kind} x {times}: {trial.restarts} restarts, jobs lost: {len(outcome.lost)}, "
            f"duplicated: {len(outcome.duplicated)}, files that differ: {len(outcome.differing)}, "
            f"steps repeated: {outcome.repeated}, {time.monotonic() - began:.0f} s"
        )
        for text in (*outcome.lost, *outcome.duplicated, *outcome.differing, *outcome.other):
            click.echo(f"! {text}")
    sys.exit(0 if good else 1)


@main.command()
@click.option("--harms", default=40, show_default=True, help="How many.")
@click.option("--seed", default=1, show_default=True, help="Decides what, whom and when.")
@click.option("--jobs", type=click.IntRange(len(JOBS)), default=20, show_default=True, help="In a queue.")
def nodes(harms: int, seed: int, jobs: int) -> None:
    """Kill, freeze and cut off machines of a cluster, and what runs on them and on the front (as root).

    What the machines said is in cluster.log afterwards.
    """
    began = time.monotonic()
    with _folders(None) as (folders, _):
        folders = replace(folders, jobs=batch_of(jobs))
        baseline = undisturbed(folders)  # of this machine alone
        with cluster_of(MODELS) as cluster:
            campaign = Harmed(cluster, folders, baseline, random.Random(seed), click.echo)
            try:
                campaign.run(harms)
            finally:
                Path("cluster.log").write_text(cluster.logs())
    click.echo(campaign.report())
    click.echo(f"{time.monotonic() - began:.0f} s")
    sys.exit(0 if campaign.good else 1)


@contextmanager
def _folders(disk_kind: str | None, across: str | None = None) -> Iterator[tuple[Folders, Disk | None]]:
    """Give folders, on a disk of their own if one is wanted, and some of them on yet another."""
    reason = unusable(disk_kind) if disk_kind else None
    if reason:
        sys.exit(f"there can be no disk to harm: {reason}")
    with (
        tempfile.TemporaryDirectory(prefix="framepackd-crash-") as name,
        tempfile.TemporaryDirectory(prefix="framepackd-crash-", dir=MEMORY) as other,
    ):
        folder = Path(name)
        disk = Disk(folder, disk_kind) if disk_kind else None
        try:
            elsewhere = {"state": {"states": Path(other)}, "targets": {"targets": Path(other)}}
            moved = elsewhere[across] if across else {}
            yield Folders(disk.root if disk else folder, folder, **moved), disk
        finally:
            if disk:
                disk.unmount()


main(prog_name="python -m tests.crash")
