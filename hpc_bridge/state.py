"""The directory of a manager: what it holds outlives it there."""

import os
from collections.abc import Sequence
from pathlib import Path

from hpc_bridge.config import Beamline, Site, read
from hpc_bridge.errors import ConfigError


class StateDirectory:
    """The records of leases and tasks, and what beamlines and sites are held, as YAML (which JSON is)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            for each in (self._path, self._path / "sites", self._path / "beamlines"):
                each.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None

    @property
    def record(self) -> Path:
        """Of `hpc_bridge.leases.Leases`."""
        return self._path / "leases.sqlite"

    @property
    def tasks(self) -> Path:
        """Of `hpc_bridge.tasks.Tasks`."""
        return self._path / "tasks.sqlite"

    def beamlines(self) -> list[tuple[Beamline, bool]]:
        """Return those that are held, and whether their nodes are being let go."""
        found = []
        for suffix, is_let_go in ((".yaml", False), (".down", True)):
            files = sorted((self._path / "beamlines").glob(f"*{suffix}"))
            found += [(read(file, Beamline), is_let_go) for file in files]
        return found

    def sites(self) -> dict[str, Site]:
        """Return those that are known."""
        return {
            site.site: site for file in sorted((self._path / "sites").glob("*.yaml")) for site in [read(file, Site)]
        }

    def keep(self, beamline: Beamline, sites: Sequence[Site]) -> None:
        """Hold a beamline at these sites from now on."""
        for site in sites:
            self._write(self._path / "sites" / f"{site.site}.yaml", site)
        self._write(self._path / "beamlines" / f"{beamline.beamline}.yaml", beamline)
        self.forget(beamline.beamline)

    def let_go(self, beamline: str) -> None:
        """Hold a beamline only until its nodes are gone."""
        held = self._path / "beamlines" / f"{beamline}.yaml"
        try:
            if held.exists():
                held.replace(held.with_suffix(".down"))
        except OSError as error:
            raise ConfigError(f"{held}: {error.strerror}") from None

    def forget(self, beamline: str) -> None:
        """Take note that the nodes of a beamline that was let go are gone."""
        gone = self._path / "beamlines" / f"{beamline}.down"
        try:
            gone.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{gone}: {error.strerror}") from None

    def _write(self, file: Path, model: Site | Beamline) -> None:
        temporary = file.with_suffix(".new")
        try:
            with temporary.open("w") as stream:
                stream.write(model.model_dump_json(indent=1))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from None
