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
COUNT = (
    "import sys; from framepack_core.media.pictures import count_frames as n; print(*map(n, sys.argv[1:]))"
)
# What takes minutes in earnest takes seconds here. A Python with a shared library looks for it where it was
# built, which the service may not see: hence the path.
LIBRARIES = "Environment=LD_LIBRARY_PATH=/opt/python/lib OMP_NUM_THREADS=1\n"
DROP_IN = f"[Service]\nWatchdogSec=6s\nRestartSec=1s\nTimeoutStopSec=4s\n{LIBRARIES}"


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


def put_in_place(service: Machine) -> None:
    """Have the service installed and running, whichever test came before."""
    service.run(f"{FRAMEPACKD} service install")
    if "settle_seconds" not in service.run("cat /etc/framepackd/config.toml", note=False):
        service.run(f'printf "{CONFIG}" >> /etc/framepackd/config.toml')
    service.run(
        "mkdir -p /etc/systemd/system/framepackd.service.d && "
        f"printf '{DROP_IN}' > /etc/systemd/system/framepackd.service.d/test.conf && systemctl daemon-reload"
    )
    service.run("systemctl restart framepackd")


def test_who_may_drop_can_do_no_more(service: Machine) -> None:
    put_in_place(service)
    service.run("useradd --create-home --groups framepackd bob; useradd --create-home eve", check=False)
    state, cache = "/var/lib/framepackd", "/var/cache/framepackd"
    service.say("== as an earlier version left it")
    service.run("systemctl stop framepackd")
    service.run(
        f"cd {state} && mkdir -p compiled loras && chmod 00770 jobs loras compiled && "
        f"chmod 660 lock framepackd.db && "
        f"mkdir -p {cache}/triton && chmod 750 {cache} && chmod 770 {cache}/triton && "
        f"chown -R framepackd: {state}/compiled loras {cache}"
    )
    service.run(f"runuser -u bob -- sh -c 'flock --nonblock {state}/lock true && touch {state}/jobs/x'")
    service.run("systemctl start framepackd")
    said = service.run("journalctl -u framepackd --no-pager -o cat | grep 'rights corrected'")
    for word in ("jobs 0770 to 0700", "lock 0660 to 0600", "loras 0770 to 2770", "compiled removed"):
        assert word in said.splitlines()[-1], said
    service.run(f"find {state} {cache} -maxdepth 1 -printf '%m %u %g %p\\n'")
    opened = service.run(f"find {state} {cache} -maxdepth 1 -perm /077", note=False).split()
    boxes = {f"{state}/{name}" for name in ("inbox", "outbox", "failed", "loras")}
    outside = [path for path in opened if not any(path.startswith(box) for box in boxes)]
    assert outside == [state]
    for attempt in (
        f"flock --nonblock {state}/lock true",
        f"ls {state}/jobs",
        f"touch {state}/jobs/y",
        f"cat {state}/framepackd.db",
        f"touch {state}/compiled",
        f"ls {cache}",
    ):
        assert "ermission denied" in service.run(f"runuser -u bob -- {attempt}", check=False), attempt
    told = service.run(f"runuser -u bob -- {FRAMEPACKD} status; echo code $?")
    assert "only framepackd and root may ask: put sudo -u framepackd before" in told
    assert "code 4" in told
    service.run(f"runuser -u bob -- sh -c 'touch {INBOX}/bob.toml && rm {INBOX}/bob.toml && ls {OUTBOX}'")
    assert "ermission denied" in service.run(f"runuser -u eve -- ls {INBOX}", check=False)
    mode = service.run("stat -c '%a %U %G' /etc/framepackd/config.toml")
    assert mode.split() == ["640", "root", "framepackd"]


# In place of the driver's: this kernel has none. Of the terminals' major number, which it knows by name.
FAKE_MODPROBE = """#!/bin/sh
case "$*" in
"-c 0") mknod -m 666 /dev/nvidia0 c 4 65 ;;
"-u -c 0 -c 1") mknod -m 666 /dev/nvidia-uvm c 4 66; mknod -m 666 /dev/nvidia-uvm-tools c 4 67 ;;
esac
"""


