"""A wrong setting is corrected in the job's own file, or nothing is written."""

from pathlib import Path
from typing import Any

import pytest

from framepack_core.errors import RequestError
from framepackd.web.fragments import choice
from framepackd.web.mending import write_setting, wrong_setting

BEFORE = '# by hand\nsteps = 101  # too many\n\n[[loras]]\nfile = "oil.safetensors"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cat.toml"
    path.write_text(BEFORE)
    return path


def test_a_setting_is_changed_and_what_stands_around_it_stays(file: Path) -> None:
    write_setting(file, "steps", "25")
    assert file.read_text() == BEFORE.replace("101", "25")
    write_setting(file, "seed", "random")
    assert 'seed = "random"' in file.read_text().partition("[[loras]]")[0]


@pytest.mark.parametrize(("key", "text"), [("steps", "0"), ("steps", "many"), ("stepps", "1")])
def test_a_value_that_is_wrong_again_is_refused_and_nothing_is_written(
    file: Path, key: str, text: str
) -> None:
    with pytest.raises(RequestError, match=rf"cat\.toml: .*{key}"):
        write_setting(file, key, text)
    assert file.read_text() == BEFORE


@pytest.mark.parametrize("content", [b"steps = ", b"\xff"])
def test_a_file_that_is_no_settings_file_any_more_is_left_alone(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"cat\.toml has changed since"):
        write_setting(file, "steps", "1")
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "error",
    [
        "[defaults]: steps must be 1 to 100, got 101",
        "dog.toml: steps must be 1 to 100, got 101",
        "cat.toml: unknown key 'stepps': did you mean 'steps'?",
        "cat.toml: loras.0.file must be the path of a file, got 'x.pt'",
        None,
    ],
)
def test_only_a_plain_setting_of_the_jobs_own_file_is_asked_for(error: str | None) -> None:
    assert wrong_setting("cat", error) is None


@pytest.mark.parametrize(
    ("files", "offered"),
    [
        (["e.jpg", "e.png", "e.end.png", "e.txt"], ["e.jpg", "e.png"]),
        (["q_frame_0.png", "q_frame_1.png", "q_frame_1.webp"], ["q_frame_1.png", "q_frame_1.webp"]),
        (["a.png", "a.txt", "a.toml"], []),
    ],
)
def test_of_files_that_conflict_only_the_pictures_of_one_name_are_offered(
    files: list[str], offered: list[str]
) -> None:
    """What is not chosen goes to the trash."""
    entry: Any = {"files": files, "reason": "several"}
    assert choice(entry) == offered
