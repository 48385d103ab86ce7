"""Vectors in numba: `LANES` 32-bit integers that a kernel loads, combines and stores as one value.

What LLVM's own vectoriser makes of a loop changes with its version and with every edit of the loop; what is said with
lanes compiles to the same few instructions everywhere (one AVX-512 register, two of AVX2, four of SSE or NEON), and
fast. Every operation is portable LLVM IR: `dot` is written so that LLVM finds `vpdpwssd` or `vpmaddwd` for it.
"""

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_VECTOR = ir.VectorType(_I32, LANES)
_ZERO = ir.Constant(_VECTOR, [0] * LANES)


class LanesType(types.Type):
    """Numba type of `LANES` int32."""

    def __init__(self) -> None:
        super().__init__("Lanes")


_lanes = LanesType()


def _intrinsic(define: Callable[..., Any]) -> Callable[..., Any]:
    """Make what a kernel calls without the first parameter, numba's typing context."""
    return cast("Callable[..., Any]", intrinsic(define))


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


def _vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def _select(indices: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(indices)), indices)


def _element(context: Any, builder: Any, signature: Any, arguments: Any, which: int) -> Any:
    """Return the pointer to element `arguments[which + 1]` of the one-dimensional array `arguments[which]`."""
    array = context.make_array(signature.args[which])(context, builder, arguments[which])
    index = context.cast(builder, arguments[which + 1], signature.args[which + 1], types.intp)
    return builder.gep(array.data, [index])


def _at(context: Any, builder: Any, signature: Any, arguments: Any, width: int) -> Any:
    """Return the pointer to element `arguments[1]`, of `width` bits, of those that begin at address `arguments[0]`."""
    base, index = (context.cast(builder, a, t, types.intp) for a, t in zip(arguments, signature.args, strict=True))
    return builder.gep(builder.inttoptr(base, ir.IntType(width).as_pointer()), [index])


def _widened(builder: Any, pointer: Any) -> Any:
    element = pointer.type.pointee
    values = builder.load(builder.bitcast(pointer, _vector(element).as_pointer()), align=element.width // 8)
    return values if element.width == 32 else builder.zext(values, _VECTOR)


@_intrinsic
def load(_: Any, array: Any, index: Any) -> Any:
    """Return elements index..index+LANES-1 of an array of unsigned integers of 8 or 16 bits, or of 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _widened(builder, _element(context, builder, signature, arguments, 0))

    return _lanes(array, index), codegen


def _load_from(width: int) -> Callable[..., Any]:
    @_intrinsic
    def load_from(_: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _widened(builder, _at(context, builder, signature, arguments, width))

        return _lanes(address, index), codegen

    return load_from


# From memory that the caller keeps alive, as numba cannot take a list of arrays that grows: elements
# index..index+LANES-1 of unsigned integers of 8, 16 or 32 bits that begin at an address.
load_u1, load_u2, load_u4 = _load_from(8), _load_from(16), _load_from(32)


def _read_from(width: int) -> Callable[..., Any]:
    @_intrinsic
    def read_from(_: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _at(context, builder, signature, arguments, width)
            return builder.zext(builder.load(pointer, align=1), _I64)

        return types.int64(address, index), codegen

    return read_from


# The same for one element.
read_u1, read_u2, read_u4 = _read_from(8), _read_from(16), _read_from(32)


@_intrinsic
def store(_: Any, value: Any, array: Any, index: Any) -> Any:
    """Store the low bits of each lane in elements index..index+LANES-1 of an array of 8, 16 or 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, signature, arguments, 1)
        element = pointer.type.pointee
        value = arguments[0] if element.width == 32 else builder.trunc(arguments[0], _vector(element))
        builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=element.width // 8)
        return context.get_dummy_value()

    return types.void(value, array, index), codegen


