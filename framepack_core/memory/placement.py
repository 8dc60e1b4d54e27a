"""Moves modules on and off the GPU as the memory plan says."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from framepack_core.memory import devices
from framepack_core.memory.footprint import Placement, Rung
from framepack_core.memory.streaming import Streamer

if TYPE_CHECKING:
    from transformers import LlamaModel


class Places:
    """Has modules on the device while they are used, or for good, or layer by layer."""

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
        """Take the modules that some rungs treat otherwise than the rest.

        Args:
            device: where to compute.
            core: what the sampling loop needs; stays, or visits while its blocks are streamed.
            blocks: of it, as lists of layers that are called one after the other.
            text_encoder: so large that it is streamed unless everything stays.
            vae: used in every section, so it stays with the core.
            pinnable: whether blocks that are streamed are to come from page-locked memory.
        """
        self.device = device
        self._core, self._blocks, self._text_encoder, self._vae = core, blocks, text_encoder, vae
        self._pinnable = pinnable
        self._placement: Placement = "all"
        self._room = 0
        self._streamers = dict[nn.Module, Streamer]()  # of what has been streamed so far
        self._stays = dict[nn.Module, ExitStack]()  # what does not leave the device again

    def take(self, rung: Rung, room: int = 0) -> None:
        """Place modules as a rung says; ``room``: bytes for blocks that stay while others are streamed."""
        self._placement = rung.placement
        self._room = room if rung.placement == "partly" else 0
        if not all(self._may_stay(module) for module in self._stays):
            self._drop(list(self._stays))
            devices.release_unused(self.device)
        if rung.placement != "all" and self._text_encoder not in self._streamers:
            self._stream_text_encoder()
        if rung.placement in ("partly", "streamed") and self._core not in self._streamers:
            layers = [layer for stack in self._blocks.children() for layer in stack.children()]
            self._streamers[self._core] = Streamer(layers, self.device, lock=self._pinnable)

    def _stream_text_encoder(self) -> None:
        """Have its layers fetched from their files: for a prompt now and then nothing is page-locked."""
        self._streamers[self._text_encoder] = Streamer(self._text_encoder.layers, self.device, lock=False)
        embedding = self._text_encoder.embed_tokens
        # More than two layers are large, and a prompt needs a few hundred rows: looked up where they are.
        embedding.register_forward_pre_hook(lambda module, ids: (ids[0].to(module.weight.device),))
        embedding.register_forward_hook(lambda _, __, rows: rows.to(self.device))

    def _drop(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._stays.pop(module).close()

    def leave(self, *modules: nn.Module) -> None:
        """Have what stays on the device leave it until it is used again, if it holds one of some modules."""
        self._drop([whole for whole in self._stays if not set(modules).isdisjoint(whole.modules())])

    def fetched_from(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Give the tensor in host memory that a streamed parameter is fetched from; None if it is its own."""
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
        """Have modules on the device inside the block, and after it where they stay there."""
        visitors, streamed = [], []
        for module in modules:
            if self._is_streamed(module):
                streamed.append(module)
                visitors += self._beside_layers(module)
            elif module not in self._stays and self._may_stay(module):
                with ExitStack() as stack:
                    stack.enter_context(devices.visiting(module, device=self.device))
                    self._stays[module] = stack.pop_all()
            elif module not in self._stays:
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

    def _beside_layers(self, module: nn.Module) -> list[nn.Module]:
        """List what of a streamed module visits as a whole."""
        elsewhere = (self._blocks, self._text_encoder.layers, self._text_encoder.embed_tokens)
        return [part for part in module.children() if part not in elsewhere]

    def for_a_moment(self, module: nn.Module) -> AbstractContextManager[None]:
        """Have one of many small modules on the device; what it leaves behind is for the next one."""
        stays = self._may_stay(module)
        return self.on_device(module) if stays else devices.visiting(module, device=self.device)
