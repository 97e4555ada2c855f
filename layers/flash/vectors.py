"""Vectors of numbers for the innermost loops of the CPU kernels, as a type that Numba knows.

A compiler that makes vector instructions out of a loop has to find out first that the arrays in it do not overlap, that
it pays, and that it is not better unrolled; with ten outputs one of the three often fails, and the same loop takes three
times as long. Here a row is a vector from the start: ``lanes`` numbers, known when the kernel is compiled, which the
compiler cuts into registers of whatever width the processor has.
"""

from __future__ import annotations

from llvmlite import ir
from numba import errors, types
from numba.extending import intrinsic, models, register_model

INDEX = types.intp


class Vector(types.Type):
    """``lanes`` numbers of the type ``dtype``."""

    def __init__(self, dtype, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind: Vector) -> None:
        real = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(real, kind.lanes))


def _pointer(context, builder, kind, array, at, lanes: int):
    """Where ``lanes`` numbers of a one-dimensional array begin, and the alignment of a single number."""
    if kind.layout != "C" or kind.ndim != 1:
        raise errors.TypingError(f"a vector needs numbers one after the other, got {kind}")
    first = builder.gep(context.make_array(kind)(context, builder, array).data, [at])
    real = context.get_data_type(kind.dtype)
    return builder.bitcast(first, ir.VectorType(real, lanes).as_pointer()), context.get_abi_sizeof(real)


def _all(builder, x, vector):
    """A vector whose numbers are all ``x``."""
    nothing, index = ir.Constant(vector, ir.Undefined), ir.IntType(32)
    one = builder.insert_element(nothing, x, ir.Constant(index, 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(index, vector.count), [0] * vector.count))


def _llvm(builder, name: str, result, *args):
    """A function of LLVM's own, for vectors or single numbers of one type."""
    kind = args[-1].type
    real, lanes = (kind.element, f"v{kind.count}") if isinstance(kind, ir.VectorType) else (kind, "")
    name = f"llvm.{name}.{lanes}{'f32' if isinstance(real, ir.FloatType) else 'f64'}"
    function = builder.module.globals.get(name)
    return function or ir.Function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)


@intrinsic(prefer_literal=True)
def load(typing, array, at, lanes):
    """``array[at : at + lanes]``; nobody looks whether the array is that long."""

    def generate(context, builder, signature, args):
        pointer, align = _pointer(context, builder, array, *args[:2], lanes.literal_value)
        return builder.load(pointer, align=align)

    return Vector(array.dtype, lanes.literal_value)(array, INDEX, lanes), generate


@intrinsic
def store(typing, vector, array, at):
    """``array[at : at + lanes] = vector``, not checked either."""

    def generate(context, builder, signature, args):
        pointer, align = _pointer(context, builder, array, *args[1:], vector.lanes)
        builder.store(args[0], pointer, align=align)
        return context.get_dummy_value()

    return types.none(vector, array, INDEX), generate


@intrinsic
def fma(typing, a, b, c):
    """``a * b + c`` for ``b`` and ``c`` both numbers or both vectors, ``a`` either; rounded once if the processor can."""

    def generate(context, builder, signature, args):
        factor = args[0]
        if isinstance(b, Vector) and not isinstance(a, Vector):
            factor = _all(builder, factor, args[1].type)
        args = factor, args[1], args[2]
        return builder.call(_llvm(builder, "fmuladd", args[2].type, *args), args)

    return b(b if isinstance(a, Vector) or not isinstance(b, Vector) else b.dtype, b, b), generate


@intrinsic
def first(typing, vector, n):
    """The first ``n`` numbers of a vector, zeros for the others, whatever they are."""

    def generate(context, builder, signature, args):
        kind, index = args[0].type, args[1].type
        lane = ir.Constant(ir.VectorType(index, kind.count), list(range(kind.count)))
        inside = builder.icmp_signed("<", lane, _all(builder, args[1], lane.type))
        return builder.select(inside, args[0], ir.Constant(kind, [0.0] * kind.count))

    return vector(vector, INDEX), generate


@intrinsic
def total(typing, vector):
    """The sum of the numbers of a vector, halves added to halves."""

    def generate(context, builder, signature, args):
        real = args[0].type.element
        args = ir.Constant(real, -0.0), args[0]
        return builder.call(_llvm(builder, "vector.reduce.fadd", real, *args), args, fastmath=("reassoc",))

    return vector.dtype(vector), generate
