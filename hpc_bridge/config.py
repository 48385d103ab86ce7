"""What the YAML file of a site, and that of a beamline, may say; `docs/` has an example of each that says all of it."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from hpc_bridge.bulk_config import Files
from hpc_bridge.errors import ConfigError
from hpc_bridge.section import Name, Section, Time


class Queue(Section):
    """A rung of the ladder: where nodes may come from."""

    name: Name
    """Of the rung; the scheduler's queue is called so, too, if `queue` does not say otherwise."""
    queue: str | None = None
    """Partition of Slurm, queue of PBS."""
    reservation: str | None = None
    walltime: Time
    """Asked for. A pilot is relieved before it ends."""
    max_jobs: int = Field(ge=1)
    """Of ours that wait or run here at once."""
    start_within: Time | None = None
    """A job that has not started by then is taken back, and the next rung is tried. The last rung waits for ever."""
    retry_after: Time = timedelta(minutes=5)
    """How long a rung is passed by that did not start a job in time, or refused one."""
    options: tuple[str, ...] = ()
    """Further options as the scheduler takes them: ``--constraint=gpu``, ``-l filesystems=home``."""


class Heartbeats(Section):
    """How pilots tell that they live."""

    dials: Literal["pilots", "manager"] = "pilots"
    """Who goes to whom. Pilots to the manager: nobody dials a node. Or the manager to pilots, where nodes reach nothing
    outside, but are reached: each writes where it listens into the site's `directory`."""
    bind: str | None = Field(default=None, pattern=r"^tcp://[^/]+:\d+$")
    """Where the manager listens for pilots that dial, ``tcp://0.0.0.0:5570``."""
    address: str | None = Field(default=None, pattern=r"^tcp://[^/]+:\d+$")
    """What pilots dial: the manager's machine as nodes see it, or the near end of a tunnel."""
    listen: str = Field(default="tcp://*", pattern=r"^tcp://(\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])$")
    """On which of a node's interfaces a pilot listens that is dialled, at a free port: ``tcp://hsn0``; all of them."""
    secret_key: Path | None = None
    """The manager's CURVE key, of `xpcs-stream keys`."""
    allowed: Path | None = None
    """Directory of public keys of pilots that may come."""
    pilot_secret_key: Path | None = None
    """The pilots' key, and ..."""
    manager_key: Path | None = None
    """... the manager's public key; both as nodes see them."""
    every: Time = timedelta(seconds=1)
    lost_after: Time = timedelta(seconds=10)
    """A pilot that was not heard of for so long is replaced."""

    @model_validator(mode="after")
    def _is_sound(self) -> "Heartbeats":
        if self.dials == "pilots" and None in (self.bind, self.address):
            raise ValueError("pilots dial: bind, where the manager listens, and address, what they dial, are needed")
        if self.dials == "manager" and (self.bind or self.address):
            raise ValueError("the manager dials: bind and address are for pilots that do")
        return self


class Site(Section):
    """A computing centre as one beamline staff sees it."""

    site: Name
    scheduler: Literal["slurm", "pbs", "local"]
    directory: Path
    """For scripts and output of jobs, on a file system that the nodes reach, and the manager's machine, too."""
    submit_through: tuple[str, ...] = ()
    """Put before every command of the scheduler: ``[sudo, -n, -u, svc8idi]``, ``[ssh, -i, KEY, svc8idi@login]``."""
    credentials: tuple[Path, ...] = ()
    """Files that must be there and be read by nobody else; never opened here."""
    prepare: str = ""
    """Lines of shell before a pilot on a node: modules, proxies, a virtual environment."""
    pilot: str = "hpc-bridge"
    """The command on a node."""
    heartbeats: Heartbeats
    queues: tuple[Queue, ...] = Field(min_length=1)
    """The ladder: tried in this order."""
    requeue_code: int = Field(default=85, ge=1, le=255)
    """With which a pilot ends that was told to go by the scheduler."""
    alone: Time = timedelta(minutes=2)
    """A pilot that has not heard of the manager for so long ends by itself."""
    ahead: Time = timedelta(minutes=3)
    """How long before the end of its walltime a pilot gets a successor."""
    drain: Time = timedelta(seconds=30)
    """How long before the end of its walltime a pilot is told to hand over at the latest."""
    submits_per_minute: float = Field(default=12, gt=0)
    command_timeout: Time = timedelta(seconds=10)
    """Of every command of the scheduler."""
    list_every: Time = timedelta(seconds=5)
    """Between looks at what the scheduler knows of our jobs. Heartbeats tell sooner what matters."""
    starts_within: Time = timedelta(minutes=5)
    """How long a job that the scheduler says runs may take until its pilot is heard of."""

    @model_validator(mode="after")
    def _is_sound(self) -> "Site":
        names = [queue.name for queue in self.queues]
        if len(set(names)) < len(names):
            raise ValueError(f"two queues are called {max(names, key=names.count)}")
        for queue in self.queues:
            if queue.walltime <= self.ahead:
                raise ValueError(
                    f"queue {queue.name}: a walltime of {queue.walltime} is not longer than ahead ({self.ahead})"
                )
        if self.drain >= self.ahead:
            raise ValueError(f"drain ({self.drain}) is not shorter than ahead ({self.ahead})")
        if self.heartbeats.lost_after <= 2 * self.heartbeats.every:
            raise ValueError(f"heartbeats: lost_after ({self.heartbeats.lost_after}) is not more than two times every")
        return self


