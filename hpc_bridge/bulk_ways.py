"""The only place that names the ways by which files of runs move."""

import re
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from uuid import UUID

from hpc_bridge.bulk_config import Route
from hpc_bridge.config import read
from hpc_bridge.transfer import Transfer
from hpc_bridge.transfer_config import Globus

_POLL = 0.2
"""Between looks at what this machine does itself (s)."""


class Way:
    """How files of a route move: all routes of one identity have one.

    Raises
    ------
    ConfigError
        The file of the identity cannot be read, or does not say what it should.
    """

    def __init__(self, route: Route) -> None:
        self._route = route
        self.settings = None if route.globus is None else read(route.globus, Globus)
        """Routes of the same identity have the same."""

    @property
    def identity(self) -> str:
        """A name for a file."""
        if self.settings is not None:
            return f"globus-{self.settings.client_id}"
        return (
            "copy" if self._route.by == "copy" else f"rsync-{re.sub('[^A-Za-z0-9]', '_', self._route.there.endpoint)}"
        )

    @property
    def poll(self) -> float:
        """Between looks at a task (s)."""
        return _POLL if self.settings is None else self.settings.poll.total_seconds()

    @property
    def root(self) -> PurePosixPath:
        """Where the paths of this machine begin in requests."""
        if self.settings is None:
            return PurePosixPath("/")
        try:
            mounted = self.settings.mounted.get(UUID(self._route.here))
        except ValueError:  # a transfer will say so
            mounted = None
        return PurePosixPath(mounted or "/")

    def open(self) -> tuple[Transfer, AbstractContextManager[object]]:
        """Return what moves files, and what is to be closed once it does no more.

        Raises
        ------
        ConfigError
            The secret of the identity cannot be read.
        """
        if self.settings is not None:
            from hpc_bridge.transfer_globus import GlobusTransfer  # its library takes its time

            transfer = GlobusTransfer(self.settings)
            return transfer, transfer
        from hpc_bridge.transfer_copy import Copy
        from hpc_bridge.transfer_here import Here
        from hpc_bridge.transfer_rsync import Rsync

        here = Here(Copy() if self._route.by == "copy" else Rsync())
        return here, here
