"""Who may join: the token that all machines share, and the certificates that encrypt what they say."""

import ipaddress
import stat
from dataclasses import dataclass
from pathlib import Path

from framepackd.problems import CommandError

SHORTEST_TOKEN = 32  # characters: as openssl rand -hex 16 gives them
MAKE_ONE = "openssl rand -hex 32 | install -m 600 /dev/stdin"


class TrustError(CommandError):
    """A machine cannot trust the others like that; the text says why and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Trust:
    """The files by which machines know each other."""

    token: Path
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None  # certificate of who signed all certificates

    def check(self, address: str) -> None:
        """See that the files are there, and are enough for a head at this IP address.

        Raises:
            TrustError: one is missing or open to others, or the head is reached by a network without TLS.
        """
        if not self.token.is_file():
            raise TrustError(f"token_file: {self.token} is not there. Make one: {MAKE_ONE} {self.token}")
        _refuse_open(self.token, "token_file")
        token = self.token.read_bytes().strip()
        if len(token) < SHORTEST_TOKEN or not token.isascii():
            raise TrustError(
                f"token_file: {self.token} holds less than {SHORTEST_TOKEN} ASCII characters. Make one that "
                f"nobody can guess: {MAKE_ONE} {self.token}"
            )
        given = {"tls_cert": self.certificate, "tls_key": self.key, "tls_ca": self.authority}
        missing = [name for name, file in given.items() if file is None]
        if missing and (len(missing) < len(given) or not ipaddress.ip_address(address).is_loopback):
            raise TrustError(
                f"{', '.join(missing)} of [cluster] must be set: the head's address {address} is reached by "
                "a network, and who reads along would have the token. docs/cluster.md says how to make them"
            )
        for name, file in given.items():
            if file is not None and not file.is_file():
                raise TrustError(f"{name}: {file} is not there. docs/cluster.md says how to make it")
        if self.key is not None:
            _refuse_open(self.key, "tls_key")

    def environment(self) -> dict[str, str]:
        """Give the variables by which Ray knows the files."""
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        if self.certificate is not None:
            variables |= {
                "RAY_USE_TLS": "1",
                "RAY_TLS_SERVER_CERT": str(self.certificate),
                "RAY_TLS_SERVER_KEY": str(self.key),
                "RAY_TLS_CA_CERT": str(self.authority),
            }
        return variables


def _refuse_open(file: Path, name: str) -> None:
    if file.stat().st_mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise TrustError(f"{name}: {file} may be read by others: chmod 600 {file}")
