"""The played GPU reports each deliberate fault, and nothing when it is done right."""

import mmap
import threading
from collections.abc import Callable

import pytest
import torch

from tests.played.cards import RTX_4090_24
from tests.played.gpu import PlayedGpu
from tests.played.tensors import CPU, RefusedError, body_of, play

both = pytest.mark.parametrize("right", [True, False])


def told(gpu: PlayedGpu, text: str) -> bool:
    return any(text in fault for fault in gpu.faults)


def test_tensors_of_two_devices_are_not_mixed() -> None:
    with PlayedGpu() as gpu:
        assert (torch.ones(3).to("cuda") + torch.ones(3).cuda()).cpu().tolist() == [2, 2, 2]
        assert (torch.ones(3).to("cuda") + torch.tensor(1)).cpu().tolist() == [2, 2, 2], (
            "a single number may be"
        )
        assert not gpu.faults
        with pytest.raises(RefusedError):
            torch.ones(3).to("cuda") + torch.ones(3)
    assert told(gpu, "mixes a tensor on the card with one of the host")


@both
def test_a_stream_waits_for_what_another_copies(*, right: bool) -> None:
    with PlayedGpu() as gpu:
        side, slot = torch.cuda.Stream(), torch.zeros(8, device="cuda")
        copied = torch.cuda.Event()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            slot.copy_(torch.ones(8).pin_memory(), non_blocking=True)
            copied.record()
        if right:
            torch.cuda.current_stream().wait_event(copied)
        slot + 1
        torch.cuda.synchronize()
    assert told(gpu, "reads what stream") is not right


@both
def test_a_copy_waits_until_the_slot_is_free(*, right: bool) -> None:
    with PlayedGpu() as gpu:
        side, slot = torch.cuda.Stream(), torch.zeros(8, device="cuda")
        slot + 1
        free = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(side):
            if right:
                free.wait()
            slot.copy_(torch.ones(8).pin_memory(), non_blocking=True)
        torch.cuda.synchronize()
    assert told(gpu, "writes what default may still be using") is not right


@both
def test_freeing_memory_that_another_stream_uses_is_a_fault(*, right: bool) -> None:
    with PlayedGpu() as gpu:
        side, source = torch.cuda.Stream(), torch.ones(8).pin_memory()
        with torch.cuda.stream(side):
            there = source.to("cuda", non_blocking=True)
        side.synchronize()
        there + 1
        if right:
            there.record_stream(torch.cuda.current_stream())
        del there
    assert told(gpu, "is given back while default still uses it") is not right


@both
@pytest.mark.parametrize("look", [lambda here: here + 1, torch.Tensor.numpy, torch.Tensor.tolist])
def test_the_host_reading_an_unfinished_copy_is_a_fault(
    look: Callable[[torch.Tensor], object], *, right: bool
) -> None:
    with PlayedGpu() as gpu:
        here = torch.ones(8).to("cuda").to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event()
        if right:
            arrived.synchronize()
        look(here)
    assert told(gpu, "the host uses what default may still be copying to") is not right


@both
def test_the_host_overwriting_an_unfinished_copy_is_a_fault(*, right: bool) -> None:
    with PlayedGpu() as gpu:
        slab = torch.zeros(8, dtype=torch.uint8, pin_memory=True)
        there = slab.to("cuda", non_blocking=True)
        if right:
            torch.cuda.synchronize()
        slab.add_(1)
        del there
    assert told(gpu, "the host writes what default may still be copying from") is not right


@both
def test_threads_use_the_played_gpu_too(*, right: bool) -> None:
    with PlayedGpu() as gpu:
        here = torch.ones(8).to("cuda").to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event()

        def save() -> None:
            if right:
                arrived.synchronize()
            here.numpy()

        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
    assert bool(gpu.faults) is not right


