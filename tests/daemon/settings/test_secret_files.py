"""Secrets lie in files of their own, and nothing that is said holds one."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from framepackd.cli.main import main
from framepackd.reports import hooks
from framepackd.reports.hooks import NotifyError
from framepackd.settings.config import Config, ConfigError, load_config
from framepackd.settings.secret_files import SecretError
from framepackd.web.server import WebError, serve

SECRET = "hush-0123"  # noqa: S105 - of nothing
HOOK = f"https://example.org/hooks/{SECRET}"


def config(folder: Path, text: str, mode: int = 0o600) -> Config:
    path = folder / "config.toml"
    path.write_text(f'state_dir = "{folder}/state"\nmodel = "demo"\n{text}')
    path.chmod(mode)
    return load_config(path)


def secret_file(folder: Path, content: str | bytes = f"{SECRET}\n", mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def check(folder: Path) -> tuple[int, str]:
    said = CliRunner().invoke(main, ["check", "--no-gpu", "--config", str(folder / "config.toml")])
    assert SECRET not in said.output
    return said.exit_code, " ".join(said.output.split())


def test_a_password_and_a_webhook_come_from_files_without_the_end_of_the_line(tmp_path: Path) -> None:
    secret_file(tmp_path)
    found = config(tmp_path, '[web]\npassword_file = "secret"\n')
    assert found.web.read_password() == SECRET
    secret_file(tmp_path, SECRET.encode("utf-8-sig"))  # as some editors write it
    assert found.web.read_password() == SECRET
    secret_file(tmp_path, f"{HOOK}\r\n")
    found = config(tmp_path, '[notify]\nwebhook_file = "secret"\n')
    assert found.notify.read_webhook() == HOOK


def test_a_plain_name_is_a_systemd_credential_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret_file(tmp_path, "beside the configuration")
    (tmp_path / "credentials").mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    text = '[web]\npassword_file = "secret"\n'
    assert config(tmp_path, text).web.read_password() == "beside the configuration"
    (tmp_path / "credentials/secret").write_text(SECRET)
    (tmp_path / "credentials/secret").chmod(0o400)
    assert config(tmp_path, text).web.read_password() == SECRET


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0o600, "No such file or directory: write the secret there"),
        ("", 0o600, "must hold one line of text"),
        ("\n", 0o600, "must hold one line of text"),
        (f"{SECRET}\nmore\n", 0o600, "must hold one line of text"),
        (SECRET.encode("utf-16"), 0o600, "is UTF-16: write it again as UTF-8"),
        (SECRET.encode("utf-16-le"), 0o600, "is UTF-16: write it again as UTF-8"),
        (SECRET, 0o644, "is open to others (mode 0644): chmod 0600"),
        (SECRET, 0o660, "is open to others (mode 0660): chmod 0600"),
    ],
)
def test_an_unusable_secret_file_is_an_error_only_for_the_command_that_needs_it(
    tmp_path: Path, content: str | bytes | None, mode: int, words: str
) -> None:
    if content is not None:
        secret_file(tmp_path, content, mode)
    found = config(tmp_path, '[web]\npassword_file = "secret"\n[notify]\nwebhook_file = "secret"\n')
    with pytest.raises(WebError, match="password_file: ") as told:
        serve(found, "0.0.0.0", 7860)  # noqa: S104 - it is refused
    assert words in str(told.value)
    assert SECRET not in str(told.value)
    with pytest.raises(NotifyError, match="webhook_file: ") as told_too:
        hooks.run(found)
    assert words in str(told_too.value)
    code, output = check(tmp_path)
    assert code == 0, "no video needs it"
    assert "! password_file" in output


def test_both_a_secret_and_its_file_are_a_mistake(tmp_path: Path) -> None:
    for text, words in (
        (f'[web]\npassword = "{SECRET}"\npassword_file = "secret"\n', "password and password_file are both"),
        (f'[notify]\nwebhook = "{HOOK}"\nwebhook_file = "secret"\n', "webhook and webhook_file are both"),
    ):
        with pytest.raises(ConfigError, match=words) as told:
            config(tmp_path, text)
        assert SECRET not in str(told.value)


@pytest.mark.parametrize(
    "address",
    [
        f"htps://example.org/{SECRET}",
        f"example.org/{SECRET}",
        f"https://user:{SECRET}@example.org/",
        f"https://example.org:{SECRET}/",
        f"https://example.org/ä{SECRET}",
        f"https://example.org/\x7f{SECRET}",
    ],
)
def test_an_unusable_address_is_refused_and_never_quoted(tmp_path: Path, address: str) -> None:
    for text in (
        f'[notify]\nwebhook = "{address}"\n'.replace("\x7f", "\\u007f"),
        '[notify]\nwebhook_file = "secret"\n',
    ):
        secret_file(tmp_path, address)
        with pytest.raises((ConfigError, SecretError)) as told:
            config(tmp_path, text).notify.read_webhook()
        assert SECRET not in str(told.value)


def test_no_error_quotes_a_secret(tmp_path: Path) -> None:
    for text in (
        f"[web]\npassword = ['{SECRET}']\n",
        f"web = '{SECRET}'\n",
        f"[notify]\nwebhook = ['{HOOK}']\n",
    ):
        with pytest.raises(ConfigError) as told:
            config(tmp_path, text)
        assert SECRET not in str(told.value)
        assert SECRET not in repr(told.value.__context__ and told.value.__cause__)
    found = config(tmp_path, f'[web]\npassword = "{SECRET}"\n[notify]\nwebhook = "{HOOK}"\n')
    assert SECRET not in repr(found)


@pytest.mark.parametrize(
    ("mode", "warned"),
    [(0o600, None), (0o640, "who may drop files"), (0o644, "everybody on this machine")],
)
def test_a_secret_in_a_configuration_that_others_can_read_is_a_warning(
    tmp_path: Path, mode: int, warned: str | None
) -> None:
    config(tmp_path, "", mode)
    (tmp_path / "state/inbox").mkdir(parents=True)
    assert "secrets" not in check(tmp_path)[1], "there is none"
    config(tmp_path, f'[web]\npassword = "{SECRET}"\n[notify]\nwebhook = "{HOOK}"\n', mode)
    code, output = check(tmp_path)
    assert code == 0
    assert ("secrets" in output) == (warned is not None)
    if warned:
        assert (
            f"password under [web] and webhook under [notify] in {tmp_path}/config.toml can be read" in output
        )
        assert warned in output
        assert "set password_file and webhook_file instead" in output


def test_a_password_of_the_environment_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMEPACKD_WEB__PASSWORD", SECRET)
    assert config(tmp_path, "", 0o644).web.read_password() == SECRET
    assert "secrets" not in check(tmp_path)[1]
