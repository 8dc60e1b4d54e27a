"""framepackd calibrate and sanity-check: they use the device, so no daemon may use it meanwhile."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from framepack_core.memory import before_torch
from framepackd.cli.options import EXIT_USAGE, config_option, fail, load

if TYPE_CHECKING:
    from framepackd.settings.config import Config


@click.command(short_help='Measure the ratios that cache = "magcache" needs.')
@config_option
@click.argument("model")
@click.option("--image", type=click.Path(path_type=Path), help="Picture to start from; else the demo's.")
@click.option("--prompt", help="What happens in it.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write; else MODEL.ratios.json.")
def calibrate(
    config_file: Path | None, model: str, image: Path | None, prompt: str | None, output: Path | None
) -> None:
    """Measure the ratios that cache = "magcache" uses, for your own model; takes as long as a section."""
    config = load(config_file)
    _refuse_without_device(config)
    _refuse_beside_daemon(config)
    before_torch.set_up(config.gpu.devices[0])
    from framepackd.machine.calibrate import calibrate as measure

    click.echo(measure(config, model, image, prompt, output or Path(f"{model}.ratios.json")))


@click.command("sanity-check", short_help="Make a short video and say whether it is right.")
@config_option
@click.option("--model", metavar="NAME", help="Which one; else the config's.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Frames to look at; else MODEL.sanity.png.",
)
def sanity_check(config_file: Path | None, model: str | None, output: Path | None) -> None:
    """Generate a short video here and say whether it is what it should be: before the first night.

    What the demo model makes is compared with a recorded fingerprint; what others make must be plausible.
    """
    config = load(config_file)
    _refuse_without_device(config)
    _refuse_beside_daemon(config)
    name = model or config.model
    before_torch.set_up(config.gpu.devices[0])
    from framepackd.worker.main import set_environment

    set_environment()
    from framepackd.cli import checks, display
    from framepackd.machine import sanity

    target = output or Path(f"{name}.sanity.png")
    try:
        report = sanity.sanity_check(config, name)
        sanity.write_sheet(report, target)
    except OSError as error:
        fail(f"{error.filename or target}: {error.strerror}: choose another --output", 1)
    display.show(checks.checks([*report.findings(), (None, "frames", str(target))]), soft_wrap=True)
    sys.exit(0 if report.fine else 1)


def _refuse_without_device(config: "Config") -> None:
    if not config.gpu.devices:
        fail("device under [gpu] is []: run this on a machine that computes", EXIT_USAGE)


def _refuse_beside_daemon(config: "Config") -> None:
    from framepackd.control import client

    try:
        why = client.device_in_use(config)
    except OSError as error:
        why = f"{config.state_dir}: {error}"
    if why is not None:
        fail(why, 1)