def test_a_stream_of_an_earlier_played_gpu_orders_nothing_on_this_one() -> None:
    with PlayedGpu():
        side = torch.cuda.Stream()
        for _ in range(9):
            torch.ones(8, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
    with PlayedGpu() as gpu:
        there = torch.ones(8, device="cuda")
        with torch.cuda.stream(side):
            there + 1
        torch.cuda.synchronize()
    assert told(gpu, "reads what default may still be writing")


def test_copies_and_waits_of_the_host_are_counted() -> None:
    with PlayedGpu() as gpu, gpu.during("it"):
        x = torch.ones(8).to("cuda")
        assert x.sum().item() == 8
        assert bool((x > 0).all())
        torch.ones(8).pin_memory().to("cuda", non_blocking=True)
    counts = gpu.counts["it"]
    assert counts["copies to the card"] == 2
    assert counts["bytes to the card"] == 64
    assert counts["host waits"] == 3
    assert gpu.waits["it"] == {"a copy to the card, at the test": 1, "item(), at the test": 2}


def test_an_event_is_done_at_its_time() -> None:
    with PlayedGpu() as gpu:
        torch.ones(1 << 20).pin_memory().to("cuda", non_blocking=True)
        copied = torch.cuda.current_stream().record_event()
        assert not copied.query()
        copied.synchronize()
        assert copied.query()
        assert gpu.counts["-"]["host waits"] == 1
        assert torch.cuda.Event().query(), "an event that was never recorded is done"


def test_out_of_memory_is_what_torch_raises_and_the_rest_can_be_used() -> None:
    with PlayedGpu(capacity=8192) as gpu:
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            torch.zeros(4096, device="cuda")
        there = torch.zeros(2048, device="cuda")
        del there
        assert torch.cuda.memory_allocated() == 0
        assert torch.cuda.memory_reserved() == 8192, "the allocator keeps it"
        assert torch.cuda.mem_get_info() == (0, RTX_4090_24.memory)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
        assert torch.cuda.max_memory_allocated() == gpu.memory.peaks["live"]["-"] == 8192
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_reserved() == 0


def test_before_memory_runs_out_streams_are_waited_for() -> None:
    with PlayedGpu(capacity=1 << 20) as gpu:
        side = torch.cuda.Stream()
        for _ in range(3):
            there = torch.zeros(1 << 18, device="cuda")
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                there.cpu()
            there.record_stream(side)
            side.until += 1  # the clock is not waited for by the host
            del there
    assert gpu.memory.drains == 2
    assert gpu.memory.peak_held == 1 << 20
    assert not gpu.faults


def test_views_of_a_slot_show_what_is_copied_into_it() -> None:
    weight = torch.randn(3, 5).to(torch.bfloat16)
    bias = torch.randn(3).to(torch.float32)
    with PlayedGpu() as gpu:
        layer = play(torch.nn.Linear(5, 3).to(torch.bfloat16).requires_grad_(requires_grad=False))
        slab = torch.empty(256 + bias.nbytes, dtype=torch.uint8, pin_memory=True)
        slab[: weight.nbytes].view(torch.bfloat16).view(3, 5).copy_(weight)
        slab[256:].view(torch.float32).copy_(bias)
        slot = torch.empty_like(slab, device="cuda")
        slot.copy_(slab, non_blocking=True)
        layer.weight.data = slot[: weight.nbytes].view(torch.bfloat16).view(3, 5)
        layer.bias.data = slot[256:].view(torch.float32).to(torch.bfloat16)
        x = torch.randn(2, 5).to(torch.bfloat16)
        result = layer(x.to("cuda")).cpu()
        assert torch.equal(result, torch.nn.functional.linear(x, weight, bias.to(torch.bfloat16)))
        assert gpu.counts["-"]["copies to the card"] == 2
        assert gpu.memory.live < slot.nbytes + 3 * 512, "the layer's weights are the slot"
        layer.weight.data = weight
        assert layer.weight.device == CPU
    assert not gpu.faults


def test_torchs_page_locked_memory_comes_in_powers_of_two_and_is_kept() -> None:
    with PlayedGpu() as gpu:
        slab = torch.empty(5000, dtype=torch.uint8, pin_memory=True)
        assert slab.is_pinned()
        assert slab[1000:].view(torch.float16).is_pinned()
        assert not torch.empty(8).is_pinned()
        assert gpu.host_memory.locked == 8192
        del slab
        again = torch.empty(8000, dtype=torch.uint8, pin_memory=True)
        assert gpu.host_memory.locked == 8192, "it is used again"
        del again
        torch.accelerator.empty_host_cache()
        assert (gpu.host_memory.locked, gpu.host_memory.peak_locked) == (0, 8192)


def test_the_programs_own_memory_is_page_locked_by_registering_it() -> None:
    with PlayedGpu() as gpu, mmap.mmap(-1, 8192) as mapped:
        slab = torch.frombuffer(mapped, dtype=torch.uint8)
        cudart = torch.cuda.cudart()
        assert not slab.is_pinned()
        assert cudart.cudaHostRegister(slab.data_ptr(), 8192, 0) == cudart.cudaError.success
        assert cudart.cudaHostRegister(slab.data_ptr(), 8192, 0) != 0, "twice is refused"
        assert slab.is_pinned()
        assert slab[4:8].is_pinned()
        slab.to("cuda", non_blocking=True)
        assert not gpu.counts["-"]["host waits"]
        torch.cuda.synchronize()
        assert cudart.cudaHostUnregister(slab.data_ptr()) == 0
        assert cudart.cudaHostUnregister(slab.data_ptr()) != 0
        assert not slab.is_pinned()
        assert (gpu.host_memory.registered, gpu.host_memory.peak_registered) == (0, 8192)
        gpu.host_memory.refuse_to_register = lambda size: size > 4096
        assert cudart.cudaHostRegister(slab.data_ptr(), 8192, 0) != 0
        assert cudart.cudaHostRegister(slab.data_ptr(), 4096, 0) == 0
        assert not gpu.faults
        del slab


@both
def test_memory_is_not_unregistered_while_it_is_copied(*, right: bool) -> None:
    with PlayedGpu() as gpu, mmap.mmap(-1, 8192) as mapped:
        slab = torch.frombuffer(mapped, dtype=torch.uint8)
        torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), 8192, 0)
        there = slab.to("cuda", non_blocking=True)
        if right:
            torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())
        del there, slab
    assert told(gpu, "unregistered while default still copies") is not right


