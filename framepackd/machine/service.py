"""framepackd service: installs and removes the units of systemd, fitted to this machine."""

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from framepackd import files, rights
from framepackd.machine.units import DEVICES, NODE, UNITS, Service, ServiceError
from framepackd.settings.config import Config

USER = "framepackd"
MACHINE_UNITS = ("framepackd.service", "framepackd@.service")
SHIPPED_COMMAND = "/opt/framepackd/bin/framepackd"
SHARED_FOLDER = Path("/srv/framepackd")  # writable for every service
MODELS = Path("/var/lib/framepackd/models")  # of all instances
DROP_FOLDERS = ("inbox", "outbox", "failed", "loras")
CONFIG_MODE, USERS_CONFIG_MODE = 0o640, 0o600  # of root and the service's group, and of a user's own
INSTALL_ELSEWHERE = (
    "Install framepackd where everybody may read, with a Python of the system: "
    "sudo python3 -m venv /opt/framepackd && sudo /opt/framepackd/bin/pip install . && "
    "sudo /opt/framepackd/bin/framepackd service install."
)
# Folders that the sandbox hides, by ProtectHome= and PrivateTmp=.
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - not used, only named

# Lines of a user's unit that some systems deny to users: the service would not start with them.
IN_NAMESPACE = re.compile(r"# In a namespace of users.*\n((?:\w+=.*\n)+)\n")
TRIAL_SECONDS = 20.0

# What a step does, in words, and how.
Step = tuple[str, Callable[[], object]]


def install(service: Service, beside: Sequence[str] = ()) -> Iterator[Step]:
    """Yield the steps that install or update the service; nothing is done before a step is called.

    ``beside`` names parts that run beside it. Installed parts are updated too.

    Raises:
        ServiceError: the service could not see or use something it needs.
        ConfigError: the configuration holds a mistake.
    """
    wanted = [service, *(service.companion(part) for part in beside)]
    wanted += [each for each in service.with_companions() if each not in wanted]
    config = service.configuration()
    if not service.of_user:
        yield from _prepare_machine(service, config)
    if config is None:
        yield f"write {service.config}", partial(_write_config, service)
    elif stat.S_IMODE(service.config.stat().st_mode) & 0o007:
        yield f"close {service.config} to others: it may hold secrets", partial(_close_config, service)
    for each in wanted:
        if each.is_node and not each.config.exists():
            yield f"write {each.config}", partial(_write, each.config, _NODE_CONFIG)
    texts = [
        (path, text)
        for each in wanted
        for path, text in ((each.unit, unit_text(each)), (each.drop_in, _drop_in_text(each, config)))
    ]
    node = service.unit.with_name(f"framepackd-{NODE}.service")  # one for all instances
    reaches_nodes = node.exists() or any(each.is_node for each in wanted)
    texts.append((service.nodes_drop_in, _NODES_DROP_IN if reaches_nodes else ""))
    if not service.of_user:
        texts.append((service.unit.with_name(DEVICES), (UNITS / DEVICES).read_text()))
    for path, text in texts:
        if text and (not path.exists() or path.read_text() != text):
            yield f"write {path}", partial(_write, path, text)
        elif not text and path.exists():
            yield f"remove {path}", path.unlink
    yield _reload(service)


def uninstall(service: Service) -> Iterator[Step]:
    """Yield the steps that remove the service; its configuration, jobs and results stay."""
    if not service.unit.exists():
        return
    for each in reversed(service.with_companions()):
        disable = [*each.systemctl, "disable", "--now", each.name]
        yield f"stop and disable {each.name}", partial(_run, *disable)
        for path in (each.drop_in, each.nodes_drop_in):
            if path.exists():
                yield f"remove {path}", path.unlink
        template = each.unit.name.partition(".")[0]  # framepackd@: other instances may be enabled
        enabled = {link.name for link in each.unit.parent.glob(f"*.wants/{template}*")}
        if "@" not in each.name or enabled <= {f"{each.name}.service"}:
            yield f"remove {each.unit}", each.unit.unlink
    devices = service.unit.with_name(DEVICES)
    if devices.exists() and not any(devices.with_name(name).exists() for name in MACHINE_UNITS):
        yield f"remove {devices}", devices.unlink
    yield _reload(service)


