/*
 * x R and its backward for bfloat16 data by the processor's products of bfloat16 pairs (vdpbf16ps: per lane two
 * multiply-adds into a float), for one level of groups of whole vectors. Included by isa_avx512bf16.c alone.
 *
 * Forward: x R = x + x E with E = R - I held as hi + lo, two bfloat16 numbers, so small rotations are not lost. That
 * is as many instructions as in float, but x is read as it lies: a pair of channels is one 32-bit number. Gradient:
 * x^T dy has exact factors, and pairs of rows halve its instructions. Together 1.4 times as fast as in float (two Zen 4
 * cores, 1024 x 768, b 8, m 2).
 *
 * The instruction takes subnormal numbers for zeros, far below the rounding of any result that is not itself one.
 */

enum {
    /*
     * Rows of a tile of the backward, and of those whose sums are in registers together. More make rows that lie 4 KiB
     * apart share sets of the first-level cache: two Zen 4 cores, 1024 x 2048, multiples of the float floor: backward
     * over 16 rows instead of 8 1.45 instead of 1.34, forward over 8 rows instead of 4 1.57 instead of 1.39.
     */
    PAIRS_ROWS = 8,
    PAIRS_ROWS_ONCE = 4,
    PAIRS_LANES = 16,
};

/* Element (t, j) of the data lies at t stride + j. Rows to fetch into cache lie `ahead` below; 0 for none. */
typedef struct pairs_rows {
    const uint16_t *data;
    int64_t stride, ahead;
} pairs_rows;

/* Rows to write. */
typedef struct pairs_room {
    uint16_t *data;
    int64_t stride, ahead;
} pairs_room;

/* Fetches the `group` channels at hand of the rows ahead. */
VEC_FN void pairs_fetch(pairs_rows x, int64_t rows, int64_t group)
{
    boft_fetch(x.data, sizeof *x.data, x.stride, x.ahead, rows, group);
}

VEC_FN __m512bh as_pairs(__m512i a) { return (__m512bh)a; }

/* sum += both products of each pair, `pair` being the same in all lanes. */
VEC_FN vec_float add_products(vec_float sum, __m512i pairs, const void *pair)
{
    int32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return _mm512_dpbf16_ps(sum, as_pairs(pairs), as_pairs(_mm512_set1_epi32(bits)));
}

/* 16 pairs: a below, b above. */
VEC_FN __m512i pairs_of(__m256i a, __m256i b)
{
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

/* Blocks minus the identity, as pairs of rows 2p and 2p + 1: `group` pairs of hi, then `group` of lo, for each p. */
VEC_ATTR static void pairs_pack(int64_t group, int64_t groups, const float *blocks, __m512i *packed)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t row = 0; row < groups * group; row += 2, blocks += 2 * group)
        for (int64_t j = 0; j < group; j += PAIRS_LANES) {
            __m256i hi[2], lo[2];
            for (int i = 0; i < 2; i++) {
                const __m512i own = _mm512_set1_epi32((int32_t)(row % group + i - j));
                const vec_float one = _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(lane, own), set1_float(1));
                const vec_float e = sub_float(load_float(blocks + i * group + j), one);
                hi[i] = narrow_bf16(e);
                lo[i] = narrow_bf16(sub_float(e, widen_bf16(hi[i])));
            }
            packed[(row * group + j) / PAIRS_LANES] = pairs_of(hi[0], hi[1]);
            packed[((row + 1) * group + j) / PAIRS_LANES] = pairs_of(lo[0], lo[1]);
        }
}

/*
 * `rows` rows of `vectors` vectors of a group's columns: out = x R, row t times factors[t] unless that is NULL. rows and
 * vectors are constants. hi and lo have sums of their own: one chain of both waits for the instruction's latency (1.29
 * instead of 1.08 times the float floor).
 */
VEC_FN void pairs_multiply_panel(const int rows, const int vectors, int64_t group, pairs_rows x, int64_t column,
                                 const __m512i *packed, const float *factors, pairs_room out)
{
    const int64_t across = group / PAIRS_LANES;
    vec_float sum[PAIRS_ROWS_ONCE][2], low[PAIRS_ROWS_ONCE][2];
    packed += column / PAIRS_LANES;
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            sum[t][v] = load_bf16(x.data + t * x.stride + column + v * PAIRS_LANES);
            low[t][v] = zero_float();
        }
#pragma GCC unroll 2
    for (int64_t k = 0; k < group; k += 2, packed += 2 * across)
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                sum[t][v] = add_products(sum[t][v], packed[v], x.data + t * x.stride + k);
                low[t][v] = add_products(low[t][v], packed[across + v], x.data + t * x.stride + k);
            }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const vec_float y = add_float(sum[t][v], low[t][v]);
            store_bf16(out.data + t * out.stride + column + v * PAIRS_LANES,
                       factors ? mul_float(y, set1_float(factors[t])) : y);
        }
}

