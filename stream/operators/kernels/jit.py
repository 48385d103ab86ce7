"""The decorators of kernels: all release the GIL, raise nothing, and are kept in the cache (see the package)."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def _kernel(**options: Any) -> Callable[[F], F]:
    return cast("Callable[[F], F]", njit(nogil=True, cache=True, error_model="numpy", **options))


kernel = _kernel()
"""A kernel that may allocate."""

part = _kernel(_nrt=False)
"""A part of one that allocates nothing: numba then leaves out the atomic counting of references to every array that is
passed on, which takes longer than what some parts do."""

inlined = _kernel(_nrt=False, forceinline=True)
"""A part too short to be worth the passing of its arguments: a named tuple of arrays is dozens of them."""
