"""Operations on played tensors: computes values or only shapes, and records copies and memory."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from tests.played import costs, shapes
from tests.played.tensors import CPU, CUDA, Played, RefusedError, body_of

if TYPE_CHECKING:
    from tests.played.gpu import PlayedGpu

KEPT = 1 << 16  # tensors of so few numbers keep them at full shape, too: masks, indices, schedules
STAGED = 1 << 16  # bytes that the driver takes from any memory without a wait
_attention = torch.nn.functional.scaled_dot_product_attention
# Their result is a number on the host, or a shape that depends on numbers.
_WAITED_FOR = {f"aten::{name}": f"{name}()" for name in ("equal", "nonzero", "masked_select", "_unique2")} | {
    "aten::_local_scalar_dense": "item()",
    "aten::is_nonzero": "bool()",
}
_NUMBERS = {f"aten::{name}" for name in ("_local_scalar_dense", "is_nonzero")}
# What is read of tensors without numbers.
_ANSWERS = {torch.bool: True}
_ANSWER = 0.02
_DECOMPOSED = {"aten::to", "aten::float", "aten::half", "aten::type_as"}
_ONLY_ALLOCATED = ("aten::empty", "aten::new_empty")


class Operations:
    """Carries out the program's operations on the card."""

    def __init__(self, gpu: "PlayedGpu") -> None:
        self.gpu = gpu

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do one of torch's own operations."""
        with self.gpu.lock:
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        name: str = func._schema.name
        if name == "prim::device":
            return args[0].place
        tensors = [*_tensors(args), *_tensors(kwargs)]
        played = [value for value in tensors if isinstance(value, Played)]
        device = kwargs.get("device")
        to_card = device is not None and torch.device(device).type == "cuda"
        to_host = device is not None and torch.device(device).type == "cpu"
        if not played and not to_card:
            return self._on_the_host(func, args, kwargs, tensors)
        if name == "aten::_to_copy":
            return self._to_copy(args[0], kwargs)
        if name in _DECOMPOSED:
            return func.decompose(*args, **kwargs)
        if name == "aten::copy_":
            return self._copy(*args, **kwargs)
        if to_host and ("_like" in name or "new_" in name):
            return self._like_on_the_host(name, args, kwargs)
        on_card = to_card or any(tensor.is_cuda for tensor in played)
        if on_card and "_like" not in name and "new_" not in name:
            self._refuse_mixed(name, tensors)
        if on_card and name in _WAITED_FOR:
            self.gpu.wait_for(self.gpu.current, _WAITED_FOR[name])
        meta = any(tensor.body.device.type == "meta" for tensor in played)
        if meta and name in _NUMBERS:
            return torch.tensor(_ANSWERS.get(played[0].dtype, _ANSWER)).to(played[0].dtype).item()
        if meta and name == "aten::equal":
            return True
        body = _on_meta if meta else body_of
        body_args, body_kwargs = _mapped(args, body), _mapped(kwargs, body)
        if device is not None:
            body_kwargs["device"] = "meta" if meta or self._is_large(args, kwargs) else CPU
        locked = body_kwargs.pop("pin_memory", False)
        result = (shapes.compute if meta else _call)(func, body_args, body_kwargs)
        if locked:
            self.gpu.host_memory.lock(result)
        known = {id(tensor.body): tensor for tensor in played}
        fresh: list[torch.Tensor] = []

        def labelled(made: torch.Tensor) -> torch.Tensor:
            if id(made) in known:
                return known[id(made)]
            label = Played(made, CUDA if on_card and not to_host else CPU)
            if label.is_cuda and self.gpu.allocate(made):
                fresh.append(label)
            return label

        wrapped = _mapped(result, labelled)
        written = [*fresh, *_written(func, args)]
        if on_card and written and not name.startswith(_ONLY_ALLOCATED):
            seconds, flops = costs.of(self.gpu.card, name, args, tensors, written)
            self.gpu.launch(played, written, seconds, flops)
        return wrapped

    def _on_the_host(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """Do an operation on the host, which may use tensors that are being copied."""
        self.gpu.host_touches(tensors, _written(func, args))
        if kwargs.get("pin_memory"):
            result: torch.Tensor = func(*args, **(kwargs | {"pin_memory": False}))
            self.gpu.host_memory.lock(result)
            return result
        return func(*args, **kwargs)

    def _like_on_the_host(self, name: str, args: Any, kwargs: Any) -> torch.Tensor:
        """Make a plain tensor, with numbers, after one on the card."""
        first = args[0]
        shape = (
            args[1] if "new_" in name and len(args) > 1 and isinstance(args[1], list | tuple) else first.shape
        )
        made = torch.zeros(shape, dtype=kwargs.get("dtype") or first.dtype)
        if kwargs.get("pin_memory"):
            self.gpu.host_memory.lock(made)
        return made

    def _refuse_mixed(self, name: str, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.ndim > 0:
                text = f"{name} mixes a tensor on the card with one of the host, {tuple(tensor.shape)}"
                self.gpu.fault(text)
                raise RefusedError(text)

    def _is_large(self, args: Any, kwargs: Any) -> bool:
        """Return whether a function makes its result on meta."""
        size = args if args and isinstance(args[0], int) else (*args, kwargs.get("size"))[0]
        if isinstance(size, torch.Tensor):
            return self.gpu.full and size.numel() > KEPT
        numbers = 1
        for side in size if isinstance(size, tuple | list) else ():
            numbers *= side if isinstance(side, int) else 1
        return self.gpu.full and numbers > KEPT

    def make(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """Call a function that makes a tensor on the card."""
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        played = [tensor for tensor in _tensors(args) if isinstance(tensor, Played)]
        given, named = _mapped(args, body_of), _mapped(kwargs, body_of)
        if func in (torch.tensor, torch.as_tensor):  # made on the host and copied
            return self.move(torch.Tensor.to, func(*given, **named), CUDA)
        meta = any(tensor.body.device.type == "meta" for tensor in played) or self._is_large(args, kwargs)
        result = func(*given, **named, device="meta" if meta else "cpu")
        with self.gpu.lock:
            self.gpu.allocate(result)
            made = Played(result, CUDA)
            if not func.__name__.startswith(("empty", "new_empty")):
                self.gpu.launch([], [made], result.nbytes / self.gpu.card.bandwidth)
        return made

    def attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute attention, and record which of PyTorch's kernels accept it."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        named = dict(zip(names, args, strict=False)) | kwargs
        tensors = [value for value in named.values() if isinstance(value, torch.Tensor)]
        query, key, value = (named[name] for name in names[:3])
        with self.gpu.lock:
            self._refuse_mixed("attention", tensors if any(tensor.is_cuda for tensor in tensors) else [])
            kernels = costs.attention_kernels(
                query, named.get("attn_mask"), gqa=bool(named.get("enable_gqa"))
            )
            self.gpu.attentions[self.gpu.phase, kernels] += 1
            if any(body_of(tensor).device.type == "meta" for tensor in tensors):
                result = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device="meta")
            else:
                result = _attention(**{name: body_of(value) for name, value in named.items()})
            out = Played(result, query.device)
            if out.is_cuda:
                self.gpu.allocate(result)
                flops = 4.0 * query.numel() * key.shape[-2]
                rate = self.gpu.card.flops * (0.8 if "flash" in kernels else 0.4)
                self.gpu.launch(tensors, [out], flops / rate, flops)
            return out

    # Copies.

    def move(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do ``to``, ``cuda`` and ``cpu``."""
        if func is torch.Tensor.cuda:
            kwargs["device"], args = (args[0] if args else CUDA), ()
        elif func is torch.Tensor.cpu:
            kwargs["device"], args = CPU, ()
        elif args and isinstance(args[0], torch.Tensor):
            kwargs |= {"device": args[0].device, "dtype": args[0].dtype}
            args = (None, None, *args[1:])
        elif args and isinstance(args[0], torch.dtype):
            args = (None, *args)
        given = dict(zip(("device", "dtype", "non_blocking", "copy"), args, strict=False))
        wanted = {name: value for name, value in (*given.items(), *kwargs.items()) if value is not None}
        device = torch.device(wanted.get("device", tensor.device))
        dtype, layout = wanted.get("dtype", tensor.dtype), wanted.get("memory_format")
        same = device.type == tensor.device.type and dtype == tensor.dtype
        if same and not wanted.get("copy") and (layout is None or tensor.is_contiguous(memory_format=layout)):
            return tensor
        with self.gpu.lock:
            if not isinstance(tensor, Played) and device.type != "cuda":
                self.gpu.host_touches([tensor])
                options = {} if layout is None else {"memory_format": layout}
                return torch.Tensor.to(tensor, device, dtype, copy=bool(wanted.get("copy")), **options)
            place = CUDA if device.type == "cuda" else device
            return self._to_copy(tensor, wanted | {"device": place, "dtype": dtype})

    def _to_copy(self, source: torch.Tensor, kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        target = torch.device(device) if device is not None else source.device
        options: dict[str, Any] = {"dtype": kwargs.get("dtype") or source.dtype}
        if kwargs.get("memory_format") is not None:
            options["memory_format"] = kwargs["memory_format"]
        body = body_of(source)
        up = source.device.type == "cpu" and target.type == "cuda"
        if source.is_cuda and target.type == "cpu" and body.device.type == "meta":
            copy = torch.zeros(body.shape, dtype=options["dtype"])  # the host continues with this
        elif body.device.type == "meta" or (up and self.gpu.full and body.numel() > KEPT):
            copy = torch.empty_like(body, device="meta", **options)
        else:
            copy = torch.ops.aten._to_copy(body, **options)
        if target.type == "cpu" and source.device.type == "cpu":
            return Played(copy, CPU) if isinstance(source, Played) or copy.device.type == "meta" else copy
        waits = not kwargs.get("non_blocking")
        if target.type == "cpu":
            if not waits:  # torch page-locks what it copies to without a wait
                self.gpu.host_memory.lock(copy)
            self._down(source, copy, waits=waits)
            return copy
        self.gpu.allocate(copy)
        made = Played(copy, CUDA)
        self._up(source, made, waits=waits)
        return made

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        into, body = body_of(target), body_of(source)
        if into.device.type != "meta" and body.device.type != "meta":
            into.copy_(body)
        if target.is_cuda:
            self._up(source, target, waits=not non_blocking)
        elif source.is_cuda:
            self._down(source, target, waits=not non_blocking)
        else:
            self.gpu.host_touches([into, body], [into])
        return target

    def _up(self, source: torch.Tensor, made: torch.Tensor, *, waits: bool) -> None:
        """Copy to the card, from the host or from the card itself."""
        card = self.gpu.card
        if source.is_cuda:
            self.gpu.launch([source], [made], (source.nbytes + made.nbytes) / card.bandwidth)
            return
        locked = self.gpu.host_memory.is_locked(body_of(source))
        self.gpu.host_touches([body_of(source)])
        if locked:
            self.gpu.hold_on_host(body_of(source))
        self.gpu.note("copies to the card")
        self.gpu.note("bytes to the card", source.nbytes)
        seconds = source.nbytes / (card.bus if locked else card.pageable)
        self.gpu.launch([source] if locked else [], [made], seconds, copies=True)
        if waits:
            self.gpu.wait_for(self.gpu.current, "a copy to the card")
        elif not locked and source.nbytes > STAGED:
            self.gpu.wait_for(self.gpu.current, "a copy to the card from memory that is not page-locked")

    def _down(self, source: torch.Tensor, made: torch.Tensor, *, waits: bool) -> None:
        """Copy to the host."""
        card, into = self.gpu.card, body_of(made)
        locked = self.gpu.host_memory.is_locked(into)
        if locked:
            self.gpu.hold_on_host(into)
        self.gpu.note("copies to the host")
        self.gpu.note("bytes to the host", source.nbytes)
        seconds = source.nbytes / (card.bus if locked else card.pageable)
        self.gpu.launch([source], [into] if locked else [], seconds, copies=True)
        if waits or not locked:
            self.gpu.wait_for(self.gpu.current, "a copy to the host")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give a copy in page-locked memory."""
        body = body_of(tensor)
        if self.gpu.host_memory.is_locked(body):
            return tensor
        self.gpu.note("bytes page-locked on the way", tensor.nbytes)
        self.gpu.time += tensor.nbytes / self.gpu.card.pageable
        copy = torch.empty_like(body) if body.device.type == "meta" else body.clone()
        self.gpu.host_memory.lock(copy)
        return Played(copy, CPU)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """List the tensors among an operation's arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Change the tensors among an operation's arguments or results."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([_mapped(item, change) for item in value])
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    return value


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    body: torch.Tensor = body_of(tensor)
    return body if body.device.type == "meta" else body.to("meta")


def _written(func: Any, args: Any) -> list[torch.Tensor]:
    """List the arguments that an operation writes to."""
    places = _places_written(func)
    return [args[place] for place in places if place < len(args) and isinstance(args[place], torch.Tensor)]


@cache
def _places_written(func: Any) -> tuple[int, ...]:
    infos = [argument.alias_info for argument in func._schema.arguments]
    return tuple(place for place, info in enumerate(infos) if info is not None and info.is_write)
