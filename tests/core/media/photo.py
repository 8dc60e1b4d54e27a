"""A photo as an iPhone saves it."""

from pathlib import Path

import pytest

from framepack_core.media import heif

PHOTO = Path(__file__).parent / "iphone.heic"
needs_pi_heif = pytest.mark.skipif(not heif.available(), reason="pi-heif is not installed")
