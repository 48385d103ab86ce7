"""What this machine can do at most, measured in the same run: read memory, multiply and add."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from bench.measure import rate

ACCUMULATORS = 16
"""Independent chains: two units of four cycles need eight, and more than the registers hold would be no peak."""

ITERATIONS = 1_000_000


@njit(nogil=True, cache=True)
def _read(words: Any) -> Any:
    total = np.uint64(0)
    for word in words:
        total ^= word
    return total


def read_rate(array: NDArray[Any], threads: int) -> float:
    """Return the bytes per second at which `array` is read, in parts of equal size."""
    flat = array.reshape(-1).view(np.uint8)
    words = np.array_split(flat[: flat.size // 8 * 8].view(np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return rate(array.nbytes, lambda: list(pool.map(_read, words)))


def multiply_add_rate(threads: int) -> float:
    """Return float32 multiply-adds per second, none of which waits for another or for memory."""
    with ThreadPoolExecutor(threads) as pool:
        return max(
            rate(
                threads * ITERATIONS * ACCUMULATORS * lanes,
                lambda: list(pool.map(chains, [ITERATIONS] * threads)),  # noqa: B023 - called at once
            )
            for lanes, chains in _CHAINS.items()
        )


def _chains(lanes: int) -> Callable[[int], float]:
    """Compile ``a = a * x + x`` over vectors of that many lanes; LLVM left alone would vectorise as it likes."""
    single = ir.FloatType()
    vector = ir.VectorType(single, lanes)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        build: Any = cgutils  # untyped
        x = ir.Constant(vector, [0.9999] * lanes)
        fma_type = ir.FunctionType(vector, [vector] * 3)
        fma = build.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{lanes}f32")
        chains = [
            build.alloca_once_value(builder, ir.Constant(vector, [1e-3 * (i + 1)] * lanes)) for i in range(ACCUMULATORS)
        ]
        with cgutils.for_range(builder, arguments[0]):
            for chain in chains:
                builder.store(builder.call(fma, [builder.load(chain), x, x]), chain)
        total = ir.Constant(vector, [0.0] * lanes)
        for chain in chains:
            total = builder.fadd(total, builder.load(chain))
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    @intrinsic
    def run(_typing: Any, _n: Any) -> Any:
        return types.float32(types.int64), generate

    measured: Any = run  # a kernel does not name the typing context
    return njit("float32(int64)", nogil=True)(lambda n: measured(n))


_CHAINS = {lanes: _chains(lanes) for lanes in (8, 16)}
"""By lanes: AVX2 has 8, AVX-512 has 16."""
