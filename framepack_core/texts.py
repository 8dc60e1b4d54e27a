"""Which text each section has, and what the transformer takes from it."""

from collections.abc import Callable, Mapping

from framepack_core.conditioning import Conditioning
from framepack_core.networks.encoders import TextConditioning
from framepack_core.networks.transformer import Tables
from framepack_core.prompts import sections_of
from framepack_core.request import Request
from framepack_core.sections import Kind


class SectionTexts:
    """The texts of a video's sections; the tables of one prompt at a time are kept, at 4 MB a step."""

    def __init__(
        self,
        request: Request,
        conditioned: Conditioning,
        kind: Kind,
        sections: int,
        make: Callable[[TextConditioning], Tables],
    ) -> None:
        """Share the prompts out; ``make`` computes the tables of one."""
        self._texts = [conditioned.positive] * sections
        window = request.latent_window_size
        acting = sections_of(request.prompts, kind, sections, window, asked=request.seconds)
        for timed, numbers in zip(conditioned.timed, acting, strict=True):
            for number in numbers:
                self._texts[number] = timed
        self._negative = conditioned.negative
        self._make = make
        self._positive: TextConditioning | None = None  # whose tables are there
        self._tables: dict[str, Tables] = {}

    def tables(self, section: int) -> Mapping[str, Tables]:
        """Give the tables of a section, by guidance branch."""
        if self._texts[section] is not self._positive:
            self._tables.pop("positive", None)  # first: they lie on the device
            self._positive = self._texts[section]
            self._tables["positive"] = self._make(self._positive)
        if self._negative is not None and "negative" not in self._tables:
            self._tables["negative"] = self._make(self._negative)
        return self._tables
