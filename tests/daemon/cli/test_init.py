"""The first configuration: where it goes, what it says, and that it replaces none."""

import os
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from framepackd.cli.main import main
from framepackd.settings.config import Config, load_config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("FRAMEPACKD_CONFIG", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "STATE_DIRECTORY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def init(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, arguments)])


def test_the_first_configuration_is_where_it_is_read_and_changes_no_default(home: Path) -> None:
    result = init()
    assert result.exit_code == 0, result.output
    written = home / ".config/framepackd/config.toml"
    found = load_config(None)
    assert found.file == written
    untouched = Config(state_dir=found.state_dir).model_dump(
        exclude={"inbox", "outbox", "failed", "lora_dir"}
    )
    assert found.model_dump(exclude={"inbox", "outbox", "failed", "lora_dir"}) == untouched
    for folder in (found.inbox, found.outbox, found.failed):
        assert folder.is_dir()
        assert str(folder) in result.output
    assert str(written) in result.output


def test_every_key_of_the_example_can_be_uncommented(home: Path) -> None:
    init()
    text = (home / ".config/framepackd/config.toml").read_text()
    keys = [line for line in text.splitlines() if line.startswith("# seconds = ")]
    assert len(keys) == 1
    assert tomllib.loads(text.replace(keys[0], keys[0].removeprefix("# ")))["defaults"]["seconds"] == 5.0


def test_folders_that_are_named_are_set_and_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    drop = home / 'my "drop" folder'
    assert init("--inbox", drop, "--outbox", "videos").exit_code == 0
    found = load_config(None)
    assert found.inbox == drop
    assert found.outbox == home / "videos"
    assert drop.is_dir()


def test_a_configuration_that_exists_stays(home: Path) -> None:
    mine = home / "mine.toml"
    mine.write_text('model = "demo"\n')
    result = init("--config", mine)
    assert result.exit_code == 2
    assert f"{mine} exists already" in result.output
    assert mine.read_text() == 'model = "demo"\n'


def test_the_next_steps_name_a_configuration_that_is_not_found_by_itself(home: Path) -> None:
    result = init("--config", home / "other.toml")
    assert f"framepackd check --config {home}/other.toml" in result.output
    assert "framepackd check --config" not in init().output


def test_what_init_and_a_file_set_ends_with_them(home: Path) -> None:
    before = os.umask(0o022)
    os.umask(before)
    result = init()
    assert result.exit_code == 0, result.output
    assert os.umask(before) == before
    (home / "other.toml").write_text('model = "demo-f1"\n')
    assert load_config(home / "other.toml").model == "demo-f1"
    assert Config().model == "framepack", "a file's keys are this file's alone"


def test_an_init_that_fails_leaves_nothing_in_the_way_of_the_next(home: Path) -> None:
    (home / "taken").write_text("a file")
    assert init("--inbox", home / "taken").exit_code == 1
    assert init("--inbox", home / "free").exit_code == 0
