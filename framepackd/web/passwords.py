"""Slows down the guessing of passwords: from each address, and from all together."""

import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable

FREE = 3  # wrong ones in a row that cost no time: people mistype
LONGEST_WAIT = 60.0  # seconds
FORGOTTEN_AFTER = 3600.0  # seconds without another wrong one
MINUTE = 60.0
MOST_A_MINUTE = 30  # wrong ones, from all addresses together
MOST_ADDRESSES = 4096  # remembered; more than can go wrong in FORGOTTEN_AFTER


class Tries:
    """Counts recent wrong passwords."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take a clock that never jumps."""
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many in a row, when the last
        self._all: deque[float] = deque(maxlen=MOST_A_MINUTE)

    def wait(self, address: str) -> float:
        """Give the seconds until a password from an address is checked; 0: now."""
        now = self._clock()
        count, last = self._wrong.get(_network(address), (0, now))
        if now - last > FORGOTTEN_AFTER:
            count = 0
        own = min(2.0 ** (count - FREE), LONGEST_WAIT) if count >= FREE else 0.0
        full = len(self._all) == MOST_A_MINUTE
        return max(last + own - now, self._all[0] + MINUTE - now if full else 0.0, 0.0)

    def wrong(self, address: str) -> int:
        """Count a wrong password; gives how many there were in a row."""
        now, network = self._clock(), _network(address)
        count, last = self._wrong.pop(network, (0, now))
        count = 1 if now - last > FORGOTTEN_AFTER else count + 1
        self._wrong[network] = count, now
        if len(self._wrong) > MOST_ADDRESSES:
            self._wrong.popitem(last=False)
        self._all.append(now)
        return count

    def right(self, address: str) -> None:
        """Forget the wrong passwords of an address that gave the right one."""
        self._wrong.pop(_network(address), None)


def _network(address: str) -> str:
    """Give the addresses that one person has: an IPv4 address, or an IPv6 network of 2^64.

    >>> _network("192.0.2.7"), _network("2001:db8::7")
    ('192.0.2.7', '2001:db8::/64')
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)
