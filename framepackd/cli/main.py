"""The commands. Each imports what it needs when it runs, so that none waits for torch."""

import faulthandler
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from framepack_core import __version__
from framepackd.cli import jobs
from framepackd.cli.device import calibrate, sanity_check
from framepackd.cli.init import init
from framepackd.cli.models import models
from framepackd.cli.node import node
from framepackd.cli.nodes import nodes
from framepackd.cli.options import Commands, config_option, fail, load, log_to_stderr
from framepackd.cli.prepare import prepare
from framepackd.cli.service import service
from framepackd.text import printable_json

if TYPE_CHECKING:
    from framepackd.settings.config import Config


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="framepackd")
def main() -> None:
    """Drop NAME.png and NAME.txt into the inbox; the video appears in the outbox."""


@click.command()
@config_option
@click.option("--once", is_flag=True, help="Take in what is there now, finish every job, and end.")
@click.option("--web", "with_page", is_flag=True, help="Serve the page too, until the daemon ends.")
def run(config_file: Path | None, *, once: bool, with_page: bool) -> None:
    """Run the daemon in the foreground, until SIGTERM or Ctrl-C."""
    config = load(config_file)
    from framepackd import daemon, rights
    from framepackd.cli.page import page
    from framepackd.settings.config import load_config

    log_to_stderr()
    with rights.own_umask(), page(config_file) if with_page else nullcontext():
        faulthandler.enable()  # when systemd ends a daemon that hangs, the journal says where it hung
        sys.exit(daemon.run(config, once=once, load_again=lambda: load_config(config_file)))


@click.command(short_help="Show the running job and when it ends, the queue, the results.")
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

        display.show(display.status(report))
    sys.exit(code)


@click.command(short_help="Call a command or a webhook when jobs end.")
@config_option
def notify(config_file: Path | None) -> None:
    """Call the command and the webhook under [notify] in the config when jobs end, until SIGTERM.

    A process of its own: the daemon needs no network for it. It only reads the job store.
    """
    config = load(config_file)
    from framepackd.reports import hooks

    log_to_stderr()
    hooks.run(config)


@click.command(short_help="Check that everything is there that a run needs.")
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
        jobs.change(config, {"command": "accept_folders"})
    from framepack_core.errors import FramePackError
    from framepack_core.memory import before_torch
    from framepackd.cli import checks, display
    from framepackd.machine.check import forecast, run_checks

    if gpu:
        devices = config.gpu.devices
        before_torch.set_up(devices[0] if len(devices) == 1 else before_torch.ALL)
    try:
        results = list(run_checks(config, gpu=gpu and vram is None))
        planned = forecast(config, gpu=gpu, vram=vram, ram=ram)
    except FramePackError:  # the checks say so
        planned = None
    display.show(checks.checks(results), soft_wrap=True)
    if planned is not None:
        display.show(checks.forecast(planned))
    short = planned is not None and planned.shortage is not None
    sys.exit(1 if short or any(fine is False for fine, _, _ in results) else 0)


@click.command(short_help="Serve the page, and the API of FramePack's demo.")
@config_option
@click.option("--server", metavar="ADDRESS", help="Address to listen on; else the config's, 127.0.0.1.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; else the config's, 7860.")
@click.option("--share", is_flag=True, help="Also at a public address, by gradio's servers; with a password.")
@click.option("--ends-with", type=int, hidden=True)  # the pid of the daemon that started it
def web(
    config_file: Path | None, server: str | None, port: int | None, *, share: bool, ends_with: int | None
) -> None:
    """Serve the page and the API of FramePack's demo, which fill the inbox and show the queue."""
    config = load(config_file)
    from framepackd.web.server import serve
    from framepackd.worker.main import die_with

    if ends_with is not None:
        die_with(ends_with)

    log_to_stderr()
    serve(config, server or config.web.server, port or config.web.port, share=share)


@click.command(short_help="Make a video with the bundled toy model.")
@click.option("--image", type=click.Path(path_type=Path), help="Picture to move; else the demo's.")
@click.option("--prompt", help="How it is to move; else as the demo's says.")
@click.option("--seconds", type=click.FloatRange(1, 120), default=2.4, help="Length.", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo"), help="Where to do it.")
@click.option("--web", "with_page", is_flag=True, help="Open the page on the demo model instead.")
def demo(image: Path | None, prompt: str | None, seconds: float, folder: Path, *, with_page: bool) -> None:
    """Make a video with the bundled demo model: the whole way from inbox to outbox.

    It is best at light: "night falls", "sunset", "fog". It also pans, tilts, zooms and rotates.
    What an earlier demo made moves to earlier/ in the folder.
    """
    from framepackd.cli.demo import run_demo, show_page, what_next

    if with_page:
        if image or prompt:
            raise click.UsageError("--web takes no picture and no prompt: the page asks for them")
        show_page(folder)
        return
    video = run_demo(folder, image, prompt, seconds)
    click.echo(what_next())
    click.echo(video)


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


main.add_section("Make videos", init, demo, run, web, notify, service, node, prepare)
main.add_section(
    "Watch and control",
    *(
        status,
        jobs.list_jobs,
        jobs.show,
        jobs.retry,
        jobs.final,
        jobs.dismiss,
        jobs.cancel,
        jobs.top,
        jobs.pause,
        jobs.resume,
        nodes,
    ),
)
main.add_section("Models and this machine", check, models, sanity_check, calibrate)
