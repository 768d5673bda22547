/*
 * bfloat16 products by pairs (vdpbf16ps: per lane two multiply-adds into a float), for rotate_bf16.h. Included by
 * isa_avx512bf16.c alone.
 *
 * Forward: x R = x + x E with E = R - I held as hi + lo, two bfloat16 numbers, so small rotations are not lost. That
 * is as many instructions as in float, but x is read as it lies: a pair of channels is one 32-bit number. Gradient:
 * x^T dy has exact factors, and pairs of rows halve its instructions. Together 1.4 times as fast as in float (two Zen 4
 * cores, 1024 x 768, b 8, m 2).
 *
 * A column of x hi is as far from x E as rounding would take a number of the column's size, the norm of E's column
 * times that of x R. Where that is small beside the rounding of x R itself, lo is left out.
 */

enum {
    /*
     * Rows of a tile of the backward, and of those whose sums are in registers together. More make rows that lie 4 KiB
     * apart share sets of the first-level cache: two Zen 4 cores, 1024 x 2048, multiples of the float floor: backward
     * over 16 rows instead of 8 1.45 instead of 1.34, forward over 8 rows instead of 4 1.57 instead of 1.39.
     */
    BF16_BACK_ROWS = 8,
    PAIRS_ROWS_ONCE = 4,
    BF16_ROWS = BOFT_BAND_ROWS,
};

VEC_FN __m512bh as_pairs(__m512i a) { return (__m512bh)a; }

/* sum += both products of each pair, `pair` being the same in all lanes. */
VEC_FN vec_float add_products(vec_float sum, __m512i pairs, const void *pair)
{
    int32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return _mm512_dpbf16_ps(sum, as_pairs(pairs), as_pairs(_mm512_set1_epi32(bits)));
}

static inline void bf16_begin(int64_t group) { (void)group; }
static inline void bf16_end(void) {}

/*
 * The largest square of a column's norm of E for which lo is left out: the error of x R is then at most 1.08 times what
 * it is with lo. Groups of one vector always take lo, which costs them nothing beside their loads.
 */
#define PAIRS_HI_ALONE (1.0f / 6)

/* Whether no column of `groups` blocks is longer than that; NaN is. */
VEC_FN int pairs_hi_alone(int64_t group, int64_t groups, const float *blocks)
{
    const int64_t across = group / BF16_LANES;
    for (int64_t g = 0; g < groups; g++) {
        vec_float squares[BOFT_PAIRS_GROUP_MOST / BF16_LANES];
        for (int64_t v = 0; v < across; v++)
            squares[v] = zero_float();
        for (int64_t k = 0; k < group; k++, blocks += group)
            for (int64_t v = 0; v < across; v++) {
                const vec_float e = bf16_rest(blocks + v * BF16_LANES, k, v * BF16_LANES);
                squares[v] = fma_float(e, e, squares[v]);
            }
        for (int64_t v = 0; v < across; v++)
            if (_mm512_cmp_ps_mask(squares[v], set1_float(PAIRS_HI_ALONE), _CMP_NLE_UQ))
                return 0;
    }
    return 1;
}

VEC_ATTR static bf16_blocks bf16_pack(int64_t group, int64_t groups, const float *blocks, __m512i *packed)
{
    if (group > BF16_LANES && pairs_hi_alone(group, groups, blocks)) {
        bf16_split(1, 1, group, groups, blocks, packed);
        return (bf16_blocks){packed, 1};
    }
    bf16_split(1, 2, group, groups, blocks, packed);
    return (bf16_blocks){packed, 2};
}

/*
 * `rows` rows of `vectors` vectors of a group's columns: out = x R, row t times factors[t] unless that is NULL. rows,
 * vectors and terms are constants. hi and lo have sums of their own: one chain of both waits for the instruction's
 * latency (1.29 instead of 1.08 times the float floor).
 */
VEC_FN void pairs_multiply_panel(const int rows, const int vectors, const int terms, int64_t group, bf16_rows x,
                                 int64_t column, const __m512i *packed, const float *factors, bf16_room out)
{
    const int64_t across = group / BF16_LANES;
    vec_float sum[PAIRS_ROWS_ONCE][2], low[PAIRS_ROWS_ONCE][2];
    packed += column / BF16_LANES;
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            sum[t][v] = load_bf16(x.data + t * x.stride + column + v * BF16_LANES);
            low[t][v] = zero_float();
        }
#pragma GCC unroll 2
    for (int64_t k = 0; k < group; k += 2, packed += terms * across)
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                sum[t][v] = add_products(sum[t][v], packed[v], x.data + t * x.stride + k);
                if (terms > 1)
                    low[t][v] = add_products(low[t][v], packed[across + v], x.data + t * x.stride + k);
            }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const vec_float y = terms > 1 ? add_float(sum[t][v], low[t][v]) : sum[t][v];
            store_bf16(out.data + t * out.stride + column + v * BF16_LANES,
                       factors ? mul_float(y, set1_float(factors[t])) : y);
        }
}