def advice(service: Service, beside: Sequence[str] = ()) -> str:
    """Say what a person does once the service is installed."""
    control = " ".join(service.systemctl)
    names = " ".join([service.name, *(service.companion(part).name for part in beside)])
    download = f"{' '.join(command())} models download --config {service.config}"
    if service.of_user:
        return (
            f"  {download}    # once, about 45 GB\n"
            f"  {control} enable --now {names}    # or restart, if it runs\n"
            "  loginctl enable-linger    # to have it run while nobody is logged in"
        )
    return (
        f"  sudo -u {USER} HF_HOME={MODELS} {download}    # once, about 45 GB\n"
        f"  sudo {control} enable --now {names}    # or restart, if it runs\n"
        f"  sudo usermod -aG {USER} NAME    # for who drops into the inbox and collects from the outbox"
    )


def command() -> list[str]:
    """Give the command line that runs this installation."""
    script = Path(sysconfig.get_path("scripts"), "framepackd")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-P", "-m", "framepackd"]


def unit_text(service: Service) -> str:
    """Fit the unit to this installation."""
    control = " ".join(service.systemctl)
    text = service.template.read_text().replace(SHIPPED_COMMAND, " ".join(map(quoted, command())))
    asked = IN_NAMESPACE.search(text) if service.of_user else None
    if asked is not None and not _granted(asked[1].split()):
        text = IN_NAMESPACE.sub("", text)
    return f"# Written by framepackd service install. For changes: {control} edit {service.name}\n{text}"


def _granted(properties: list[str]) -> bool:
    """Try to start something with these properties under this user's systemd."""
    trial = [
        "systemd-run",
        "--user",
        "--wait",
        "--quiet",
        *(f"--property={line}" for line in properties),
        "true",
    ]
    try:
        ran = subprocess.run(trial, capture_output=True, timeout=TRIAL_SECONDS, check=False)  # noqa: S603 - all from here
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ran.returncode == 0


def quoted(path: object) -> str:
    """Write a path into a unit.

    >>> print(quoted("/opt/100 %/framepackd"))
    "/opt/100 %%/framepackd"
    """
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if re.search(r"""[\s"';\\]""", text) else text


def _drop_in_text(service: Service, config: Config | None) -> str:
    """Make folders writable that the sandbox keeps read-only; empty if there are none."""
    if config is None or service.of_user or service.is_node:
        return ""
    own = (service.state_dir, SHARED_FOLDER)
    outside = [
        folder for folder in config.folders.values() if not any(folder.is_relative_to(place) for place in own)
    ]
    required = " ".join(map(quoted, outside))
    opened = [required] if outside else []
    if config.outbox in outside:
        opened.append(quoted(f"-{config.trash}"))  # "-": it may be missing
    if config.metrics_file is not None:
        opened.append(quoted(f"-{config.metrics_file.parent}"))
    if not opened:
        return ""
    mounts = f"[Unit]\nRequiresMountsFor={required}\n\n" if outside else ""
    return (
        f"# Written by framepackd service install, from {service.config}.\n"
        f"{mounts}[Service]\nReadWritePaths={' '.join(opened)}\n"
    )


def _prepare_machine(service: Service, config: Config | None) -> Iterator[Step]:
    """Yield the steps that only a service with its own user and sandbox needs."""
    _refuse_hidden(installation(), INSTALL_ELSEWHERE)
    folders = [service.state_dir, *(service.state_dir / name for name in DROP_FOLDERS)]
    if config is not None:
        folders = [*config.folders.values(), config.trash]
        folders += [config.lora_dir] if config.lora_dir.is_relative_to(service.state_dir) else []
        sources = [
            Path(place)
            for model in config.models.values()
            for place in (model.transformer, model.base, model.image_encoder)
        ]
        sources += [config.lora_dir, *([config.preview_decoder] if config.preview_decoder else [])]
        figures = [config.metrics_file.parent] if config.metrics_file else []
        _refuse_hidden([*folders, *figures, *sources], f"Name another place in {service.config}.")
    try:
        pwd.getpwnam(USER)
    except KeyError:
        yield f"create the system user {USER}", _create_user
    yield f"see that {USER} may use this installation", _try_installation
    for folder in folders:
        if not folder.exists():
            yield f"make {folder} for {USER}", partial(_make_folder, folder, service)
    if config is not None and config.state_dir.exists() and rights.wrong(config):
        yield f"put the rights in {config.state_dir} right", partial(rights.put_right, config)


