"""A played GPU: runs the code path of CUDA on a machine without a GPU.

What a GPU would refuse is refused: tensors of two devices in an operation. What it would make the program
wait for is noted, with the line: copies, ``.item()``, streams that are waited for. What it would not notice
is told: a stream or the host that reads what another may still be writing, memory that is given back while it
is in use. A clock plays its time by counts, so that it can be seen what runs ahead of what.

    with PlayedGpu(RTX_4090_24, full=True) as gpu:
        ...the program...
    gpu.counts["step"]["host waits"]

What it cannot show: the numerics of kernels, their workspaces, gaps in memory, drivers, real times. What an
operation that torch does in one call needs on the way is not seen, so what is held is at least that much.
"""

import gc
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch

from tests.played.cards import CONTEXT, RTX_4090_24, CardModel
from tests.played.memory import Block, CardMemory, HostMemory, watch
from tests.played.operations import Operations
from tests.played.streams import PLAYING, Event, Order, Stream, join
from tests.played.tensors import CUDA, Functions, PlainOperations, body_of

PROGRAM = ("framepack_core.", "framepackd.")  # whose lines are told


@dataclass
class _Failure:
    error: Exception
    within: str  # a function of the program; "": anywhere
    left: int  # how often
    after: int  # how many operations are let through first
    breaks: bool  # whether the context is broken from then on


