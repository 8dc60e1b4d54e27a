"""The process that rows are computed in: ``python -m benchmarks.first_light.child DESCRIPTOR``.

Rows come by the standard input, each the fields of a :class:`Check` as a line of JSON. What they yield leaves
by the descriptor, one JSON object a line: ``{"figure": ...}``, and ``{"end": ...}`` at the end of a row.
"""

import gc
import importlib
import io
import json
import os
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

from benchmarks.first_light import Check, Figure, SkippedError
from framepack_core.memory import before_torch


def main() -> None:
    """Compute what is asked for until the standard input ends, or the device is not to be relied on."""
    before_torch.set_up("auto")  # as in a worker
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as out:
        for line in sys.stdin:
            end = compute(Check(**json.loads(line)), out)
            release()
            out.write(json.dumps({"end": end}) + "\n")
            if end["broken"]:
                return


def compute(check: Check, out: io.TextIOBase | Any) -> dict[str, Any]:
    """Compute a row, and give how it ended."""
    good: list[bool] = []
    try:
        for found in rows_of(check):
            figure = found if isinstance(found, Figure) else Figure.of(found)
            out.write(json.dumps({"figure": figure.as_json}) + "\n")
            if figure.good is not None:
                good.append(figure.good)
    except SkippedError as error:
        return {"status": "skipped", "why": str(error), "broken": False}
    except Exception as error:
        traceback.print_exc()
        return {"status": "fail", "why": f"{type(error).__name__}: {error}", "broken": is_broken(error)}
    return {"status": ("pass" if all(good) else "fail") if good else "figure", "why": "", "broken": False}


def rows_of(check: Check) -> Any:
    """Give what computes a row.

    Raises:
        SkippedError: it cannot be computed here.
    """
    missing = [name for name in check.needs if find_spec(name) is None]
    if missing:
        raise SkippedError(f"not installed: {', '.join(missing)}")
    if check.gpu and not _gpu_is_there():
        raise SkippedError("needs a GPU")
    if "transformers" in check.needs:
        from framepackd.worker.main import set_environment

        set_environment()
    module, _, function = check.function.partition(":")
    with inference_mode() if "torch" in check.needs else nullcontext():
        yield from getattr(importlib.import_module(module), function)()


def _gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def inference_mode() -> AbstractContextManager[Any]:
    """Compute without what training would need."""
    import torch

    return torch.inference_mode()


def is_broken(error: Exception) -> bool:
    """Say whether what comes after such an error had better be computed in another process."""
    if "torch" not in sys.modules:
        return False
    from framepack_core.memory.device_errors import Verdict, judge

    return judge(error) is not Verdict.NOTHING


def release() -> None:
    """Give back what a row has left on the device."""
    torch: Any = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
