"""Reads passwords and webhook addresses from files, which may be systemd credentials."""

import os
import re
import stat
from pathlib import Path
from urllib.parse import urlsplit

from framepackd.settings.decoding import other_unicode

CREDENTIALS = "CREDENTIALS_DIRECTORY"  # set by systemd for a unit with LoadCredential=
MAX_BYTES = 4096


class SecretError(Exception):
    """A secret cannot be read; the text says why and what to do, and never the secret."""


def locate(file: Path, base: Path) -> Path:
    """Find a secret's file: a plain name among systemd's credentials, else below the config's folder."""
    credentials = os.environ.get(CREDENTIALS)
    if credentials and len(file.parts) == 1 and Path(credentials, file).exists():
        return Path(credentials, file)
    return base / file.expanduser()


def secret(file: Path, key: str) -> str:
    """Read a secret: the file's content without the line end.

    Raises:
        SecretError: the file is missing, empty, not UTF-8 text, or open to others.
    """
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise SecretError(
            f"{key}: {file}: {error.strerror}: write the secret there, for the service's user alone "
            "(mode 0600), or hand it over by LoadCredential= of the unit"
        ) from error
    if mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise SecretError(
            f"{key}: {file} is open to others (mode {stat.S_IMODE(mode):04o}): chmod 0600 {file}"
        )
    text = content.decode("utf-8-sig", "replace").rstrip("\r\n")  # Notepad may write a mark before it
    if kind := other_unicode(content):
        raise SecretError(f"{key}: {file} is {kind}: write it again as UTF-8, one line, the secret")
    if not text.strip() or len(content) > MAX_BYTES or not text.isprintable() or "\ufffd" in text:
        raise SecretError(
            f"{key}: {file} must hold one line of text, the secret, and does not: write it again"
        )
    return text


def webhook_address(url: str, source: str) -> str:
    """Check an address. No error quotes it: what follows the host is often a secret.

    >>> webhook_address("ftp://example.org/token", "webhook")
    Traceback (most recent call last):
    ValueError: webhook must be an address that starts with http:// or https://
    """
    if not re.fullmatch(r"https?://[^\s/]+\S*", url):
        raise ValueError(f"{source} must be an address that starts with http:// or https://")
    try:
        parts = urlsplit(url)
        usable = parts.port != 0 and parts.hostname and url.isascii() and url.isprintable()
    except ValueError:
        usable = None
    if not usable or parts.username is not None:
        raise ValueError(
            f"{source} must be an address as a browser has it: a host, a port that is a number, no user or "
            "password before the host, and other characters than ASCII as %XX"
        )
    return url