def installation() -> list[Path]:
    """Name the paths that framepackd reads to run."""
    packages = [importlib.util.find_spec(name) for name in ("framepackd", "framepack_core", "torch")]
    origins = [Path(package.origin) for package in packages if package and package.origin]
    return [Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), *origins]


def _refuse_hidden(places: list[Path], advice: str) -> None:
    for place in [*places, *(place.resolve() for place in places if place.is_absolute())]:
        hiding = next((folder for folder in HIDDEN if place.is_relative_to(folder)), None)
        if hiding is not None:
            raise ServiceError(
                f"the service would not see {place}: its sandbox hides {hiding} from it. {advice} "
                "Or make it a service of your own user, without this sandbox: "
                "framepackd service install --user"
            )


def _create_user() -> None:
    home = str(Service.of_machine(None).state_dir)
    shell = "/usr/sbin/nologin"
    _run("useradd", "--system", "--user-group", "--home-dir", home, "--shell", shell, USER)


def _try_installation() -> None:
    """Import the daemon as the service's user."""
    try:
        subprocess.run(
            [sys.executable, "-P", "-c", "import framepackd.daemon"],
            user=USER,
            group=USER,
            extra_groups=[],
            cwd="/",
            env={},
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        words = error.stderr if isinstance(error, subprocess.CalledProcessError) else error.strerror
        reason = (words or str(error)).strip().splitlines()[-1]
        raise ServiceError(
            f"user {USER} cannot use {sys.prefix} ({reason}): "
            f"let everybody read it, for example chmod -R go+rX {sys.prefix}"
        ) from error


def _make_folder(folder: Path, service: Service) -> None:
    """Make a folder for the service's user; its group may drop files and collect results."""
    folder.mkdir(parents=True)
    shutil.chown(folder, USER, USER)
    folder.chmod(rights.WALKED if folder == service.state_dir else rights.SHARED)


def _first_config(service: Service) -> str:
    folder = "" if service.of_user else f'state_dir = "{service.state_dir}"\n'
    return (
        "# framepackd's configuration; what is not set has its default. Every key: config.example.toml.\n"
        f"# After a change: {' '.join(service.systemctl)} reload {service.name}\n"
        f'{folder}# inbox = "/srv/framepackd/inbox"    # these three: in the state folder unless set\n'
        '# outbox = "/srv/framepackd/outbox"\n'
        '# failed = "/srv/framepackd/failed"\n'
    )


_NODES_DROP_IN = """\
# Written by framepackd service install: its bridges to other machines confine themselves, by Landlock.
[Service]
SystemCallFilter=landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""

_NODE_CONFIG = """\
# Configuration of framepackd node; it holds no secrets, and everybody may read it. See docs/cluster.md.
# The tables [cluster] and [models], and preview_decoder, as in config.example.toml.
[cluster]
# address = "front:6379"
# token_file = "token"    # /etc/credstore/framepackd-node.token, and so on: the unit says so
# tls_cert = "crt"
# tls_key = "key"
# tls_ca = "ca"
"""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def _write_config(service: Service) -> None:
    _write(service.config, _first_config(service))
    _close_config(service)


def _close_config(service: Service) -> None:
    """Let only the service and its administrator read a configuration: it may hold secrets."""
    if not service.of_user:
        shutil.chown(service.config, group=USER)
    service.config.chmod(USERS_CONFIG_MODE if service.of_user else CONFIG_MODE)


def _reload(service: Service) -> Step:
    words = [*service.systemctl, "daemon-reload"]
    return " ".join(words), partial(_run, *words)


def _run(*words: str) -> None:
    try:
        ran = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - all from here
    except FileNotFoundError as error:
        raise ServiceError(f"{words[0]} is not here: is this a machine with systemd?") from error
    if ran.returncode != 0:
        raise ServiceError(f"{' '.join(words)}: {ran.stderr.strip() or f'exit code {ran.returncode}'}")
