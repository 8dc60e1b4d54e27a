"""Moves modules on and off the device as the memory level says."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from framepack_core.memory import devices
from framepack_core.memory.footprint import MemoryLevel, Placement
from framepack_core.memory.streaming import Streamer

if TYPE_CHECKING:
    from transformers import LlamaModel


class Places:
    """Places modules on the device temporarily, permanently, or layer by layer."""

    def __init__(
        self,
        device: torch.device,
        *,
        core: nn.Module,
        blocks: nn.Module,
        text_encoder: "LlamaModel",
        vae: nn.Module,
        pinnable: bool,
    ) -> None:
        """Take the modules that the levels treat differently; all others move when they are used.

        Args:
            device: where to compute.
            core: the sampling loop's part of the transformer; stays, or is streamed.
            blocks: of the core, as lists of layers in the order of their calls.
            text_encoder: so large that it is streamed unless everything stays.
            vae: used in every section, so it stays with the core.
            pinnable: whether streamed blocks are kept in page-locked memory.
        """
        self.device = device
        self._core, self._blocks, self._text_encoder, self._vae = core, blocks, text_encoder, vae
        self._pinnable = pinnable
        self._placement: Placement = "all"
        self._room = 0
        self._streamers = dict[nn.Module, Streamer]()  # of all modules that were ever streamed
        self.staying = dict[nn.Module, ExitStack]()  # modules that stay on the device; closing one removes it

    def take(self, level: MemoryLevel, room: int = 0) -> None:
        """Apply a memory level; ``room``: bytes for blocks that stay while others are streamed."""
        self._placement = level.placement
        self._room = room if level.placement == "partly" else 0
        if not all(self._may_stay(module) for module in self.staying):
            self._drop(list(self.staying))
            devices.release_unused(self.device)
        if level.placement != "all" and self._text_encoder not in self._streamers:
            self._stream_text_encoder()
        if level.placement in ("partly", "streamed") and self._core not in self._streamers:
            layers = [layer for stack in self._blocks.children() for layer in stack.children()]
            self._streamers[self._core] = Streamer(layers, self.device, lock=self._pinnable)

    def _stream_text_encoder(self) -> None:
        """Stream its layers from their files; it is used too rarely to page-lock memory for it."""
        self._streamers[self._text_encoder] = Streamer(self._text_encoder.layers, self.device, lock=False)
        embedding = self._text_encoder.embed_tokens
        # Larger than two layers, and a prompt needs a few hundred of its rows: looked up in host memory.
        embedding.register_forward_pre_hook(lambda module, ids: (ids[0].to(module.weight.device),))
        embedding.register_forward_hook(lambda _, __, rows: rows.to(self.device))

    def _drop(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self.staying.pop(module).close()

    def leave(self, *modules: nn.Module) -> None:
        """Remove from the device, until they are used again, the modules that contain one of ``modules``."""
        self._drop([whole for whole in self.staying if not set(modules).isdisjoint(whole.modules())])

    def home(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Give the host memory that a parameter is streamed from; None if it is not streamed."""
        found = (streamer.home(parameter) for streamer in self._streamers.values())
        return next((home for home in found if home is not None), None)

    def _may_stay(self, module: nn.Module) -> bool:
        return self._placement == "all" or (self._placement == "core" and module in (self._core, self._vae))

    def _is_streamed(self, module: nn.Module) -> bool:
        if module is self._text_encoder:
            return self._placement != "all"
        return module is self._core and self._placement in ("partly", "streamed")

    @contextmanager
    def on_device(self, *modules: nn.Module) -> Iterator[None]:
        """Place modules on the device inside the block; those that may stay, stay after it."""
        visitors, streamed = [], []
        for module in modules:
            if self._is_streamed(module):
                streamed.append(module)
                visitors += self._not_streamed(module)
            elif module not in self.staying and self._may_stay(module):
                with ExitStack() as stack:
                    stack.enter_context(devices.visiting(module, device=self.device))
                    self.staying[module] = stack.pop_all()
            elif module not in self.staying:
                visitors.append(module)
        try:
            with devices.visiting(*visitors, device=self.device), ExitStack() as stack:
                for module in streamed:
                    room = self._room if module is self._core else 0
                    stack.enter_context(self._streamers[module].on_device(room))
                yield
        finally:
            if visitors:
                devices.release_unused(self.device)

    def _not_streamed(self, module: nn.Module) -> list[nn.Module]:
        """List the parts of a streamed module that are moved as a whole."""
        elsewhere = (self._blocks, self._text_encoder.layers, self._text_encoder.embed_tokens)
        return [part for part in module.children() if part not in elsewhere]

    def for_a_moment(self, module: nn.Module) -> AbstractContextManager[None]:
        """Place one of many small modules on the device; torch keeps the freed memory for the next one."""
        stays = self._may_stay(module)
        return self.on_device(module) if stays else devices.visiting(module, device=self.device)
