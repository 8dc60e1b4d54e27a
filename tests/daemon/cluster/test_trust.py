"""Trust: without a token nothing runs, without TLS nothing beyond this machine; errors say what to do."""

from pathlib import Path

import pytest

from framepackd.cluster.trust import Trust, TrustError

LOOPBACK, NETWORK = "127.0.0.1", "10.0.0.1"


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    files = {name: tmp_path / name for name in ("token", "certificate", "key", "authority")}
    for file in files.values():
        file.write_text("a" * 64 + "\n")
        file.chmod(0o600)
    return Trust(**files)


def test_a_token_is_enough_on_one_machine_only(trust: Trust) -> None:
    Trust(trust.token).check(LOOPBACK)
    with pytest.raises(
        TrustError, match=r"tls_cert, tls_key, tls_ca .* must be set: the head's address 10\.0\.0\.1"
    ):
        Trust(trust.token).check(NETWORK)
    trust.check(NETWORK)


def test_some_files_of_tls_are_not_enough_anywhere(trust: Trust) -> None:
    with pytest.raises(TrustError, match=r"tls_ca of .* must be set"):
        Trust(trust.token, trust.certificate, trust.key).check(LOOPBACK)


@pytest.mark.parametrize("name", ["token", "certificate", "key", "authority"])
def test_a_file_that_is_missing_is_named(trust: Trust, name: str) -> None:
    getattr(trust, name).unlink()
    with pytest.raises(TrustError, match=f"{getattr(trust, name)} is not there"):
        trust.check(NETWORK)


@pytest.mark.parametrize("name", ["token", "key"])
def test_a_secret_that_others_may_read_is_refused(trust: Trust, name: str) -> None:
    getattr(trust, name).chmod(0o644)
    with pytest.raises(TrustError, match=f"may be read by others: chmod 600 {getattr(trust, name)}"):
        trust.check(NETWORK)


def test_a_token_that_can_be_guessed_is_refused_and_not_shown(trust: Trust) -> None:
    trust.token.write_text("secret\n")
    with pytest.raises(TrustError, match="less than 32 ASCII characters") as refused:
        trust.check(NETWORK)
    assert "secret" not in str(refused.value)


def test_a_token_that_is_no_text_is_refused_in_words(trust: Trust) -> None:
    trust.token.write_bytes(b"\xff" * 64)
    with pytest.raises(TrustError, match="less than 32 ASCII characters"):
        trust.check(NETWORK)


def test_ray_always_asks_for_the_token(trust: Trust) -> None:
    alone, encrypted = Trust(trust.token).environment(), trust.environment()
    assert alone == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(trust.token)}
    assert encrypted["RAY_USE_TLS"] == "1"
    assert encrypted.items() > alone.items()
