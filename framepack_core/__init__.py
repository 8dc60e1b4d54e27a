"""FramePack: one picture and a sentence become a video, section by section.

This package only computes. It uses torch, diffusers and transformers; watched folders, the database and
commands belong to framepackd. Start reading at :mod:`framepack_core.engine`.
"""

import logging
import os

__version__ = "0.1.0"

# Here, for the libraries say this while they are imported. They advise to install what nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if (_bitsandbytes := logging.getLogger("bitsandbytes")).level == logging.NOTSET:
    _bitsandbytes.setLevel(logging.ERROR)