/* `rows` (a constant) rows of whole groups: y = x R, row t times factors[t] unless that is NULL. */
VEC_FN void pairs_multiply_rows(const int rows, const int terms, int64_t group, int64_t groups, bf16_rows x,
                                const __m512i *packed, const float *factors, bf16_room y)
{
    const int64_t vectors_of_a_group = terms * (group * group / (2 * BF16_LANES));
    /* Every panel reads the whole group, which y in the place of x would change. */
    const int overlap = y.data == x.data && group > 2 * BF16_LANES;
    for (int64_t g = 0; g < groups; g++, x.data += group, y.data += group, packed += vectors_of_a_group) {
        bf16_fetch(x, rows, group);
        bf16_fetch(bf16_rows_of(y), rows, group);
        uint16_t copy[PAIRS_ROWS_ONCE * BOFT_PAIRS_GROUP_MOST];
        bf16_rows in = x;
        if (overlap) {
            for (int t = 0; t < rows; t++)
                memcpy(copy + t * group, x.data + t * x.stride, (size_t)group * sizeof *copy);
            in = (bf16_rows){copy, group, 0};
        }
        int64_t column = 0;
        for (; column + 2 * BF16_LANES <= group; column += 2 * BF16_LANES)
            pairs_multiply_panel(rows, 2, terms, group, in, column, packed, factors, y);
        if (column < group)
            pairs_multiply_panel(rows, 1, terms, group, in, column, packed, factors, y);
    }
}

VEC_FN void pairs_multiply(const int terms, int64_t group, int64_t groups, int64_t rows, bf16_rows x,
                           const __m512i *packed, const float *factors, bf16_room y)
{
    int64_t t = 0;
#define ROWS(count)                                                                                                    \
    pairs_multiply_rows(count, terms, group, groups, (bf16_rows){x.data + t * x.stride, x.stride, x.ahead}, packed,    \
                        factors ? factors + t : NULL, (bf16_room){y.data + t * y.stride, y.stride, y.ahead})
    for (; t + PAIRS_ROWS_ONCE <= rows; t += PAIRS_ROWS_ONCE)
        ROWS(PAIRS_ROWS_ONCE);
    for (; t < rows; t++)
        ROWS(1);
#undef ROWS
}

/* Not inlined, and with the smallest group as a constant, so that their loops have the registers to themselves. */
VEC_ATTR static __attribute__((noinline)) void pairs_multiply_one(int64_t groups, int64_t rows, bf16_rows x,
                                                                  const __m512i *packed, const float *factors,
                                                                  bf16_room y)
{
    pairs_multiply(2, BF16_LANES, groups, rows, x, packed, factors, y);
}

VEC_ATTR static __attribute__((noinline)) void pairs_multiply_hi(int64_t group, int64_t groups, int64_t rows,
                                                                 bf16_rows x, const __m512i *packed,
                                                                 const float *factors, bf16_room y)
{
    pairs_multiply(1, group, groups, rows, x, packed, factors, y);
}

VEC_ATTR static __attribute__((noinline)) void bf16_multiply(int64_t group, int64_t groups, int64_t rows, bf16_rows x,
                                                             bf16_blocks blocks, const float *factors, bf16_room y)
{
    if (group == BF16_LANES)
        pairs_multiply_one(groups, rows, x, blocks.pairs, factors, y);
    else if (blocks.terms == 1)
        pairs_multiply_hi(group, groups, rows, x, blocks.pairs, factors, y);
    else
        pairs_multiply(2, group, groups, rows, x, blocks.pairs, factors, y);
}

/* The pairs of rows of a group's x: pair q of channel k at [k / 16][q][k % 16]. */
typedef int32_t pairs_of_group[BOFT_PAIRS_GROUP_MOST / BF16_LANES][BF16_BACK_ROWS / 2][BF16_LANES];

/* `vectors` (a constant) vectors of a group's columns: dblocks += x^T dy over `rows` rows, or = if `start`. */
VEC_FN void pairs_gradient_panel(const int vectors, int64_t group, int64_t column, int64_t rows, pairs_of_group x,
                                 bf16_rows dy, float *dblocks, int start)
{
    __m512i grad[2][BF16_BACK_ROWS / 2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
        bf16_load(BF16_BACK_ROWS / 2, rows, dy.data + column + v * BF16_LANES, dy.stride, grad[v]);
    dblocks += column;
    for (int64_t part = 0; part < group / BF16_LANES; part++)
#pragma GCC unroll 4
        for (int k = 0; k < BF16_LANES; k++, dblocks += group)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                vec_float sum = start ? zero_float() : load_float(dblocks + v * BF16_LANES);
#pragma GCC unroll 4
                for (int q = 0; q < BF16_BACK_ROWS / 2; q++)
                    sum = add_products(sum, grad[v][q], &x[part][q][k]);
                store_float(dblocks + v * BF16_LANES, sum);
            }
}

VEC_FN void bf16_gradient_rows(int64_t group, int64_t groups, int64_t rows, bf16_rows x, bf16_rows dy, float *dblocks,
                               int start)
{
    for (int64_t g = 0; g < groups; g++, x.data += group, dy.data += group, dblocks += group * group) {
        bf16_fetch(x, rows, group);
        bf16_fetch(dy, rows, group);
        pairs_of_group in;
        for (int64_t part = 0; part < group / BF16_LANES; part++) {
            __m512i pairs[BF16_BACK_ROWS / 2];
            bf16_load(BF16_BACK_ROWS / 2, rows, x.data + part * BF16_LANES, x.stride, pairs);
#pragma GCC unroll 4
            for (int q = 0; q < BF16_BACK_ROWS / 2; q++)
                _mm512_storeu_si512(in[part][q], pairs[q]);
        }
        int64_t column = 0;
        for (; column + 2 * BF16_LANES <= group; column += 2 * BF16_LANES)
            pairs_gradient_panel(2, group, column, rows, in, dy, dblocks, start);
        if (column < group)
            pairs_gradient_panel(1, group, column, rows, in, dy, dblocks, start);
    }
}
