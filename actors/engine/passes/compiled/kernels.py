"""A forward pass of a Llama-like decoder for few tokens at a time, in float32, compiled for the processor at hand.

One function, that of `pass_address`, is entered by every thread of a team at once. It walks through the layers in
phases; in each phase the threads take pieces of the work from a counter until none is left, and go on when all are
done. All products, those of attention too, are made of one tile: up to 8 rows by 3 vectors of columns, held in
registers.

Addresses travel as integers, in tables of 64-bit numbers whose columns are named below. Everything that is compiled
together lies in this file, because numba's cache on disk knows of changes in one file only. Nothing is compiled before
an address is asked for.

Shapes: N tokens, R asked rows, I hidden width, F width between the products of the feed-forward part, H query heads,
K key-value heads, G = H / K, D head width, V columns of the output layer.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from actors.jit import OPTIONS, compiled

Table = NDArray[np.int64]

BLOCK_SIZE = 16
"""Positions of a block of the cache."""

_FEATURES = binding.get_host_cpu_features()
_IS_X86 = bool(_FEATURES.get("sse2"))
IS_FAST = bool(_FEATURES.get("fma") and _FEATURES.get("avx2")) or not _IS_X86
"""Whether the processor multiplies and adds vectors in one operation."""

LANES = 16 if _FEATURES.get("avx512f") else 8
"""Numbers of a vector, and columns of a panel of weights. Half as many registers allow tiles of half the rows."""

_MAX_ROWS = 8 if LANES == 16 else 4
_NUM_VECTORS = 3
_GROUP = 64
_CHUNK = 96
"""Rows that are multiplied with the weights of so many inputs before the next inputs have their turn. Meanwhile these
inputs' weights are asked for: memory then works as long as the multiplication does, and not in turn with it."""

_UNSEEN = np.float32(-1e30)
"""The score of a position that a token does not see."""

_NUM_SPINS = 5_000
"""So often a thread looks whether the others have come before it lets other processes have its core."""

# A pass.
(
    COUNTERS,  # zeros: for threads, then for each phase the pieces that were begun and those that are done
    LAYERS,  # the table of layers
    NUM_LAYERS,
    NUM_TOKENS,
    NUM_ROWS,
    HIDDEN_WIDTH,
    INNER_WIDTH,
    NUM_HEADS,
    NUM_KEY_HEADS,
    HEAD_WIDTH,
    MAX_CONTEXT,
    NUM_PANELS,  # of the output layer; 0 where hidden states are asked for
    EPSILON,  # of norms: addresses of a number, as the next one
    SCALE,  # of attention scores
    EMBEDDING,  # [tokens, I]
    COSINE,  # [positions, D]
    SINE,
    FINAL_NORM,  # [I]
    OUTPUT,  # panels
    ZEROS,  # as many as the widest product has columns
    TOKENS,  # [N]
    POSITIONS,  # [N]
    TABLES,  # [N], addresses of the numbers of the sequence's blocks
    ROWS,  # [R], indices of tokens
    STATES,  # [N, I]: the residual stream
    NORMED,  # [N, I]
    HEADS,  # [N, (H + 2 K) D]: queries, keys, values
    ATTENDED,  # [N, H D]
    INNER,  # [N, 2 F]: gates and what passes them
    GATED,  # [N, F]
    SCORES,  # [threads, G, MAX_CONTEXT]
    RESULT,  # [R, NUM_PANELS * LANES], or [R, I]
    NUM_FIELDS,
) = range(33)

# A layer. Products are panels: [columns / LANES, inputs, LANES].
(
    ATTENTION_NORM,  # [I]
    HEADS_PRODUCT,  # columns (H + 2 K) D
    HEADS_BIAS,
    QUERY_NORM,  # [D], or 0
    KEY_NORM,
    KEYS,  # [blocks, K, D, BLOCK_SIZE]
    VALUES,  # [blocks, K, BLOCK_SIZE, D]
    WINDOW,  # positions that a token sees
    ATTENDED_PRODUCT,  # columns I
    INNER_NORM,
    INNER_PRODUCT,  # columns 2 F
    GATED_PRODUCT,  # columns I
    NUM_LAYER_FIELDS,
) = range(13)

