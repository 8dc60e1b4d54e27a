"""The daemon's end of the worker: which job runs, and how it ended."""
