"""What the YAML file of a beamline may say of runs that go by file."""

import re
from collections.abc import Sequence
from datetime import timedelta
from os.path import normpath
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hpc_bridge.section import Name, Section, Time
from hpc_bridge.switch import Switching
from hpc_bridge.transfer import Place


def _with_file(words: tuple[str, ...]) -> tuple[str, ...]:
    if not any("{file}" in word for word in words):
        raise ValueError("does not say {file}: where the file is on the node")
    return words


Command = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_with_file)]
"""Words, of which ``{file}`` stands for the file on the node (of several of a run: the first), ``{run}`` for its run,
``{result}`` for where the result is wanted on the node: a command that says so has to leave a file there. It stands in
no script, but others on the node see it: nothing secret here."""


class Route(Section):
    """How files get to a site and results come back, and what is done there."""

    by: Literal["globus", "copy", "rsync"]
    """Copy: to a folder that is mounted here. Rsync: over ssh."""
    globus: Path | None = None
    """Who we are at Globus, the file of `hpc-bridge login`. Where its `mounted` says where the root of a collection is
    seen from here, files are looked up below it; else a collection has the paths that this machine has."""
    here: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9-]*)?$")
    """The collection of Globus with the disks of this machine."""
    there: Place
    """Where files are brought, in a folder of the beamline: on a collection, at ``user@host``, or on this machine."""
    path: PurePosixPath | None = None
    """The same folder as nodes see it. None: as in `there`."""
    command: Command | None = None
    """What a node runs for a file. None: files are only brought there."""
    repair: Command | None = None
    """What a node runs for a run of the stream of which frames were lost. None: it is only brought there."""

    @property
    def on_nodes(self) -> PurePosixPath:
        """The folder where files are brought, as nodes see it."""
        return self.path or self.there.path

    @model_validator(mode="after")
    def _is_a_way(self) -> "Route":
        if (self.by == "globus") != (self.globus is not None):
            raise ValueError("globus: names the identity if files go by globus, and only then")
        if (self.by == "globus") != bool(self.here):
            raise ValueError("here: names the collection of this machine if files go by globus, and only then")
        if (self.by == "copy") != (not self.there.endpoint):
            raise ValueError("there: names an endpoint if files go by globus or rsync, and only then")
        if self.path is not None and not self.path.is_absolute():
            raise ValueError(f"path: {self.path} is not absolute")
        return self


class Files(Section):
    """Runs that go by file: those that people hand in, and those that the stream lost frames of."""

    sites: dict[Name, Route] = Field(min_length=1)
    """In this order: the next one is taken while those before cannot be reached or refuse."""
    nodes: int = Field(default=1, ge=1)
    """For these runs at most, beside those for the stream."""
    linger: Time = timedelta(minutes=2)
    """How long such nodes are kept that have nothing to do."""
    results: Path
    """Where results come back to; no other beamline's do."""
    drop: Path | None = None
    """A folder: what is put there, and is called `.h5`, is taken as if it were handed in. Nothing is removed."""
    roots: dict[str, Path] = Field(default_factory=dict)
    """Directories, as the documents of the run engine call them, and where they are here: the files there that a run's
    documents point to go when the run is over. None: they do not. Files elsewhere are never taken."""
    gateway: Path | None = None
    """What the gateway tells of itself: its `--status`."""
    plane: Path | None = None
    """Where the gateway is told how frames go: its `--plane`."""
    switch: Switching = Switching()
    """When they go which way."""
    send: Literal["lost", "always"] = "lost"
    """Which runs go of those that the gateway spooled: those that did not all come through the stream, or all."""
    deadline: Time = timedelta(hours=24)
    """After which nobody wants it any more."""
    patience: Time = timedelta(minutes=10)
    """How long nothing may move to a site until the next one is tried."""
    retry_after: Time = timedelta(seconds=30)
    """Before a command that failed is tried again, and four times as long before its third and last try."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """The highest goes first, among all beamlines."""

    @model_validator(mode="after")
    def _is_sound(self) -> "Files":
        for name, path in (("results", self.results), ("drop", self.drop)):
            if path is not None and not path.is_absolute():
                raise ValueError(f"{name}: {path} is not absolute")
        for called, path in self.roots.items():
            if not called.startswith("/") or ".." in PurePosixPath(called).parts or not path.is_absolute():
                raise ValueError(f"roots: {called}: {path}: not two absolute paths")
        if self.drop is not None and normpath(self.drop) == normpath(self.results):
            raise ValueError(f"drop: {self.drop} is where results come back to: each would be taken as a run")
        if self.plane is not None and self.gateway is None:
            raise ValueError("plane: how frames should go is only known by gateway")
        return self


def words(command: Sequence[str], *, file: str, run: str, result: str) -> list[str]:
    """Return a command for one run."""
    known = {"{file}": file, "{run}": run, "{result}": result}
    # All at once: a file may be called like one of them.
    return [re.sub("|".join(map(re.escape, known)), lambda match: known[match[0]], word) for word in command]