def test_the_devices_are_made_although_the_service_itself_may_make_none(service: Machine) -> None:
    put_in_place(service)
    script = service.root / "usr/local/bin/nvidia-modprobe"
    script.write_text(FAKE_MODPROBE)
    script.chmod(0o755)
    unit = service.run("cat /etc/systemd/system/framepackd.service", note=False)
    policy = re.findall(r"^(Device(?:Policy|Allow)=.*)$", unit, re.MULTILINE)
    assert policy == ["DevicePolicy=closed", "DeviceAllow=char-nvidia* rw"]
    options = " ".join(f"-p '{line.replace('nvidia', 'tty')}'" for line in policy)
    refused = service.run(f"systemd-run --wait --pipe -q {options} nvidia-modprobe -c 0", check=False)
    assert "Operation not permitted" in refused, "the device policy is in force here"
    assert "nvidia" not in service.run("ls /dev", note=False)
    service.run("systemctl restart framepackd")
    for device in ("nvidia0", "nvidia-uvm", "nvidia-uvm-tools"):
        assert service.run(f"stat -c %F /dev/{device}").strip() == "character special file"
    script.unlink()
    service.run("rm /dev/nvidia* && systemctl restart framepackd")
    assert service.show("ActiveState") == "active", "without such a driver nothing is amiss"


ASK_THE_PAGE = (
    "import urllib.request as r, urllib.error as e\n"
    "try: print(r.urlopen('http://127.0.0.1:7860/config').status)\n"
    "except e.HTTPError as error: print(error.code)\n"
    "except e.URLError as error: print(error.reason)\n"
)


def test_the_page_has_its_password_from_a_credential_and_starts_without_one(service: Machine) -> None:
    put_in_place(service)
    (service.root / "root/ask.py").write_text(ASK_THE_PAGE)
    ask = "/opt/framepackd/bin/python3 /root/ask.py"
    service.run(f"{FRAMEPACKD} service install --with web")
    service.run(
        "mkdir -p /etc/systemd/system/framepackd-web.service.d && "
        f"printf '[Service]\\n{LIBRARIES}' > /etc/systemd/system/framepackd-web.service.d/test.conf && "
        "systemctl daemon-reload"
    )
    service.run("systemctl start framepackd-web")
    service.until(lambda: service.run(ask, note=False).strip() == "200", "the page without a password")
    service.run(
        "mkdir -p -m 700 /etc/credstore && (umask 077 && echo hush > /etc/credstore/framepackd-web.password)"
    )
    service.run("printf \"[web]\\npassword_file = 'password'\\n\" >> /etc/framepackd/config.toml")
    service.run("systemctl restart framepackd-web")
    service.until(lambda: service.run(ask, note=False).strip() == "401", "the page with a password")
    service.run("systemctl stop framepackd-web; systemctl disable framepackd-web", check=False)


# Presses "move to trash" of the newest result, as a browser does.
TRASH_ON_THE_PAGE = """
import re, sys, urllib.parse, urllib.request
url, job = "http://127.0.0.1:7871", sys.argv[1]
page = urllib.request.urlopen(f"{url}/results/{job}").read().decode()
form = {"job": job, "token": re.search('name="token" value="([^"]+)"', page)[1]}
asked = urllib.request.Request(url + "/page/do/trash", urllib.parse.urlencode(form).encode())
print(re.search('id="toast"[^>]*>([^<]*)', urllib.request.urlopen(asked).read().decode())[1])
"""


def test_a_daemon_without_network_and_card_has_a_node_make_a_video(service: Machine) -> None:
    put_in_place(service)
    service.run(f"{FRAMEPACKD} service install --with node")
    service.run("systemctl stop framepackd; rm -rf /var/lib/framepackd/inbox/* /var/lib/framepackd/outbox/*")
    node = f"{FRAMEPACKD} node --config /etc/framepackd/node.toml --cpu"
    settings = f"[Service]\\n{LIBRARIES}ExecStart=\\nExecStart={node}\\n"
    folder = "/etc/systemd/system/framepackd-node.service.d"
    service.run(f"mkdir -p {folder} && printf '{settings}' > {folder}/test.conf && systemctl daemon-reload")
    service.run(
        "mkdir -p -m 700 /etc/credstore && "
        "(umask 077 && head -c 16 /dev/urandom | xxd -p > /etc/credstore/framepackd-node.token)"
    )
    (service.root / "etc/framepackd/node.toml").write_text(
        "[cluster]\naddress = '127.0.0.1:6379'\ntoken_file = 'token'\n"
    )
    config = service.root / "etc/framepackd/config.toml"
    before = config.read_text()
    config.write_text(
        before.replace("steps = 100", "steps = 2").replace("seconds = 8", "seconds = 1")
        + "[gpu]\ndevice = []\n[cluster]\nnodes = 'all'\n"
    )
    exposure = service.run("systemd-analyze security --threshold=10 framepackd-node --no-pager | tail -1")
    assert float(re.findall(r"exposure level.* ([\d.]+) ", exposure)[0]) <= 1.8
    service.run("systemctl start framepackd-node framepackd")
    drop(service, "far")
    service.until(lambda: "far.mp4" in service.run(f"ls {OUTBOX}", note=False), "the video")
    service.run(f"{FRAMEPACKD} nodes")
    assert "AF_INET" not in service.run("systemctl cat framepackd | grep RestrictAddressFamilies")
    assert "Landlock" not in service.run("journalctl -u framepackd-node -u framepackd --no-pager -o cat")
    service.run("systemctl stop framepackd framepackd-node")
    config.write_text(before)