# A product.
(
    PRODUCT_COUNTER,  # zero: pieces that were begun
    PRODUCT_DONE,  # zero
    PRODUCT_ROWS,
    PRODUCT_INPUT,  # [rows, inputs]
    PRODUCT_INPUTS,
    PRODUCT_PANELS,
    PRODUCT_NUM_PANELS,
    PRODUCT_BIAS,  # [panels * LANES]
    PRODUCT_RESULT,  # [rows, panels * LANES]
    NUM_PRODUCT_FIELDS,
) = range(10)

NUM_PHASES = 9
"""Of a layer; a pass has 3 more, and a counter for its threads."""

_COUNTER_BYTES = 16

_FLOAT = ir.FloatType()
_LONG = ir.IntType(64)
_INT = ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_LONG_ORDER = 8  # alignment of atomic numbers


def _nothing() -> Any:
    return cgutils.get_null_value(ir.IntType(8).as_pointer())


def _load(builder: Any, address: Any) -> Any:
    """The vector at an address."""
    vector = builder.load(builder.inttoptr(address, _VECTOR.as_pointer()))
    vector.align = 4
    return vector


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, _VECTOR.as_pointer())).align = 4


def _next(builder: Any, address: Any, index: Any) -> Any:
    """The address of the vector so many places on."""
    return builder.add(address, builder.mul(index, ir.Constant(_LONG, 4 * LANES)))


def _fma(builder: Any) -> Any:
    """The function a * b + c of vectors."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")


def _spread(builder: Any, number: Any) -> Any:
    """A number in all lanes of a vector."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    lane = builder.insert_element(undefined, number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(_INTS, [0] * LANES))


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a vector's numbers, from the first to the last."""
    lanes = [builder.extract_element(vector, ir.Constant(_INT, lane)) for lane in range(LANES)]
    total = lanes[0]
    for lane in lanes[1:]:
        total = builder.fadd(total, lane)
    return total


def _constant(number: float) -> Any:
    """A number that is known beforehand, in all lanes of a vector."""
    return ir.Constant(_VECTOR, [ir.Constant(_FLOAT, float(np.float32(number)))] * LANES)


@intrinsic
def _floats(_context: Any, address: Any) -> Any:
    """The address of float32 numbers, as a pointer."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.int64), build


@intrinsic
def _longs(_context: Any, address: Any) -> Any:
    """The address of int64 numbers, as a pointer."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _LONG.as_pointer())

    return types.CPointer(types.int64)(types.int64), build


@intrinsic
def _add_one(_context: Any, address: Any) -> Any:
    """Add one to a number that threads share; return what it was."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _LONG.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_LONG, 1), "acq_rel")

    return types.int64(types.int64), build


@intrinsic
def _read_shared(_context: Any, address: Any) -> Any:
    """Return a number that threads share, with all that was written before it."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _LONG.as_pointer())
        return builder.load_atomic(pointer, "acquire", _LONG_ORDER)

    return types.int64(types.int64), build


