/* Sizes shared by the kernels of Cayley and collapse and by the functions that answer workspace sizes. */
#ifndef BOFT_CAYLEY_SIZES_H
#define BOFT_CAYLEY_SIZES_H

#include <stddef.h>
#include <stdint.h>

enum {
    /*
     * Blocks of at most this size go through Cayley several at a time in the lanes of vectors, if they fill more than
     * half of them or are of at most the second size: on a Zen 4 core with AVX-512, 8 at once reach 0.7 of the FMA peak
     * at b = 40 and 64, one by itself 0.42 and 0.49, and memory for more would leave its second-level cache.
     */
    BOFT_LANES_MAX_B = 64,
    BOFT_LANES_ALWAYS_B = 16,
    /*
     * The same for the backward, however many there are: 0.75 of the peak in lanes against 0.42 alone at b = 25, but
     * 0.65 against 0.72 at b = 32, whose rows fill vectors.
     */
    BOFT_LANES_MAX_B_BACKWARD = 31,
    /* Of at most this size through collapse: one group by itself takes two to four times as long. */
    BOFT_COLLAPSE_LANES_MAX_B = 4,
    /* Bytes of the widest vector. */
    BOFT_VECTOR_BYTES = 64,
    /* The part of A, rows x depth, that a product keeps in the second-level cache. */
    BOFT_CACHED_ROWS = 256,
    BOFT_CACHED_DEPTH = 256,
};

/* Bytes rounded up so that the next array in a workspace is aligned like the first. */
static inline size_t boft_aligned(size_t bytes)
{
    return (bytes + BOFT_VECTOR_BYTES - 1) / BOFT_VECTOR_BYTES * BOFT_VECTOR_BYTES;
}

/* 1 if A, rows x depth, is small enough to multiply as it is. */
static inline int boft_product_is_small(int64_t rows, int64_t depth)
{
    return depth <= BOFT_CACHED_DEPTH && rows * depth <= BOFT_CACHED_ROWS * BOFT_CACHED_DEPTH;
}

/* Bytes of the workspace of a product of this size: a part of A and two vectors' worth of columns of B. */
static inline size_t boft_product_workspace(int64_t rows, int64_t depth, size_t real)
{
    if (boft_product_is_small(rows, depth))
        return 0;
    return BOFT_CACHED_ROWS * BOFT_CACHED_DEPTH * real + BOFT_CACHED_DEPTH * 2 * BOFT_VECTOR_BYTES;
}

/* Row stride of an n x n matrix of doubles: whole vectors, and rows apart from each other in a cache's sets. */
static inline int64_t boft_padded(int64_t n)
{
    int64_t padded = (n + 7) / 8 * 8;
    return padded % 64 ? padded : padded + 8;
}

/* Row stride, in vectors, of b x b vectors of doubles: odd, for rows apart from each other in a cache's sets. */
static inline int64_t boft_lanes_stride(int64_t b)
{
    return b | 1;
}

/*
 * Columns that are eliminated together out of n: 8 or a multiple of it. Wider panels pass over the matrix less often,
 * which counts once it leaves a cache: n = 64 fits the first level, n = 320 the second of a Zen 4 core.
 */
static inline int64_t boft_panel(int64_t n)
{
    return n <= 64 ? 8 : n <= 512 ? 32 : 128;
}

/* Bytes of the workspace of the inverse of an n x n matrix of doubles: factors, pivot rows, a pivot a row. */
static inline size_t boft_invert_workspace(int64_t n)
{
    const int64_t panel = boft_panel(n);
    return boft_aligned((size_t)(panel * (n + boft_padded(n)) + n) * sizeof(double)) +
           boft_product_workspace(n, panel, sizeof(double));
}

#endif
