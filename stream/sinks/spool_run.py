"""The files of one run in a spool: parts with its frames, and a master that links them, as EIGERs write them.

In the directory of the run::

    RUN_master.h5         what the detector said; links /entry/data/data_000001, ...; when the run ended, the ledger
    RUN_data_000001.h5    frames at /entry/data/data, in chunks of bitshuffle and LZ4; lost ones have no chunk;
                          and what the detector said, for who has only this one
    RUN_way.json          which way the frames went besides, see `stream.gateway_runs`
    safe                  made by who has proven that the frames are safe elsewhere

A part is seen once it is complete, and never changed: so whoever comes at any time reads whole files, a killed process
leaves them, and they can be taken away one by one. Until its run stopped well, the master names one part more than
there is: by that `stream.ingest.hdf5` knows that the run did not end, or was aborted, and reads it as far as it goes.
"""

import io
import re
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin

from stream.ledger import Ledger
from stream.messages import ExitStatus, RunStart
from stream.wire import Buffer

PART_SECONDS, PART_SHARE = 2.0, 0.01
"""How long a part is open: at most so many seconds, or that share of its run. So even a day has fewer than 1000."""

LONGEST_END = 10**6
"""More frames than these that were planned and never came are not told one by one: readers look for each."""

SAFE = "safe"


class SpooledRun:
    """Writes the files of one run.

    Parameters
    ----------
    directory
        Of the spool. The directory of the run is made in it, under a name that is not taken.
    start
        Of the run.

    Attributes
    ----------
    path
        The directory of the run.

    Raises
    ------
    OSError
        As do all methods: the disk is full or gone. Frames of the part that was open are lost, the others are not.
    """

    def __init__(self, directory: Path, start: RunStart) -> None:
        self.path = _made(directory, start.run)
        self._start = start
        self._began = time.monotonic()
        self._part: _Part | None = None
        self._n_parts = self._n_linked = 0
        self._parts_end = self._end = 0
        self._n_frames = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time for `settle`."""
        now = time.monotonic()
        return self._part is not None and now - self._part.began > max(PART_SECONDS, PART_SHARE * (now - self._began))

    @property
    def n_unsettled(self) -> int:
        """Frames that are lost if the part that is open cannot be completed."""
        return self._part.n_frames if self._part is not None else 0

    def write(self, first: int, chunks: Sequence[Buffer]) -> None:
        """Write the chunks of frames first, first + 1, ..., which come after all that were written."""
        self._open().write(first, chunks)
        self._end = first + len(chunks)

    def settle(self) -> None:
        """Complete the part that is open: its frames can be read from now on."""
        if self._part is not None:
            self._complete(self._part, self._end)

    def close(self, exit_status: ExitStatus, ledger: Ledger) -> None:
        """End the run: its master has the ledger of what came, and how many frames of it are "spooled"."""
        end = ledger.sent if ledger.sent - self._end <= LONGEST_END else self._end
        if end > self._parts_end or not self._n_parts:
            self._complete(self._open(), end)
        closed = {"exit_status": exit_status, "ledger": {**ledger.arrays(), "spooled": self._n_frames}}
        self._link(self._n_parts + (exit_status != "success"), closed)

    def discard(self) -> None:
        """Give up the part that is open."""
        if self._part is not None:
            part, self._part = self._part, None
            part.discard()

    def _open(self) -> "_Part":
        if self._part is None:
            number = self._n_parts + 1
            if number > self._n_linked:
                self._link(number)
            self._part = _Part(self.path / _part_name(self.path, number), self._parts_end, self._start)
        return self._part

    def _complete(self, part: "_Part", end: int) -> None:
        self._link(self._n_parts + 2)  # before there is this part: the last one that is named never is
        part.close(end)
        self._part = None
        self._n_parts += 1
        self._parts_end = end
        self._n_frames += part.n_frames

    def _link(self, n_parts: int, closed: Mapping[str, Any] | None = None) -> None:
        image = BytesIO()
        with h5py.File(image, "w") as file:
            _describe(file, self._start)
            data = _group(file["entry"], "data", "NXdata")
            for number in range(1, n_parts + 1):
                data[f"data_{number:06d}"] = h5py.ExternalLink(_part_name(self.path, number), "/entry/data/data")
            if closed is not None:
                file["entry/exit_status"] = closed["exit_status"]
                ledger = _group(file["entry"], "ledger", "NXcollection")
                for name, value in closed["ledger"].items():
                    ledger[name] = value
        master = self.path / master_name(self.path)
        hidden = master.with_name(f".{master.name}")
        hidden.write_bytes(image.getbuffer())
        hidden.replace(master)
        self._n_linked = n_parts


def files_of(run: Path) -> list[Path]:
    """Return the files in the directory of a run that are ours, in the order in which they can be removed.

    Others may take the directory away at any time; then there are none.
    """
    ours = re.compile(rf"\.?{re.escape(run.name)}_(data_\d+\.h5|master\.h5|way\.json)|{SAFE}")
    try:
        found = [path for path in run.iterdir() if ours.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: (path.name == SAFE, path.name == master_name(run)))


def unfinished(run: Path) -> list[Path]:
    """Return what a process that was killed has left in the directory of a run, and nobody can read."""
    return [path for path in files_of(run) if path.name.startswith(".")]


class _Part:
    """Frames of a run in a file, which has its name once it is complete.

    Parameters
    ----------
    first
        The frame that its dataset begins with.
    """

    def __init__(self, path: Path, first: int, start: RunStart) -> None:
        self.began = time.monotonic()
        self.n_frames = 0
        self._path, self._first = path, first
        self._hidden = path.with_name(f".{path.name}")
        self._disk = _Disk(self._hidden)
        self._file = h5py.File(self._disk, "w", libver="v110")  # v110: finds a chunk at once, however many there are
        try:
            _describe(self._file, start)
            self._frames = self._file.create_dataset(
                "entry/data/data",
                shape=(0, *start.shape),
                maxshape=(None, *start.shape),
                chunks=(1, *start.shape),
                dtype=start.dtype,
                **hdf5plugin.Bitshuffle(cname="lz4"),
            )
        except (OSError, RuntimeError, ValueError):
            self.discard()
            raise

    def write(self, first: int, chunks: Sequence[Buffer]) -> None:
        row = first - self._first
        self._frames.resize(row + len(chunks), axis=0)
        for i, chunk in enumerate(chunks, row):
            self._frames.id.write_direct_chunk((i, 0, 0), chunk)
            self._check()
        self.n_frames += len(chunks)

    def close(self, end: int) -> None:
        self._frames.resize(end - self._first, axis=0)
        self._file.close()
        self._disk.close()
        self._check()
        self._hidden.replace(self._path)

    def discard(self) -> None:
        self._file.close()
        self._disk.close()
        self._hidden.unlink(missing_ok=True)

    def _check(self) -> None:
        if self._disk.error is not None:
            raise self._disk.error


class _Disk(io.FileIO):
    """A file of which HDF5 never hears that the disk is full: it could not close it then, nor the process end.

    What is not written is kept in memory, as HDF5 may read it again. Besides, other threads go on while Python waits
    for the disk, and stand still while HDF5 does.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None
        self._unwritten: list[tuple[int, bytes]] = []

    def write(self, data: Any, /) -> int:
        at, rest = self.tell(), memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        if rest:
            self._unwritten.append((at + size - len(rest), bytes(rest)))
        return size

    def readinto(self, buffer: Any, /) -> int:
        at, room = self.tell(), memoryview(buffer).cast("B")
        super().readinto(room)
        for begin, data in self._unwritten:
            first, end = max(at, begin), min(at + len(room), begin + len(data))
            if first < end:
                room[first - at : end - at] = data[first - begin : end - begin]
        return len(room)

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = error
            return size or 0


