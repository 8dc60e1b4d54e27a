"""Runs prepare and lists what it has made."""

from pathlib import Path

from click.testing import CliRunner, Result

from framepackd.cli.main import main
from tests.daemon.place import Place


def run(place: Place, *arguments: object) -> Result:
    config = place.config.state_dir.parent / "config.toml"
    return CliRunner().invoke(main, ["prepare", "--config", str(config), *map(str, arguments)])


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


PAIR = ["_first_frame.png", "_frame_diff.txt", "_last_frame.png"]
