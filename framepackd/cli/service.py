"""framepackd service: installs and uninstalls the systemd units of the daemon."""

import os
from functools import partial
from typing import TYPE_CHECKING

import click

from framepackd.cli.options import EXIT_USAGE, fail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from framepackd.machine.service import Step
    from framepackd.machine.units import Service


@click.group(short_help="Install and uninstall the service of systemd.")
def service() -> None:
    """Have systemd run the daemon."""


of_user_option = click.option("--user", is_flag=True, help="For this user alone, without root.")
instance_option = click.option("--instance", metavar="NAME", help="One of several, with NAME.toml.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


@service.command("install")
@of_user_option
@instance_option
@click.option("--with", "beside", multiple=True, metavar="PART", help="Install this service too: notify.")
@dry_run_option
def install_service(*, user: bool, instance: str | None, beside: tuple[str, ...], dry_run: bool) -> None:
    """Install the service for this installation: unit, user, folders, a configuration if there is none.

    Run it again after you moved the installation or a folder.
    """
    from framepackd.machine import service as services

    install = partial(services.install, beside=beside)
    chosen = _take_service_steps(install, user=user, instance=instance, dry_run=dry_run)
    if dry_run:
        for each in (chosen, *map(chosen.companion, beside)):
            click.echo(f"\n{each.unit}:\n{services.unit_text(each)}")
    click.echo(f"next:\n{services.advice(chosen, beside)}")


@service.command("uninstall")
@of_user_option
@instance_option
@dry_run_option
def uninstall_service(*, user: bool, instance: str | None, dry_run: bool) -> None:
    """Stop the service and remove its unit; configuration, jobs and results stay."""
    from framepackd.machine import service as services

    chosen = _take_service_steps(services.uninstall, user=user, instance=instance, dry_run=dry_run)
    click.echo(f"kept: {chosen.config}, {chosen.state_dir}")


def _take_service_steps(
    steps: "Callable[[Service], Iterator[Step]]", *, user: bool, instance: str | None, dry_run: bool
) -> "Service":
    from framepackd.machine.units import Service

    if user and instance:
        fail("--instance is for services of the machine: leave out --user", EXIT_USAGE)
    if not user and not dry_run and os.geteuid() != 0:
        fail("this writes to /etc and needs root: put sudo before it, or --user after it", 1)
    chosen = Service.of_this_user() if user else Service.of_machine(instance)
    for words, do in steps(chosen):
        click.echo(f"would {words}" if dry_run else words)
        if not dry_run:
            do()
    return chosen