@_intrinsic
def splat(_: Any, value: Any) -> Any:
    """Return the low 32 bits of an integer in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.cast(builder, arguments[0], signature.args[0], types.int32)
        return builder.shuffle_vector(builder.insert_element(_ZERO, number, _I32(0)), _ZERO, _select([0] * LANES))

    return _lanes(value), codegen


def _elementwise(operate: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    @_intrinsic
    def operation(_: Any, x: Any, y: Any) -> Any:
        def codegen(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return operate(builder, *arguments)

        return _lanes(x, y), codegen

    return operation


add = _elementwise(lambda builder, x, y: builder.add(x, y))
subtract = _elementwise(lambda builder, x, y: builder.sub(x, y))
either = _elementwise(lambda builder, x, y: builder.or_(x, y))
both = _elementwise(lambda builder, x, y: builder.and_(x, y))
left = _elementwise(lambda builder, x, y: builder.shl(x, y))
right = _elementwise(lambda builder, x, y: builder.lshr(x, y))
above = _elementwise(lambda builder, x, y: builder.sext(builder.icmp_unsigned(">", x, y), _VECTOR))


@_intrinsic
def any_bits(_: Any, x: Any) -> Any:
    """Return the bits that are set in any lane, as an int64."""

    def codegen(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        value = arguments[0]
        for step in (8, 4, 2, 1):
            other = builder.shuffle_vector(value, value, _select([(i + step) % LANES for i in range(LANES)]))
            value = builder.or_(value, other)
        return builder.zext(builder.extract_element(value, _I32(0)), _I64)

    return types.int64(x), codegen


def _dot(builder: Any, total: Any, x: Any, y: Any) -> Any:
    wide = ir.VectorType(_I32, 2 * LANES)
    x, y = (builder.sext(builder.bitcast(each, ir.VectorType(_I16, 2 * LANES)), wide) for each in (x, y))
    product = builder.mul(x, y)
    low, high = (
        builder.shuffle_vector(product, product, _select([2 * i + half for i in range(LANES)])) for half in (0, 1)
    )
    return builder.add(total, builder.add(low, high))


@_intrinsic
def dot(_: Any, total: Any, x: Any, y: Any) -> Any:
    """Return total + x.low * y.low + x.high * y.high, where each lane of x and y holds two int16."""

    def codegen(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return _dot(builder, *arguments)

    return _lanes(total, x, y), codegen


@_intrinsic
def dots(_: Any, totals: Any, x: Any, array: Any, index: Any) -> Any:
    """Return the tuple of `dot(totals[j], x, load(array, index - j * LANES))`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, signature, arguments, 2)
        pointer = builder.bitcast(pointer, _VECTOR.as_pointer())
        sums = [
            _dot(builder, total, arguments[1], builder.load(builder.gep(pointer, [_I64(-j)]), align=4))
            for j, total in enumerate(cgutils.unpack_tuple(builder, arguments[0]))
        ]
        return context.make_tuple(builder, signature.return_type, sums)

    return totals(totals, x, array, index), codegen


@_intrinsic
def adds(_: Any, x: Any, y: Any) -> Any:
    """Return the tuple of sums of two tuples of lanes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, y = (cgutils.unpack_tuple(builder, each) for each in arguments)
        return context.make_tuple(
            builder, signature.return_type, [builder.add(*pair) for pair in zip(x, y, strict=True)]
        )

    return x(x, y), codegen


@_intrinsic
def transpose(_: Any, rows: Any, array: Any, index: Any) -> Any:
    """Store a tuple of LANES lanes with rows and columns exchanged, LANES**2 elements from array[index] on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = cgutils.unpack_tuple(builder, arguments[0])
        step = 1
        while step < LANES:
            keep = [i if not i & step else LANES + i - step for i in range(LANES)]
            move = [i + step if not i & step else LANES + i for i in range(LANES)]
            for i in range(LANES):
                if not i & step:
                    x, y = values[i], values[i + step]
                    values[i] = builder.shuffle_vector(x, y, _select(keep))
                    values[i + step] = builder.shuffle_vector(x, y, _select(move))
            step *= 2
        pointer = builder.bitcast(_element(context, builder, signature, arguments, 1), _VECTOR.as_pointer())
        for i, value in enumerate(values):
            builder.store(value, builder.gep(pointer, [_I64(i)]), align=4)
        return context.get_dummy_value()

    return types.void(rows, array, index), codegen


@_intrinsic
def add_shifted(_: Any, value: Any, shift: Any, array: Any, index: Any) -> Any:
    """Add each lane, first shifted left by the lane of `shift`, to the int64 elements index..index+LANES-1."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.VectorType(_I64, LANES)
        value, shift = (builder.zext(each, wide) for each in arguments[:2])
        pointer = builder.bitcast(_element(context, builder, signature, arguments, 2), wide.as_pointer())
        builder.store(builder.add(builder.load(pointer, align=8), builder.shl(value, shift)), pointer, align=8)
        return context.get_dummy_value()

    return types.void(value, shift, array, index), codegen


@_intrinsic
def prefetch(_: Any, address: Any) -> Any:
    """Ask for the cache line at an address, which need not exist, to be in L2 soon."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(context.cast(builder, arguments[0], signature.args[0], types.intp), _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()

    return types.void(address), codegen
