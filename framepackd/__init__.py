"""The daemon: watches a folder, keeps jobs in SQLite, has a worker process generate them, delivers videos.

It runs :mod:`framepack_core` in a process of its own and never imports torch itself.
"""
