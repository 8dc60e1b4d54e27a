"""Imported first by each Python that a test starts: leaves out packages that its process never uses.

Importing them takes a third of a worker's start. diffusers and transformers import both wherever they are;
without them they do without. And a daemon forks its workers, see forking.py.
"""

import os
import sys

_WITH_WORKERS = {"run", "demo", "framepackd.cluster.node"}
_LEFT_OUT = {"bitsandbytes"}  # as in most installations, which lack the extra nf4
if "--multiprocessing-fork" in sys.orig_argv:  # a worker, what forks workers, or a bridge to one
    _LEFT_OUT.add("scipy")
for _package in _LEFT_OUT:
    sys.modules.setdefault(_package, None)  # type: ignore[arg-type] # as documented: its import fails

if "FORKED_WORKERS" in os.environ and not _WITH_WORKERS.isdisjoint(sys.orig_argv):
    from forking import fork_workers

    fork_workers()