@intrinsic
def _rest(_context: Any, is_long: Any) -> Any:
    """Wait for a moment, or let another process have the core."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        with builder.if_else(builder.trunc(arguments[0], ir.IntType(1))) as (long, short):
            with long:
                kind = ir.FunctionType(_INT, [])
                builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
            with short:
                if _IS_X86:
                    kind = ir.FunctionType(ir.VoidType(), [])
                    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return _nothing()

    return types.void(types.int64), build


def _tile(num_rows: int, num_vectors: int) -> Callable[..., None]:
    """Return the function out = start + x W for so many rows and vectors of columns, as `_multiply` calls it."""

    @intrinsic
    def tile(
        _context: Any,
        x: Any,
        x_stride: Any,
        weights: Any,
        input_stride: Any,
        vector_stride: Any,
        num_inputs: Any,
        start: Any,
        start_stride: Any,
        out: Any,
        out_stride: Any,
        ahead: Any,
        ahead_stride: Any,
    ) -> Any:
        def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            x, x_stride, weights, input_stride, vector_stride, num_inputs = arguments[:6]
            start, start_stride, out, out_stride, ahead, ahead_stride = arguments[6:]
            byte = ir.IntType(8).as_pointer()
            fma = _fma(builder)
            prefetch = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT]), "llvm.prefetch.p0"
            )

            def at(address: Any, index: int, stride: Any) -> Any:
                return builder.add(address, builder.mul(stride, ir.Constant(_LONG, index)))

            width = ir.Constant(_LONG, 4 * LANES)
            places = [(row, vector) for row in range(num_rows) for vector in range(num_vectors)]
            sums = {place: cgutils.alloca_once(builder, _VECTOR) for place in places}
            for row, vector in places:
                builder.store(_load(builder, at(at(start, row, start_stride), vector, width)), sums[row, vector])
            rows = [at(x, row, x_stride) for row in range(num_rows)]
            panels = [at(weights, vector, vector_stride) for vector in range(num_vectors)]
            with cgutils.for_range(builder, num_inputs) as loop:
                column = builder.mul(loop.index, input_stride)
                asked = builder.add(ahead, builder.mul(loop.index, ahead_stride))
                factors = []
                for panel in panels:
                    address = builder.add(panel, column)
                    factors.append(_load(builder, address))
                    hint = [ir.Constant(_INT, number) for number in (0, 3, 1)]
                    builder.call(prefetch, [builder.inttoptr(builder.add(panel, asked), byte), *hint])
                offset = builder.mul(loop.index, ir.Constant(_LONG, 4))
                for row in range(num_rows):
                    number = builder.load(builder.inttoptr(builder.add(rows[row], offset), _FLOAT.as_pointer()))
                    spread = _spread(builder, number)
                    for vector, factor in enumerate(factors):
                        place = sums[row, vector]
                        builder.store(builder.call(fma, [spread, factor, builder.load(place)]), place)
            for row, vector in places:
                _store(builder, builder.load(sums[row, vector]), at(at(out, row, out_stride), vector, width))
            return _nothing()

        return types.void(*[types.int64] * 12), build

    return tile


_tile_1x1, _tile_2x1, _tile_3x1, _tile_4x1, _tile_5x1, _tile_6x1, _tile_7x1, _tile_8x1 = (
    _tile(num_rows, 1) for num_rows in range(1, 9)
)
_tile_1x3, _tile_2x3, _tile_3x3, _tile_4x3, _tile_5x3, _tile_6x3, _tile_7x3, _tile_8x3 = (
    _tile(num_rows, _NUM_VECTORS) for num_rows in range(1, 9)
)


@compiled
def _tiles_x1(
    m: int, x: int, xs: int, w: int, ws: int, vs: int, k: int, s: int, ss: int, out: int, outs: int, a: int, as_: int
) -> None:
    """One vector of columns of m rows, at most `_MAX_ROWS`."""
    if m == 1:
        _tile_1x1(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 2:
        _tile_2x1(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 3:
        _tile_3x1(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 4:
        _tile_4x1(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 5:
        _tile_5x1(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 6:
        _tile_6x1(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 7:
        _tile_7x1(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    else:
        _tile_8x1(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)


@compiled
def _tiles_x3(
    m: int, x: int, xs: int, w: int, ws: int, vs: int, k: int, s: int, ss: int, out: int, outs: int, a: int, as_: int
) -> None:
    """Three vectors of columns of m rows, at most `_MAX_ROWS`."""
    if m == 1:
        _tile_1x3(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 2:
        _tile_2x3(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 3:
        _tile_3x3(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 4:
        _tile_4x3(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 5:
        _tile_5x3(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 6:
        _tile_6x3(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    elif m == 7:
        _tile_7x3(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)
    else:
        _tile_8x3(x, xs, w, ws, vs, k, s, ss, out, outs, a, as_)


@compiled
def _multiply(
    num_rows: int,
    x: int,
    x_stride: int,
    weights: int,
    input_stride: int,
    vector_stride: int,
    num_inputs: int,
    start: int,
    start_stride: int,
    out: int,
    out_stride: int,
    num_vectors: int,
    ahead: int,
) -> None:
    """out = start + x W for n vectors of columns. Strides are in bytes; a start of stride 0 serves all rows.

    Meanwhile memory is asked for that will be needed next: so far ahead of each weight.
    """
    width = 4 * LANES
    for row in range(0, num_rows, _MAX_ROWS):
        m = min(_MAX_ROWS, num_rows - row)
        xr, sr, outr = x + row * x_stride, start + row * start_stride, out + row * out_stride
        v = 0
        while v + _NUM_VECTORS <= num_vectors:
            wv = weights + v * vector_stride
            _tiles_x3(
                m, xr, x_stride, wv, input_stride, vector_stride, num_inputs,
                sr + v * width, start_stride, outr + v * width, out_stride, ahead, input_stride,
            )  # fmt: skip
            v += _NUM_VECTORS
        while v < num_vectors:
            wv = weights + v * vector_stride
            _tiles_x1(
                m, xr, x_stride, wv, input_stride, vector_stride, num_inputs,
                sr + v * width, start_stride, outr + v * width, out_stride, ahead, input_stride,
            )  # fmt: skip
            v += 1


@compiled
def _multiply_panels(
    counter: int,
    num_rows: int,
    x: int,
    num_inputs: int,
    weights: int,
    num_panels: int,
    start: int,
    start_stride: int,
    out: int,
    out_stride: int,
) -> int:
    """out = start + x W, by all threads together: each takes a few panels after the other. Return how many pieces."""
    panel = 4 * LANES * num_inputs
    width = 4 * LANES
    p = _add_one(counter) * _NUM_VECTORS
    while p < num_panels:
        num_vectors = min(_NUM_VECTORS, num_panels - p)
        for first in range(0, num_rows, _GROUP):
            last = min(first + _GROUP, num_rows)
            num_blocks = (last - first + _MAX_ROWS - 1) // _MAX_ROWS
            for k in range(0, num_inputs, _CHUNK):
                num = min(_CHUNK, num_inputs - k)
                w = weights + p * panel + k * width
                following = _CHUNK * width
                if k + _CHUNK >= num_inputs:
                    # The piece that is to be taken next, perhaps by this thread.
                    following = (_read_shared(counter) * _NUM_VECTORS - p) * panel - k * width
                for block in range(num_blocks):
                    row = first + block * _MAX_ROWS
                    m = min(_MAX_ROWS, last - row)
                    xr = x + 4 * (row * num_inputs + k)
                    outr = out + row * out_stride + p * width
                    sr, ss = (outr, out_stride) if k > 0 else (start + row * start_stride + p * width, start_stride)
                    # Each block of rows asks for a part of them.
                    ahead, ahead_stride = following + num * block // num_blocks * width, width // num_blocks
                    if num_vectors == _NUM_VECTORS:
                        _tiles_x3(
                            m, xr, 4 * num_inputs, w, width, panel, num, sr, ss, outr, out_stride, ahead, ahead_stride
                        )  # fmt: skip
                    else:
                        for v in range(num_vectors):
                            _tiles_x1(
                                m, xr, 4 * num_inputs, w + v * panel, width, panel, num, sr + v * width, ss,
                                outr + v * width, out_stride, ahead, ahead_stride,
                            )  # fmt: skip
        _finish(counter)
        p = _add_one(counter) * _NUM_VECTORS
    return (num_panels + _NUM_VECTORS - 1) // _NUM_VECTORS


@compiled
def _finish(counter: int) -> None:
    """Note that a piece of a phase is done."""
    _add_one(counter + 8)


@compiled
def _wait(counter: int, num_pieces: int) -> int:
    """Wait until all pieces of a phase are done, whoever has done them; return the next phase's counter.

    A thread that another process keeps from its core is not waited for, unless it has begun a piece.
    """
    num_spins = 0
    while _read_shared(counter + 8) < num_pieces:
        num_spins += 1
        _rest(1 if num_spins > _NUM_SPINS else 0)
    return counter + _COUNTER_BYTES


def _exponential(builder: Any, x: Any) -> Any:
    """e ** x of a vector whose numbers are 0 or less, to an ulp or two; e ** -87 stands for what is less than that."""
    fma = _fma(builder)
    least = _constant(-87)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    # 1.5 * 2**23: adding it rounds to a whole number, which then lies in the lowest bits.
    magic = _constant(12582912.0)
    shifted = builder.call(fma, [x, _constant(1.4426950408889634), magic])
    n = builder.fsub(shifted, magic)
    r = builder.call(fma, [n, _constant(-0.693359375), x])
    r = builder.call(fma, [n, _constant(2.12194440e-4), r])
    # Cephes' polynomial for e ** r, between -ln(2) / 2 and ln(2) / 2.
    p = _constant(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = builder.call(fma, [p, r, _constant(factor)])
    p = builder.fadd(builder.call(fma, [builder.fmul(p, r), r, r]), _constant(1))
    bits = builder.add(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [127] * LANES))
    return builder.fmul(p, builder.bitcast(builder.shl(bits, ir.Constant(_INTS, [23] * LANES)), _VECTOR))


@intrinsic
def _largest(_context: Any, address: Any, num_vectors: Any) -> Any:
    """The largest of some vectors' numbers; those that are no numbers are passed over."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        address, num_vectors = arguments
        best = cgutils.alloca_once_value(builder, _load(builder, address))
        with cgutils.for_range(builder, num_vectors) as loop:
            x = _load(builder, _next(builder, address, loop.index))
            held = builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", x, held), x, held), best)
        lanes = [builder.extract_element(builder.load(best), ir.Constant(_INT, lane)) for lane in range(LANES)]
        result = lanes[0]
        for lane in lanes[1:]:
            result = builder.select(builder.fcmp_ordered(">", lane, result), lane, result)
        return result

    return types.float32(types.int64, types.int64), build


