"""Attention over keys and values that lie in blocks, in Triton: flash attention with split keys.

Scores are never stored; a softmax is carried along as keys come (FlashAttention, arXiv 2205.14135), by several programs
at once where there are few queries, whose parts are joined at the end (Flash-Decoding). Which keys a program takes
depends on the query's own position alone, so what is computed beside a sequence changes nothing for it.

A tile is consecutive tokens of one sequence. Its rows are those tokens, for each of the query heads that share a
key-value head.

Shapes: N tokens of the step, U tiles, S sequences, W blocks of the longest of them, H query heads, K key-value heads,
G query heads to each of these, D key width, E value width, P positions of the cache.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    # They change from step to step, and one binary is to serve all steps.
    do_not_specialize=["num_tiles", "num_sequences"],
    do_not_specialize_on_alignment=["positions", "tiles", "blocks"],
)
def attend(
    query,  # [H, N, D]
    keys,  # [P, K, D]
    values,  # [P, K, E]
    output,  # [N, H, E]
    parts,  # [U, K, splits, rows of a tile, E], float32; unused if there is one split
    states,  # [U, K, splits, 2, padded rows], float32: the largest score and the sum of weights
    positions,  # [N]
    tiles,  # [3, U]: first token, number of tokens, sequence
    blocks,  # [W, S]
    num_tiles,
    num_sequences,
    scale,
    cap,
    window,
    query_head_stride,
    query_token_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,  # K
    GROUP: tl.constexpr,  # G
    TOKENS: tl.constexpr,  # of a tile, at most
    ROWS: tl.constexpr,  # TOKENS * GROUP, padded to a power of two
    KEY_WIDTH: tl.constexpr,
    KEY_LANES: tl.constexpr,  # the width, padded
    VALUE_WIDTH: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    KEYS: tl.constexpr,  # that are taken together
    SPLITS: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """Attend for one tile and key-value head to every SPLITS-th group of keys; grid [U, K, SPLITS]."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    first = tl.load(tiles + tile)
    count = tl.load(tiles + num_tiles + tile).to(tl.int32)
    sequence = tl.load(tiles + 2 * num_tiles + tile)
    start = tl.load(positions + first).to(tl.int32)

    rows = tl.arange(0, ROWS)
    tokens = rows // GROUP
    is_row = tokens < count
    row_positions = start + tokens
    lanes = tl.arange(0, KEY_LANES)
    value_lanes = tl.arange(0, VALUE_LANES)
    query_rows = (head * GROUP + rows % GROUP) * query_head_stride + (first + tokens) * query_token_stride
    queries = tl.load(
        query + query_rows[:, None] + lanes[None, :], mask=is_row[:, None] & (lanes < KEY_WIDTH)[None, :], other=0.0
    )

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, VALUE_LANES], tl.float32)
    end = start + count
    first_group = tl.maximum(start - window + 1, 0) // KEYS
    for group in range(first_group + split, tl.cdiv(end, KEYS), SPLITS):
        seen = group * KEYS + tl.arange(0, KEYS)
        is_key = seen < end
        block = tl.load(blocks + (seen // BLOCK_SIZE) * num_sequences + sequence, mask=is_key, other=0)
        places = (block * BLOCK_SIZE + seen % BLOCK_SIZE) * NUM_HEADS + head
        keys_here = tl.load(
            keys + places[None, :] * KEY_WIDTH + lanes[:, None],
            mask=is_key[None, :] & (lanes < KEY_WIDTH)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys_here, input_precision="ieee") * scale
        if IS_CAPPED:
            # cap * tanh(scores / cap)
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / cap)) + 1.0))
        is_seen = (seen[None, :] <= row_positions[:, None]) & (seen[None, :] > row_positions[:, None] - window)
        scores = tl.where(is_seen & is_key[None, :], scores * LOG2_E, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A row may see none of these keys, nor any before.
        reference = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp2(scores - reference[:, None])
        kept = tl.exp2(largest - reference)
        values_here = tl.load(
            values + places[:, None] * VALUE_WIDTH + value_lanes[None, :],
            mask=is_key[:, None] & (value_lanes < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        total = total * kept + tl.sum(weights, 1)
        products = tl.dot(weights.to(values_here.dtype), values_here, input_precision="ieee")
        attended = attended * kept[:, None] + products
        largest = new_largest

    is_value = is_row[:, None] & (value_lanes < VALUE_WIDTH)[None, :]
    if SPLITS == 1:
        output_rows = ((first + tokens) * NUM_HEADS + head) * GROUP + rows % GROUP
        attended = attended / tl.where(is_row, total, 1.0)[:, None]
        tl.store(
            output + output_rows[:, None] * VALUE_WIDTH + value_lanes[None, :],
            attended.to(output.dtype.element_ty),
            mask=is_value,
        )
    else:
        part = (tile * NUM_HEADS + head) * SPLITS + split
        part_rows = part.to(tl.int64) * (TOKENS * GROUP) + rows
        # What nobody's weight counts is not read either.
        tl.store(
            parts + part_rows[:, None] * VALUE_WIDTH + value_lanes[None, :],
            attended,
            mask=is_value & (total > 0.0)[:, None],
        )
        tl.store(states + part * 2 * ROWS + rows, largest)
        tl.store(states + (part * 2 + 1) * ROWS + rows, total)


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=["tiles"])
def join(
    output,
    parts,
    states,
    tiles,
    num_tiles,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join what the splits of a tile and key-value head attended to; grid [U, K]. Arguments are those of `attend`."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(tiles + tile)
    count = tl.load(tiles + num_tiles + tile).to(tl.int32)
    rows = tl.arange(0, ROWS)
    tokens = rows // GROUP
    is_row = tokens < count
    value_lanes = tl.arange(0, VALUE_LANES)
    is_lane = (value_lanes < VALUE_WIDTH)[None, :]

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, VALUE_LANES], tl.float32)
    for split in range(SPLITS):
        part = (tile * NUM_HEADS + head) * SPLITS + split
        part_largest = tl.load(states + part * 2 * ROWS + rows)
        part_total = tl.load(states + (part * 2 + 1) * ROWS + rows)
        part_rows = part.to(tl.int64) * (TOKENS * GROUP) + rows
        part_attended = tl.load(
            parts + part_rows[:, None] * VALUE_WIDTH + value_lanes[None, :],
            mask=(is_row & (part_total > 0.0))[:, None] & is_lane,
            other=0.0,
        )
        new_largest = tl.maximum(largest, part_largest)
        reference = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        kept = tl.exp2(largest - reference)
        weight = tl.exp2(part_largest - reference)
        total = total * kept + part_total * weight
        attended = attended * kept[:, None] + part_attended * weight[:, None]
        largest = new_largest

    output_rows = ((first + tokens) * NUM_HEADS + head) * GROUP + rows % GROUP
    tl.store(
        output + output_rows[:, None] * VALUE_WIDTH + value_lanes[None, :],
        (attended / tl.where(is_row, total, 1.0)[:, None]).to(output.dtype.element_ty),
        mask=is_row[:, None] & is_lane,
    )
