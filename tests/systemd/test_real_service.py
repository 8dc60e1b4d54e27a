"""Installed as docs/operations.md says, on a real systemd, through everything that can befall a service."""

import json
import re
import time
from typing import Any

import pytest

from tests.systemd.conftest import Machine, reason_not_to_boot

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.skipif(reason_not_to_boot() is not None, reason=reason_not_to_boot() or ""),
    pytest.mark.timeout(1800),
]

FRAMEPACKD = "/opt/framepackd/bin/framepackd"
INBOX, OUTBOX = "/var/lib/framepackd/inbox", "/var/lib/framepackd/outbox"
# Small videos of two thousand steps, half a minute or more, so that there is time to harm them.
CONFIG = (
    "model = 'demo'\nsettle_seconds = 0.5\n[defaults]\nseconds = 8\nsteps = 100\n"
    "latent_window_size = 3\nwidth = 32\nheight = 32\n"
)
COUNT = "import sys; from framepack_core.media import count_frames as n; print(*map(n, sys.argv[1:]))"
# What takes minutes in earnest takes seconds here. A Python with a shared library looks for it where it was
# built, which the service may not see: hence the path.
DROP_IN = (
    "[Service]\nWatchdogSec=6s\nRestartSec=1s\nTimeoutStopSec=4s\n"
    "Environment=LD_LIBRARY_PATH=/opt/python/lib OMP_NUM_THREADS=1\n"
)


def jobs(machine: Machine) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(machine.run(f"{FRAMEPACKD} status --json", check=False, note=False))
    return report


def drop(machine: Machine, name: str, inbox: str = INBOX) -> None:
    """Drop a job as somebody of the group framepackd would."""
    demo = "/opt/framepackd/lib/python*/site-packages/framepackd/demo"
    machine.run(f"cd {inbox} && umask 002 && cp {demo}/lake.txt {name}.txt && cp {demo}/lake.png {name}.png")


def wait_until_it_samples(machine: Machine, name: str) -> None:
    """Wait until steps are done while we look: a job that goes on counts those from before as well."""
    seen: list[tuple[int, int]] = []

    def samples() -> bool:
        running = next((job for job in jobs(machine)["jobs"] if job["state"] == "running"), None)
        if running is not None and running["name"] == name:
            seen.append((running["section"], running["step"]))
        return len(set(seen)) > 2

    machine.until(samples, f"{name} to be sampled")


def worker_of(machine: Machine, daemon: str) -> str:
    found = machine.run(f"pgrep --parent {daemon} --full spawn_main", note=False).split()
    return found[-1]


@pytest.fixture(scope="module")
def service(machine: Machine) -> Machine:
    """Install it; what pip would fetch lies under /opt/libraries."""
    python = "/opt/python/bin/python3"
    machine.run(f"{python} -m venv /opt/framepackd")
    machine.run("echo /opt/libraries > $(echo /opt/framepackd/lib/python*/site-packages)/libraries.pth")
    machine.run("/opt/framepackd/bin/pip install --quiet --no-deps --no-index /opt/wheel/*.whl")
    return machine


def test_the_service_is_refused_what_it_would_not_see(service: Machine) -> None:
    service.run("chmod 700 /opt/framepackd")
    refused = service.run(f"{FRAMEPACKD} service install", check=False)
    assert "user framepackd cannot use /opt/framepackd" in refused
    assert "chmod" in refused
    service.run("chmod 755 /opt/framepackd")
    service.run("cp -a /opt/framepackd /root/framepackd && ls /root/framepackd/bin/python3")
    hidden = service.run("/root/framepackd/bin/python3 -m framepackd service install", check=False)
    assert "hides /root" in hidden
    assert not (service.root / "etc/systemd/system/framepackd.service").exists()


