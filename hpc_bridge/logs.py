"""How logs are written: in words for people, or as one JSON object a line for machines that collect them."""

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Any, Literal

Format = Literal["text", "json"]

VARIABLE = "HPC_BRIDGE_LOG_FORMAT"
"""Of the environment: which format, where it is not said."""

_said = logging.getLogger("hpc-bridge")

# Not structlog's own: with it comes asyncio, for which no pilot has time while it starts.
_known: ContextVar[Mapping[str, object]] = ContextVar("_known", default=MappingProxyType({}))


def configure(process: str, how: Format | None = None) -> None:
    """Write the logs of this process to standard error; processes that it begins write theirs in the same format.

    Parameters
    ----------
    process
        What it is called in JSON.
    how
        None: as `VARIABLE` says, in words if it says nothing.
    """
    how = how or ("json" if os.environ.get(VARIABLE) == "json" else "text")
    os.environ[VARIABLE] = how
    handler = logging.StreamHandler()
    shown = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    if how == "json":
        handler.setFormatter(_json(process))
        _said.setLevel(logging.INFO)
        _take_what_nobody_caught()
    logging.basicConfig(level=logging.WARNING, format=shown, handlers=[handler], force=True)


def is_json() -> bool:
    """Tell whether standard error has nothing but JSON."""
    return os.environ.get(VARIABLE) == "json"


def say(text: object, level: int = logging.INFO) -> None:
    """Tell who started this process something, whatever is logged."""
    if is_json():
        _said.log(level, "%s", text)
    else:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def bind(**known: object) -> None:
    """Let all that this thread logs from now on carry these fields; None: no more."""
    _known.set({name: value for name, value in {**_known.get(), **known}.items() if value is not None})


@contextmanager
def bound(**known: object) -> Iterator[None]:
    """Let all that this thread logs meanwhile carry these fields."""
    before = _known.set({**_known.get(), **known})
    try:
        yield
    finally:
        _known.reset(before)


def _json(process: str) -> logging.Formatter:
    from structlog.processors import JSONRenderer, TimeStamper, format_exc_info
    from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name

    of_process = {"process": process, "pid": os.getpid(), "node": os.uname().nodename}

    def add_what_is_known(_: object, __: str, event: Any) -> Any:
        return {**event, **of_process, **_known.get()}

    return ProcessorFormatter(
        foreign_pre_chain=[
            TimeStamper(fmt="iso", utc=True),
            add_log_level,
            add_logger_name,
            ExtraAdder(),
            add_what_is_known,
        ],
        processors=[ProcessorFormatter.remove_processors_meta, format_exc_info, JSONRenderer()],
    )


def _take_what_nobody_caught() -> None:
    """Log what Python would write to standard error itself: it is no JSON."""
    logging.captureWarnings(True)

    def of_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _said.critical("%s", kind.__name__, exc_info=(kind, error, trace))

    def of_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None:
            _said.critical("%s", failed.exc_type.__name__, exc_info=failed.exc_value)

    sys.excepthook, threading.excepthook = of_process, of_thread
