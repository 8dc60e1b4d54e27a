"""Checks and prepares the machine: check, sanity-check, calibrate, service."""