def test_an_instance_works_on_folders_of_its_own(service: Machine) -> None:
    service.run("mkdir -p /etc/framepackd && useradd --system --user-group framepackd", check=False)
    config = f"state_dir = '/var/lib/framepackd-cat'\noutbox = '/data/cats out'\n{CONFIG}steps = 2\n"
    config += "[web]\nport = 7871\n"
    service.run(f'printf "{config.replace("steps = 100", "")}" > /etc/framepackd/cat.toml')
    service.run(f"{FRAMEPACKD} service install --instance cat --with web")
    for unit, settings in (("framepackd@", DROP_IN), ("framepackd-web@", f"[Service]\\n{LIBRARIES}")):
        folder = f"/etc/systemd/system/{unit}.service.d"
        service.run(f"mkdir -p {folder} && printf '{settings}' > {folder}/test.conf")
    service.run("systemctl daemon-reload")
    service.run("systemctl enable --now framepackd@cat")
    drop(service, "cat", "/var/lib/framepackd-cat/inbox")
    service.until(lambda: "cat.mp4" in service.run("ls '/data/cats out'", note=False), "the video")
    service.run("systemctl start framepackd-web@cat")
    (service.root / "root/trash.py").write_text(TRASH_ON_THE_PAGE)
    report = json.loads(service.run(f"{FRAMEPACKD} status --config /etc/framepackd/cat.toml --json"))
    press = f"/opt/framepackd/bin/python3 /root/trash.py {report['jobs'][0]['id']}"
    moved = "Moved to /data/cats out-trash/cat."
    service.until(lambda: moved in service.run(press, check=False, note=False), "the page to move the result")
    assert service.run("cd '/data/cats out-trash/cat' && ls").split() == [
        "cat.json",
        "cat.mp4",
        "cat.png",
        "cat.txt",
    ]
    service.run(f"{FRAMEPACKD} service uninstall --instance cat")
    assert service.run("systemctl is-active framepackd@cat", check=False).strip() == "inactive"
    service.run("ls /etc/framepackd/cat.toml")


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
    service.until(lambda: "cat.mp4" in service.run(videos, check=False, note=False), "the video", 600)
    service.run(f"{ann} systemctl --user status framepackd --no-pager")
    modes = service.run(
        "cd /home/ann/.local/state/framepackd && "
        "stat -c '%a %n' . inbox outbox failed loras jobs lock framepackd.db"
    )
    shared = "".join(f"2770 {name}\n" for name in ("inbox", "outbox", "failed", "loras"))
    assert modes == f"750 .\n{shared}700 jobs\n600 lock\n600 framepackd.db\n"
    exposure = service.run(f"{ann} systemd-analyze --user security framepackd --no-pager | tail -1")
    assert float(re.findall(r"exposure level.* ([\d.]+) ", exposure)[0]) <= 6.2
    (service.root / "root/ask.py").write_text(ASK_THE_PAGE)
    service.run(f"{ann} {FRAMEPACKD} service install --user --with web")
    service.run(f"{ann} systemctl --user start framepackd-web")
    service.until(
        lambda: service.run("/opt/framepackd/bin/python3 /root/ask.py", note=False).strip() == "200",
        "the user's page",
    )
    assert "PrivateUsers=yes" in service.run("cat /home/ann/.config/systemd/user/framepackd-web.service")
    service.run(f"{ann} systemctl --user reload framepackd && {ann} {FRAMEPACKD} service uninstall --user")
    assert service.run(f"{ann} systemctl --user is-active framepackd", check=False).strip() == "inactive"
