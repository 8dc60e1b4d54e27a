"""Workers in threads of the test: they neither die with it nor ignore its signals."""

import pytest

from framepackd import files
from framepackd.worker import main


@pytest.fixture(autouse=True)
def _a_worker_may_be_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "die_with", lambda parent: None)
    for name in ("signal", "pthread_sigmask"):
        monkeypatch.setattr(main.signal, name, lambda *_: None)
    monkeypatch.setattr(files, "_observer", None)
