"""Physical quantities as people write them, "500 ms" or "11 keV", as plain floats in the units of this package."""

import math
import re
from functools import cache
from typing import TYPE_CHECKING

from stream.errors import ConfigError

if TYPE_CHECKING:
    import pint

NAMES = {
    "s": "a time",
    "m": "a length",
    "keV": "an energy",
    "1/s": "a rate",
    "1/angstrom": "a wavevector",
    "angstrom^2/s": "a diffusion coefficient",
}
"""The units of this package and what is measured in them."""

_PARTS = {
    "s": {"ms": 1e3, "us": 1e6},
    "m": {"mm": 1e3, "um": 1e6},
    "1/s": {"Hz": 1.0, "kHz": 1e-3},
}
"""How many of a unit that is often written are one of ours: for these pint is not imported."""

# Narrower than what pint reads: it would raise 9**9**9**9 to its power.
_FACTOR = r"[^\W\d_]+(?:\s*(?:\^|\*\*)\s*-?[1-9])?"
_QUANTITY = re.compile(
    r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    rf"(?P<unit>(?:(?:\s+1)?\s*/)?\s*{_FACTOR}(?:\s*[ */]\s*{_FACTOR})*)?\s*"
)


def quantity(text: object, unit: str) -> float:
    """Return the value of `text` in `unit`.

    Parameters
    ----------
    text
        A number and a unit, e.g. ``"500 ms"``, ``"0.05 1/nm"``, ``"2e4 angstrom^2/s"``.
    unit
        One of `NAMES`.

    Raises
    ------
    ConfigError
        `text` has no unit, or is something else, or is not finite.
    """
    name = NAMES[unit]
    not_one = ConfigError(f'"{text}" is not {name}; write e.g. "5 {unit}"')
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise not_one
    if match["unit"] is None:
        raise ConfigError(f'"{text}" has no unit; {name} is written e.g. "{match["number"]} {unit}"')
    written = match["unit"].strip()
    number = float(match["number"])
    if written == unit:
        value = number
    elif (parts := _PARTS.get(unit, {}).get(written)) is not None:
        value = number / parts
    else:
        import pint  # it and its registry take 0.4 s, which a worker that starts has not

        unit_of_text = f"1{written}" if written.startswith("/") else written
        try:
            value = float(_registry().Quantity(number, unit_of_text).to(unit).magnitude)
        except pint.PintError:
            raise not_one from None
    if not math.isfinite(value):
        raise ConfigError(f'"{text}" is not finite')
    return value


@cache
def _registry() -> "pint.UnitRegistry[float]":
    import pint

    return pint.UnitRegistry()