def _made(directory: Path, run: str) -> Path:
    """Make a directory for a run, whose name may come again and be anything."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", run)[:80]
    if name != run or not name[:1].isalnum():
        name = f"run_{name}_{sha256(run.encode('utf-8', 'replace')).hexdigest()[:8]}"
    for path in (directory / (name if n == 1 else f"{name}_{n}") for n in count(1)):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("count never ends")


def master_name(run: Path) -> str:
    """Return the name of the master in the directory of a run."""
    return f"{run.name}_master.h5"


def _part_name(run: Path, number: int) -> str:
    return f"{run.name}_data_{number:06d}.h5"


def _describe(file: h5py.File, start: RunStart) -> None:
    """Write what a RunStart says, where `stream.ingest.nexus` finds it."""
    entry = _group(file, "entry", "NXentry")
    instrument = _group(entry, "instrument", "NXinstrument")
    detector = _group(instrument, "detector", "NXdetector")
    beam = _group(instrument, "beam", "NXbeam")
    said = start.metadata
    for group, name, value, units in (
        (detector, "frame_time", start.frame_time, "s"),
        (detector, "count_time", start.count_time, "s"),
        (detector, "saturation_value", start.saturation_value, None),
        (detector, "distance", said.get("detector_distance"), "m"),
        (detector, "beam_center_x", said.get("beam_center_x"), "pixel"),
        (detector, "beam_center_y", said.get("beam_center_y"), "pixel"),
        (detector, "x_pixel_size", said.get("x_pixel_size"), "m"),
        (detector, "y_pixel_size", said.get("y_pixel_size"), "m"),
        (beam, "incident_energy", said.get("incident_energy"), "keV"),
        (entry, "scan_number", said.get("scan_number"), None),
    ):
        if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63):
            group[name] = value
            if units:
                group[name].attrs["units"] = units
    for group, name, text in (
        (entry, "entry_identifier", start.run),
        (entry, "start_time", said.get("start_time")),
        (entry, "sample/name", said.get("sample")),
        (detector, "description", said.get("detector")),
    ):
        if isinstance(text, str):
            group[name] = text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _group(parent: h5py.Group, name: str, nx_class: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["NX_class"] = nx_class
    return group
