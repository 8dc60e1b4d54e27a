"""The commands. Each imports what it needs when it runs, so that none waits for torch."""

import faulthandler
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from framepack_core import __version__
from framepackd.cli.device import calibrate, sanity_check
from framepackd.cli.models import models
from framepackd.cli.options import EXIT_USAGE, Commands, config_option, fail, load
from framepackd.cli.prepare import prepare
from framepackd.text import PrintableFormatter, printable, printable_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from framepackd.machine.service import Step
    from framepackd.machine.units import Service
    from framepackd.settings.config import Config


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="framepackd")
def main() -> None:
    """Drop NAME.png and NAME.txt into the inbox; the video appears in the outbox."""


for command in (prepare, models, calibrate, sanity_check):
    main.add_command(command)


@main.command()
@config_option
@click.option("--once", is_flag=True, help="Take in what is there now, finish every job, and end.")
def run(config_file: Path | None, *, once: bool) -> None:
    """Run the daemon in the foreground, until SIGTERM or Ctrl-C."""
    config = load(config_file)
    from framepackd import daemon, rights
    from framepackd.settings.config import load_config

    os.umask(rights.UMASK)
    _log_to_stderr()
    faulthandler.enable()  # when systemd ends a daemon that hangs, the journal says where it hung
    sys.exit(daemon.run(config, once=once, load_again=lambda: load_config(config_file)))


@main.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
@click.option("--watch", is_flag=True, help="Redraw until interrupted.")
def status(config_file: Path | None, *, as_json: bool, watch: bool) -> None:
    """Show the daemon, the running job and when it ends, the queue, what waits and why, the last results."""
    config = load(config_file)
    if watch:
        _watch(config)
        return
    from framepackd.control import client

    report, code = client.report(config)
    if as_json:
        click.echo(printable_json(report))
    elif code == client.EXIT_UNKNOWN:
        click.echo(f"framepackd: {report['daemon']['error']}", err=True)
    else:
        from framepackd.cli import display

        display.console().print(display.status(report))
    sys.exit(code)


@main.command()
@config_option
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def show(config_file: Path | None, job: str, *, as_json: bool) -> None:
    """Show one job whole. JOB is its id, the start of it, or its name."""
    config = load(config_file)
    from framepackd.control import client

    try:
        record, _ = client.show(config, job)
    except Exception as error:  # whatever it is: it cannot be shown
        fail(f"{config.state_dir}: {error}", 1)
    if record is None:
        fail(f"no job {job!r}: framepackd status lists them", 1)
    if as_json:
        click.echo(printable_json(record))
    else:
        from framepackd.cli import display

        display.console().print(display.job(record))


jobs_argument = click.argument("jobs", metavar="JOB...", nargs=-1, required=True)


@main.command()
@config_option
@jobs_argument
@click.option(
    "--anew", is_flag=True, help="From the beginning, queued jobs too; what was made is kept aside."
)
def retry(config_file: Path | None, jobs: tuple[str, ...], *, anew: bool) -> None:
    """Run failed or cancelled jobs again, as they were asked for and with the same seed.

    JOB is its id, the start of it, or its name.
    """
    _change(load(config_file), {"command": "retry", "jobs": jobs, "anew": anew})


@main.command()
@config_option
@jobs_argument
@click.option("--keep", is_flag=True, help="Deliver what exists of a video that is being made.")
def cancel(config_file: Path | None, jobs: tuple[str, ...], *, keep: bool) -> None:
    """Cancel queued or running jobs; their files go to the failed folder.

    JOB is its id, the start of it, or its name.
    """
    _change(load(config_file), {"command": "cancel", "jobs": jobs, "keep": keep})


@main.command()
@config_option
@jobs_argument
def top(config_file: Path | None, jobs: tuple[str, ...]) -> None:
    """Let queued jobs run next, in the order given.

    JOB is its id, the start of it, or its name.
    """
    _change(load(config_file), {"command": "top", "jobs": jobs})


@main.command()
@config_option
def pause(config_file: Path | None) -> None:
    """Stop the running job at its next step, free the GPU, and start none until framepackd resume."""
    _change(load(config_file), {"command": "pause"})


@main.command()
@config_option
def resume(config_file: Path | None) -> None:
    """Let the queue run again after framepackd pause."""
    _change(load(config_file), {"command": "resume"})