/* `rows` (a constant) rows of whole groups: y = x R, row t times factors[t] unless that is NULL. */
VEC_FN void pairs_multiply_rows(const int rows, int64_t group, int64_t groups, pairs_rows x, const __m512i *packed,
                                const float *factors, pairs_room y)
{
    /* Every panel reads the whole group, which y in the place of x would change. */
    const int overlap = y.data == x.data && group > 2 * PAIRS_LANES;
    for (int64_t g = 0; g < groups; g++, x.data += group, y.data += group, packed += group * group / PAIRS_LANES) {
        pairs_fetch(x, rows, group);
        pairs_fetch((pairs_rows){y.data, y.stride, y.ahead}, rows, group);
        uint16_t copy[PAIRS_ROWS_ONCE * BOFT_PAIRS_GROUP_MOST];
        pairs_rows in = x;
        if (overlap) {
            for (int t = 0; t < rows; t++)
                memcpy(copy + t * group, x.data + t * x.stride, (size_t)group * sizeof *copy);
            in = (pairs_rows){copy, group, 0};
        }
        int64_t column = 0;
        for (; column + 2 * PAIRS_LANES <= group; column += 2 * PAIRS_LANES)
            pairs_multiply_panel(rows, 2, group, in, column, packed, factors, y);
        if (column < group)
            pairs_multiply_panel(rows, 1, group, in, column, packed, factors, y);
    }
}

VEC_FN void pairs_multiply(int64_t group, int64_t groups, int64_t rows, pairs_rows x, const __m512i *packed,
                           const float *factors, pairs_room y)
{
    int64_t t = 0;
#define ROWS(count)                                                                                                    \
    pairs_multiply_rows(count, group, groups, (pairs_rows){x.data + t * x.stride, x.stride, x.ahead}, packed,          \
                        factors ? factors + t : NULL, (pairs_room){y.data + t * y.stride, y.stride, y.ahead})
    for (; t + PAIRS_ROWS_ONCE <= rows; t += PAIRS_ROWS_ONCE)
        ROWS(PAIRS_ROWS_ONCE);
    for (; t < rows; t++)
        ROWS(1);
#undef ROWS
}

/* Not inlined, and with the smallest group as a constant, so that their loops have the registers to themselves. */
VEC_ATTR static __attribute__((noinline)) void pairs_multiply_one(int64_t groups, int64_t rows, pairs_rows x,
                                                                  const __m512i *packed, const float *factors,
                                                                  pairs_room y)
{
    pairs_multiply(PAIRS_LANES, groups, rows, x, packed, factors, y);
}

VEC_ATTR static __attribute__((noinline)) void pairs_multiply_any(int64_t group, int64_t groups, int64_t rows,
                                                                  pairs_rows x, const __m512i *packed,
                                                                  const float *factors, pairs_room y)
{
    if (group == PAIRS_LANES)
        pairs_multiply_one(groups, rows, x, packed, factors, y);
    else
        pairs_multiply(group, groups, rows, x, packed, factors, y);
}

/* Whether the functions below take these arguments. From the whole call's shape, so that threads do not matter. */
static inline int pairs_serve(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    return dtype == BOFT_BF16 && boft_goes_in_pairs(plan) && rows >= BOFT_PAIRS_ROWS_MIN;
}

VEC_ATTR static void pairs_rotate(const boft_rotate_args *args, const float *factors, int64_t begin, int64_t end,
                                  void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t span = boft_span_channels(plan), group = plan->super;
    for (int64_t first = 0; first < plan->d; first += span) {
        const int64_t groups = boft_min(span, plan->d - first) / group;
        pairs_pack(group, groups, (const float *)args->blocks + first * group, workspace);
        for (int64_t row = begin; row < end; row += BOFT_BAND_ROWS) {
            const int64_t rows = boft_min(BOFT_BAND_ROWS, end - row);
            const int64_t ahead = boft_ahead(BOFT_BAND_ROWS, row, rows, args->rows);
            const pairs_rows x = {(const uint16_t *)args->x + row * args->x_stride + first, args->x_stride, ahead};
            const pairs_room y = {(uint16_t *)args->y + row * args->y_stride + first, args->y_stride, ahead};
            pairs_multiply_any(group, groups, rows, x, workspace, factors ? factors + row : NULL, y);
        }
    }
}

/* `rows` rows (at most PAIRS_ROWS) of a vector of channels as pairs of rows; missing rows are zeros. */
VEC_FN void pairs_load(int64_t rows, const uint16_t *data, int64_t stride, __m512i pairs[PAIRS_ROWS / 2])
{
#pragma GCC unroll 4
    for (int q = 0; q < PAIRS_ROWS / 2; q++) {
        const __m256i none = _mm256_setzero_si256();
        const uint16_t *from = data + 2 * q * stride;
        const __m256i even = 2 * q < rows ? _mm256_loadu_si256((const __m256i *)from) : none;
        const __m256i odd = 2 * q + 1 < rows ? _mm256_loadu_si256((const __m256i *)(from + stride)) : none;
        pairs[q] = pairs_of(even, odd);
    }
}

/* The pairs of rows of a group's x: pair q of channel k at [k / 16][q][k % 16]. */
typedef int32_t pairs_of_group[BOFT_PAIRS_GROUP_MOST / PAIRS_LANES][PAIRS_ROWS / 2][PAIRS_LANES];

