"""A Tiled catalogue in which TiledWriter goes on with runs that it, or a process before it, began to write.

bluesky_tiled_plugins 2.0's TiledWriter makes every node and fails where one is there. Here, making what is there gives
what is there. It writes the arrays of an event before its row in the table, which is what makes the event count: so
arrays go on behind the last row, over what an event left whose writing was cut off.
"""

from collections.abc import Callable
from typing import Any, Self

import httpx

TABLE = "internal"
"""What TiledWriter calls the table of a stream."""


class Unanswered(Exception):
    """Whether rows were added to a table is not known."""


def events(stream: Any) -> list[tuple[int, float]]:
    """Return number and time (s) of the events that are kept, of a stream as a plain container."""
    try:
        table = stream[TABLE]
    except KeyError:
        return []
    kept = table.read(["seq_num", "time"])
    return list(zip(kept["seq_num"].tolist(), kept["time"].tolist(), strict=True))


class Container:
    """A container as tiled.client has it, in all that TiledWriter asks of one."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def include_data_sources(self) -> Self:
        """Return this container, telling of data sources."""
        return type(self)(self._node.include_data_sources())

    @property
    def base(self) -> Self:
        """The same container without what its specs make of it."""
        return type(self)(self._node.base)

    def create_container(self, key: str, **described: Any) -> Self:
        """Return the container of that name."""
        return type(self)(self._made(self._node.create_container, key, **described)[0])

    def new(self, *described: Any, key: str, **more: Any) -> Any:
        """Return the node of that name, with data that lie in files."""
        return self._made(self._node.new, key, *described, **more)[0]

    def create_appendable_table(self, *described: Any, key: str, **more: Any) -> "_Table":
        """Return the table of that name."""
        return _Table(self._made(self._node.create_appendable_table, key, *described, **more)[0])

    def write_array(self, array: Any, *, key: str, **described: Any) -> Any:
        """Return the array of that name, once the array is in it, behind what counts."""
        node, is_new = self._made(self._node.write_array, key, array, **described)
        if not is_new:
            node.patch(array, offset=(len(events(self._node)),), extend=True)
        return node

    def _made(self, make: Callable[..., Any], key: str, *described: Any, **more: Any) -> tuple[Any, bool]:
        """Return the node of that name, and whether it is new."""
        try:
            return make(*described, key=key, **more), True
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.CONFLICT:
                raise
        return self._node[key], False


class _Table:
    """A table to which TiledWriter never adds a row twice: where no answer came, somebody has to look first."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def append_partition(self, partition: int, rows: Any) -> None:
        try:
            self._node.append_partition(partition, rows)
        except httpx.TransportError as error:
            raise Unanswered(str(error)) from error
        except httpx.HTTPStatusError as error:
            if not error.response.is_server_error:
                raise
            raise Unanswered(str(error)) from error
