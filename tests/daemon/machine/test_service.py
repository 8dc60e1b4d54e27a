"""The units, and putting them in place."""

import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from framepackd.cli.main import main
from framepackd.machine import service, units
from framepackd.machine.units import Service, ServiceError

UNITS = sorted(units.UNITS.rglob("*.service"))
# Those that run framepackd; what makes the devices is root's own, and not in a sandbox.
SYSTEM_UNITS = [path for path in UNITS if path.parent.name != "user" and path.name != units.DEVICES]
USER_UNITS = [path for path in UNITS if path.parent.name == "user"]


def analyze(*words: object) -> "subprocess.CompletedProcess[str]":
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here: apt-get install systemd")
    return subprocess.run(
        ["systemd-analyze", *map(str, words)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("template", UNITS, ids=lambda path: str(path.relative_to(units.UNITS)))
def test_systemd_finds_nothing_to_say_of_the_units(template: Path, tmp_path: Path) -> None:
    name = template.name.replace("@", "@cat")
    unit = tmp_path / name
    # As installed here: the shipped path is that of an installation which this machine need not have.
    unit.write_text(
        template.read_text().replace(service.SHIPPED_COMMAND, f"{sys.executable} -P -m framepackd")
    )
    # Read as a unit of the machine, the user's too: verifying for a user needs that user's systemd.
    verified = analyze("verify", "--man=no", unit)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@pytest.mark.parametrize("unit", SYSTEM_UNITS, ids=lambda path: path.name)
def test_the_sandbox_is_tight(unit: Path) -> None:
    # What speaks to the network is not shut off from it.
    limit = 10 if "PrivateNetwork=yes" in unit.read_text() else 20
    rated = analyze("security", "--offline=true", f"--threshold={limit}", unit)
    assert rated.returncode == 0, rated.stdout
    exposure = re.search(r"exposure level.*: ([\d.]+)", rated.stdout)
    assert exposure is not None
    assert float(exposure[1]) <= limit / 10


@pytest.mark.parametrize("unit", USER_UNITS, ids=lambda path: path.name)
def test_the_sandbox_of_a_user_is_as_tight_as_a_user_may_have_it(
    unit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    rated = analyze("security", "--user", "--offline=true", unit)
    exposure = re.search(r"exposure level.*: ([\d.]+)", rated.stdout)
    assert exposure is not None, rated
    assert float(exposure[1]) <= {"framepackd": 6.2, "framepackd-node": 6.3}.get(unit.stem, 2.5)


def test_what_a_system_denies_to_users_is_left_out(systemctl: Path, tmp_path: Path) -> None:
    trial = tmp_path / "bin/systemd-run"
    unit = tmp_path / "config/systemd/user/framepackd-web.service"
    for code, granted in ((1, False), (0, True)):
        trial.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/tried; exit {code}\n')
        trial.chmod(0o755)
        assert command("install", "--user", "--with", "web").exit_code == 0
        assert ("PrivateUsers=yes" in unit.read_text()) == granted
        assert ("ProtectProc=" in unit.read_text()) == granted
        tried = (tmp_path / "tried").read_text()
        assert "--property=PrivateUsers=yes" in tried
        assert "--property=ProtectProc=invisible" in tried, "all of it is tried, as one may be denied alone"
        assert "NoNewPrivileges=yes" in unit.read_text()
        assert "\n\n[Install]\n" in unit.read_text()


def test_the_devices_are_made_by_a_unit_that_has_no_device_policy() -> None:
    assert not re.search("^Device|^PrivateDevices", (units.UNITS / units.DEVICES).read_text(), re.MULTILINE)
    for name in service.MACHINE_UNITS:
        unit = (units.UNITS / name).read_text()
        assert "nvidia-modprobe" not in unit, "its device policy would refuse to make them"
        assert re.search(f"^After=.*{units.DEVICES}", unit, re.MULTILINE)
        assert re.search(f"^Wants=.*{units.DEVICES}", unit, re.MULTILINE)


def test_only_the_daemon_is_shut_off_from_the_network() -> None:
    online = {unit.name for unit in SYSTEM_UNITS if "PrivateNetwork=yes" not in unit.read_text()}
    assert not online & {"framepackd.service", "framepackd@.service"}


@pytest.mark.parametrize("name", ["framepackd", "framepackd-notify"])
def test_an_instance_differs_from_the_service_only_in_its_name_and_places(name: str) -> None:
    instance = (units.UNITS / f"{name}@.service").read_text()
    for here, there in (
        (" %i:", ":"),
        ("%i.toml", "config.toml"),
        ("# Not below framepackd/: that is the state folder of the unit without an instance.\n", ""),
        ("StateDirectory=framepackd-%i", "StateDirectory=framepackd"),
    ):
        assert here in instance
        instance = instance.replace(here, there)
    assert instance == (units.UNITS / f"{name}.service").read_text()


@pytest.fixture(autouse=True)
def _unset_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "")  # the command sets it, for its own short life


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for systemctl with a script that writes down how it was called; give what it wrote."""
    calls = tmp_path / "calls"
    script = tmp_path / "bin/systemctl"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return calls


def command(*words: str) -> Result:
    return CliRunner().invoke(main, ["service", *words])


def test_a_users_service_is_put_in_place_once_and_taken_away_again(systemctl: Path, tmp_path: Path) -> None:
    unit = tmp_path / "config/systemd/user/framepackd.service"
    config = tmp_path / "config/framepackd/config.toml"
    first = command("install", "--user")
    assert first.exit_code == 0, first.output
    assert f"write {unit}" in first.output
    assert "systemctl --user enable --now framepackd" in first.output
    assert systemctl.read_text() == "--user daemon-reload\n"
    assert service.SHIPPED_COMMAND not in unit.read_text()
    assert f"ExecStart={service.quoted(service.command()[0])} " in unit.read_text()

    config.write_text('model = "demo"\n')
    second = command("install", "--user")
    assert "write" not in second.output
    assert config.read_text() == 'model = "demo"\n', "what is configured stays"

    gone = command("uninstall", "--user")
    assert gone.exit_code == 0, gone.output
    assert not unit.exists()
    assert config.exists()
    assert "--user disable --now framepackd\n" in systemctl.read_text()
    assert command("uninstall", "--user").exit_code == 0, "it is gone already"


def test_a_companion_is_installed_when_asked_for_and_removed_with_the_daemon(
    systemctl: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "config/systemd/user"
    assert command("install", "--user").exit_code == 0
    assert not (folder / "framepackd-notify.service").exists()
    asked = command("install", "--user", "--with", "notify")
    assert asked.exit_code == 0, asked.output
    assert "systemctl --user enable --now framepackd framepackd-notify" in asked.output
    unit = folder / "framepackd-notify.service"
    assert f"ExecStart={service.quoted(service.command()[0])} " in unit.read_text()
    unit.write_text("old")
    assert f"write {unit}" in command("install", "--user").output, "what is in place is kept up to date"
    gone = command("uninstall", "--user")
    assert gone.exit_code == 0, gone.output
    assert not list(folder.glob("*.service"))
    assert "--user disable --now framepackd-notify\n" in systemctl.read_text()


def test_a_part_that_there_is_not_is_refused(systemctl: Path) -> None:
    refused = command("install", "--user", "--with", "nothing")
    assert refused.exit_code == 1
    assert "--with takes node, notify, web" in refused.output


def test_the_parts_of_an_instance_are_instances_too() -> None:
    notify = Service.of_machine("cat").companion("notify")
    assert notify.name == "framepackd-notify@cat"
    assert notify.unit == Path("/etc/systemd/system/framepackd-notify@.service")
    assert notify.template == units.UNITS / "framepackd-notify@.service"
    assert notify.config == Path("/etc/framepackd/cat.toml")


def test_one_part_for_other_machines_serves_all_instances() -> None:
    with pytest.raises(ServiceError, match="without --instance"):
        Service.of_machine("cat").companion("node")


def test_a_dry_run_says_all_and_does_nothing(systemctl: Path, tmp_path: Path) -> None:
    said = command("install", "--user", "--dry-run")
    assert said.exit_code == 0
    assert "would write" in said.output
    assert "WatchdogSec=" in said.output, "the unit itself is shown"
    assert not (tmp_path / "config").exists()
    assert not systemctl.exists()


def test_a_configuration_with_a_mistake_is_reported_before_anything_is_done(
    systemctl: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config/framepackd/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("setle_seconds = 1\n")
    refused = command("install", "--user")
    assert refused.exit_code == 2
    assert "setle_seconds" in refused.output
    assert not (tmp_path / "config/systemd").exists()


def test_where_systemd_does_not_listen_that_is_said(systemctl: Path, tmp_path: Path) -> None:
    script = tmp_path / "bin/systemctl"
    script.write_text("#!/bin/sh\necho Failed to connect to bus >&2; exit 1\n")
    refused = command("install", "--user")
    assert refused.exit_code == 1
    assert "systemctl --user daemon-reload: Failed to connect to bus" in refused.output


@pytest.mark.parametrize("hidden", ["/home/ann/venv", "/root/venv", "/run/user/1000/venv", "/var/tmp/venv"])  # noqa: S108 - only told
def test_an_installation_that_the_sandbox_hides_is_refused(
    systemctl: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    monkeypatch.setattr(sys, "executable", f"{hidden}/bin/python")
    refused = command("install", "--dry-run")
    assert refused.exit_code == 1
    assert f"would not see {hidden}/bin/python" in refused.output
    assert "/opt/framepackd" in refused.output
    assert "--user" in refused.output


MachineService = Callable[[str], Service]


@pytest.fixture
def machine_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineService:
    """Give the machine's service for a configuration, with its files in a folder of the test."""

    def make(config: str) -> Service:
        monkeypatch.setattr(service, "installation", list)
        whole = Service.of_machine("cat")
        (tmp_path / "cat.toml").write_text(f'state_dir = "{whole.state_dir}"\n{config}')
        unit, own = tmp_path / whole.unit.name, tmp_path / "cat.toml"
        return Service(whole.name, whole.template, unit, own, whole.state_dir, False)

    return make


def test_folders_outside_the_state_folder_are_opened_for_this_instance_alone(
    machine_service: MachineService,
) -> None:
    chosen = machine_service('inbox = "/data/in box"\noutbox = "/srv/framepackd/out"\n')
    steps = dict(service.install(chosen))
    assert f"make /data/in box for {service.USER}" in steps
    steps[f"write {chosen.drop_in}"]()
    assert chosen.drop_in.parent.name == "framepackd@cat.service.d"
    assert 'RequiresMountsFor="/data/in box"\n' in chosen.drop_in.read_text()
    assert 'ReadWritePaths="/data/in box"\n' in chosen.drop_in.read_text()
    chosen.config.write_text(f'state_dir = "{chosen.state_dir}"\n')
    assert f"remove {chosen.drop_in}" in dict(service.install(chosen))


def test_the_page_may_write_to_the_trash_beside_an_outbox_anywhere(
    machine_service: MachineService,
) -> None:
    chosen = machine_service('outbox = "/data/out"\n').companion("web")
    steps = dict(service.install(chosen))
    assert f"make /data/out-trash for {service.USER}" in steps
    steps[f"write {chosen.drop_in}"]()
    assert "ReadWritePaths=/data/out -/data/out-trash\n" in chosen.drop_in.read_text()
    for name in ("framepackd-web.service", "framepackd-web@.service"):
        assert f"ReadWritePaths=-{service.SHARED_FOLDER}\n" in (units.UNITS / name).read_text()


def test_the_part_for_other_machines_sees_nothing_of_the_daemons(machine_service: MachineService) -> None:
    instance, main_unit = machine_service('outbox = "/data/out"\n'), "framepackd.service"
    places = {"template": units.UNITS / main_unit, "unit": instance.unit.with_name(main_unit)}
    chosen = replace(instance, name="framepackd", **places)
    node = chosen.companion("node")
    assert node.config.name == "node.toml"
    steps = dict(service.install(chosen, ["node"]))
    assert f"write {node.config}" in steps
    assert f"write {node.drop_in}" not in steps, "the daemon's folders are not opened for it"
    assert f"write {chosen.nodes_drop_in}" not in dict(service.install(chosen))
    steps[f"write {chosen.nodes_drop_in}"]()
    assert "SystemCallFilter=landlock_" in chosen.nodes_drop_in.read_text(), "bridges may confine themselves"
    unit = (units.UNITS / "framepackd-node.service").read_text()
    assert re.search(
        "^InaccessiblePaths=.*-/var/lib/framepackd .*-/etc/framepackd/config.toml$", unit, re.MULTILINE
    )
    assert "PrivateUsers=" not in unit, "the daemon is known by its user"


def test_the_folder_of_the_metrics_is_opened_and_the_daemon_starts_without_it(
    machine_service: MachineService,
) -> None:
    chosen = machine_service('metrics_file = "/data/node exporter/framepackd.prom"\n')
    steps = dict(service.install(chosen))
    assert not any("make /data" in step for step in steps), "whose folder it is, nobody knows here"
    steps[f"write {chosen.drop_in}"]()
    assert 'ReadWritePaths="-/data/node exporter"\n' in chosen.drop_in.read_text()
    assert "RequiresMountsFor" not in chosen.drop_in.read_text()
    chosen.config.write_text('metrics_file = "/home/ann/framepackd.prom"\n')
    with pytest.raises(ServiceError, match="would not see /home/ann"):
        list(service.install(chosen))


def test_the_unit_that_makes_the_devices_is_removed_with_the_last_service(
    systemctl: Path, tmp_path: Path, machine_service: MachineService
) -> None:
    chosen = machine_service("")
    devices = tmp_path / units.DEVICES
    steps = dict(service.install(chosen))
    for path in (chosen.unit, devices):
        steps[f"write {path}"]()
    assert "nvidia" not in units.parts(), "it is no part that somebody asks for"
    (tmp_path / "framepackd.service").write_text("another")
    assert f"remove {devices}" not in dict(service.uninstall(chosen))
    (tmp_path / "framepackd.service").unlink()
    for step in service.uninstall(chosen):
        step[1]()
    assert not devices.exists()


def test_the_configuration_is_for_the_service_and_nobody_else(
    systemctl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine_service: MachineService
) -> None:
    config = tmp_path / "config/framepackd/config.toml"
    assert command("install", "--user").exit_code == 0
    assert config.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(service, "USER", pwd.getpwuid(os.geteuid()).pw_name)
    chosen = machine_service("")
    chosen.config.chmod(0o644)  # as earlier versions wrote it
    dict(service.install(chosen))[f"close {chosen.config} to others: it may hold secrets"]()
    assert chosen.config.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("key", ["inbox", "lora_dir", "preview_decoder"])
def test_a_place_that_the_sandbox_hides_is_refused(key: str, machine_service: MachineService) -> None:
    chosen = machine_service(f'{key} = "/home/ann/it"\n')
    with pytest.raises(ServiceError, match=r"would not see /home/ann/it.*another place in .*cat.toml"):
        list(service.install(chosen))


@pytest.mark.parametrize("name", ["config", "a/b", "-x", "a b", "", "ä\n"])
def test_an_instance_needs_a_name_that_can_be_one(name: str) -> None:
    with pytest.raises(ServiceError, match="letters, digits"):
        Service.of_machine(name)


def test_an_instance_has_its_own_configuration_and_state(monkeypatch: pytest.MonkeyPatch) -> None:
    cat = Service.of_machine("cat")
    assert (str(cat.config), str(cat.state_dir)) == ("/etc/framepackd/cat.toml", "/var/lib/framepackd-cat")
    refused = command("install", "--user", "--instance", "cat")
    assert refused.exit_code == 2