/* `vectors` (a constant) vectors of a group's columns: dblocks += x^T dy over `rows` rows, or = if `start`. */
VEC_FN void pairs_gradient_panel(const int vectors, int64_t group, int64_t column, int64_t rows, pairs_of_group x,
                                 pairs_rows dy, float *dblocks, int start)
{
    __m512i grad[2][PAIRS_ROWS / 2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
        pairs_load(rows, dy.data + column + v * PAIRS_LANES, dy.stride, grad[v]);
    dblocks += column;
    for (int64_t part = 0; part < group / PAIRS_LANES; part++)
#pragma GCC unroll 4
        for (int k = 0; k < PAIRS_LANES; k++, dblocks += group)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                vec_float sum = start ? zero_float() : load_float(dblocks + v * PAIRS_LANES);
#pragma GCC unroll 4
                for (int q = 0; q < PAIRS_ROWS / 2; q++)
                    sum = add_products(sum, grad[v][q], &x[part][q][k]);
                store_float(dblocks + v * PAIRS_LANES, sum);
            }
}

VEC_FN void pairs_gradient_rows(int64_t group, int64_t groups, int64_t rows, pairs_rows x, pairs_rows dy,
                                float *dblocks, int start)
{
    for (int64_t g = 0; g < groups; g++, x.data += group, dy.data += group, dblocks += group * group) {
        pairs_fetch(x, rows, group);
        pairs_fetch(dy, rows, group);
        pairs_of_group in;
        for (int64_t part = 0; part < group / PAIRS_LANES; part++) {
            __m512i pairs[PAIRS_ROWS / 2];
            pairs_load(rows, x.data + part * PAIRS_LANES, x.stride, pairs);
#pragma GCC unroll 4
            for (int q = 0; q < PAIRS_ROWS / 2; q++)
                _mm512_storeu_si512(in[part][q], pairs[q]);
        }
        int64_t column = 0;
        for (; column + 2 * PAIRS_LANES <= group; column += 2 * PAIRS_LANES)
            pairs_gradient_panel(2, group, column, rows, in, dy, dblocks, start);
        if (column < group)
            pairs_gradient_panel(1, group, column, rows, in, dy, dblocks, start);
    }
}

VEC_ATTR static __attribute__((noinline)) void pairs_gradient_one(int64_t groups, pairs_rows x, pairs_rows dy,
                                                                  float *dblocks, int start)
{
    pairs_gradient_rows(PAIRS_LANES, groups, PAIRS_ROWS, x, dy, dblocks, start);
}

/* dblocks += x^T dy over `rows` rows (at most PAIRS_ROWS) of whole groups, or = if `start`. */
VEC_ATTR static __attribute__((noinline)) void pairs_gradient_any(int64_t group, int64_t groups, int64_t rows,
                                                                  pairs_rows x, pairs_rows dy, float *dblocks,
                                                                  int start)
{
    if (group == PAIRS_LANES && rows == PAIRS_ROWS)
        pairs_gradient_one(groups, x, dy, dblocks, start);
    else if (rows == PAIRS_ROWS)
        pairs_gradient_rows(group, groups, PAIRS_ROWS, x, dy, dblocks, start);
    else
        pairs_gradient_rows(group, groups, rows, x, dy, dblocks, start);
}

VEC_ATTR static void pairs_rotate_backward(const boft_rotate_backward_args *args, int64_t begin, int64_t end,
                                           void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t span = boft_span_channels(plan), across = boft_spans(plan), group = plan->super;
    const int64_t splits = boft_rotate_backward_splits(plan, args->rows);
    for (int64_t task = begin; task < end; task++) {
        const int64_t split = task / across, channel = task % across * span;
        const int64_t groups = boft_min(span, plan->d - channel) / group;
        const int64_t first = boft_split_begin(args->rows, split, splits);
        const int64_t past = boft_split_begin(args->rows, split + 1, splits);
        float *dblocks = args->dblocks ? (float *)args->dblocks + split * plan->count + channel * group : NULL;
        if (args->dx)
            pairs_pack(group, groups, (const float *)args->blocks_back + channel * group, workspace);
        for (int64_t row = first; row < past; row += PAIRS_ROWS) {
            const int64_t rows = boft_min(PAIRS_ROWS, past - row);
            const int64_t ahead = boft_ahead(BOFT_BAND_ROWS, row, rows, args->rows);
            pairs_rows dy = {(const uint16_t *)args->dy + row * args->dy_stride + channel, args->dy_stride, ahead};
            if (dblocks) {
                const pairs_rows x = {(const uint16_t *)args->x + row * args->x_stride + channel, args->x_stride, ahead};
                pairs_gradient_any(group, groups, rows, args->transpose ? dy : x, args->transpose ? x : dy, dblocks,
                                   row == first);
                dy.ahead = 0;
            }
            if (args->dx) {
                const pairs_room dx = {(uint16_t *)args->dx + row * args->dx_stride + channel, args->dx_stride, ahead};
                pairs_multiply_any(group, groups, rows, dy, workspace, NULL, dx);
            }
        }
    }
}
