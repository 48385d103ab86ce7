"""Which files are a run."""

import errno
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from hpc_bridge.bulk_record import Known
from hpc_bridge.errors import ConfigError
from hpc_bridge.transfer import File

_MASTER = re.compile(r"(.+)_master\.(h5|hdf5|hdf)")
_PART = re.compile(r"(.+)_data_\d+\.(h5|hdf5|hdf)")


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of files, the one that links the others first."""
    return sorted(names, key=lambda name: (_MASTER.fullmatch(name) is None, name))


def is_part(name: str) -> bool:
    """Tell whether a file is one that a master links."""
    return _PART.fullmatch(name) is not None


def is_name(name: str) -> bool:
    """Tell whether a file of a run may have this name: one that can be asked of anybody who moves files."""
    try:
        File(name=name, size=0, sha256="0" * 64)
    except ValueError:
        return False
    return True


def known(path: Path) -> Known:
    """Return what is seen of a file.

    Raises
    ------
    OSError
        There is none, or it is none that can be read to its end: a pipe, a device, a folder.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return Known(path.name, found.st_size, found.st_mtime_ns)


def run_of(path: Path) -> tuple[str, PurePosixPath, tuple[Known, ...]]:
    """Return the name, the folder and the files of the run of a file: a master comes with the parts beside it.

    A folder stands for the files of one run in it.

    Raises
    ------
    ConfigError
        There is no such file, or nothing in the folder.
    """
    path = path.absolute()
    try:
        if path.is_dir():
            files = [each for each in path.iterdir() if each.is_file() and each.suffix in (".h5", ".hdf5", ".hdf")]
            return path.name, PurePosixPath(path), _known(path, (each.name for each in files))
        match = _MASTER.fullmatch(path.name)
        if match is None:
            return path.stem, PurePosixPath(path.parent), _known(path.parent, [path.name])
        parts = path.parent.glob(f"{_escaped(match[1])}_data_*")
        names = [path.name, *(part.name for part in parts if is_part(part.name))]
        return match[1], PurePosixPath(path.parent), _known(path.parent, names)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def runs_of(names: Iterable[str]) -> dict[str, tuple[str, list[str]]]:
    """Return the runs of a folder: by the file that is opened the name of the run, and all its files."""
    names = sorted(names)
    parts: dict[str, list[str]] = {}
    for name in names:
        if (part := _PART.fullmatch(name)) is not None:
            parts.setdefault(part[1], []).append(name)
    found = {}
    for name in names:
        if (master := _MASTER.fullmatch(name)) is not None:
            found[name] = master[1], [name, *parts.get(master[1], ())]
        elif not is_part(name):
            found[name] = PurePosixPath(name).stem, [name]
    return found


def _known(folder: Path, names: Iterable[str]) -> tuple[Known, ...]:
    found = tuple(known(folder / name) for name in in_order(names) if not name.startswith("."))
    if not found:
        raise ConfigError(f"{folder}: no file of a run is in it")
    return found


def _escaped(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)
