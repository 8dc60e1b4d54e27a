"""Sends commands to a daemon, or performs them where none runs."""
