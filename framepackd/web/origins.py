"""Decides to which names the server answers, and whether a request comes from its own page."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from framepackd.settings.tables import HOST

DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Authority:
    """What stands between ``//`` and ``/`` in an address."""

    host: str  # in lower case; an IPv6 address is in brackets, and written in the shortest way
    port: int | None = None


def parse_authority(text: str) -> Authority | None:
    """Read ``name``, ``name:port``, ``[IPv6]`` or ``[IPv6]:port``; None: it is anything else.

    >>> parse_authority("LocalHost:7860"), parse_authority("[0:0::1]")
    (Authority(host='localhost', port=7860), Authority(host='[::1]', port=None))
    >>> parse_authority("me@localhost"), parse_authority("localhost."), parse_authority("[fe80::1%eth0]")
    (None, None, None)
    """
    found = HOST.fullmatch(text.lower())
    if found is None:
        return None
    host, port = found["host"], int(found["port"] or 1)
    if not 1 <= port <= 65535:
        return None
    if host.startswith("["):
        try:
            host = f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
        except ValueError:
            return None
    return Authority(host, port if found["port"] else None)


def is_loopback(host: str) -> bool:
    """Say whether a host, or an address to listen on, is reached from this machine only."""
    if host in ("localhost", "::1", "[::1]"):
        return True
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


class Hosts:
    """The names to which this server answers.

    Another page may make its own name point to 127.0.0.1 once it is loaded (DNS rebinding): the browser then
    takes this server for that page's own. Only the name in the request shows it.
    """

    def __init__(self, server: str, named: Iterable[str], *, others: bool) -> None:
        """Take the address to listen on, the names in the config, and whether other machines reach it."""
        self._named = [parsed for name in named if (parsed := parse_authority(name))]
        self._server = parse_authority(f"[{server}]" if ":" in server.strip("[]") else server)
        self._any = others and not self._named

    def answers(self, host: Authority) -> bool:
        """Say whether the server answers to this name."""
        return (
            self._any
            or is_loopback(host.host)
            or (self._server is not None and host.host == self._server.host)
            or any(name.host == host.host and name.port in (None, host.port) for name in self._named)
        )

    def owns(self, origin: str, host: Authority, scheme: str) -> bool:
        """Say whether an ``Origin`` is this server's page, which was requested as ``host`` over ``scheme``.

        A proxy may hide its own name, and that the page came over https: its name has to be in the config.
        """
        sent_over, _, rest = origin.partition("://")
        sender = parse_authority(rest)
        if sender is None or sent_over not in DEFAULT_PORTS or (scheme == "https" and sent_over == "http"):
            return False
        usual = DEFAULT_PORTS[sent_over]
        return any(
            sender.host == own.host and (sender.port or usual) == (own.port or usual)
            for own in (host, *self._named)
        )
