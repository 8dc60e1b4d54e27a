"""The last few results of the encoders, so that the same prompt or picture is not encoded again."""

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

Source = TypeVar("Source")
Result = TypeVar("Result")

KEPT = 8  # a prompt takes 4 MB, a picture 2


class Recent(Generic[Result]):
    """Results by what they were made of; those not asked for longest give way."""

    def __init__(self, kept: int = KEPT) -> None:
        """Hold nothing yet, and never more than ``kept`` results."""
        self._kept = kept
        self._results: dict[str, Result] = {}

    def all(
        self, wanted: Mapping[str, Source], make: Callable[[list[Source]], Iterable[Result]]
    ) -> list[Result]:
        """Give a result for each source, ``wanted`` naming all that it depends on; makes what is missing."""
        missing = {name: source for name, source in wanted.items() if name not in self._results}
        if missing:
            self._results |= zip(missing, make(list(missing.values())), strict=True)
        self._results |= {name: self._results.pop(name) for name in wanted}  # to the end
        results = [self._results[name] for name in wanted]
        for name in list(self._results)[: -self._kept]:
            del self._results[name]
        return results