@main.command()
@config_option
def notify(config_file: Path | None) -> None:
    """Call the command and the webhook under [notify] in the config when jobs end, until SIGTERM.

    A process of its own: the daemon needs no network for it. It only reads the job store.
    """
    config = load(config_file)
    from framepackd.reports import hooks

    _log_to_stderr()
    hooks.run(config)


@main.command()
@config_option
@click.option("--gpu/--no-gpu", default=True, help="Whether to check the GPU, which loads torch.")
@click.option("--vram", type=click.FloatRange(1, 1024), metavar="GIB", help="Plan for a card of this size.")
@click.option("--ram", type=click.FloatRange(1, 65536), metavar="GIB", help="Plan for a host with so much.")
@click.option(
    "--accept-folders",
    is_flag=True,
    help="Take inbox, outbox and failed folder as they are now for the right ones, from now on.",
)
def check(
    config_file: Path | None, *, gpu: bool, vram: float | None, ram: float | None, accept_folders: bool
) -> None:
    """Check that everything a run needs is there, and say how to mend what is not.

    At the end comes the memory plan: what will live where, and what that takes.
    """
    config = load(config_file)
    if accept_folders:
        _change(config, {"command": "accept_folders"})
    from framepack_core.errors import FramePackError
    from framepack_core.memory import before_torch
    from framepackd.cli import display
    from framepackd.machine.check import forecast, run_checks

    if gpu:
        before_torch.set_up(config.gpu.device)
    try:
        results = list(run_checks(config, gpu=gpu and vram is None))
        planned = forecast(config, gpu=gpu, vram=vram, ram=ram)
    except FramePackError:  # the checks say so
        planned = None
    display.console().print(display.checks(results), soft_wrap=True)
    if planned is not None:
        display.console().print(display.forecast(planned))
    short = planned is not None and planned.plan.shortage is not None
    sys.exit(1 if short or any(fine is False for fine, _, _ in results) else 0)


@main.command()
@config_option
@click.option("--server", metavar="ADDRESS", help="Address to listen on; else the config's, 127.0.0.1.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; else the config's, 7860.")
@click.option("--share", is_flag=True, help="Also at a public address, by gradio's servers; with a password.")
def web(config_file: Path | None, server: str | None, port: int | None, *, share: bool) -> None:
    """Serve the page and the API of FramePack's demo, which fill the inbox and show the queue."""
    config = load(config_file)
    from framepackd.web.server import serve

    _log_to_stderr()
    serve(config, server or config.web.server, port or config.web.port, share=share)


@main.command()
@click.option("--image", type=click.Path(path_type=Path), help="Picture to move; else the demo's.")
@click.option("--prompt", help="How it is to move; else as the demo's says.")
@click.option("--seconds", type=click.FloatRange(1, 120), default=2.4, help="Length.", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo"), help="Where to do it.")
def demo(image: Path | None, prompt: str | None, seconds: float, folder: Path) -> None:
    """Make a video with the bundled demo model: the whole way from inbox to outbox.

    It pans over any picture, tilts, and changes the light: "pan left", "look up", "night falls", "fog".
    """
    from framepackd.cli.demo import run_demo

    click.echo(run_demo(folder, image, prompt, seconds))


@main.group()
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


def _change(config: "Config", request: dict[str, Any]) -> NoReturn:
    """Send a command to the daemon, or perform it if none runs; print the results, and end."""
    from framepackd.control import client

    done = True
    try:
        for results in client.change(config, request):
            for result in results:
                line = printable(result["message"])
                click.echo(line if result["done"] else f"framepackd: {line}", err=not result["done"])
                done &= result["done"]
    except OSError as error:
        fail(f"{config.state_dir}: {error}", 1)
    sys.exit(0 if done else 1)


def _watch(config: "Config") -> None:
    from rich.live import Live

    from framepackd.cli import display
    from framepackd.control import client

    screen = display.console()
    code = 0
    try:
        with Live(console=screen, auto_refresh=False, transient=False) as live:
            while True:
                report, code = client.report(config)
                if code == client.EXIT_UNKNOWN:
                    fail(report["daemon"]["error"], code)
                live.update(display.status(report), refresh=True)
                time.sleep(0.5)
    except KeyboardInterrupt:
        sys.exit(code)


def _log_to_stderr() -> None:
    """Log with time stamps for people; with priorities instead where systemd's journal reads."""
    form = "%(asctime)s %(levelname)s %(message)s"
    if os.environ.get("JOURNAL_STREAM"):
        priorities = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
        for name, priority in priorities.items():
            logging.addLevelName(getattr(logging, name), f"<{priority}>")
        form = "%(levelname)s%(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