def test_it_lives_through_a_bad_night(service: Machine) -> None:
    service.run(f"{FRAMEPACKD} service install")
    again = service.run(f"{FRAMEPACKD} service install")
    assert "write" not in again, "it is in place already"
    service.run(f'printf "{CONFIG}" >> /etc/framepackd/config.toml')
    service.run(
        "mkdir -p /etc/systemd/system/framepackd.service.d && "
        f"printf '{DROP_IN}' > /etc/systemd/system/framepackd.service.d/test.conf && systemctl daemon-reload"
    )
    verified = service.run("systemd-analyze verify --man=no /etc/systemd/system/framepackd.service")
    assert verified == ""
    exposure = service.run("systemd-analyze security --threshold=10 framepackd --no-pager | grep -v ✓")
    assert float(re.findall(r"exposure level.* ([\d.]+) ", exposure)[0]) <= 1.0

    service.run("systemctl enable --now framepackd")
    assert service.show("StatusText") in ("", "idle")
    ready = service.run("journalctl -u framepackd --no-pager -o cat")
    assert ready.index("watching /var/lib/framepackd/inbox") >= 0
    service.until(lambda: service.show("StatusText") == "idle", "the status")

    drop(service, "cat")
    wait_until_it_samples(service, "cat")
    drop(service, "dog")
    told = re.compile(r"cat: \d+ %, section \d+/\d+, .*; 1 queued")
    service.until(lambda: told.match(service.show("StatusText")), "a status with progress")
    service.run("systemctl status framepackd --no-pager")

    service.say("== the worker dies")
    daemon = service.show("MainPID")
    service.run(f"kill -KILL {worker_of(service, daemon)}")
    service.until(lambda: jobs(service)["jobs"][0]["attempts"] == 1, "the attempt to be counted")
    assert service.show("MainPID") == daemon, "the daemon lives on"

    service.say("== the daemon dies")
    wait_until_it_samples(service, "cat")
    service.run(f"kill -KILL {daemon}")
    service.until(lambda: service.show("NRestarts") == "1", "the restart")
    service.until(lambda: service.show("ActiveState") == "active", "the daemon to be back")

    service.say("== the daemon hangs")
    wait_until_it_samples(service, "cat")
    began = time.monotonic()
    service.run(f"kill -STOP {service.show('MainPID')}")
    service.until(lambda: service.show("NRestarts") == "2", "the watchdog", 60)
    service.say(f"restarted {time.monotonic() - began:.1f} s after it was stopped, WatchdogSec=6s")
    service.until(lambda: service.show("ActiveState") == "active", "the daemon to be back")

    service.say("== the configuration changes")
    wait_until_it_samples(service, "cat")
    daemon = service.show("MainPID")
    service.run("sed -i 's/^settle_seconds.*/settle_seconds = 0.6/' /etc/framepackd/config.toml")
    service.run("systemctl reload framepackd")
    service.until(
        lambda: (
            "configuration read again: new settle_seconds"
            in service.run("journalctl -u framepackd --no-pager -o cat | tail -5", note=False)
        ),
        "the configuration to be read",
    )
    assert (service.show("MainPID"), service.show("ActiveState")) == (daemon, "active")

    service.say("== stopped during a job, while its worker is deaf for longer than TimeoutStopSec=4s")
    wait_until_it_samples(service, "cat")
    worker = worker_of(service, daemon)
    service.run(f"kill -STOP {worker}; systemctl stop --no-block framepackd")
    time.sleep(8)
    assert service.show("ActiveState") == "deactivating", "it asked for more time and got it"
    service.run(f"kill -CONT {worker}; systemctl stop framepackd")
    assert service.show("Result") == "success"
    assert jobs(service)["counts"]["queued"] == 2

    service.say("== started again")
    service.run("systemctl start framepackd")
    service.until(lambda: jobs(service)["counts"]["done"] == 2, "both videos", 1200)
    record = json.loads(service.run(f"cat {OUTBOX}/cat.json", note=False))
    assert (record["attempts"], record["state"]) == (1, "done")
    counted = service.run(f"/opt/framepackd/bin/python3 -c '{COUNT}' {OUTBOX}/cat.mp4 {OUTBOX}/dog.mp4")
    assert counted.split() == [str(record["frames"])] * 2
    service.run(f"ls -ln {OUTBOX}")
    service.run(
        "systemctl status framepackd --no-pager; systemctl show framepackd -p NRestarts,Result,StatusText"
    )
    service.run("journalctl -u framepackd --no-pager -o short-monotonic")


def test_an_instance_works_on_folders_of_its_own(service: Machine) -> None:
    service.run("mkdir -p /etc/framepackd && useradd --system --user-group framepackd", check=False)
    config = f"state_dir = '/var/lib/framepackd-cat'\noutbox = '/data/cats out'\n{CONFIG}steps = 2\n"
    service.run(f'printf "{config.replace("steps = 100", "")}" > /etc/framepackd/cat.toml')
    service.run(f"{FRAMEPACKD} service install --instance cat")
    service.run(
        "mkdir -p /etc/systemd/system/framepackd@.service.d && "
        f"printf '{DROP_IN}' > /etc/systemd/system/framepackd@.service.d/test.conf && systemctl daemon-reload"
    )
    service.run("systemctl enable --now framepackd@cat")
    drop(service, "cat", "/var/lib/framepackd-cat/inbox")
    service.until(lambda: "cat.mp4" in service.run("ls '/data/cats out'", note=False), "the video")
    service.run(f"{FRAMEPACKD} service uninstall --instance cat")
    assert service.run("systemctl is-active framepackd@cat", check=False).strip() == "inactive"
    service.run("ls '/data/cats out/cat.mp4' /etc/framepackd/cat.toml")


def test_the_service_of_a_user_needs_no_root(service: Machine) -> None:
    service.run("useradd --create-home ann && systemctl start dbus systemd-logind")
    service.run("loginctl enable-linger ann")
    ann = "runuser -u ann -- env XDG_RUNTIME_DIR=/run/user/$(id -u ann) LD_LIBRARY_PATH=/opt/python/lib"
    service.until(
        lambda: (
            "running" in service.run(f"{ann} systemctl --user is-system-running", check=False, note=False)
        ),
        "the user's systemd",
    )
    config = CONFIG.replace("steps = 100", "steps = 2")
    service.run(f"{ann} {FRAMEPACKD} service install --user")
    service.run(f'printf "{config}" >> /home/ann/.config/framepackd/config.toml')
    service.run(f"{ann} systemctl --user set-environment LD_LIBRARY_PATH=/opt/python/lib")
    service.run(f"{ann} systemctl --user enable --now framepackd")
    drop(service, "cat", "/home/ann/.local/state/framepackd/inbox")
    service.run("chown ann: /home/ann/.local/state/framepackd/inbox/*")
    videos = "ls /home/ann/.local/state/framepackd/outbox"
    service.until(lambda: "cat.mp4" in service.run(videos, check=False, note=False), "the video")
    service.run(f"{ann} systemctl --user status framepackd --no-pager")
    service.run(f"{ann} systemctl --user reload framepackd && {ann} {FRAMEPACKD} service uninstall --user")
    assert service.run(f"{ann} systemctl --user is-active framepackd", check=False).strip() == "inactive"
