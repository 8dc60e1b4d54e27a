"""framepackd node: what it refuses before it runs anything."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from framepackd.cli.main import main


@pytest.mark.parametrize(
    ("options", "table", "said"),
    [
        ([], "", "--head HOST:PORT is needed"),
        (["--head", "127.0.0.1:6379"], "", "token_file under [cluster] is needed"),
        (["--head", "127.0.0.1"], 'token_file = "token"', "give HOST:PORT"),
        (["--head", "192.0.2.1:6379"], 'token_file = "token"', "must be set: the head's address 192.0.2.1"),
        (
            ["--head", "127.0.0.1:6379", "--name", "a b"],
            'token_file = "token"',
            "cannot name a machine 'a b'",
        ),
        ([], 'address = "127.0.0.1:6379"\ntoken_file = "none"', "is not there. Make one:"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(
    options: list[str], table: str, said: str, tmp_path: Path
) -> None:
    config = tmp_path / "node.toml"
    socket = f'socket = "{tmp_path}/run/bridges.sock"'
    config.write_text(f'state_dir = "{tmp_path}/state"\n[cluster]\n{socket}\n{table}\n')
    (tmp_path / "token").write_text("a" * 64)
    (tmp_path / "token").chmod(0o600)
    ran = CliRunner().invoke(main, ["node", "--config", str(config), *options])
    assert ran.exit_code == 2
    assert said in ran.output
    assert not (tmp_path / "run").exists()
