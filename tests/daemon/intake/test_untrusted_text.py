"""Names, prompts and settings that nobody would write: understood or refused, and safe to print."""

import json
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framepack_core.errors import RequestError
from framepackd.inbox.naming import group_files
from framepackd.settings.decoding import MAX_PROMPT_BYTES, read_prompt
from framepackd.settings.job_settings import JobSettings, parse_settings, read_settings_file
from framepackd.text import as_utf8, printable, printable_json, rest_of_name

anything = st.text(st.characters())  # lone surrogates, too: bytes of a name that are not UTF-8
keys = st.sampled_from([*JobSettings.model_fields, "cfg", "use_teacache", "use_random_seed", "unknown"])
toml_words = st.sampled_from(
    [*JobSettings.model_fields, *"=.[]{},#\"'\n 019-_", "0x", "nan", "true", "'''", "\\u0000", "1e9"]
)
toml = st.lists(toml_words, max_size=30).map(lambda words: "".join(words).encode())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=8,
)


@given(text=anything)
def test_what_is_printed_never_speaks_to_the_terminal(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    as_utf8(text).encode()


@given(value=st.dictionaries(st.text(), st.text()))
def test_printable_json_means_the_same(value: dict[str, str]) -> None:
    written = printable_json(value)
    assert all(c.isprintable() or c == "\n" for c in written)
    assert json.loads(written) == value


def read(reader: Callable[[Path], Any], content: bytes) -> tuple[Any, str]:
    """Have a file read; gives what it says, or else why it was refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.toml")
        path.write_bytes(content)
        try:
            return reader(path), ""
        except RequestError as error:
            return None, str(error)


@given(content=st.binary(max_size=200) | toml)
def test_settings_are_understood_or_refused_in_few_words(content: bytes) -> None:
    settings, refusal = read(lambda path: read_settings_file(path, "x.toml"), content)
    assert refusal or set(settings) <= set(JobSettings.model_fields)
    assert len(refusal) < 3000


@given(said=st.dictionaries(keys, values))
def test_any_value_is_understood_or_refused(said: dict[str, object]) -> None:
    understood, refusal = read(lambda _: parse_settings(said, "x.toml"), b"")
    assert refusal or parse_settings(understood, "again") == understood
    assert len(refusal) < 3000


@given(content=st.binary(max_size=200) | st.text().map(str.encode))
def test_a_text_is_the_prompt_or_refused(content: bytes) -> None:
    prompt, refusal = read(read_prompt, content)
    if not refusal:
        assert prompt == prompt.strip()
        assert prompt in content.decode().replace("\r\n", "\n")


def test_an_endless_text_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RequestError, match=f"may have {MAX_PROMPT_BYTES}"):
        read_prompt(tmp_path / "x.txt")


@given(stem=st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1))
def test_a_files_name_is_its_jobs_name_and_a_rest(stem: str) -> None:
    for suffix in (".png", "_end.png", ".end.jpg", "_first_frame.png", ".TXT", ".toml"):
        for group in group_files([stem + suffix]):
            rest = rest_of_name(stem + suffix, group.name)
            assert group.name + rest == unicodedata.normalize("NFC", stem + suffix)
