/*
 * bfloat16 data that is multiplied as it lies, and blocks as pairs of bfloat16 numbers: what rotate_pairs.h and
 * rotate_amx.h share. Each of them gives rotate_bf16.h
 *
 *   BF16_ROWS, BF16_BACK_ROWS  rows of a tile of the forward and of the backward; fetched are those one band ahead
 *   bf16_begin, bf16_end       around every use of the others
 *   bf16_pack                  the blocks of a span for bf16_multiply, in at most as many bytes as they have as floats
 *   bf16_multiply              y = x R for the rows of a tile, row t times factors[t] unless that is NULL
 *   bf16_gradient_rows         dblocks += x^T dy for the rows of a tile, or = if `start`; inlined where some of its
 *                              arguments are constants
 *
 * The instructions of both take subnormal numbers for zeros, far below the rounding of any result that is not itself
 * one.
 */

/* Element (t, j) of the data lies at t stride + j. Rows to fetch into cache lie `ahead` below; 0 for none. */
typedef struct bf16_rows {
    const uint16_t *data;
    int64_t stride, ahead;
} bf16_rows;

/* Rows to write. */
typedef struct bf16_room {
    uint16_t *data;
    int64_t stride, ahead;
} bf16_room;

/* Packed blocks, each entry the sum of `terms` numbers, 1 or 2. */
typedef struct bf16_blocks {
    const __m512i *pairs;
    int terms;
} bf16_blocks;

/* Channels of a vector, and of the smallest group. */
enum { BF16_LANES = 16 };

/* Fetches the `group` channels at hand of the rows ahead. */
VEC_FN void bf16_fetch(bf16_rows x, int64_t rows, int64_t group)
{
    boft_fetch(x.data, sizeof *x.data, x.stride, x.ahead, rows, group);
}

VEC_FN bf16_rows bf16_rows_of(bf16_room room)
{
    return (bf16_rows){room.data, room.stride, room.ahead};
}

/* 16 pairs: a below, b above. By one permutation of bytes where every processor has it: x^T dy by AMX 28 us, not 31. */
VEC_FN __m512i pairs_of(__m256i a, __m256i b)
{
#ifdef VEC_NATIVE_TILES
    static const uint8_t order[64] = {
        0,  1,  32, 33, 2,  3,  34, 35, 4,  5,  36, 37, 6,  7,  38, 39, 8,  9,  40, 41, 10, 11,
        42, 43, 12, 13, 44, 45, 14, 15, 46, 47, 16, 17, 48, 49, 18, 19, 50, 51, 20, 21, 52, 53,
        22, 23, 54, 55, 24, 25, 56, 57, 26, 27, 58, 59, 28, 29, 60, 61, 30, 31, 62, 63,
    };
    return _mm512_permutexvar_epi8(_mm512_loadu_si512(order), _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
#else
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
#endif
}

/* `rows` rows of a vector of channels as `count` (a constant) pairs of rows; missing rows are zeros. */
VEC_FN void bf16_load(const int count, int64_t rows, const uint16_t *data, int64_t stride, __m512i *pairs)
{
#pragma GCC unroll 16
    for (int q = 0; q < count; q++) {
        const __m256i none = _mm256_setzero_si256();
        const uint16_t *from = data + 2 * q * stride;
        const __m256i even = 2 * q < rows ? _mm256_loadu_si256((const __m256i *)from) : none;
        const __m256i odd = 2 * q + 1 < rows ? _mm256_loadu_si256((const __m256i *)(from + stride)) : none;
        pairs[q] = pairs_of(even, odd);
    }
}

/* A vector of row k of a block from column j on, minus the identity. */
VEC_FN vec_float bf16_rest(const float *at, int64_t k, int64_t j)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 diagonal = _mm512_cmpeq_epi32_mask(lane, _mm512_set1_epi32((int32_t)(k - j)));
    return sub_float(load_float(at), _mm512_maskz_mov_ps(diagonal, set1_float(1)));
}

/*
 * Blocks, minus the identity if `rest`, each entry as the sum of `terms` bfloat16 numbers, hi or hi + lo, as pairs of
 * rows 2p and 2p + 1: `group` pairs of hi, then as many of lo, for each p. rest and terms are constants.
 */
VEC_FN void bf16_split(const int rest, const int terms, int64_t group, int64_t groups, const float *blocks,
                       __m512i *packed)
{
    const int64_t across = group / BF16_LANES;
    for (int64_t row = 0; row < groups * group; row += 2, blocks += 2 * group, packed += terms * across)
        for (int64_t v = 0; v < across; v++) {
            const int64_t j = v * BF16_LANES;
            __m256i hi[2], lo[2];
            for (int i = 0; i < 2; i++) {
                const float *at = blocks + i * group + j;
                const vec_float e = rest ? bf16_rest(at, row % group + i, j) : load_float(at);
                hi[i] = narrow_bf16(e);
                if (terms > 1)
                    lo[i] = narrow_bf16(sub_float(e, widen_bf16(hi[i])));
            }
            packed[v] = pairs_of(hi[0], hi[1]);
            if (terms > 1)
                packed[across + v] = pairs_of(lo[0], lo[1]);
        }
}
