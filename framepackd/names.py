"""Names of files and texts of users: compared, taken apart and printed."""

import unicodedata


def printable(text: str) -> str:
    r"""Show control characters as escapes: names and prompts must not speak to the terminal.

    >>> printable("new\nline")
    'new\\nline'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_utf8(name: str) -> str:
    r"""Escape the bytes of a name that are not UTF-8: Linux allows them, JSON and SQLite do not.

    >>> as_utf8("caf" + chr(0xdce9))
    'caf\\udce9'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def rest_of_name(file: str, name: str) -> str:
    """Give what follows NAME in the name of one of its files.

    >>> rest_of_name("cat_end.png", "cat")
    '_end.png'
    """
    return unicodedata.normalize("NFC", file)[len(unicodedata.normalize("NFC", name)) :]
