"""Names the versions that a video's bits depend on, without importing the libraries."""

import importlib.metadata

import framepack_core


def versions() -> dict[str, str]:
    """Give the versions of framepackd and of the libraries that compute and write."""
    libraries = {
        name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "av")
    }
    return {"framepackd": framepack_core.__version__, **libraries}
