"""Which files documents may point to."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from stream.errors import ConfigError, DecodeError
from stream.wire import shown


class Roots:
    """Directories of which files may be read, by what documents call them.

    Parameters
    ----------
    directories
        What documents call a directory, and where it is here: ``{"/nsls2/data": Path("/mnt/data")}``.

    Raises
    ------
    ConfigError
        There is none, or one is not absolute or not there.
    """

    def __init__(self, directories: Mapping[str, Path]) -> None:
        self._directories: dict[PurePosixPath, Path] = {}
        for called, directory in directories.items():
            if not called.startswith("/") or ".." in PurePosixPath(called).parts:
                raise ConfigError(f'"{called}" is no absolute path of a directory')
            if not directory.is_dir():
                raise ConfigError(f"{directory}: no such directory")
            self._directories[PurePosixPath(called)] = directory.resolve()
        if not directories:
            raise ConfigError("no directory is given of which files may be read")

    def of_uri(self, uri: str) -> Path:
        """Return where a ``file://localhost/path`` is here.

        Raises
        ------
        DecodeError
            It is no file, or in none of the directories, also once its links are followed.
        """
        try:
            parts = urlsplit(uri)
        except ValueError:
            raise DecodeError(f"{shown(uri)} is no URI") from None
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise DecodeError(f"{shown(uri)} is not file://localhost/...")
        return self.of_path(unquote(parts.path))

    def of_path(self, path: str) -> Path:
        """Return where a path of a document is here; errors as `of_uri`."""
        there = PurePosixPath(path)
        inside = [called for called in self._directories if there.is_relative_to(called)]
        if inside and "\0" not in path:
            called = max(inside, key=lambda each: len(each.parts))
            root = self._directories[called]
            here = (root / there.relative_to(called)).resolve()
            if here.is_relative_to(root):
                return here
        allowed = ", ".join(map(str, self._directories))
        raise DecodeError(f"{shown(path)} is not in {allowed}, of which files may be read")
