"""What the commands say of themselves."""

import re
import subprocess
import sys
import tomllib

import pytest
from click.testing import CliRunner

from framepackd.cli.main import main
from tests.wings import ROOT


def test_the_help_lists_each_command_once_in_one_whole_line() -> None:
    text = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    lines = text[text.index("Make videos:") :].splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted(main.commands)
    assert all(line.endswith(".") for line in lines if line.startswith("  "))
    assert "…" not in text
    assert "..." not in text[text.index("Make videos:") :]


@pytest.mark.parametrize("command", sorted(main.commands))
def test_each_command_tells_its_options_within_80_columns(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"], terminal_width=80)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80


def test_the_commands_import_no_more_than_the_build_has() -> None:
    """The build makes man pages and completions from them, in an environment of its own."""
    code = (
        "import sys; before = set(sys.modules); import framepackd.cli.main\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    has = {re.split(r"[>=]", name)[0].replace("-", "_") for name in build}
    assert set(done.stdout.split()) <= has | {"framepackd", "framepack_core"}
