"""The loaded model: one worker at a time loads one."""

import fcntl
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from framepackd.worker import engines
from tests.daemon.worker.jobs import work_in


def test_a_worker_waits_while_another_loads_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that plan at once would both count the same free memory of the machine."""
    work, loaded = work_in(tmp_path), threading.Event()
    engine = SimpleNamespace(
        level=0, device=None, models=SimpleNamespace(dtype=None), take_level=lambda _: None
    )

    def load(*_: object, **__: object) -> object:
        loaded.set()
        return engine

    monkeypatch.setattr(engines.Engine, "load", load)
    monkeypatch.setattr(engines.device_support, "warnings", lambda *_: [])
    with work.load_lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=engines.Engines().get, args=(work, 0))
        thread.start()
        assert not loaded.wait(0.2)
    assert loaded.wait(5)
    thread.join()
