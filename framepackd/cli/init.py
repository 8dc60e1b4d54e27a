"""framepackd init: writes a commented configuration, makes the folders, and says what to do next."""

import json
import re
from pathlib import Path

import click

from framepackd.cli.options import EXIT_USAGE, fail, load, own_command

HEAD = """\
# framepackd's configuration. Remove the # before a key to set it; each shows its default, or an example.
# Paths: absolute, with ~, or relative to this file.
"""
# A link to the repository's config.example.toml; in a wheel a file.
EXAMPLE = Path(__file__).parents[1] / "settings/config.example.toml"


@click.command(short_help="Write a configuration, make the folders, say what is next.")
@click.option("--inbox", type=click.Path(path_type=Path), metavar="DIR", help="Where you will drop work.")
@click.option("--outbox", type=click.Path(path_type=Path), metavar="DIR", help="Where videos are delivered.")
@click.option(
    "--config", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write this file instead."
)
def init(inbox: Path | None, outbox: Path | None, file: Path | None) -> None:
    """Write a commented configuration where it is read, make the folders, and say what to do next.

    A configuration that exists is never overwritten.
    """
    from framepackd.settings.config import own_config

    file = (file or own_config()).expanduser().absolute()
    text = first_config({"inbox": inbox, "outbox": outbox})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        fail(f"{file} exists already: edit it, or write another one with --config FILE", EXIT_USAGE)
    except OSError as error:
        fail(f"{file}: {error.strerror}: check that this user may write there", 1)
    config = load(file)
    from framepackd import folders, rights

    try:
        with rights.own_umask():
            rights.make_folders(config)
            folders.make_new(config)
    except OSError as error:
        file.unlink()  # so that the next try may write it
        fail(f"{error.filename}: {error.strerror}: give another path", 1)
    command = own_command()
    named = "" if file == own_config() else f" --config {file}"
    click.echo(f"config   {file}")
    for name in ("inbox", "outbox", "failed"):
        click.echo(f"{name:8} {config.folders[name]}")
    click.echo(
        f"""
next:
  {command} models download{named}    # the model's files, about 45 GB, once; none for model = "demo"
  {command} check{named}              # is everything there that a run needs?
  {command} run --web{named}          # make videos; the page is http://localhost:{config.web.port}
Drop NAME.png and NAME.txt into the inbox; NAME.mp4 appears in the outbox."""
    )


def first_config(places: dict[str, Path | None]) -> str:
    """Give the example with every key commented out, but for places that are given.

    A key that is commented out follows the default of each later version.
    """
    example = EXAMPLE.read_text(encoding="utf-8").split("\n\n", 1)[1]  # without what it says of copying it
    text = re.sub(r"^(\w+ = )", r"# \1", example, flags=re.MULTILINE)
    for name, folder in places.items():
        if folder is not None:
            line = f"{name} = {json.dumps(str(folder.expanduser().absolute()), ensure_ascii=False)}"
            text = re.sub(rf"^# {name} = .*$", line.replace("\\", r"\\"), text, flags=re.MULTILINE)
    return f"{HEAD}\n{text}"
