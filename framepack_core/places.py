"""Which modules are on the device, and when: as a rung of the ladder says."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

from framepack_core import memory
from framepack_core.footprint import Rung
from framepack_core.transformer import Core


class Places:
    """Has modules on the device while they are used, or for good, or lets hooks move them piece by piece."""

    def __init__(
        self, device: torch.device, *, core: Core, text_encoder: nn.Module, vae: nn.Module, pinnable: bool
    ) -> None:
        """Take the modules that some rungs treat otherwise than the rest.

        Args:
            device: where to compute.
            core: streamed on the lowest rungs, else stays.
            text_encoder: so large that it is streamed unless everything stays.
            vae: used in every section, so it stays with the core.
            pinnable: whether blocks that are streamed are to come from page-locked memory.
        """
        self.device = device
        self._core, self._text_encoder, self._vae = core, text_encoder, vae
        self._pinnable = pinnable and device.type == "cuda"
        self._placement = "all"
        self._hooked: set[nn.Module] = set()  # these are moved by hooks of their own
        self._streamed = dict[nn.Parameter, torch.Tensor]()  # what they fetch
        self._stays = dict[nn.Module, ExitStack]()  # what does not leave the device again

    def take(self, rung: Rung) -> bool:
        """Place modules as a rung says; False if that is too far up for modules that are streamed."""
        streamed = [] if rung.placement == "all" else [self._text_encoder]
        if rung.placement == "streamed":
            streamed.append(self._core.blocks)
        if not self._hooked <= set(streamed):
            return False
        self._placement = rung.placement
        if not all(self._may_stay(module) for module in self._stays):
            self._drop(list(self._stays))
            memory.release_unused(self.device)
        for module in streamed:
            if module not in self._hooked:
                self._stream(module)
        return True

    def _stream(self, module: nn.Module) -> None:
        self._hooked.add(module)
        if module is not self._core.blocks:
            memory.stream_layers(module, self.device)
            return
        if self._pinnable:
            memory.lock(module)
        if self.device.type != "cpu":
            self._streamed = {parameter: parameter.data for parameter in module.parameters()}
        memory.stream_blocks(module, self.device)

    def _drop(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._stays.pop(module).close()

    def leave(self, *modules: nn.Module) -> None:
        """Have what stays on the device leave it until it is used again, if it holds one of some modules."""
        self._drop([whole for whole in self._stays if not set(modules).isdisjoint(whole.modules())])

    def fetched_from(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Give the tensor in host memory that a streamed parameter is fetched from; None if it is its own."""
        return self._streamed.get(parameter)

    def _may_stay(self, module: nn.Module) -> bool:
        return self._placement == "all" or (self._placement == "core" and module in (self._core, self._vae))

    @contextmanager
    def on_device(self, *modules: nn.Module) -> Iterator[None]:
        """Have modules on the device inside the block, and after it where they stay there."""
        if self._core.blocks in self._hooked:
            modules = tuple(
                part for whole in modules for part in (whole.children() if whole is self._core else (whole,))
            )
        visitors = []
        for module in modules:
            if module in self._hooked or module in self._stays:
                continue
            if self._may_stay(module):
                with ExitStack() as stack:
                    stack.enter_context(memory.visiting(module, device=self.device))
                    self._stays[module] = stack.pop_all()
            else:
                visitors.append(module)
        try:
            with memory.visiting(*visitors, device=self.device):
                yield
        finally:
            if visitors:
                memory.release_unused(self.device)

    def for_a_moment(self, module: nn.Module) -> AbstractContextManager[None]:
        """Have one of many small modules on the device; what it leaves behind is for the next one."""
        stays = self._may_stay(module)
        return self.on_device(module) if stays else memory.visiting(module, device=self.device)
