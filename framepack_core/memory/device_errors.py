"""Judges an error: too little GPU memory, a broken CUDA context, or neither.

PyTorch raises ``OutOfMemoryError`` only for its own allocations. Failed allocations of cuBLAS, cuDNN, the
driver and Triton are other errors, distinguished by their texts alone (here those of torch 2.11). After most
of them the CUDA context of the process cannot be trusted.
"""

import re
from enum import Enum

import torch


class Verdict(Enum):
    """What an error means for the device."""

    MEMORY = "it had too little memory, and the process can go on"
    MEMORY_AND_CONTEXT = "it had too little memory, and only another process can go on"
    CONTEXT = "it failed, and only another process can go on"
    NOTHING = "nothing"


# A tensor is too large for a kernel; raised before the kernel starts. Smaller tiles help.
_TOO_LARGE = re.compile(r"32[- ]?bit index|canUse32BitIndexMath", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|(CUBLAS|CUDNN|CUSOLVER|CUFFT)\w*_ALLOC(ATION)?_FAILED"
    # cuBLAS and cuDNN allocate their handles when they are first used.
    r"|(CUBLAS|CUDNN)_STATUS_NOT_INITIALIZED"
    # The allocator's text after it has asked the driver about a failure.
    r"|NVML_SUCCESS == ",
    re.IGNORECASE,
)
_FAILED = re.compile(
    r"\b(CUDA|HIP)( driver)? error|\bCUBLAS_STATUS|\bCUDNN_STATUS|cuDNN error|Triton Error \[CUDA\]"
)


def judge(error: BaseException) -> Verdict:
    """Judge what an error means for the device.

    >>> judge(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")).name
    'MEMORY_AND_CONTEXT'
    >>> judge(RuntimeError("shape mismatch")).name
    'NOTHING'
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return Verdict.MEMORY
    if not isinstance(error, RuntimeError):
        return Verdict.NOTHING
    if _TOO_LARGE.search(text):
        return Verdict.MEMORY
    on_device = isinstance(error, torch.AcceleratorError) or _FAILED.search(text) is not None
    if _OUT_OF_MEMORY.search(text) and (on_device or "NVML_SUCCESS" in text):
        return Verdict.MEMORY_AND_CONTEXT
    return Verdict.CONTEXT if on_device else Verdict.NOTHING
