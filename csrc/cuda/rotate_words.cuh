/*
 * Rows of bfloat16 or float16 in registers, as tensor cores take them, for products with blocks of R.
 *
 * A rotation near the identity would be lost in 16 bits, so rows are multiplied as x + x E with E = R - I held as the
 * sum of two 16-bit numbers; sums are float32 and are rounded once. (float16: what the second number loses as a
 * subnormal is below 2^-25 of x.)
 *
 * Columns come in chunks of 32 channels. For the matrix products of 16 rows and a chunk, lane l with r = l / 4 and q =
 * l % 4 holds channels 8q ... 8q+7 of rows r and r + 8, which is one 16-byte access each: word p is the pair of
 * channels 8q+2p and 8q+2p+1. The inner index of a product may come in any order that both sides share, and columns in
 * any order, so these words are what mma takes and gives:
 *   step s of x:       a = words 2s and 2s+1, so its inner index 2q+e is channel 8q+4s+e, and 2q+8+e is 8q+4s+2+e;
 *   column tile j:     column n is channel 8 (n / 2) + 2j + n % 2, so acc is word j of the result;
 *   x^T, dy of word p: movmatrix gives rows in pairs of channel 8 (r / 2) + 2p + r % 2.
 */
#ifndef BOFT_ROTATE_WORDS_CUH
#define BOFT_ROTATE_WORDS_CUH

#include "launch.cuh"

enum { CHUNK = 32, TENSOR_ROWS = 16, FRAGMENTS = 8 };

/* Rows r and r + 8 of a chunk in a lane. */
typedef uint32_t words[2][4];

/* at: the lane's channels of its first row. left: rows that there are from that row on. */
DEVICE void load_words(words w, const uint16_t *at, int64_t stride, int left)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (left > 8 * h)
            bits = load16(at + 8 * h * stride);
        w[h][0] = bits.x, w[h][1] = bits.y, w[h][2] = bits.z, w[h][3] = bits.w;
    }
}

DEVICE void store_words(const words w, uint16_t *at, int64_t stride, int left)
{
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (left > 8 * h)
            store16(at + 8 * h * stride, make_uint4(w[h][0], w[h][1], w[h][2], w[h][3]));
}

template <class D> DEVICE void start_at(float acc[4][4], const words x)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        acc[j][0] = D::low(x[0][j]);
        acc[j][1] = D::high(x[0][j]);
        acc[j][2] = D::low(x[1][j]);
        acc[j][3] = D::high(x[1][j]);
    }
}

template <class D> DEVICE void add_words(float acc[4][4], const words x)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        acc[j][0] += D::low(x[0][j]);
        acc[j][1] += D::high(x[0][j]);
        acc[j][2] += D::low(x[1][j]);
        acc[j][3] += D::high(x[1][j]);
    }
}

template <class D> DEVICE void round_words(words y, const float acc[4][4])
{
#pragma unroll
    for (int p = 0; p < 4; p++) {
        y[0][p] = D::pack(acc[p][0], acc[p][1]);
        y[1][p] = D::pack(acc[p][2], acc[p][3]);
    }
}

/* Entry `at` of the fragments of E of several pairs of chunks: its pair, and rows k ... k+3 of column c in it. */
typedef struct fragment_place {
    int pair, k, c;
} fragment_place;

DEVICE fragment_place place_of_fragment(int at)
{
    const int lane = at % 32, i = at / 32 % FRAGMENTS;
    return {at / 32 / FRAGMENTS, lane % 4 * 8 + i / 4 * 4, lane / 8 * 8 + i % 4 * 2 + lane / 4 % 2};
}

/* hi and lo of four entries of E. */
template <class D> DEVICE uint4 fragment_of(const float e[4])
{
    const uint32_t hi[2] = {D::pack(e[0], e[1]), D::pack(e[2], e[3])};
    return make_uint4(hi[0], hi[1], D::pack(e[0] - D::low(hi[0]), e[1] - D::high(hi[0])),
                      D::pack(e[2] - D::low(hi[1]), e[3] - D::high(hi[1])));
}

/* acc += x E of a pair of chunks, for `HELD` row tiles. The lane's fragment i lies at e[i step]. */
template <class D, int HELD, int STEP> DEVICE void multiply_words(float acc[HELD][4][4], const words *x, const uint4 *e)
{
#pragma unroll
    for (int s = 0; s < 2; s++) {
        uint4 fragment[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            fragment[j] = e[(4 * s + j) * STEP];
#pragma unroll
        for (int part = 0; part < 2; part++)
#pragma unroll
            for (int h = 0; h < HELD; h++) {
                const uint32_t a[4] = {x[h][0][2 * s], x[h][1][2 * s], x[h][0][2 * s + 1], x[h][1][2 * s + 1]};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const uint32_t b[2] = {part ? fragment[j].z : fragment[j].x, part ? fragment[j].w : fragment[j].y};
                    D::mma(acc[h][j], a, b);
                }
            }
    }
}

/* First row of a split: whole steps of rows, so that blocks share them evenly. */
DEVICE int64_t tensor_split_start(int64_t rows, int64_t splits, int64_t split, int64_t step)
{
    const int64_t at = (rows + step - 1) / step * split / splits * step;
    return at < rows ? at : rows;
}

#endif