class PlayedGpu:
    """Plays a GPU inside a ``with`` block, one at a time, also for threads started in the block."""

    ended = 0.0  # the clock of the last one: streams that the program keeps may have work until then

    def __init__(
        self, card: CardModel = RTX_4090_24, *, full: bool = False, capacity: int | None = None
    ) -> None:
        """Put a card in.

        Args:
            card: its model.
            full: compute nothing of what is large.
            capacity: bytes for tensors; None: what CUDA's context leaves.
        """
        self.card, self.full = card, full
        self.memory = CardMemory(self, card.memory - CONTEXT if capacity is None else capacity)
        self.host_memory = HostMemory(self)
        self.operations = Operations(self)
        self.lock = threading.RLock()
        self.phase = "-"
        self.counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # by phase
        self.waits: dict[str, Counter[str]] = defaultdict(Counter)  # by phase: what is waited for, and where
        self.faults = Counter[str]()
        self.attentions = Counter[tuple[str, tuple[str, ...]]]()  # phase, and the kernels that could
        self.blocks: dict[int, Block] = {}  # by storage
        self.host = Order()  # what the host knows to be done
        self.time = PlayedGpu.ended  # of the host
        self.busy: dict[str, float] = defaultdict(float)  # seconds, by stream
        self._default = Stream(CUDA, "default")
        self._streams = [self._default]
        self._launched = deque[float]()
        self._thread = threading.local()
        self._failures: list[_Failure] = []
        self._broken: Exception | None = None

    # What a test makes of it.

    def fail(
        self, error: Exception, within: str = "", *, times: int = 1, after: int = 0, breaks: bool = False
    ) -> None:
        """Let operations on the card fail that a function of the program starts.

        Args:
            error: what is raised.
            within: the name of a function on the call stack; "" for any.
            times: how often.
            after: how many operations succeed before.
            breaks: whether every later operation fails too, as in a broken CUDA context.
        """
        self._failures.append(_Failure(error, within, times, after, breaks))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what happens inside the block under the name of a phase."""
        before, self.phase = self.phase, phase
        began = self.time
        try:
            yield
        finally:
            self.counts[phase]["seconds"] += self.time - began
            self.phase = before

    # Bookkeeping.

    def note(self, what: str, amount: float = 1) -> None:
        self.counts[self.phase][what] += amount

    def fault(self, text: str) -> None:
        self.faults[f"{text}, at {self._site()}"] += 1

    def _site(self) -> str:
        """Name the current line of the program."""
        return next((_line(frame) for frame in _frames() if _is_program(frame)), "the test")

    def host_waits(self, what: str, order: Order, until: float) -> None:
        """Let the host wait until work is done."""
        if self._broken is not None:
            raise self._broken
        join(self.host, order)
        self.note("host waits")
        self.note("seconds waited", max(until - self.time, 0))
        self.time = max(self.time, until)
        self.waits[self.phase][f"{what}, at {self._site()}"] += 1

    def wait_for(self, stream: Stream, what: str) -> None:
        self.host_waits(what, stream.now(), stream.until)

    def wait_for_all(self, what: str) -> None:
        order = Order()
        for stream in self._streams:
            join(order, stream.now())
        self.host_waits(what, order, max(stream.until for stream in self._streams))

    def has_reached(self, order: Order, until: float) -> bool:
        """Return whether work is done, without waiting for it."""
        self.time += self.card.launch
        if until > self.time:
            return False
        join(self.host, order)
        return True

    def block(self, tensor: torch.Tensor) -> Block | None:
        return self.blocks.get(body_of(tensor).untyped_storage()._cdata)

    def allocate(self, body: torch.Tensor) -> bool:
        """Put a tensor's storage on the card; return whether it was not there yet."""
        storage: Any = body.untyped_storage()
        if storage._cdata in self.blocks:
            return False
        self._hold(storage, self.memory.allocate(storage, self.current))
        return True

    def hold_on_host(self, body: torch.Tensor) -> None:
        """Record the use of page-locked memory."""
        storage: Any = body.untyped_storage()
        if storage._cdata not in self.blocks:
            address = storage.data_ptr() if body.device.type == "cpu" else 0
            self._hold(
                storage, Block(storage.nbytes(), self.current, self.phase, on_card=False, address=address)
            )

    def _hold(self, storage: Any, block: Block) -> None:
        key = storage._cdata
        self.blocks[key] = block

        def gone() -> None:
            with self.lock:
                if self.blocks.get(key) is block:
                    del self.blocks[key]
                if block.on_card:
                    self.memory.free(block)

        watch(storage, gone)

    # Order and time.

    def launch(
        self,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        seconds: float,
        flops: float = 0,
        *,
        copies: bool = False,
    ) -> None:
        """Add an operation to the current stream."""
        self._break()
        stream = self.current
        join(stream.after, self.host)
        stream.advance()
        if not copies:
            self.note("kernels")
            self.note("flops", flops)
        for block in self._blocks(reads):
            name, tick = block.wrote
            if name not in ("", stream.name) and stream.after[name] < tick:
                self.fault(f"{stream.name} reads what {name} may still be writing")
            block.used[stream.name] = stream.tick
        for block in self._blocks(writes):
            for name, tick in (block.wrote, *block.used.items()):
                if name not in ("", stream.name) and stream.after[name] < tick:
                    self.fault(f"{stream.name} writes what {name} may still be using")
            block.wrote = stream.name, stream.tick
            block.used[stream.name] = stream.tick
        self.time += self.card.launch
        while self._launched and self._launched[0] <= self.time:
            self._launched.popleft()
        if len(self._launched) >= self.card.queue:
            self.time = self._launched.popleft()
        stream.until = max(stream.until, self.time) + seconds
        self.busy[stream.name] += seconds
        self._launched.append(stream.until)

    def _blocks(self, used: Iterable[torch.Tensor]) -> Iterator[Block]:
        return (block for tensor in used if (block := self.block(tensor)) is not None)

    def host_touches(self, tensors: Iterable[torch.Tensor], written: Iterable[torch.Tensor] = ()) -> None:
        """Check that the host neither reads the target nor writes the source of an unfinished copy."""
        for block in self._blocks(tensors):
            name, tick = block.wrote
            if not block.on_card and name and self.host[name] < tick:
                self.fault(f"the host uses what {name} may still be copying to")
        for block in self._blocks(written):
            for name, tick in block.used.items():
                if not block.on_card and self.host[name] < tick and block.wrote[0] != name:
                    self.fault(f"the host writes what {name} may still be copying from")

    def _break(self) -> None:
        """Raise a failure that the test has planted here."""
        if self._broken is not None:
            raise self._broken
        for failure in self._failures:
            if failure.within and all(
                f.f_code.co_name != failure.within for f in _frames() if _is_program(f)
            ):
                continue
            failure.after -= 1
            if failure.after >= 0:
                continue
            failure.left -= 1
            if failure.left <= 0:
                self._failures.remove(failure)
            if failure.breaks:
                self._broken = failure.error
            raise failure.error

    # Replacements of torch.cuda's functions.

    @property
    def current(self) -> Stream:
        stream: Stream = getattr(self._thread, "stream", self._default)
        return stream

    @contextmanager
    def _stream(self, stream: Stream | None) -> Iterator[None]:
        before = self.current
        self._thread.stream = before if stream is None else stream
        self._follow(self._thread.stream)
        try:
            yield
        finally:
            self._thread.stream = before

    def _new_stream(self, device: Any = None, *_: object, **__: object) -> Stream:
        stream = Stream(CUDA)
        self._follow(stream)
        return stream

    def _follow(self, stream: Stream) -> None:
        if stream not in self._streams:  # perhaps one that the program keeps
            self._streams.append(stream)

    def _record(self, tensor: torch.Tensor, stream: Stream) -> None:
        if (block := self.block(tensor)) is not None:
            block.recorded[stream.name] = stream

    def _set_fraction(self, fraction: float, device: Any = None) -> None:
        self.memory.capacity = int(fraction * self.card.memory)

    def _cudart(self) -> Any:
        return SimpleNamespace(
            cudaHostRegister=self.host_memory.register,
            cudaHostUnregister=self.host_memory.unregister,
            cudaError=SimpleNamespace(success=0),
            cudaGetErrorString=lambda code: f"CUDA error {code}",
        )

    def _torch_cuda(self) -> dict[str, Any]:
        memory, card = self.memory, self.card
        properties = SimpleNamespace(
            name=card.name,
            total_memory=card.memory,
            major=card.capability[0],
            minor=card.capability[1],
            multi_processor_count=64,
            uuid="00000000-0000-0000-0000-000000000000",
        )
        return {
            "_lazy_init": lambda: None,
            "init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: card.name,
            "get_device_capability": lambda device=None: card.capability,
            "get_device_properties": lambda device=None: properties,
            "get_arch_list": lambda: ["sm_80", "sm_86", "sm_90", "compute_90"],
            "is_bf16_supported": lambda including_emulation=True: True,
            "cudart": self._cudart,
            "Stream": self._new_stream,
            "Event": Event,
            "stream": self._stream,
            "current_stream": lambda device=None: self.current,
            "default_stream": lambda device=None: self._default,
            "synchronize": lambda device=None: self.wait_for_all("cuda.synchronize"),
            "mem_get_info": lambda device=None: (max(memory.capacity - memory.reserved, 0), card.memory),
            "memory_allocated": lambda device=None: memory.live,
            "memory_reserved": lambda device=None: memory.reserved,
            "max_memory_allocated": lambda device=None: memory.peak_live,
            "max_memory_reserved": lambda device=None: memory.peak_reserved,
            "reset_peak_memory_stats": lambda device=None: memory.reset_peaks(),
            "set_per_process_memory_fraction": self._set_fraction,
            "empty_cache": memory.empty_cache,
        }

    def __enter__(self) -> Self:
        host, patch = self.host_memory, mock.patch.object
        gc.freeze()  # the engine has garbage collected often: not that of a whole run of tests
        with ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(torch.cuda, **self._torch_cuda()))
            for what, name, stand_in in (
                (torch.accelerator, "empty_host_cache", host.empty_cache),
                (torch.Tensor, "is_pinned", lambda tensor, device=None: host.is_locked(body_of(tensor))),
                (torch.Tensor, "pin_memory", lambda tensor, device=None: self.operations.pin(tensor)),
                (torch.Tensor, "record_stream", lambda tensor, stream: self._record(tensor, stream)),
                (torch.backends.cudnn, "version", lambda: 91701),
                (threading.Thread, "run", _in_every_thread(threading.Thread.run)),
            ):
                stack.enter_context(patch(what, name, stand_in))
            PLAYING.append(self)
            stack.callback(PLAYING.remove, self)
            stack.enter_context(_modes())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *what: Any) -> None:
        self._stack.__exit__(*what)
        if self.host_memory.registered:  # the program may drop it later than the card
            torch.cuda.cudart = self._cudart
        gc.unfreeze()
        PlayedGpu.ended = max(self.time, *(stream.until for stream in self._streams))


@contextmanager
def _modes() -> Iterator[None]:
    with Functions(), PlainOperations():  # type: ignore[no-untyped-call] # as torch has it
        yield


def _in_every_thread(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Play the GPU in threads too: torch's modes hold for a single thread."""

    def running(thread: threading.Thread) -> None:
        with _modes():
            run(thread)

    return running


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_program(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(PROGRAM)


def _line(frame: FrameType) -> str:
    return f"{frame.f_globals['__name__']}:{frame.f_lineno} {frame.f_code.co_name}"