@intrinsic
def _soften(_context: Any, address: Any, num_vectors: Any, best: Any, scale: Any) -> Any:
    """Put e ** ((x - best) * scale) in the place of some vectors' numbers x; return their sum."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        address, num_vectors, best, scale = arguments
        best, scale = _spread(builder, best), _spread(builder, scale)
        sums = cgutils.alloca_once_value(builder, _constant(0))
        with cgutils.for_range(builder, num_vectors) as loop:
            place = _next(builder, address, loop.index)
            x = builder.fmul(builder.fsub(_load(builder, place), best), scale)
            weights = _exponential(builder, x)
            _store(builder, weights, place)
            builder.store(builder.fadd(builder.load(sums), weights), sums)
        return _sum_of_lanes(builder, builder.load(sums))

    return types.float32(types.int64, types.int64, types.float32, types.float32), build


@intrinsic
def _gate(_context: Any, gates: Any, passing: Any, out: Any, num_vectors: Any) -> Any:
    """out = SiLU(gates) * passing (arXiv 2002.05202), for some vectors of each."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        gates, passing, out, num_vectors = arguments
        zero, one = _constant(0), _constant(1)
        with cgutils.for_range(builder, num_vectors) as loop:
            x = _load(builder, _next(builder, gates, loop.index))
            is_positive = builder.fcmp_ordered(">", x, zero)
            e = _exponential(builder, builder.select(is_positive, builder.fsub(zero, x), x))
            # 1 / (1 + e^-x), without large exponentials.
            share = builder.fdiv(builder.select(is_positive, one, e), builder.fadd(one, e))
            passed = _load(builder, _next(builder, passing, loop.index))
            _store(builder, builder.fmul(builder.fmul(x, share), passed), _next(builder, out, loop.index))
        return _nothing()

    return types.void(*[types.int64] * 4), build


