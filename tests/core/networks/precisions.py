"""The precisions that can be tested here."""

import importlib.util

import pytest

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
BOTH = ["fp8", pytest.param("nf4", marks=needs_bitsandbytes)]