class Account(Section):
    """On whose account nodes are taken, and how much of it."""

    account: str = Field(pattern=r"^[A-Za-z0-9_.:-]+$")
    """Of Slurm, or project::suballocation of PBS."""
    node_hours: float | None = Field(default=None, gt=0)
    """What this beamline may use of it. None: as much as the scheduler lets."""
    since: datetime | None = None
    """From when what was used counts, ISO 8601. None: all that is on record."""

    @property
    def begins(self) -> float:
        """The same in seconds of the Unix epoch."""
        return 0.0 if self.since is None else self.since.astimezone().timestamp()


class Beamline(Section):
    """What a beamline wants to run, and where."""

    beamline: Name
    sites: tuple[Name, ...] = Field(min_length=1)
    """In this order: the next one is taken while those before cannot be reached or refuse."""
    accounts: dict[Name, Account] = Field(default_factory=dict)
    """By site."""
    command: tuple[str, ...] = Field(min_length=1)
    """What a pilot runs on its node; ``{status}`` in it stands for a file where it tells how it is, ``{name}`` for the
    lease."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Of the command. It stands in the job's script, as `command` does: nothing secret here, but where it is."""
    nodes: int = Field(default=1, ge=0)
    """While a run is on, or always if no run engine is followed."""
    idle_nodes: int = Field(default=0, ge=0)
    """Between runs, where a run engine is followed: warm, waiting."""
    spares: int = Field(default=0, ge=0)
    """More than that, so that one may die."""
    max_nodes: int = Field(ge=1)
    grow_at_lag: Time | None = None
    """One more node, up to `max_nodes`, each time that pilots lag so far behind for `grow_after`."""
    grow_after: Time = timedelta(seconds=30)
    linger: Time = timedelta(minutes=10)
    """How long nodes are kept that are no more needed."""
    run_engine: str | None = Field(
        default=None, pattern=r"^(kafka\+bluesky://[^/]+:\d+/[\w.-]+|zmq\+bluesky://[^/]+:\d+)$"
    )
    """Whose runs ask for nodes: documents of Bluesky, over Kafka or from a Proxy."""
    kafka_properties: Path | None = None
    """Settings of librdkafka to read them with, a ``name=value`` a line."""
    files: Files | None = None
    """Runs that go by file."""

    @model_validator(mode="after")
    def _is_sound(self) -> "Beamline":
        if self.nodes + self.spares > self.max_nodes:
            raise ValueError(f"nodes + spares ({self.nodes + self.spares}) are more than max_nodes ({self.max_nodes})")
        if unknown := set(self.accounts) - set(self.sites):
            raise ValueError(f"accounts of sites that are not among the sites: {', '.join(sorted(unknown))}")
        if self.files is not None and (unknown := set(self.files.sites) - set(self.sites)):
            raise ValueError(f"files: sites that are not among the sites: {', '.join(sorted(unknown))}")
        if self.files is not None and self.files.roots and self.run_engine is None:
            raise ValueError("files: roots: which files are there is told by a run_engine")
        return self


_Model = TypeVar("_Model", bound=BaseModel)


def read(file: Path, model: type[_Model]) -> _Model:
    """Read the file of a site or of a beamline.

    Raises
    ------
    ConfigError
        Names the file, the place in it, and what is wrong.
    """
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {error}") from None
    try:
        return checked(document, model)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def checked(document: object, model: type[_Model]) -> _Model:
    """Return what a document says of a site or of a beamline.

    Raises
    ------
    ConfigError
        Names the place in it, and what is wrong.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{place}: {first['msg']}" if place else first["msg"]) from None
