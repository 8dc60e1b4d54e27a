"""Break this process's CUDA context and say how that is judged.

``python -m benchmarks.first_light.broken WAY``. A later call reports what a kernel did wrong, and every
call after that fails as well.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from framepack_core.memory.device_errors import Verdict, judge
from framepackd.worker.messages import Failed, leaves_after

WRITES_ANYWHERE = 'extern "C" __global__ void anywhere(float *x) { x[1ull << 44] = 1; }'


def failed_assert() -> None:
    """Look up a row that there is not: the kernel asserts that there is."""
    table = torch.zeros(4, 4, device="cuda")
    torch.nn.functional.embedding(torch.tensor([1 << 20], device="cuda"), table)
    torch.cuda.synchronize()


def illegal_access() -> None:
    """Write where nothing is."""
    kernel: Any = torch.cuda._compile_kernel(
        WRITES_ANYWHERE, "anywhere"
    )  # no other way to a kernel of one's own is in torch
    kernel((1, 1, 1), (1, 1, 1), (torch.zeros(4, device="cuda"),))
    torch.cuda.synchronize()


def afterwards() -> None:
    """Compute something that nothing is wrong with."""
    torch.ones(4, device="cuda").sum().item()


def judged(call: Callable[[], None]) -> dict[str, Any]:
    """Give what a call fails with, and whether the worker would leave because of it."""
    try:
        call()
    except Exception as error:
        verdict = judge(error)
        answer = Failed(str(error), retry=True, device=verdict is not Verdict.NOTHING)
        good = verdict is Verdict.CONTEXT and leaves_after(answer)
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return {"verdict": verdict.name, "error": text, "good": good}
    return {"verdict": "nothing failed", "error": "", "good": False}


if __name__ == "__main__":
    breaks = {"assert": failed_assert, "illegal": illegal_access}[sys.argv[1]]
    print(json.dumps({"the call": judged(breaks), "the next": judged(afterwards)}))
