"""What sections of configuration files have in common."""

import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

NAME = r"[A-Za-z0-9][A-Za-z0-9_]{0,31}"
"""Of sites, queues and beamlines: they become parts of names of jobs and files."""

_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?)\s*(s|min|h|(?:second|minute|hour|day)s?)\s*")
_SHORT = {"s": "seconds", "min": "minutes", "h": "hours"}


def _time(value: Any) -> Any:
    """Turn ``"72 h"`` into a timedelta; ``72:00:00`` and plain seconds are pydantic's matter."""
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    number, unit = match.groups()
    return timedelta(**{_SHORT.get(unit, unit.removesuffix("s") + "s"): float(number)})


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("is not a time that can pass")
    return value


Time = Annotated[timedelta, BeforeValidator(_time), AfterValidator(_positive)]
Name = Annotated[str, Field(pattern=f"^{NAME}$")]


class Section(BaseModel):
    """Says nothing that is not known, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
