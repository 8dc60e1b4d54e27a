"""Lists the systemd units that framepackd installs, and where the files of each go."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import framepackd
from framepackd.problems import CommandError
from framepackd.settings.config import Config, load_config

DEVICES = "framepackd-nvidia.service"  # creates the GPU's device files, for all services of the machine
NODE = "node"  # the part that reaches other machines, or is one: with a configuration and files of its own
NODE_CONFIG = "node.toml"
INSTANCE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HERE = Path(framepackd.__file__).parent
# In a wheel the units lie in the package, in a checkout beside it.
UNITS = next(folder for folder in (_HERE / "systemd", _HERE.parent / "systemd") if folder.is_dir())


class ServiceError(CommandError):
    """The service cannot be installed; the text says why and what to do."""


@dataclass(frozen=True)
class Service:
    """A service, and where its files go."""

    name: str  # as systemctl calls it
    template: Path
    unit: Path
    config: Path
    state_dir: Path
    of_user: bool

    @classmethod
    def of_machine(cls, instance: str | None) -> "Service":
        """Give the machine's service, or one of its instances.

        Raises:
            ServiceError: the instance cannot have this name.
        """
        if instance is None:
            name, unit, config, state = "framepackd", "framepackd.service", "config.toml", "framepackd"
        elif not INSTANCE.fullmatch(instance) or instance == "config":
            raise ServiceError(
                f"instance {instance!r}: use letters, digits, _ . and -, and not 'config', "
                "which is the configuration of the service without an instance"
            )
        else:
            name, unit = f"framepackd@{instance}", "framepackd@.service"
            config, state = f"{instance}.toml", f"framepackd-{instance}"
        return cls(
            name,
            UNITS / unit,
            Path("/etc/systemd/system", unit),
            Path("/etc/framepackd", config),
            Path("/var/lib", state),
            of_user=False,
        )

    @classmethod
    def of_this_user(cls) -> "Service":
        """Give this user's own service."""
        config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        return cls(
            "framepackd",
            UNITS / "user/framepackd.service",
            config / "systemd/user/framepackd.service",
            config / "framepackd/config.toml",
            state / "framepackd",
            of_user=True,
        )

    def companion(self, part: str) -> "Service":
        """Give the service that runs beside this one: ``notify`` is framepackd-notify, with the same config.

        Raises:
            ServiceError: there is no such part.
        """
        known = parts()
        if part not in known:
            raise ServiceError(f"there is no unit for {part!r}: --with takes {', '.join(known)}")

        def renamed(name: str) -> str:
            return name.replace("framepackd", f"framepackd-{part}", 1)

        template = self.template.with_name(renamed(self.template.name))
        if part == NODE and not template.exists():
            raise ServiceError("one framepackd-node serves all instances: install it without --instance")
        beside = replace(
            self,
            name=renamed(self.name),
            template=template,
            unit=self.unit.with_name(renamed(self.unit.name)),
        )
        return replace(beside, config=self.config.with_name(NODE_CONFIG)) if part == NODE else beside

    def with_companions(self) -> "list[Service]":
        """Give this service and its installed companions."""
        instance = "@" in self.name
        beside = [self.companion(part) for part in parts() if part != NODE or not instance]
        return [self, *(each for each in beside if each.is_in_place)]

    @property
    def is_in_place(self) -> bool:
        """Whether its unit exists and, for one instance of several, its configuration."""
        return self.unit.exists() and ("@" not in self.name or self.config.exists())

    @property
    def is_node(self) -> bool:
        """Whether it is the part for other machines, which sees nothing of the daemon's."""
        return self.name == f"framepackd-{NODE}"

    @property
    def drop_in(self) -> Path:
        """The file that adds the configuration's folders to the unit."""
        return self.unit.parent / f"{self.name}.service.d/folders.conf"

    @property
    def nodes_drop_in(self) -> Path:
        """The file that lets its bridges to other machines confine themselves."""
        return self.drop_in.with_name("nodes.conf")

    @property
    def systemctl(self) -> list[str]:
        """The command that controls it."""
        return ["systemctl", "--user"] if self.of_user else ["systemctl"]

    def configuration(self) -> Config | None:
        """Read its configuration as the service will; None where there is none yet.

        Raises:
            ConfigError: it holds a mistake.
        """
        if not self.config.exists():
            return None
        os.environ["STATE_DIRECTORY"] = str(self.state_dir)  # as systemd sets it for the service
        return load_config(self.config)


def parts() -> list[str]:
    """Name the parts that can run beside the daemon as services of their own."""
    units = set(UNITS.glob("framepackd-*[!@].service")) - {UNITS / DEVICES}
    return sorted(unit.stem.removeprefix("framepackd-") for unit in units)
