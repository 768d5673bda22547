/*
 * What the kernels of blocks share: where the parts of a level lie, and products of small matrices.
 *
 * The product F_{k-1} ... F_0 of a level's k factors is made row by row from the top factor down, and only from entries
 * that are not zero by construction. Let t be the chunk of a row, c = b / 2 channels a chunk. After the factors above e
 * the row is zero outside the chunks that agree with t in bits 0 ... e: these, ordered by the bits above e, are the
 * "rows after e", c 2^(k-1-e) columns wide. Rows after k-2 are rows of the blocks of factor k-1 as they lie in q, and
 * rows after -1 are those of the collapsed block. One step down is, for each chunk t of rows and each value h of the
 * bits above f,
 *     rows after f-1, columns of h (b of them) = rows after f, columns of h (c of them) * c rows of a block,
 * namely of block (h, low) of factor f from row c bit on, where low is t's bits below f and bit its bit f.
 * Gradients go the other way: that of rows after -1 is dblocks, and that of rows after k-2 is the gradient of factor
 * k-1, in place in da.
 */
#ifndef BOFT_BLOCKS_TILE_CUH
#define BOFT_BLOCKS_TILE_CUH

#include "launch.cuh"

/* A level as a kernel sees it. */
struct factors_of_level {
    int first, count;         /* its factors */
    int b, chunk, group;      /* chunk: b / 2 */
    int64_t blocks_per_factor; /* d / b */
    int64_t offset;           /* of the level in the collapsed blocks */
};

DEVICE factors_of_level level_of_plan(const boft_plan &plan, int level)
{
    const boft_level &from = plan.level[level];
    const int b = (int)plan.b;
    return {(int)from.first, (int)from.factors, b, b / 2, (int)from.group, plan.blocks, from.offset};
}

/* Which of the blocks (m, D, b, b) acts on the chunks (high, bit, low) of group g in factor f of the level. */
DEVICE int64_t block_of_factor(const factors_of_level &level, int64_t g, int f, int high, int low)
{
    const int64_t outer = g >> level.first, lane = g & (((int64_t)1 << level.first) - 1);
    const int64_t among = ((outer << (level.count - 1 - f)) + high) << (level.first + f);
    return (level.first + f) * level.blocks_per_factor + among + ((int64_t)low << level.first) + lane;
}

/* The block of factor f that the rows of chunk t meet in their columns of h, from the row on that they start with. */
DEVICE int64_t factor_rows(const factors_of_level &level, int64_t g, int t, int f, int h)
{
    const int low = t & ((1 << f) - 1), bit = t >> f & 1;
    return (block_of_factor(level, g, f, h, low) * level.b + bit * level.chunk) * level.b;
}

/* Columns of rows after e. */
DEVICE int width_after(const factors_of_level &level, int e)
{
    return level.chunk << (level.count - 1 - e);
}

/* Where rows after count - 2 of a chunk start in q, and rows after -1 in the collapsed blocks. */
DEVICE int64_t top_rows(const factors_of_level &level, int64_t g, int t)
{
    return factor_rows(level, g, t, level.count - 1, 0);
}

DEVICE int64_t collapsed_rows(const factors_of_level &level, int64_t g, int t)
{
    return level.offset + (g * level.group + (int64_t)t * level.chunk) * level.group;
}

/* Where a block lies in the collapsed blocks if its level has no other factor; -1 otherwise. */
DEVICE int64_t place_if_single(const boft_plan &plan, int64_t block)
{
    const int64_t factor = block / plan.blocks;
    for (int l = 0; l < plan.levels; l++)
        if (plan.level[l].first == factor && plan.level[l].factors == 1)
            return plan.level[l].offset + block % plan.blocks * plan.b * plan.b;
    return -1;
}

/* Threads that take four of n rows or columns each. */
static inline __host__ __device__ int quarter(int n)
{
    return (n + 3) / 4;
}

/* Offsets of the four of n rows of thread i, quarter(n) apart so that neighbours have neighbours; at most the last. */
template <class Index> DEVICE void four_of(int i, int n, Index stride, Index out[4])
{
#pragma unroll
    for (int u = 0; u < 4; u++)
        out[u] = min(i + u * quarter(n), n - 1) * stride;
}

/* sum[u][v] += a[row[u] + k a_next] * b[column[v] + k b_next] over k = 0 ... depth-1. */
template <class T, class Index>
DEVICE void add_products(T sum[4][4], const T *a, const Index row[4], Index a_next, const T *b, const Index column[4],
                         Index b_next, int depth)
{
#pragma unroll 2
    for (int k = 0; k < depth; k++) {
        T left[4], right[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            left[u] = a[row[u] + k * a_next];
            right[u] = b[column[u] + k * b_next];
        }
#pragma unroll
        for (int u = 0; u < 4; u++)
#pragma unroll
            for (int v = 0; v < 4; v++)
                sum[u][v] += left[u] * right[v];
    }
}

/* to[i * stride + j] = sum for the four rows from i and four columns from j on that exist. */
template <class T, class Index>
DEVICE void store_four(const T sum[4][4], T *to, int i, int rows, Index stride, int j, int columns)
{
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
        for (int v = 0; v < 4; v++)
            if (i + u * quarter(rows) < rows && j + v * quarter(columns) < columns)
                to[(i + u * quarter(rows)) * stride + j + v * quarter(columns)] = sum[u][v];
}

#endif
