"""Runs jobs on the worker, and decides about retries: which job runs, and how it ended."""
