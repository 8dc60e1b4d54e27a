"""FramePack: one picture and a sentence become a video, section by section.

This package only computes. It uses torch, diffusers and transformers; watched folders, the database and
commands belong to framepackd. Start reading at :mod:`framepack_core.engine`.
"""

__version__ = "0.1.0"