@intrinsic
def _sum_of_squares(_context: Any, address: Any, num_vectors: Any) -> Any:
    """The sum of the squares of some vectors' numbers."""

    def build(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        address, num_vectors = arguments
        fma = _fma(builder)
        sums = cgutils.alloca_once_value(builder, _constant(0))
        with cgutils.for_range(builder, num_vectors) as loop:
            x = _load(builder, _next(builder, address, loop.index))
            builder.store(builder.call(fma, [x, x, builder.load(sums)]), sums)
        return _sum_of_lanes(builder, builder.load(sums))

    return types.float32(types.int64, types.int64), build


@compiled
def _normalise(source: int, scale: int, target: int, width: int, epsilon: float) -> None:
    """An RMS norm, scale * x / sqrt(mean(x^2) + epsilon) (arXiv 1910.07467), of one row."""
    x, w, out = carray(_floats(source), width), carray(_floats(scale), width), carray(_floats(target), width)
    total = _sum_of_squares(source, width // LANES)
    factor = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
    for i in range(width):
        out[i] = w[i] * (x[i] * factor)


@compiled
def _rotate(address: int, cosine: Any, sine: Any, width: int) -> None:
    """Rotate a head by the angles of its position (arXiv 2104.09864), in place."""
    x = carray(_floats(address), width)
    half = width // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cosine[i] - b * sine[i]
        x[i + half] = b * cosine[i + half] + a * sine[i + half]


@compiled
def _place_heads(job: Table, layer: Table, token: int, epsilon: float) -> None:
    """Norm and rotate a token's queries and keys, and write its keys and values into the cache."""
    num_heads, num_key_heads, width = job[NUM_HEADS], job[NUM_KEY_HEADS], job[HEAD_WIDTH]
    row = job[HEADS] + 4 * token * (num_heads + 2 * num_key_heads) * width
    position = carray(_longs(job[POSITIONS]), job[NUM_TOKENS])[token]
    cosine = carray(_floats(job[COSINE] + 4 * position * width), width)
    sine = carray(_floats(job[SINE] + 4 * position * width), width)
    for head in range(num_heads + num_key_heads):
        address = row + 4 * head * width
        norm = layer[QUERY_NORM] if head < num_heads else layer[KEY_NORM]
        if norm != 0:
            _normalise(address, norm, address, width, epsilon)
        _rotate(address, cosine, sine, width)
    table = carray(_longs(job[TABLES]), job[NUM_TOKENS])[token]
    block = carray(_longs(table + 8 * (position // BLOCK_SIZE)), 1)[0]
    slot = position % BLOCK_SIZE
    new = carray(_floats(row + 4 * num_heads * width), (2, num_key_heads * width))
    size = num_key_heads * width * BLOCK_SIZE
    keys = carray(_floats(layer[KEYS] + 4 * block * size), (num_key_heads * width, BLOCK_SIZE))
    values = carray(_floats(layer[VALUES] + 4 * block * size), (num_key_heads, BLOCK_SIZE, width))
    for i in range(num_key_heads * width):
        keys[i, slot] = new[0, i]
    for head in range(num_key_heads):
        for i in range(width):
            values[head, slot, i] = new[1, head * width + i]


@compiled
def _attend(job: Table, layer: Table, item: int, following: int, scores: int, scale: float) -> None:
    """Attend with one token's queries of one key-value head; ask for the keys of one that may follow."""
    num_heads, num_key_heads, width = job[NUM_HEADS], job[NUM_KEY_HEADS], job[HEAD_WIDTH]
    token, head = item // num_key_heads, item % num_key_heads
    num_queries = num_heads // num_key_heads
    length = carray(_longs(job[POSITIONS]), job[NUM_TOKENS])[token] + 1
    first = max(0, length - layer[WINDOW])
    first_block, num_blocks = first // BLOCK_SIZE, (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    blocks = carray(_longs(carray(_longs(job[TABLES]), job[NUM_TOKENS])[token]), num_blocks)
    queries = job[HEADS] + 4 * (token * (num_heads + 2 * num_key_heads) + head * num_queries) * width
    score_stride = 4 * job[MAX_CONTEXT]
    size = 4 * num_key_heads * width * BLOCK_SIZE
    next_token, next_head = following // num_key_heads, following % num_key_heads
    next_length = carray(_longs(job[POSITIONS]), job[NUM_TOKENS])[next_token] + 1
    next_num_blocks = (next_length + BLOCK_SIZE - 1) // BLOCK_SIZE
    next_blocks = carray(_longs(carray(_longs(job[TABLES]), job[NUM_TOKENS])[next_token]), next_num_blocks)
    # A head's values in a block take as much memory as its keys, at the same place.
    to_values = layer[VALUES] - layer[KEYS]
    b = first_block
    while b < num_blocks:
        # Blocks that lie at even distances are columns of one product.
        step = (blocks[b + 1] - blocks[b]) * size if b + 1 < num_blocks else 0
        is_even = LANES == BLOCK_SIZE and b + 2 < num_blocks and (blocks[b + 2] - blocks[b + 1]) * size == step
        _multiply(
            num_queries, queries, 4 * width,
            layer[KEYS] + blocks[b] * size + 4 * head * width * BLOCK_SIZE, 4 * BLOCK_SIZE,
            step if is_even else 4 * LANES, width, job[ZEROS], 0, scores + 4 * b * BLOCK_SIZE, score_stride,
            _NUM_VECTORS if is_even else BLOCK_SIZE // LANES, to_values,
        )  # fmt: skip
        b += _NUM_VECTORS if is_even else 1
    out = job[ATTENDED] + 4 * (token * num_heads + head * num_queries) * width
    start, start_stride = job[ZEROS], 0
    totals = np.empty(num_queries, np.float32)
    begin, end = first_block * BLOCK_SIZE, num_blocks * BLOCK_SIZE
    for query in range(num_queries):
        address = scores + query * score_stride
        row = carray(_floats(address), end)
        row[begin:first] = _UNSEEN
        row[length:] = _UNSEEN
        num_vectors = (end - begin) // LANES
        best = _largest(address + 4 * begin, num_vectors)
        totals[query] = _soften(address + 4 * begin, num_vectors, best, scale)
    for b in range(first_block, num_blocks):
        begin = max(first, b * BLOCK_SIZE)
        end = min(length, (b + 1) * BLOCK_SIZE)
        place = 4 * (head * BLOCK_SIZE + begin % BLOCK_SIZE) * width
        next_block = next_blocks[min(b, next_num_blocks - 1)]
        to_next = (next_block - blocks[b]) * size + 4 * (next_head - head) * width * BLOCK_SIZE - to_values
        _multiply(
            num_queries, scores + 4 * begin, score_stride,
            layer[VALUES] + blocks[b] * size + place, 4 * width, 4 * LANES, end - begin,
            start, start_stride, out, 4 * width, width // LANES, to_next,
        )  # fmt: skip
        start, start_stride = out, 4 * width
    for query in range(num_queries):
        attended = carray(_floats(out + 4 * query * width), width)
        for i in range(width):
            attended[i] /= totals[query]


@compiled
def _normalise_tokens(counter: int, job: Table, norm: int, epsilon: float) -> None:
    """Norm the residual stream, by all threads together."""
    width = job[HIDDEN_WIDTH]
    i = _add_one(counter)
    while i < job[NUM_TOKENS]:
        _normalise(job[STATES] + 4 * i * width, norm, job[NORMED] + 4 * i * width, width, epsilon)
        _finish(counter)
        i = _add_one(counter)


@compiled
def _embed(counter: int, job: Table) -> None:
    """Begin the residual stream with the tokens' embeddings."""
    width = job[HIDDEN_WIDTH]
    tokens = carray(_longs(job[TOKENS]), job[NUM_TOKENS])
    i = _add_one(counter)
    while i < job[NUM_TOKENS]:
        embedding = carray(_floats(job[EMBEDDING] + 4 * tokens[i] * width), width)
        state = carray(_floats(job[STATES] + 4 * i * width), width)
        for j in range(width):
            state[j] = embedding[j]
        _finish(counter)
        i = _add_one(counter)


@compiled
def _run(address: int) -> None:
    """All phases of a pass; each has a counter of its own, in their order."""
    job = carray(_longs(address), NUM_FIELDS)
    thread = _add_one(job[COUNTERS])
    counter = job[COUNTERS] + _COUNTER_BYTES
    n, hidden, inner = job[NUM_TOKENS], job[HIDDEN_WIDTH], job[INNER_WIDTH]
    num_heads, num_key_heads, width = job[NUM_HEADS], job[NUM_KEY_HEADS], job[HEAD_WIDTH]
    num_head_columns = (num_heads + 2 * num_key_heads) * width
    scores = job[SCORES] + 4 * thread * (num_heads // num_key_heads) * job[MAX_CONTEXT]
    epsilon, scale = carray(_floats(job[EPSILON]), 1)[0], carray(_floats(job[SCALE]), 1)[0]
    layers = carray(_longs(job[LAYERS]), (job[NUM_LAYERS], NUM_LAYER_FIELDS))
    _embed(counter, job)
    counter = _wait(counter, n)
    for number in range(job[NUM_LAYERS]):
        layer = layers[number]
        _normalise_tokens(counter, job, layer[ATTENTION_NORM], epsilon)
        counter = _wait(counter, n)
        num_pieces = _multiply_panels(
            counter, n, job[NORMED], hidden, layer[HEADS_PRODUCT], num_head_columns // LANES,
            layer[HEADS_BIAS], 0, job[HEADS], 4 * num_head_columns,
        )  # fmt: skip
        counter = _wait(counter, num_pieces)
        i = _add_one(counter)
        while i < n:
            _place_heads(job, layer, i, epsilon)
            _finish(counter)
            i = _add_one(counter)
        counter = _wait(counter, n)
        num_threads = _read_shared(job[COUNTERS])
        i = _add_one(counter)
        while i < n * num_key_heads:
            # Threads take turns, more or less.
            following = min(i + num_threads, n * num_key_heads - 1)
            _attend(job, layer, i, following, scores, scale)
            _finish(counter)
            i = _add_one(counter)
        counter = _wait(counter, n * num_key_heads)
        num_pieces = _multiply_panels(
            counter, n, job[ATTENDED], num_heads * width, layer[ATTENDED_PRODUCT], hidden // LANES,
            job[STATES], 4 * hidden, job[STATES], 4 * hidden,
        )  # fmt: skip
        counter = _wait(counter, num_pieces)
        _normalise_tokens(counter, job, layer[INNER_NORM], epsilon)
        counter = _wait(counter, n)
        num_pieces = _multiply_panels(
            counter, n, job[NORMED], hidden, layer[INNER_PRODUCT], 2 * inner // LANES,
            job[ZEROS], 0, job[INNER], 8 * inner,
        )  # fmt: skip
        counter = _wait(counter, num_pieces)
        i = _add_one(counter)
        while i < n:
            gates = job[INNER] + 8 * i * inner
            _gate(gates, gates + 4 * inner, job[GATED] + 4 * i * inner, inner // LANES)
            _finish(counter)
            i = _add_one(counter)
        counter = _wait(counter, n)
        num_pieces = _multiply_panels(
            counter, n, job[GATED], inner, layer[GATED_PRODUCT], hidden // LANES,
            job[STATES], 4 * hidden, job[STATES], 4 * hidden,
        )  # fmt: skip
        counter = _wait(counter, num_pieces)
    rows = carray(_longs(job[ROWS]), job[NUM_ROWS])
    normed = job[NORMED] if job[NUM_PANELS] else job[RESULT]
    i = _add_one(counter)
    while i < job[NUM_ROWS]:
        _normalise(job[STATES] + 4 * rows[i] * hidden, job[FINAL_NORM], normed + 4 * i * hidden, hidden, epsilon)
        _finish(counter)
        i = _add_one(counter)
    counter = _wait(counter, job[NUM_ROWS])
    _multiply_panels(
        counter, job[NUM_ROWS], normed, hidden, job[OUTPUT], job[NUM_PANELS],
        job[ZEROS], 0, job[RESULT], 4 * LANES * job[NUM_PANELS],
    )  # fmt: skip


@compiled
def _run_product(address: int) -> None:
    job = carray(_longs(address), NUM_PRODUCT_FIELDS)
    _multiply_panels(
        address + 8 * PRODUCT_COUNTER, job[PRODUCT_ROWS], job[PRODUCT_INPUT], job[PRODUCT_INPUTS], job[PRODUCT_PANELS],
        job[PRODUCT_NUM_PANELS], job[PRODUCT_BIAS], 0, job[PRODUCT_RESULT], 4 * LANES * job[PRODUCT_NUM_PANELS],
    )  # fmt: skip


def _enter_pass(address: int) -> None:
    _run(address)


def _enter_product(address: int) -> None:
    _run_product(address)


@cache
def _entry(function: Callable[[int], None]) -> Any:
    """A function compiled for the threads of a team to enter with their table's address; held, as its code is."""
    try:
        return cfunc("void(int64)", cache=True, **OPTIONS)(function)
    except RuntimeError:  # no place for a cache: compiled in every process
        return cfunc("void(int64)", **OPTIONS)(function)


def pass_address() -> int:
    """Return the address of the function that computes a pass, compiled at the first call or read from the cache."""
    return int(_entry(_enter_pass).address)


def product_address() -> int:
    """Return the address of the function that computes one product, compiled likewise."""
    return int(_entry(_enter_product).address)
