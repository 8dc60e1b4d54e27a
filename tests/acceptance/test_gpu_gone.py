"""A real daemon whose GPU is not there: here none is, or no eighth one."""

from tests.acceptance.conftest import Daemon, MakeDaemon

GPU = '[gpu]\ndevice = "cuda:7"\n'


def test_without_its_gpu_the_queue_waits_and_the_reason_stands_in_status_within_half_a_minute(
    make_daemon: MakeDaemon,
) -> None:
    daemon: Daemon = make_daemon(models=GPU)
    daemon.drop("cat")
    daemon.start()

    def reason() -> str:
        return daemon.status()["daemon"]["paused"] or ""

    daemon.until(lambda: bool(reason()), "the reason", 30)
    assert "device 'cuda:7' is not there" in reason()
    assert "check the driver with nvidia-smi, or compute on the CPU with device = " in reason()
    (job,) = daemon.status()["jobs"]
    assert (job["state"], job["attempts"]) == ("queued", 0)
    assert daemon.stop() == 0
    once = daemon.command("run", "--once")
    assert once.returncode == 1
    assert "jobs are left in the queue: device 'cuda:7' is not there" in once.stderr
    assert daemon.status()["counts"]["queued"] == 1
