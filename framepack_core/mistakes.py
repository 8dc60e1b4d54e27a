"""Explains wrong settings: the key, its value, what is allowed, and the key that was probably meant."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MultipleOf
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

MAX_MISTAKES = 10  # listed in one message
MAX_SHOWN = 100  # characters of a wrong value in a message
# By pydantic's names of errors.
KINDS = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
}


@dataclass(frozen=True)
class Also:
    """An annotation of a field of numbers: other values that it takes, in words for messages."""

    words: str


def explain(
    error: ValidationError,
    fields: type[BaseModel],
    *,
    said: Mapping[str, str] | None = None,
    meant: Mapping[str, str] | None = None,
    secret: Collection[str] = (),
) -> str:
    """Describe each mistake: the wrong key, its value and the allowed values.

    The value is not added to a validator's own text, which names it where that helps.

    Args:
        error: pydantic's error.
        fields: the model that was validated.
        said: for each field, the name that the user wrote for it, if that is another.
        meant: words that users may write for a key, each with the key to suggest.
        secret: keys whose values must not be shown.
    """
    found: dict[str, list[str]] = {}  # texts by key: of a union, pydantic reports one mistake per type
    ends: dict[str, str] = {}
    for mistake in error.errors(include_url=False):
        place = _locate(mistake["loc"], fields)
        key = place.name(said or {})
        words = _words(mistake["type"], mistake["msg"], mistake.get("ctx", {}), place)
        if mistake["type"] == "extra_forbidden":
            text, ends[key] = f"unknown key {shown(key)}{_guess(place, said or {}, meant or {})}", ""
        elif mistake["type"] == "missing":
            text, ends[key] = f"{key} is missing", ""
        elif words is None:
            text, ends[key] = _own(key, str(mistake["msg"]), place), ""
        else:
            more = bool(found.get(key))
            text = words if more else f"{key} must be {words}"
            ends[key] = "" if key in secret else f", got {shown(mistake['input'])}"
        if text not in found.setdefault(key, []):
            found[key].append(text)
    mistakes = [" or ".join(texts) + ends[key] for key, texts in found.items()]
    more_than = len(mistakes) - MAX_MISTAKES
    if more_than > 0:
        mistakes = [*mistakes[:MAX_MISTAKES], f"and {more_than} more mistakes"]
    return "; ".join(mistakes)


@dataclass(frozen=True)
class _Place:
    """Where a mistake is: its keys and, if known, its field and the table that holds it."""

    keys: tuple[str, ...]
    field: FieldInfo | None
    table: type[BaseModel] | None
    annotation: Any

    def name(self, said: Mapping[str, str]) -> str:
        return ".".join((said.get(self.keys[0], self.keys[0]), *self.keys[1:])) if self.keys else ""


def _locate(location: Iterable[str | int], fields: type[BaseModel]) -> _Place:
    """Follow pydantic's location through the types; skips the parts that name a type of a union."""
    keys: list[str] = []
    field: FieldInfo | None = None
    table: type[BaseModel] | None = None
    annotation: Any = fields
    for part in location:
        inner = next(filter(_is_nested, _choices(annotation)), None)
        if inner is None or part == "[key]":
            continue
        keys.append(str(part))
        if _is_table(inner):
            table = inner
            field = _field(table, str(part))
            annotation = field.annotation if field else None
        else:  # a list of something, or a table by names
            field, table = None, None
            annotation = next(each for each in reversed(get_args(inner)) if each is not ...)
    return _Place(tuple(keys), field, table, annotation)


def _choices(annotation: Any) -> Iterator[Any]:
    """Give the types of a union or annotated type.

    >>> list(_choices(Annotated[int, "small"] | None))
    [<class 'int'>, <class 'NoneType'>]
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _choices(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for each in get_args(annotation):
            yield from _choices(each)
    else:
        yield annotation


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_nested(annotation: Any) -> bool:
    return _is_table(annotation) or get_origin(annotation) in (list, tuple, dict)


def _field(table: type[BaseModel], key: str) -> FieldInfo | None:
    by_alias = (field for field in table.model_fields.values() if field.alias == key)
    return table.model_fields.get(key) or next(by_alias, None)


def _words(kind: str, message: str, context: Mapping[str, Any], place: _Place) -> str | None:
    """Describe the allowed values; None if a validator's own text does."""
    metadata = place.field.metadata if place.field is not None else []
    if limits := _range(metadata):
        also = next((each.words for each in metadata if isinstance(each, Also)), "")
        number = "a whole number" if also else KINDS.get(kind, "")  # the kind, if the value has another
        before = number and number + (" from " if " to " in limits else ", ")
        return f"{before}{limits}{also}"
    if kind == "value_error":
        return None
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "too_long":
        return f"a list of at most {context['max_length']} entries"
    message = message.removeprefix("Input should be ")
    return KINDS.get(kind) or message[:1].lower() + message[1:]


def _range(metadata: Iterable[object]) -> str:
    """Write the range of a field of numbers, such as ``1 to 120``; empty if it has none."""
    limits: dict[type, Any] = {}
    for each in metadata:
        for kind, name in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (MultipleOf, "multiple_of")):
            if isinstance(each, kind):
                limits[kind] = getattr(each, name)
    step = f" in steps of {limits[MultipleOf]}" if MultipleOf in limits else ""
    if Gt in limits and Le in limits:
        return f"more than {limits[Gt]}, and at most {limits[Le]}{step}"
    if Ge in limits:
        return f"{limits[Ge]} {f'to {limits[Le]}' if Le in limits else 'or more'}{step}"
    return ""


def _own(key: str, message: str, place: _Place) -> str:
    """Put the key before a validator's own text, unless the text begins with it."""
    message = message.removeprefix("Value error, ")
    if not key or message.startswith((key, f"[{key}]")):
        return message
    of_a_table = any(_is_table(each) for each in _choices(place.annotation))
    return f"{key}{':' if of_a_table else ''} {message}"


def _guess(place: _Place, said: Mapping[str, str], meant: Mapping[str, str]) -> str:
    if place.table is None:
        return ""
    *above, key = place.keys
    names = {field.alias or name: field.alias or name for name, field in place.table.model_fields.items()}
    known = {**(meant if not above else {}), **names}
    match = closest(key, known)
    return "" if match is None else f": did you mean {'.'.join([*above, known[match]])!r}?"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Give the known word that was probably meant, if there is one.

    >>> closest("framepak", ["demo", "framepack"]), closest("x", ["demo"])
    ('framepack', None)
    """
    if len(word) > MAX_SHOWN:
        return None
    return next(iter(get_close_matches(word.lower(), list(known), n=1)), None)


def shown(value: object) -> str:
    """Write a value for a message as ``repr`` does, cut at 100 characters.

    >>> shown("x" * 1000) == repr("x" * 1000)[:100] + "…"
    True
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; tables nested too deep
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
