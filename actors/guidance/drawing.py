"""A step's rows to its tokens: merge, filter and draw, one row at a time, on one thread.

Rows are read where they lie; a row with guides is one copy while it is worked on. What is computed is in `reference`,
how it is computed fast in `kernels` and `filters`. Not among the package's names: numba, which it brings, is for
coordinators only.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.api import Sampling
from actors.guidance.filters import filter_floor
from actors.guidance.kernels import NOTHING, Floats, add_guide, find_best, race
from actors.guidance.merge import Guidance
from actors.guidance.shaping import Shaper

_MASK = 2**32 - 1

_rooms = threading.local()
"""One row's memory for each thread that draws, as long as the thread lives: see `_room`."""


def merge_and_draw(
    base: Sequence[Tensor],
    guidance: Sequence[Sequence[Guidance]],
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    samples: Sequence[int],
    shapers: Sequence[Shaper | None] | None = None,
) -> list[int | None]:
    """Return one token per row; None where the merged logits hold a NaN or their best is not finite.

    token = argmax_v(log p(v) + g_v) over the tokens that the row's filters keep, p = softmax(z / T), z as `merge`
    gives it; the argmax of z where T = 0. Ties go to the lowest token. Frees the interpreter's lock.

    Args:
        base: B rows of the base's logits, each [V], of any floating dtype. Float32 rows are not copied, unless they
            are not contiguous.
        guidance: for each row its guides, always in the same order, since sums round by order.
        samplings: each row's settings.
        positions: each row's position in its output.
        samples: each row's sample index within its request.
        shapers: what changes each row's logits, if anything does.
    """
    rows = zip(base, guidance, samplings, positions, samples, shapers or [None] * len(base), strict=True)
    return [
        _draw(merged(row, guides, shaper), sampling, position, sample)
        for row, guides, sampling, position, sample, shaper in rows
    ]


def warm_up() -> None:
    """Compile the kernels, or load them from numba's cache: seconds or a fraction of one, once per process."""
    row = torch.zeros(8)
    merge_and_draw([row], [[Guidance(1.0, row)]], [Sampling(top_k=4, top_p=0.9, min_p=0.1)], [0], [0])


def merged(base: Tensor, guides: Sequence[Guidance], shaper: Shaper | None = None) -> Floats:
    """Return what a row draws from, float32 [V]: the base's own memory, or, changed, that which the next row takes."""
    z_V = floats(base)
    if guides or shaper is not None:
        base_V, z_V = z_V, _room(len(z_V))
        z_V[:] = base_V
    if shaper is not None:
        shaper.shape_base(z_V)
    for weight, logits_U in guides:
        add_guide(z_V, floats(logits_U), float(weight))
    if shaper is not None:
        shaper.shape_merged(z_V)
    return z_V


def _room(size: int) -> Floats:
    """This thread's memory for a row: fresh pages would take longer than to fill them."""
    room: Floats | None = getattr(_rooms, "room", None)
    if room is None or len(room) < size:
        room = _rooms.room = np.empty(size, np.float32)
    return room[:size]


def _draw(z_V: Floats, sampling: Sampling, position: int, sample: int) -> int | None:
    maxima, best_block = find_best(z_V)
    if best_block == NOTHING:
        return None
    if sampling.is_greedy:
        return 4 * best_block + int(z_V[4 * best_block : 4 * best_block + 4].argmax())
    temperature = float(sampling.temperature)
    floor, end = filter_floor(
        z_V,
        maxima,
        float(maxima[best_block]),
        temperature,
        min(sampling.top_k, len(z_V)),
        float(sampling.top_p),
        float(sampling.min_p),
    )
    key = sampling.seed & _MASK, sampling.seed >> 32 & _MASK
    return race(z_V, maxima, best_block, temperature, floor, end, key, position, sample)


def floats(row: Tensor) -> Floats:
    """Return the row's own memory, if it is contiguous float32, else a copy that is."""
    array: Floats = row.detach().to("cpu", torch.float32).contiguous().numpy()
    return array
