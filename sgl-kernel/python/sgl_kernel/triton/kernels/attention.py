"""Paged attention in Triton: one kernel for prompts and single queries, and the merge of its parts.

A program takes a tile of queries of one request with all query heads of one kv head, and a range
of keys; `sgl_kernel.triton.work` cuts a step into such items. K and V are read through the block
table, from one plane or from segments at any addresses. Sums are float32. See docs/gpu.md,
Note [Triton attention]. Checked in Triton's interpreter and compiled for sm_90; not yet run on a
GPU.

Legend: M rows of a tile (query, head of the group), N keys of a block, D head dim, E value dim.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Columns of a work item, int32.
REQUEST = tl.constexpr(0)
ROW = tl.constexpr(1)
QUERIES = tl.constexpr(2)
POSITION = tl.constexpr(3)
FIRST_KEY = tl.constexpr(4)
END_KEY = tl.constexpr(5)
PART = tl.constexpr(6)
ITEM_COLUMNS = tl.constexpr(8)

# What a query sees besides the causal cut: all, the last `span` keys, those of its chunk of `span`.
FULL = tl.constexpr(0)
SLIDING = tl.constexpr(1)
CHUNKED = tl.constexpr(2)


@triton.jit
def _first_seen(position, span, SIGHT: tl.constexpr):
    if SIGHT == SLIDING:
        return tl.maximum(position - span + 1, 0)
    elif SIGHT == CHUNKED:
        return position - position % span
    else:
        return position * 0


@triton.jit
def key_pointers(
    base, pages, key, offs_n, columns, segment_pages, valid,
    STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    KV_TYPE: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Pointers [N, columns] of keys [key, key + N), counted from the table's first position.

    A slot has STRIDE numbers. `key` is a multiple of N, which is a power of two. A block within one
    page costs one look at the table, and its addresses are a base and constant strides; smaller
    pages cost a look a key. The compiler can't know that segments begin at multiples of 16 bytes,
    and would load element by element. Pages are divided in 32 bits and then widened: a GPU divides
    64 bits by a subroutine.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(pages + key // PAGE_SIZE)
        place = key % PAGE_SIZE
        plane = base
        if SEGMENTED:
            segment = page // segment_pages
            page -= segment * segment_pages
            address = tl.multiple_of(tl.load(base + segment), 16)
            plane = tl.multiple_of(address.to(tl.pointer_type(KV_TYPE)), 16)
        slot = page.to(tl.int64) * PAGE_SIZE + place
        return (plane + slot * STRIDE) + (offs_n * STRIDE)[:, None] + columns[None, :]
    else:
        places = key + offs_n
        page = tl.load(pages + places // PAGE_SIZE, mask=valid, other=0)
        if SEGMENTED:
            segment = page // segment_pages
            page -= segment * segment_pages
            address = tl.multiple_of(tl.load(base + segment, mask=valid, other=0), [16])
            plane = tl.multiple_of(address.to(tl.pointer_type(KV_TYPE)), [16])
            slots = plane + (page.to(tl.int64) * PAGE_SIZE + places % PAGE_SIZE) * STRIDE
        else:
            slots = base + (page.to(tl.int64) * PAGE_SIZE + places % PAGE_SIZE) * STRIDE
        return slots[:, None] + columns[None, :]


@triton.jit
def _widened(x, COMPUTE_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr):
    """K or V as it is multiplied. Nothing is rounded where x has a byte.

    Bytes go by float32, whose instructions round two numbers at a time: the compiler's own way from
    float16 to bfloat16 is a conversion for each number, in the unit that also does `exp2`.
    """
    if x.dtype.primitive_bitwidth == 8:
        x = x.to(tl.float32)
    return x.to(COMPUTE_TYPE).to(DOT_TYPE)


@triton.jit
def _attend(
    acc, top, total, q, q_rest, k_base, v_base, pages, positions, begin, end, lo, hi, origin, head,
    segment_pages, span, scale, logit_cap,
    MASKED: tl.constexpr, SIGHT: tl.constexpr, CAPPED: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, KV_TYPE: tl.constexpr, SEGMENTED: tl.constexpr,
    COMPUTE_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The blocks of keys that begin in [begin, end) join the running softmax of the tile.

    Places count from `origin`, the table's first position. MASKED: keys outside [lo, hi) are not
    read, and every row sees what its own position allows. Else every row sees every key. LATENT: a
    slot is one row for all heads, of which the first E numbers are the values, too; they are loaded
    once, and the others beside them, since D is no power of two and the next one is far.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    offs_r = VALUE_DIM + tl.arange(0, BLOCK_R)
    # What of a slot is loaded first, and where it begins.
    SLOT: tl.constexpr = HEAD_DIM if LATENT else KV_HEADS * HEAD_DIM
    WIDTH: tl.constexpr = VALUE_DIM if LATENT else HEAD_DIM
    first = 0 if LATENT else head * HEAD_DIM
    for start in range(begin, end, BLOCK_N):
        key = tl.multiple_of(start, BLOCK_N)
        places = key + offs_n
        valid = places >= 0
        if MASKED:
            valid = (places >= lo) & (places < hi)
        k_at = key_pointers(
            k_base, pages, key, offs_n, first + offs_d, segment_pages, valid,
            SLOT, PAGE_SIZE, BLOCK_N, KV_TYPE, SEGMENTED,
        )  # fmt: skip
        if MASKED:
            k = tl.load(k_at, mask=valid[:, None] & (offs_d < WIDTH)[None, :], other=0.0)
        elif WIDTH < BLOCK_D:
            k = tl.load(k_at, mask=(offs_d < WIDTH)[None, :], other=0.0)
        else:
            k = tl.load(k_at)
        k = _widened(k, COMPUTE_TYPE, DOT_TYPE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if LATENT:
            rest_at = key_pointers(
                k_base, pages, key, offs_n, offs_r, segment_pages, valid,
                SLOT, PAGE_SIZE, BLOCK_N, KV_TYPE, SEGMENTED,
            )  # fmt: skip
            in_row = (offs_r < HEAD_DIM)[None, :]
            rest = tl.load(rest_at, mask=valid[:, None] & in_row, other=0.0)
            rest = _widened(rest, COMPUTE_TYPE, DOT_TYPE)
            scores = tl.dot(q_rest, tl.trans(rest), scores, input_precision=PRECISION)
        # Scores times `unit` are logarithms to base 2: one product with the difference, in one go.
        unit = scale * LOG2E
        if CAPPED:
            x = scores * (scale / logit_cap)
            decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
            scores = tl.where(x < 0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
            unit = logit_cap * LOG2E
        if MASKED:
            at = (places + origin)[None, :]
            seen = valid[None, :] & (at <= positions[:, None])
            if SIGHT != FULL:
                seen &= at >= _first_seen(positions, span, SIGHT)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * unit)
        base = new_top
        if MASKED:  # a row that has seen nothing yet has nothing to subtract
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * unit - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        top = new_top
        if LATENT:
            v = k
        else:
            v_at = key_pointers(
                v_base, pages, key, offs_n, head * VALUE_DIM + offs_e, segment_pages, valid,
                KV_HEADS * VALUE_DIM, PAGE_SIZE, BLOCK_N, KV_TYPE, SEGMENTED,
            )  # fmt: skip
            if MASKED:
                v = tl.load(v_at, mask=valid[:, None] & (offs_e < VALUE_DIM)[None, :], other=0.0)
            elif VALUE_DIM < BLOCK_E:
                v = tl.load(v_at, mask=(offs_e < VALUE_DIM)[None, :], other=0.0)
            else:
                v = tl.load(v_at)
            v = _widened(v, COMPUTE_TYPE, DOT_TYPE)
        weights = weights.to(COMPUTE_TYPE).to(DOT_TYPE)
        acc = tl.dot(weights, v, acc * fade[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, part_lse_ptr, lse_ptr, sinks_ptr,
    items_ptr, table_starts_ptr, origins_ptr, pages_ptr,
    q_stride, segment_pages, span, scale, logit_cap, v_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, LATENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SIGHT: tl.constexpr, CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    SEGMENTED: tl.constexpr, KV_TYPE: tl.constexpr, COMPUTE_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program w * KV_HEADS + g: item w with the query heads of kv head g.

    LATENT: all query heads read the rows of one kv head, GROUP of them in a program, so that
    KV_HEADS counts programs. BLOCK_R is the width of what of a row is no value.

    An item without queries is padding. One whose PART is -1 is the only part of its queries and
    writes the output, times `v_scale`; the others write float32 parts for `merge_parts_kernel`,
    which does that. Strides count elements. Q, K, V and weights are rounded to COMPUTE_TYPE and
    multiplied as DOT_TYPE, which is the same but in the interpreter, whose products of bfloat16 are
    those of its bits.
    """
    program = tl.program_id(0)
    # The heads of a slot lie side by side, so programs beside each other read the same lines.
    head = program % KV_HEADS
    item = items_ptr + (program // KV_HEADS) * ITEM_COLUMNS
    queries = tl.load(item + QUERIES)
    if queries == 0:
        return
    request = tl.load(item + REQUEST)
    first_row = tl.load(item + ROW)
    position = tl.load(item + POSITION)
    part = tl.load(item + PART)
    origin = tl.load(origins_ptr + request)
    pages = pages_ptr + tl.load(table_starts_ptr + request)
    lo = tl.load(item + FIRST_KEY) - origin
    hi = tl.load(item + END_KEY) - origin

    rows = tl.arange(0, BLOCK_M)
    query = rows // GROUP
    in_tile = query < queries
    # Rows of padding stand where the first query does: they compute, and are not written.
    positions = tl.where(in_tile, position + query, position)
    heads = head * GROUP + rows % GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    q_rows = (q_ptr + (first_row + query).to(tl.int64) * q_stride + heads * HEAD_DIM)[:, None]
    WIDTH: tl.constexpr = VALUE_DIM if LATENT else HEAD_DIM
    in_q = in_tile[:, None] & (offs_d < WIDTH)[None, :]
    q = tl.load(q_rows + offs_d[None, :], mask=in_q, other=0.0)
    q = q.to(COMPUTE_TYPE).to(DOT_TYPE)
    q_rest = q
    if LATENT:
        offs_r = VALUE_DIM + tl.arange(0, BLOCK_R)
        in_rest = in_tile[:, None] & (offs_r < HEAD_DIM)[None, :]
        q_rest = tl.load(q_rows + offs_r[None, :], mask=in_rest, other=0.0)
        q_rest = q_rest.to(COMPUTE_TYPE).to(DOT_TYPE)

    # Blocks from `begin` are cut by the window, from `clear` every row sees them whole, from `cut`
    # they are cut by the diagonal or the end.
    begin = lo // BLOCK_N * BLOCK_N
    last_first = _first_seen(position + queries - 1, span, SIGHT) - origin
    clear = (tl.maximum(lo, last_first) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    cut = tl.minimum(hi, position + 1 - origin) // BLOCK_N * BLOCK_N
    if cut <= clear:
        clear = begin
        cut = begin

    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total = _attend(
        acc, top, total, q, q_rest, k_ptr, v_ptr, pages, positions, begin, clear, lo, hi, origin,
        head, segment_pages, span, scale, logit_cap,
        True, SIGHT, CAPPED, KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_E, BLOCK_R, BLOCK_N,
        LATENT, PAGE_SIZE, KV_TYPE, SEGMENTED, COMPUTE_TYPE, DOT_TYPE, PRECISION,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, q_rest, k_ptr, v_ptr, pages, positions, clear, cut, lo, hi, origin,
        head, segment_pages, span, scale, logit_cap,
        False, SIGHT, CAPPED, KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_E, BLOCK_R, BLOCK_N,
        LATENT, PAGE_SIZE, KV_TYPE, SEGMENTED, COMPUTE_TYPE, DOT_TYPE, PRECISION,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, q_rest, k_ptr, v_ptr, pages, positions, cut, hi, lo, hi, origin,
        head, segment_pages, span, scale, logit_cap,
        True, SIGHT, CAPPED, KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_E, BLOCK_R, BLOCK_N,
        LATENT, PAGE_SIZE, KV_TYPE, SEGMENTED, COMPUTE_TYPE, DOT_TYPE, PRECISION,
    )  # fmt: skip

    is_whole = part < 0
    if HAS_SINKS:
        if is_whole:
            sink = tl.load(sinks_ptr + heads, mask=in_tile, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(top, sink)
            fade = tl.exp2(top - higher)
            total = total * fade + tl.exp2(sink - higher)
            acc = acc * fade[:, None]
            top = higher
    # A part may lie wholly behind the last key that a row sees: nothing, with a weight of nothing.
    saw = total > 0.0
    divisor = tl.where(saw, total, 1.0)
    result = acc / divisor[:, None]
    lse = tl.where(saw, top * LN2 + tl.log(divisor), float("-inf"))
    writes = in_tile[:, None] & (offs_e < VALUE_DIM)[None, :]
    if is_whole:
        row = (first_row + query).to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(
            out_ptr + row[:, None] * VALUE_DIM + offs_e[None, :],
            (result * v_scale).to(out_ptr.dtype.element_ty),
            mask=writes,
        )
        if HAS_LSE:
            tl.store(lse_ptr + row, lse, mask=in_tile)
    else:
        row = (part + query).to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(part_ptr + row[:, None] * VALUE_DIM + offs_e[None, :], result, mask=writes)
        tl.store(part_lse_ptr + row, lse, mask=in_tile)


@triton.jit
def merge_parts_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, sinks_ptr, rows_ptr, v_scale,
    NUM_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Program i * NUM_HEADS + h: head h of merged row i from all its parts, in float32, times
    `v_scale`.

    `rows` int32 [*, 4]: the output's row, the first part's row, how many parts, and how many rows
    lie from part to part. A row of no parts is padding.
    """
    program = tl.program_id(0)
    head = program % NUM_HEADS
    merged = rows_ptr + (program // NUM_HEADS) * 4
    row = tl.load(merged).to(tl.int64)
    first = tl.load(merged + 1).to(tl.int64)
    count = tl.load(merged + 2)
    step = tl.load(merged + 3)
    if count == 0:
        return
    offs_p = tl.arange(0, BLOCK_P)
    offs_e = tl.arange(0, BLOCK_E)
    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for start in range(0, count, BLOCK_P):
        inside = start + offs_p < count
        at = (first + (start + offs_p) * step) * NUM_HEADS + head
        top = tl.maximum(top, tl.load(part_lse_ptr + at, mask=inside, other=float("-inf")))
    highest = tl.max(top, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    acc = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    totals = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, count, BLOCK_P):
        inside = start + offs_p < count
        at = (first + (start + offs_p) * step) * NUM_HEADS + head
        lse = tl.load(part_lse_ptr + at, mask=inside, other=float("-inf"))
        weight = tl.exp2((lse - highest) * LOG2E)
        values = tl.load(
            part_ptr + at[:, None] * VALUE_DIM + offs_e[None, :],
            mask=inside[:, None] & (offs_e < VALUE_DIM)[None, :],
            other=0.0,
        )
        totals += weight
        acc += values * weight[:, None]
    total = tl.sum(totals, 0)
    if HAS_SINKS:
        total += tl.exp2((sink - highest) * LOG2E)
    result = tl.sum(acc, 0) / total * v_scale
    out_row = row * NUM_HEADS + head
    tl.store(
        out_ptr + out_row * VALUE_DIM + offs_e,
        result.to(out_ptr.dtype.element_ty),
        mask=offs_e < VALUE_DIM,
    )
    if HAS_LSE:
        tl.store(lse_ptr + out_row, highest + tl.log(total))
