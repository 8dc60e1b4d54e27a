"""Tensors of the played GPU: each has a label of its device, and data in host memory or on meta.

The body holds real numbers, so that results can be compared; or it lies on the meta device, where
nothing is computed and only shapes, dtypes and bytes are. A CPU-only torch refuses the very word "cuda" and
knows no place but its own: functions that name a device are caught before torch sees them.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.played.streams import playing

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
_DATA: Any = torch.Tensor.data  # a descriptor
_SET_DATA, _GET_DATA = _DATA.__set__, _DATA.__get__
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_MOVES = (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu)
_TO_THE_HOST = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.data_ptr)


class RefusedError(RuntimeError):
    """A real GPU would refuse this operation."""


class Played(torch.Tensor):
    """A tensor with a label of its device."""

    body: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, body: torch.Tensor, place: torch.device) -> "Played":
        with torch.inference_mode(mode=False):  # else no view of it could be made outside
            self: Played = torch.Tensor._make_wrapper_subclass(
                cls,
                body.size(),
                strides=body.stride(),
                storage_offset=body.storage_offset(),
                dtype=body.dtype,
                layout=body.layout,
                device=torch.device("meta"),
                requires_grad=False,
            )
        self.body, self.place = body, place
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override] # torch has an attribute
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override] # torch has an attribute
        return self.place.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override] # torch has an attribute
        return self.place.type == "cpu"

    @property
    def is_meta(self) -> bool:  # type: ignore[override] # torch has an attribute
        return False

    def __repr__(self) -> str:  # type: ignore[override] # torch has an argument for itself
        return f"Played({tuple(self.shape)}, {self.dtype}, {self.place})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch says less of it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return playing().operations.dispatch(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Catches functions that are called with plain tensors, or with none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class PlainOperations(TorchDispatchMode):  # type: ignore[no-untyped-call] # as torch has it
    """Catches operations on plain tensors, or on none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return playing().operations.dispatch(func, args, kwargs or {})


def body_of(value: Any) -> Any:
    """Give the data of a played tensor; anything else unchanged."""
    return value.body if isinstance(value, Played) else value


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call one of torch's functions as a torch with CUDA would."""
    operations = playing().operations
    if func == _SET_DATA:
        _set_data(*args)
        return None
    if func == _GET_DATA and isinstance(args[0], Played):
        return Played(args[0].body, args[0].place)
    if func is _ATTENTION and any(isinstance(value, Played) for value in (*args, *kwargs.values())):
        return operations.attention(*args, **kwargs)
    if func in _TO_THE_HOST:
        return _to_the_host(func, *args, **kwargs)
    if func in _MOVES:
        return operations.move(func, *args, **kwargs)
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
        return operations.make(func, args, kwargs)
    return func(*args, **kwargs)


def _set_data(old: torch.Tensor, new: torch.Tensor) -> None:
    if not isinstance(old, Played):
        if isinstance(new, Played):
            raise TypeError("a plain tensor cannot become a played one: begin with play(module)")
        _SET_DATA(old, new)
        return
    if not isinstance(new, Played):
        new = Played(new, CPU)
    if (old.dtype, old.shape, old.stride()) != (new.dtype, new.shape, new.stride()):
        with torch._C._DisableTorchDispatch():  # what torch itself knows of it
            _SET_DATA(old, new)
    old.body, old.place = new.body, new.place


def _to_the_host(func: Any, tensor: torch.Tensor, **options: Any) -> Any:
    """Let the host read a tensor's values: numpy, tolist, data_ptr."""
    if isinstance(tensor, Played):
        if tensor.is_cuda and func is torch.Tensor.numpy:
            raise RefusedError("numpy() of a tensor on the card")
        if tensor.is_cuda and func is torch.Tensor.tolist:
            tensor = tensor.cpu()
        tensor = body_of(tensor)
    playing().host_touches([tensor])
    if tensor.device.type == "meta" and func is not torch.Tensor.data_ptr:
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return func(tensor, **options)


def play(module: torch.nn.Module) -> torch.nn.Module:
    """Replace a module's tensors by played ones in host memory; shared tensors stay shared."""
    seen: dict[int, torch.Tensor] = {}
    for part in module.modules():
        held: dict[str, torch.Tensor | None]
        for held in (part._parameters, part._buffers):  # type: ignore[assignment] # parameters are tensors
            for name, tensor in held.items():
                if tensor is None or isinstance(tensor, Played):
                    continue
                if id(tensor) not in seen:
                    played: torch.Tensor = Played(tensor.detach(), CPU)
                    if held is part._parameters:
                        played = torch.nn.Parameter(played, requires_grad=False)
                    seen[id(tensor)] = played
                held[name] = seen[id(tensor)]
    return module
