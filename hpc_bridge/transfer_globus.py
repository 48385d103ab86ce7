"""The files of a run by Globus, through its Transfer service."""

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import PurePosixPath
from threading import Lock
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from globus_sdk import GlobusError, GlobusHTTPResponse, TransferAPIError, TransferData

from hpc_bridge.transfer import (
    Place,
    Progress,
    Request,
    State,
    TransferRefused,
    TransferUnreachable,
    UnknownTask,
)
from hpc_bridge.transfer_config import Globus
from hpc_bridge.transfer_digest import missing_below
from hpc_bridge.transfer_globus_errors import judge
from hpc_bridge.transfer_login import Login

_MOVES = ("", "OK")
"""What nice_status says of a task that moves; every other word is of one that waits for something."""


class GlobusTransfer:
    """Tasks of one identity.

    A task counts as arrived when Globus says that it succeeded: its document carries the sha256 of every file, which
    the endpoints compare. Their sizes are listed all the same, and where the destination is mounted here, the files
    are read again.

    Raises
    ------
    ConfigError
        The secret cannot be read, or can be read by others.
    """

    def __init__(self, settings: Globus) -> None:
        self.most_active = settings.most_active
        self._mounted = settings.mounted
        self._login = Login(settings)
        self._client = self._login.client
        self._one = Lock()
        """The library promises nothing to threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._login.close()

    def prepare(self, request: Request, name: str) -> str:
        """Return the document of a task, with a submission id that the service gave."""
        with self._asking():
            given = self._client.get_submission_id()
        document = TransferData(
            _collection(request.source),
            _collection(request.destination),
            label=_label(request, name),
            submission_id=_text(given, "value"),
            sync_level="checksum",
            verify_checksum=True,
            preserve_timestamp=False,
            encrypt_data=True,
            deadline=datetime.fromtimestamp(request.deadline, UTC).isoformat(timespec="seconds"),
            skip_source_errors=False,
            fail_on_quota_errors=True,
            delete_destination_extra=False,
            notify_on_succeeded=False,
            notify_on_failed=False,
            notify_on_inactive=False,
        )
        for file in request.files:
            document.add_item(
                str(request.source.path / file.name),
                str(request.destination.path / file.name),
                recursive=False,
                external_checksum=file.sha256,
                checksum_algorithm="sha256",
            )
        return json.dumps(_without_missing(document))

    def submit(self, document: str) -> str:
        """Return the id of the task of a document; the service knows it again by its submission id."""
        with self._asking():
            return _text(self._client.submit_transfer(json.loads(document)), "task_id")

    def find(self, document: str) -> str | None:
        """Return the id of the task with the label of a document."""
        label = json.loads(document)["label"]
        with self._asking():
            tasks = self._client.task_list(filter={"type": "TRANSFER", "label": label}, limit=100)
            found = [task.get("task_id") for task in tasks if isinstance(task, Mapping) and task.get("label") == label]
        return next((task for task in found if isinstance(task, str)), None)

    def progress(self, task: str) -> Progress:
        """Return how far a task is."""
        with self._asking(task):
            return _progress(self._client.get_task(task).data)

    def cancel(self, task: str) -> None:
        """Ask the service to end a task."""
        try:
            with self._asking(task):
                self._client.cancel_task(task)
        except UnknownTask:
            return

    def missing(self, request: Request) -> Sequence[str]:
        """Return what is not there; see the class for what is known of what is."""
        mounted = self._mounted.get(UUID(_collection(request.destination)))
        if mounted is not None:
            return tuple(missing_below(mounted / request.destination.path.relative_to("/"), request))
        folders = {(request.destination.path / file.name).parent for file in request.files}
        sizes = {path: size for folder in sorted(folders) for path, size in self._listed(request.destination, folder)}
        found = {file: sizes.get(str(request.destination.path / file.name)) for file in request.files}
        return tuple(
            f"{file.name}: {'not there' if size is None else f'{size} bytes instead of {file.size}'}"
            for file, size in found.items()
            if size != file.size
        )

    def _listed(self, place: Place, folder: PurePosixPath) -> list[tuple[str, int]]:
        try:
            with self._asking(str(folder)):
                entries = self._client.operation_ls(_collection(place), path=f"{folder}/", show_hidden=True)
                return [
                    (posixpath.join(folder, str(entry.get("name"))), _count(entry.get("size")))
                    for entry in entries
                    if isinstance(entry, Mapping) and entry.get("type") == "file"
                ]
        except UnknownTask:  # the folder is not there
            return []

    @contextmanager
    def _asking(self, thing: str = "") -> Iterator[None]:
        """Turn errors into ours; that `thing` is not there is UnknownTask."""
        try:
            with self._one:
                yield
        except TransferAPIError as error:
            if thing and (error.http_status == 404 or (error.code or "").endswith("NotFound")):
                raise UnknownTask(f"Globus: {thing}: {error.code}") from None
            raise judge(error) from None
        except GlobusError as error:
            raise judge(error) from None
        except (KeyError, TypeError, ValueError) as error:  # of the library, which reads answers without a look
            raise TransferUnreachable(f"Globus: answered what nobody can read: {error!r}") from None


def _collection(place: Place) -> str:
    try:
        return str(UUID(place.endpoint))
    except ValueError:
        raise TransferRefused(f"{place.endpoint!r} is no id of a collection of Globus", is_final=True) from None


def _label(request: Request, name: str) -> str:
    """Keep to what labels may have (128 letters, digits, blanks, ``-``, ``_``), and to what is no sign in a filter."""
    return re.sub(r"[^A-Za-z0-9 _-]", "_", f"{name} {request.beamline} {request.run}")[:128]


def _without_missing(document: TransferData) -> dict[str, Any]:
    return {key: value for key, value in document.items() if isinstance(value, str | bool | int | list)}


def _text(answer: GlobusHTTPResponse, key: str) -> str:
    value = answer.get(key)
    if not isinstance(value, str) or not value:
        raise TransferUnreachable(f"Globus: answered without {key}: {answer.text[:200]}")
    return value


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _progress(task: object) -> Progress:
    if not isinstance(task, Mapping) or not isinstance(task.get("status"), str):
        raise TransferUnreachable(f"Globus: answered without a status: {str(task)[:200]}")
    nice = str(task.get("nice_status") or "")
    fatal = task.get("fatal_error")
    if isinstance(fatal, Mapping):
        message = f"{fatal.get('code')}: {fatal.get('description')}"
    else:
        message = str(task.get("nice_status_details") or task.get("nice_status_short_description") or nice)
    return Progress(
        state=_state(task, nice.upper(), message),
        bytes=_count(task.get("bytes_transferred")),
        files=_count(task.get("files_transferred")) + _count(task.get("files_skipped")),
        faults=_count(task.get("faults")),
        nice_status=nice,
        message="" if nice.upper() in _MOVES and not fatal else message[:500],
    )


def _state(task: Mapping[str, Any], nice: str, message: str) -> State:
    status = task["status"]
    if status == "SUCCEEDED":
        return State.DONE
    if status == "FAILED":
        return State.CANCELED if message.startswith("CANCEL") else State.FAILED
    if status == "ACTIVE" and not task.get("is_paused") and nice in (*_MOVES, "QUEUED"):
        return State.QUEUED if nice == "QUEUED" else State.ACTIVE
    return State.STALLED
