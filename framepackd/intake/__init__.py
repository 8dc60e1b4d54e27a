"""Settled files become jobs."""
