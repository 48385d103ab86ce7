"""numba on arrays and ints; knows nothing of messages.

numba (0.68) looks for a change only in the file a kernel stands in, not in those it imports; and after a change it
reuses the names of its files, so that a process killed in mid-save leaves old machine code under a new entry. So every
version of the sources of this package has a cache directory of its own.
"""

import hashlib
import importlib
import tempfile
from contextlib import suppress
from pathlib import Path

from numba.core import config


def _cache(sources: list[Path]) -> Path:
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    places = [_everybody_elses, sources[0].parent / "__pycache__", Path("~/.cache/xpcs-stream").expanduser()]
    for place in filter(None, places):
        directory = Path(place) / version
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
            return directory
    raise OSError(f"compiled kernels cannot be kept in any of {[str(place) for place in places]}; set NUMBA_CACHE_DIR")


_sources = sorted(Path(__file__).parent.glob("*.py"))
_everybody_elses = config.CACHE_DIR  # type: ignore[attr-defined]

CACHE = _cache(_sources)
"""Where numba keeps what it has compiled."""

# A kernel's place in the cache is settled when it is defined.
config.CACHE_DIR = str(CACHE)  # type: ignore[attr-defined]
for _source in _sources:
    if _source.stem != "__init__":
        importlib.import_module(f"{__name__}.{_source.stem}")
config.CACHE_DIR = _everybody_elses  # type: ignore[attr-defined]
