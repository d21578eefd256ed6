"""What numba compiles for the CPU: attention of decoding jobs (attention/decode.py), the softmax of prompts
(attention/dense.py), RMS norms.

What stands here is never run as Python. It is all in one file, for that alone is what numba looks at to see whether
what it kept on disk is still right.
"""

# numba's typing of its own functions is not mypy's.
# mypy: disable-error-code="call-arg,assignment,return-value,unreachable,var-annotated"

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.types import literal
from numba.extending import intrinsic

BLOCK = 256  # tokens whose scores are held at a time
NORM_BLOCK = 16  # numbers of a row at a time
_LANES = 16  # of a sum, as wide as vectors get
# What the compiler may do with sums. NaN stays NaN: it is how a broken model shows.
_FAST = ("reassoc", "contract", "nsz", "arcp")
# numba gives these to all there is; a product and a sum in one would round otherwise than torch's, see _turned.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {*_FAST} - {"contract"}}
# Of e^r for |r| <= ln(2) / 2, the highest power's first: Cephes' polynomial, to float32's last bits, and one whose
# error is 4e-5, enough for a bfloat16.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0)
_EXP_HALF = (1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_FLOAT, _HALF, _WORD = ir.FloatType(), ir.IntType(16), ir.IntType(32)

Kernel = Callable[..., None]


def take_threads(wanted: int) -> int:
    """How many of the threads that a kernel wants it gets: no more than torch's operators have in this thread."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = min(torch.get_num_threads(), most, wanted)
    numba.set_num_threads(threads)
    return threads


# Each is compiled when it is first asked for on a machine.


@functools.cache
def attention_kernel(dim: int, width: int) -> Kernel:
    """`_attend` for heads of `dim` numbers of `width` bytes.

    Each thread reads whole rows of its tokens' keys, then of their values, in blocks whose scores stay in the nearest
    cache (online softmax, as FlashAttention has it); a context that is cut among threads is put together at the end.
    """
    number, table, address = types.int64, types.Array(types.int64, 2, "C"), types.int64
    shape = (literal(dim), literal(width), number, number, number, number)
    arguments = (*shape, table, address, table, table, types.Array(number, 1, "C"), address, types.float32)
    return _compiled(_attend, arguments, parallel=True)


@functools.cache
def norm_kernel(width: int) -> Kernel:
    """`_norm` of rows of numbers of `width` bytes."""
    number, address = types.int64, types.int64
    arguments = (literal(width), number, number, number, address, address, address, types.float32)
    return _compiled(_norm, arguments, parallel=True)


@functools.cache
def softmax_kernel(width: int) -> Kernel:
    """`_soften` of numbers of `width` bytes."""
    number, address = types.int64, types.int64
    return _compiled(_soften, (literal(width), *[number] * 6, address, address), parallel=True)


def _compiled(function: Kernel, arguments: tuple[Any, ...], **options: Any) -> Kernel:
    try:
        kernel = njit(cache=True, **_OPTIONS, **options)(function)
    except RuntimeError:  # there is no directory where it could be kept
        kernel = njit(**_OPTIONS, **options)(function)
    compiled: Kernel = kernel.compile(arguments)
    return compiled


def _norm(width: int, threads: int, rows: int, length: int, x: int, weight: int, out: int, epsilon: float) -> None:
    """Each row of x divided by the root of its mean square, rounded, times weight. length: a multiple of NORM_BLOCK."""
    if threads == 1:
        _norm_rows(width, 0, rows, length, x, weight, out, epsilon)
    else:
        for thread in prange(threads):
            first, behind = rows * thread // threads, rows * (thread + 1) // threads
            _norm_rows(width, first, behind, length, x, weight, out, epsilon)


@njit(**_OPTIONS)
def _norm_rows(width: int, first: int, behind: int, length: int, x: int, weight: int, out: int, epsilon: float) -> None:
    row_bytes = length * width
    for row in range(x + first * row_bytes, x + behind * row_bytes, row_bytes):
        total = np.float32(0)
        for i in range(0, row_bytes, NORM_BLOCK * width):
            total += _square(NORM_BLOCK, width, row + i)
        scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(length) + epsilon))
        for i in range(0, row_bytes, NORM_BLOCK * width):
            _scale_by_row(NORM_BLOCK, width, out + row - x + i, row + i, scale, weight + i)


def _soften(
    width: int, threads: int, rows: int, length: int, queries: int, seen: int, window: int, scores: int, shares: int
) -> None:
    """Scores of rows become weights: e^(score - the row's largest), 0 where a query does not see; not yet divided by
    their sum, of which the reciprocal is noted.

    scores: address of [rows, length]; shares: of [rows] float32. Row i is of query i % queries; the first one sees
    the first `seen` columns, each other one more than the one before it, and none more than the last `window` of them.
    """
    if threads == 1:
        for row in range(rows):
            _soften_row(width, length, seen + row % queries, window, scores + row * length * width, shares + row * 4)
    else:
        for thread in prange(threads):
            for row in range(rows * thread // threads, rows * (thread + 1) // threads):
                own = scores + row * length * width
                _soften_row(width, length, seen + row % queries, window, own, shares + row * 4)


@njit(**_OPTIONS)
def _soften_row(width: int, length: int, end: int, window: int, scores: int, share: int) -> None:
    """Of `length` scores, only those of the last `window` columns before `end` count."""
    start, whole = max(0, end - window), length // _LANES * _LANES  # what follows is no whole vector
    first, behind = start // _LANES * _LANES, min((end + _LANES - 1) // _LANES * _LANES, whole)
    own, count, before, until = scores + first * width, (behind - first) // _LANES, start - first, end - first
    top = _largest(_LANES, width, own, count, before, until)
    for i in range(max(start, whole), end):
        top = max(top, _get_number(width, scores + i * width))
    _clear_numbers(_LANES, width, scores, first // _LANES)
    total = _weigh(_LANES, width, own, count, before, until, top)
    _clear_numbers(_LANES, width, scores + behind * width, (whole - behind) // _LANES)
    for i in range(whole, length):
        weight = _exp(_get_number(width, scores + i * width) - top) if start <= i < end else np.float32(0)
        total += weight
        _put_number(width, scores + i * width, weight)
    _put(share, np.float32(1) / total)


def _attend(
    dim: int,
    width: int,
    heads: int,
    kv_heads: int,
    layer: int,
    place: int,
    rows: Any,
    out: int,
    places: Any,
    parts: Any,
    bounds: Any,
    scratch: int,
    scale: float,
) -> None:
    """rows: addresses and steps in bytes of query, key, value, raw key; then the addresses of cos and sin, see
    Rotary.half_turn, or 0 where query and key are rotated. out: address of [jobs, heads, dim] float32.

    layer: of the model; place: the same among the layers whose KV lies together. places: of each job, see _place.
    parts, bounds: see share_out. scratch: address of memory, see Decoding.
    """
    threads = len(bounds) - 1
    step = heads * (dim + 2)  # of each part what it found, and by head the sum of its weights and its largest score
    own_step = heads * (dim + BLOCK)  # of each thread, see _attend_part
    found, own = scratch, scratch + len(parts) * step * 4
    if threads == 1:
        for part in range(len(parts)):
            into = found + part * step * 4
            _attend_part(dim, width, heads, kv_heads, layer, place, rows, places, parts[part], scale, own, into)
    else:
        for thread in prange(threads):
            for part in range(bounds[thread], bounds[thread + 1]):
                into = found + part * step * 4
                queries = own + thread * own_step * 4
                _attend_part(dim, width, heads, kv_heads, layer, place, rows, places, parts[part], scale, queries, into)
    first = 0
    while first < len(parts):
        behind = first + 1
        while behind < len(parts) and parts[behind, 0] == parts[first, 0]:
            behind += 1
        for h in range(heads):
            top, total, whole = np.float32(-np.inf), np.float32(0), out + (parts[first, 0] * heads + h) * dim * 4
            for part in range(first, behind):
                top = max(top, _get(found + (part * step + heads * (dim + 1) + h) * 4))
            _clear_row(dim, whole)
            for part in range(first, behind):
                weight = _exp(_get(found + (part * step + heads * (dim + 1) + h) * 4) - top)
                total += weight * _get(found + (part * step + heads * dim + h) * 4)
                _add_scaled(dim, 4, whole, weight, found + (part * step + h * dim) * 4)
            _scale_row(dim, whole, np.float32(1) / total)
        first = behind


@njit(**_OPTIONS)
def _attend_part(
    dim: int,
    width: int,
    heads: int,
    kv_heads: int,
    layer: int,
    place: int,
    rows: Any,
    places: Any,
    part: Any,
    scale: float,
    queries: int,
    found: int,
) -> None:
    """Of one job, over some of its tokens. All that has an address is float32.

    queries: for the queries [heads, dim] and the scores of a block [heads, BLOCK]. found: for what is found
    [heads, dim], the sums of weights [heads] and the largest scores [heads].
    """
    group, head, row = heads // kv_heads, dim * width, kv_heads * dim * width
    job, start, end = part[0], part[1], part[2]
    keys, values = places[job, 0] + place * places[job, 1], places[job, 2] + place * places[job, 3]
    raw, past = places[job, 4], places[job, 6]
    is_turned = rows[4, 0] == 0
    cos, sin = rows[4, 0] + past * head, rows[4, 1] + past * head
    if end == past + 1:
        for h in range(kv_heads):
            key = rows[1, 0] + job * rows[1, 1] + h * head
            if is_turned:
                _copy_row(dim, width, keys + past * row + h * head, key)
            else:
                _turn_row(dim, width, keys + past * row + h * head, key, cos, sin)
            _copy_row(dim, width, values + past * row + h * head, rows[2, 0] + job * rows[2, 1] + h * head)
            if raw:
                new = raw + layer * places[job, 5]
                _copy_row(dim, width, new + h * head, rows[3, 0] + job * rows[3, 1] + h * head)
    sums, tops = found + heads * dim * 4, found + heads * (dim + 1) * 4
    scores = queries + heads * dim * 4
    for h in range(heads):
        query = rows[0, 0] + job * rows[0, 1] + h * head
        if is_turned:
            _widen(dim, width, queries + h * dim * 4, query)
        else:
            _turn_wide(dim, width, queries + h * dim * 4, query, cos, sin)
        _scale_row(dim, queries + h * dim * 4, scale)
        _clear_row(dim, found + h * dim * 4)
        _put(sums + h * 4, np.float32(0))
        _put(tops + h * 4, np.float32(-np.inf))
    for block in range(start, end, BLOCK):
        tokens = min(BLOCK, end - block)
        for t in range(tokens):
            for h in range(kv_heads):
                key = keys + (block + t) * row + h * head
                for g in range(h * group, h * group + group):
                    _put(scores + (g * BLOCK + t) * 4, _dot(dim, width, queries + g * dim * 4, key))
        for h in range(heads):
            own, top = scores + h * BLOCK * 4, _get(tops + h * 4)
            higher = top
            for t in range(tokens):
                higher = max(higher, _get(own + t * 4))
            fade = _exp(top - higher)
            total = _get(sums + h * 4) * fade
            _scale_row(dim, found + h * dim * 4, fade)
            for t in range(tokens):
                weight = _exp(_get(own + t * 4) - higher)
                _put(own + t * 4, weight)
                total += weight
            _put(tops + h * 4, higher)
            _put(sums + h * 4, total)
        for t in range(tokens):
            for h in range(kv_heads):
                value = values + (block + t) * row + h * head
                for g in range(h * group, h * group + group):
                    _add_scaled(dim, width, found + g * dim * 4, _get(scores + (g * BLOCK + t) * 4), value)


# Numbers and rows of numbers by address. Rows are whole vectors, which the compiler does not make by itself of loops
# over them. Those of queries and results are float32; those of keys and values have numbers of `width` bytes, where 2
# are a bfloat16.


@intrinsic
def _get(typing: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _FLOAT.as_pointer()), align=4)

    return types.float32(types.int64), emit


@intrinsic
def _put(typing: Any, address: Any, number: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _FLOAT.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), emit


@intrinsic
def _exp(typing: Any, x: Any) -> Any:
    """e^x for x <= 0."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(_exponential(builder, _all(builder, args[0], 1), _EXP), _WORD(0))

    return types.float32(types.float32), emit


@intrinsic(prefer_literal=True)
def _dot(typing: Any, dim: Any, width: Any, query: Any, key: Any) -> Any:
    length = dim.literal_value

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        products = builder.fmul(_load(builder, args[2], length), _load(builder, args[3], length, width), flags=_FAST)
        return _total(builder, products, length)

    return types.float32(dim, width, types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def _add_scaled(typing: Any, dim: Any, width: Any, found: Any, weight: Any, value: Any) -> Any:
    length = dim.literal_value

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        added = builder.fmul(_all(builder, args[3], length), _load(builder, args[4], length, width), flags=_FAST)
        _store(builder, args[2], builder.fadd(_load(builder, args[2], length), added, flags=_FAST))
        return context.get_dummy_value()

    return types.void(dim, width, types.int64, types.float32, types.int64), emit


@intrinsic(prefer_literal=True)
def _scale_row(typing: Any, dim: Any, row: Any, factor: Any) -> Any:
    length = dim.literal_value

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[1], builder.fmul(_load(builder, args[1], length), _all(builder, args[2], length)))
        return context.get_dummy_value()

    return types.void(dim, types.int64, types.float32), emit


@intrinsic(prefer_literal=True)
def _clear_row(typing: Any, dim: Any, row: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[1], ir.Constant(ir.VectorType(_FLOAT, dim.literal_value), None))
        return context.get_dummy_value()

    return types.void(dim, types.int64), emit


@intrinsic(prefer_literal=True)
def _widen(typing: Any, dim: Any, width: Any, to: Any, source: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[2], _load(builder, args[3], dim.literal_value, width))
        return context.get_dummy_value()

    return types.void(dim, width, types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def _copy_row(typing: Any, dim: Any, width: Any, to: Any, source: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(ir.IntType(8), dim.literal_value * width.literal_value).as_pointer()
        taken = builder.load(builder.inttoptr(args[3], kind), align=2)
        builder.store(taken, builder.inttoptr(args[2], kind), align=2)
        return context.get_dummy_value()

    return types.void(dim, width, types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def _turn_row(typing: Any, dim: Any, width: Any, to: Any, source: Any, cos: Any, sin: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[2], _turned(builder, args[3:], dim.literal_value, width), width)
        return context.get_dummy_value()

    return types.void(dim, width, types.int64, types.int64, types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def _turn_wide(typing: Any, dim: Any, width: Any, to: Any, source: Any, cos: Any, sin: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[2], _turned(builder, args[3:], dim.literal_value, width))
        return context.get_dummy_value()

    return types.void(dim, width, types.int64, types.int64, types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def _square(typing: Any, length: Any, width: Any, row: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = _load(builder, args[2], length.literal_value, width)
        return _total(builder, builder.fmul(loaded, loaded, flags=_FAST), length.literal_value)

    return types.float32(length, width, types.int64), emit


@intrinsic(prefer_literal=True)
def _scale_by_row(typing: Any, length: Any, width: Any, to: Any, row: Any, scale: Any, weight: Any) -> Any:
    """row times scale, rounded, times weight."""
    count = length.literal_value

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scaled = builder.fmul(_load(builder, args[3], count, width), _all(builder, args[4], count))
        scaled = builder.fmul(_rounded(builder, scaled, width), _load(builder, args[5], count, width))
        _store(builder, args[2], _rounded(builder, scaled, width), width)
        return context.get_dummy_value()

    return types.void(length, width, types.int64, types.int64, types.float32, types.int64), emit


@intrinsic(prefer_literal=True)
def _get_number(typing: Any, width: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(_load(builder, args[1], 1, width), _WORD(0))

    return types.float32(width, types.int64), emit


@intrinsic(prefer_literal=True)
def _put_number(typing: Any, width: Any, address: Any, number: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[1], _rounded(builder, _all(builder, args[2], 1), width), width)
        return context.get_dummy_value()

    return types.void(width, types.int64, types.float32), emit


@intrinsic(prefer_literal=True)
def _clear_numbers(typing: Any, lanes: Any, width: Any, address: Any, count: Any) -> Any:
    """`count` times `lanes` numbers."""
    length = lanes.literal_value

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with _each_block(builder, args[2], args[3], length, width) as (address, _):
            _store(builder, address, ir.Constant(ir.VectorType(_FLOAT, length), None), width)
        return context.get_dummy_value()

    return types.void(lanes, width, types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def _largest(typing: Any, lanes: Any, width: Any, address: Any, count: Any, start: Any, end: Any) -> Any:
    """Of `count` times `lanes` numbers, those before `start` and from `end` on left out."""
    length = lanes.literal_value
    nothing = ir.Constant(ir.VectorType(_FLOAT, length), [-math.inf] * length)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = cgutils.alloca_once_value(builder, nothing)
        with _each_block(builder, args[2], args[3], length, width) as (address, first):
            is_seen = _between(builder, first, args[4], args[5], length)
            scores = builder.select(is_seen, _load(builder, address, length, width), nothing)
            builder.store(_larger(builder, scores, builder.load(found)), found)
        return _fold(builder, builder.load(found), length, _larger)

    return types.float32(lanes, width, *[types.int64] * 4), emit


@intrinsic(prefer_literal=True)
def _weigh(typing: Any, lanes: Any, width: Any, address: Any, count: Any, start: Any, end: Any, top: Any) -> Any:
    """Of `count` times `lanes` numbers each becomes e^(number - top), or 0 before `start` and from `end` on. Returns
    their sum."""
    length = lanes.literal_value
    nothing = ir.Constant(ir.VectorType(_FLOAT, length), None)
    factors = _EXP if width.literal_value == 4 else _EXP_HALF

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = cgutils.alloca_once_value(builder, nothing)
        top = _all(builder, args[6], length)
        with _each_block(builder, args[2], args[3], length, width) as (address, first):
            scores = builder.fsub(_load(builder, address, length, width), top)
            is_seen = _between(builder, first, args[4], args[5], length)
            weights = builder.select(is_seen, _exponential(builder, scores, factors), nothing)
            builder.store(builder.fadd(builder.load(found), weights, flags=_FAST), found)
            _store(builder, address, _nearly_rounded(builder, weights, width), width)
        return _total(builder, builder.load(found), length)

    return types.float32(lanes, width, *[types.int64] * 4, types.float32), emit


@contextlib.contextmanager
def _each_block(builder: Any, address: Any, count: Any, length: int, width: Any) -> Iterator[tuple[Any, Any]]:
    """A loop over `count` blocks of `length` numbers: each one's address, and the index of its first number."""
    with cgutils.for_range(builder, count) as loop:
        first = builder.mul(loop.index, ir.Constant(loop.index.type, length))
        bytes_before = builder.mul(first, ir.Constant(first.type, width.literal_value))
        yield builder.add(address, bytes_before), first


def _between(builder: Any, first: Any, start: Any, end: Any, length: int) -> Any:
    """For each lane, of which the first has index `first`, whether its index is in start..end-1."""
    words = ir.VectorType(_WORD, length)
    lanes = ir.Constant(words, [*range(length)])
    start, end = (_all(builder, builder.trunc(builder.sub(border, first), _WORD), length) for border in (start, end))
    return builder.and_(builder.icmp_signed(">=", lanes, start), builder.icmp_signed("<", lanes, end))


def _exponential(builder: Any, row: Any, factors: Sequence[float]) -> Any:
    """e^x for x <= 0: 2^n e^r, the latter by a polynomial."""
    count = row.type.count
    floats, words = row.type, ir.VectorType(_WORD, count)

    def constant(number: float) -> Any:
        return ir.Constant(floats, [float(np.float32(number))] * count)

    least = constant(-87)
    row = builder.select(builder.fcmp_ordered("<", row, least), least, row)
    turns = builder.fadd(builder.fmul(row, constant(1 / math.log(2)), flags=_FAST), constant(-0.5), flags=_FAST)
    power = builder.fptosi(turns, words)
    n = builder.sitofp(power, floats)
    r = builder.fadd(row, builder.fmul(n, constant(-0.693359375), flags=_FAST), flags=_FAST)
    r = builder.fadd(r, builder.fmul(n, constant(2.12194440e-4), flags=_FAST), flags=_FAST)
    p = constant(factors[0])
    for factor in factors[1:]:
        p = builder.fadd(builder.fmul(p, r, flags=_FAST), constant(factor), flags=_FAST)
    bits = builder.shl(builder.add(power, ir.Constant(words, [127] * count)), ir.Constant(words, [23] * count))
    return builder.fmul(p, builder.bitcast(bits, floats))


def _nearly_rounded(builder: Any, row: Any, width: Any) -> Any:
    """Numbers that are not negative, as `_rounded`, but halfway to the larger one: a third of the operations."""
    if width.literal_value == 4:
        return row
    words = ir.VectorType(_WORD, row.type.count)
    half = ir.Constant(words, [0x8000] * row.type.count)
    return builder.bitcast(builder.add(builder.bitcast(row, words), half), row.type)


def _turned(builder: Any, addresses: Any, length: int, width: Any) -> Any:
    """A head rotated: source * cos + source with its halves exchanged * sin, each rounded as torch does it."""
    source, cos, sin = (_load(builder, address, length, width) for address in addresses)
    exchanged = [*range(length // 2, length), *range(length // 2)]
    turned = builder.shuffle_vector(source, source, ir.Constant(ir.VectorType(_WORD, length), exchanged))
    straight = _rounded(builder, builder.fmul(source, cos), width)
    return _rounded(builder, builder.fadd(straight, _rounded(builder, builder.fmul(turned, sin), width)), width)


def _rounded(builder: Any, row: Any, width: Any) -> Any:
    """To numbers of the model's type, still as float32: to the nearest, halfway to the even one; NaN stays NaN."""
    if width.literal_value == 4:
        return row
    words = ir.VectorType(_WORD, row.type.count)
    constant = {n: ir.Constant(words, [n] * row.type.count) for n in (1, 16, 0x7FFF, 0xFFFF0000, 0x7FC00000)}
    bits = builder.bitcast(row, words)
    odd = builder.and_(builder.lshr(bits, constant[16]), constant[1])
    bits = builder.and_(builder.add(builder.add(bits, constant[0x7FFF]), odd), constant[0xFFFF0000])
    is_none = builder.fcmp_unordered("uno", row, row)
    return builder.bitcast(builder.select(is_none, constant[0x7FC00000], bits), row.type)


def _load(builder: Any, address: Any, length: int, width: Any = None) -> Any:
    """A row as float32. width: of numbers of the model's type."""
    floats = ir.VectorType(_FLOAT, length)
    if width is None or width.literal_value == 4:
        return builder.load(builder.inttoptr(address, floats.as_pointer()), align=4)
    # A bfloat16 is the upper half of a float32.
    halves = builder.load(builder.inttoptr(address, ir.VectorType(_HALF, length).as_pointer()), align=2)
    words = ir.VectorType(_WORD, length)
    return builder.bitcast(builder.shl(builder.zext(halves, words), ir.Constant(words, [16] * length)), floats)


def _store(builder: Any, address: Any, row: Any, width: Any = None) -> None:
    """width: of numbers of the model's type, to which the row is rounded already."""
    if width is not None and width.literal_value == 2:
        words, halves = (ir.VectorType(kind, row.type.count) for kind in (_WORD, _HALF))
        bits = builder.lshr(builder.bitcast(row, words), ir.Constant(words, [16] * row.type.count))
        row = builder.trunc(bits, halves)
    builder.store(row, builder.inttoptr(address, row.type.as_pointer()), align=2)


def _total(builder: Any, row: Any, length: int) -> Any:
    """The sum of its numbers."""
    return _fold(builder, row, length, lambda builder, a, b: builder.fadd(a, b, flags=_FAST))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _fold(builder: Any, row: Any, length: int, of: Callable[[Any, Any, Any], Any]) -> Any:
    """A row's numbers put together by twos."""
    lanes = math.gcd(length, _LANES)
    parts = [_part(builder, row, start, lanes) for start in range(0, length, lanes)]
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [pair[0] if len(pair) == 1 else of(builder, *pair) for pair in pairs]
    while lanes > 1:
        lanes //= 2
        parts = [of(builder, *(_part(builder, parts[0], start, lanes) for start in (0, lanes)))]
    return builder.extract_element(parts[0], _WORD(0))


def _all(builder: Any, number: Any, length: int) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(number.type, length), ir.Undefined), number, _WORD(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_WORD, length), [0] * length))


def _part(builder: Any, row: Any, start: int, lanes: int) -> Any:
    return builder.shuffle_vector(row, row, ir.Constant(ir.VectorType(_WORD, lanes), [*range(start, start + lanes)]))
