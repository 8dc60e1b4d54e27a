"""FramePack: one picture and a sentence become a video, section by section.

The computation alone: it knows torch, diffusers and transformers, and nothing of folders that are
watched, databases or commands. Start reading at :mod:`framepack_core.engine`.
"""

__version__ = "0.1.0"
