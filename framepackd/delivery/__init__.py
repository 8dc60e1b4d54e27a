"""Moves results to the outbox and the failed folder."""