def test_at_full_shape_large_tensors_have_no_values_and_small_ones_have() -> None:
    with PlayedGpu(full=True) as gpu:
        large = torch.ones(1 << 10, 1 << 10, device="cuda") @ torch.ones(1 << 10, 1 << 10, device="cuda")
        assert body_of(large).is_meta
        assert torch.arange(5, device="cuda").cpu().tolist() == [0, 1, 2, 3, 4]
        assert large.cpu().shape == (1 << 10, 1 << 10)
        assert gpu.counts["-"]["flops"] == 2 * 2**30
    assert gpu.memory.peak_live == 3 * 4 * 2**20


def test_the_host_runs_ahead_until_the_queue_is_full() -> None:
    with PlayedGpu(full=True) as gpu:
        x = torch.ones(1 << 14, 1 << 14, device="cuda")
        began, behind = gpu.time, []
        for _ in range(2000):
            x.add_(1)
            behind.append(gpu.current.until - gpu.time)
        a_call = 2 * x.nbytes / RTX_4090_24.bandwidth
        assert gpu.time - began > 900 * a_call, "it waits for room in the queue"
        assert behind[-1] == pytest.approx(1024 * a_call, rel=0.01)


def test_errors_can_be_planted_and_a_broken_context_stays_broken() -> None:
    with PlayedGpu() as gpu:
        x = torch.ones(3, device="cuda")
        gpu.fail(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), after=1)
        x + 1
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            x + 1
        x + 1
        gpu.fail(torch.AcceleratorError("an illegal memory access was encountered"), breaks=True)
        for _ in range(2):
            with pytest.raises(torch.AcceleratorError):
                x + 1
