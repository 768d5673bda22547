/* Products of the matrices of blocks larger than 32 x 32, a launch each: those of blocks_tile.cuh, in global memory. */
#ifndef BOFT_BLOCKS_PRODUCT_CUH
#define BOFT_BLOCKS_PRODUCT_CUH

#include "blocks_tile.cuh"

/* PRODUCT_RESIDENT: CUDA blocks a multiprocessor must have room for, or ptxas spills to fit more. */
enum { PRODUCT_TILE = 32, PRODUCT_DEPTH = 16, PRODUCT_THREADS = 64, PRODUCT_RESIDENT = 8 };

/* Which product: a step down, its two gradients, and the two of Cayley's backward. */
enum product_kind { ROWS, ROW_GRADIENTS, FACTOR_GRADIENT, CAYLEY_HALF, CAYLEY_WHOLE };

/* What products read and write; of a level: of factor f. */
template <class T> struct product_data {
    const T *q;
    T *rows, *gradients; /* workspace: rows after 0 ... count-3 of all groups and their gradients */
    T *blocks;           /* ROWS: collapsed blocks */
    const T *dblocks;
    T *da;         /* gradients of q until Cayley's backward */
    T *half, *whole; /* workspace (m, D, b, b): J^T dQ and J^T dQ J^T for J = I + Q */
};

/* c = plus (0 if NULL) + a b, or for a part of the depth, `parts` of which add up. */
template <class T> struct product {
    const T *a, *b, *plus;
    T *c;
    int64_t a_row, a_next, b_next, b_column, c_row; /* of plus as of c */
};

struct product_shape {
    int rows, columns, depth, parts;
    int64_t pieces;
};

/* Elements of rows after 0 ... count-3 of all groups of a level. */
static inline int64_t rows_in_workspace_size(const boft_plan *plan, int64_t level)
{
    const int64_t k = plan->level[level].factors;
    return k < 3 ? 0 : plan->d * (plan->b / 2) * (((int64_t)1 << k) - 4);
}

/* Rows after e of chunk t of a group, in q (da) for count-2, in the collapsed blocks for -1, else in the workspace. */
template <class T>
DEVICE T *rows_of(const factors_of_level &level, T *top, T *between, T *bottom, int64_t g, int t, int e,
                  int64_t *stride)
{
    const int k = level.count;
    *stride = e == k - 2 ? level.b : width_after(level, e);
    if (e == k - 2)
        return top + top_rows(level, g, t);
    if (e == -1)
        return bottom + collapsed_rows(level, g, t);
    const int64_t d = level.blocks_per_factor * level.b, before = d * level.chunk * ((1 << k) - (1 << (k - e)));
    return between + before + (g * level.group + t * level.chunk) * *stride;
}

static inline product_shape shape_of_product(product_kind kind, const boft_plan *plan, int64_t level, int f)
{
    const int b = (int)plan->b, c = b / 2, k = (int)plan->level[level].factors;
    const int64_t groups = plan->d / plan->level[level].group;
    switch (kind) {
    case ROWS:
        return {c, b, c, 1, groups << (2 * k - 1 - f)};
    case ROW_GRADIENTS:
        return {c, c, b, 1, groups << (2 * k - 1 - f)};
    case FACTOR_GRADIENT:
        return {c, b, c, 1 << (k - 1 - f), groups << k};
    default:
        return {b, b, b, 1, plan->m * plan->blocks};
    }
}

template <class T>
DEVICE product<T> product_of_level(product_kind kind, const factors_of_level &level, const product_data<T> &data, int f,
                                   int64_t piece, int part)
{
    const int k = level.count, b = level.b, c = level.chunk, log_highs = k - 1 - f, h = piece & ((1 << log_highs) - 1);
    const int64_t g = piece >> (kind == FACTOR_GRADIENT ? k : k + log_highs);
    product<T> p = {};
    if (kind == FACTOR_GRADIENT) {
        const int lowest = (piece >> log_highs) & ((2 << f) - 1), t = part * (2 << f) + lowest;
        p.a = rows_of(level, data.q, (const T *)data.rows, (const T *)NULL, g, t, f, &p.a_next) + h * c;
        p.b = rows_of(level, (const T *)NULL, (const T *)data.gradients, data.dblocks, g, t, f - 1, &p.b_next) + h * b;
        p.c = data.da + factor_rows(level, g, lowest, f, h);
        p.a_row = 1;
        p.b_column = 1;
        p.c_row = b;
        return p;
    }
    const int t = (piece >> log_highs) & ((1 << k) - 1);
    p.b = data.q + factor_rows(level, g, t, f, h);
    p.a_next = 1;
    if (kind == ROWS) {
        p.a = rows_of(level, data.q, (const T *)data.rows, (const T *)NULL, g, t, f, &p.a_row) + h * c;
        p.c = rows_of(level, (T *)NULL, data.rows, data.blocks, g, t, f - 1, &p.c_row) + h * b;
        p.b_next = b;
        p.b_column = 1;
    } else {
        p.a = rows_of(level, (const T *)NULL, (const T *)data.gradients, data.dblocks, g, t, f - 1, &p.a_row) + h * b;
        p.c = rows_of(level, data.da, data.gradients, (T *)NULL, g, t, f, &p.c_row) + h * c;
        p.b_next = 1;
        p.b_column = b;
    }
    return p;
}

template <class T>
DEVICE product<T> product_of_cayley(product_kind kind, const boft_plan &plan, const product_data<T> &data,
                                    int64_t block)
{
    const int64_t b = plan.b, at = block * b * b, place = place_if_single(plan, block);
    const T *const dq = place < 0 ? data.da + at : data.dblocks + place;
    if (kind == CAYLEY_HALF)
        return {data.q + at, dq, dq, data.half + at, 1, b, b, 1, b};
    return {data.half + at, data.q + at, data.half + at, data.whole + at, b, 1, 1, b, b};
}

/* depth x width values, columns `next` apart in depth and `stride` across, to rows of PRODUCT_TILE + 1; 0 outside. */
template <class T>
DEVICE void load_product_tile(T *tile, const T *from, int64_t stride, int64_t next, int width, int depth)
{
    for (int n = threadIdx.x; n < PRODUCT_TILE * PRODUCT_DEPTH; n += PRODUCT_THREADS) {
        const int along = next == 1; /* neighbours in memory to neighbouring threads */
        const int k = along ? n % PRODUCT_DEPTH : n / PRODUCT_TILE, i = along ? n / PRODUCT_DEPTH : n % PRODUCT_TILE;
        tile[k * (PRODUCT_TILE + 1) + i] = i < width && k < depth ? from[i * stride + k * next] : 0;
    }
}

/* CUDA blocks: `tiles` for each piece. */
template <class T, product_kind KIND>
__global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_RESIDENT)
    multiply(const boft_plan plan, int l, int f, const product_shape shape, unsigned tiles, const product_data<T> data)
{
    enum { STRIDE = PRODUCT_TILE + 1 };
    SHARED(T, left, PRODUCT_DEPTH * STRIDE);
    SHARED(T, right, PRODUCT_DEPTH * STRIDE);
    const int64_t piece = blockIdx.x / tiles;
    const int across = (shape.columns + PRODUCT_TILE - 1) / PRODUCT_TILE, tile = (int)(blockIdx.x % tiles);
    const int i0 = tile / across * PRODUCT_TILE, j0 = tile % across * PRODUCT_TILE;
    const factors_of_level level = level_of_plan(plan, l);
    T sum[4][4] = {};
    int row[4], column[4];
#pragma unroll
    for (int u = 0; u < 4; u++) {
        row[u] = threadIdx.x / 8 + 8 * u;
        column[u] = threadIdx.x % 8 + 8 * u;
    }
    product<T> p;
    for (int part = 0; part < shape.parts; part++) {
        if constexpr (KIND == CAYLEY_HALF || KIND == CAYLEY_WHOLE)
            p = product_of_cayley(KIND, plan, data, piece);
        else
            p = product_of_level(KIND, level, data, f, piece, part);
        for (int k = 0; k < shape.depth; k += PRODUCT_DEPTH) {
            __syncthreads();
            const T *const a = p.a + i0 * p.a_row + k * p.a_next, *const b = p.b + j0 * p.b_column + k * p.b_next;
            load_product_tile(left, a, p.a_row, p.a_next, shape.rows - i0, shape.depth - k);
            load_product_tile(right, b, p.b_column, p.b_next, shape.columns - j0, shape.depth - k);
            __syncthreads();
            add_products(sum, (const T *)left, row, (int)STRIDE, (const T *)right, column, (int)STRIDE, PRODUCT_DEPTH);
        }
    }
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
        for (int v = 0; v < 4; v++) {
            const int64_t at = (i0 + row[u]) * p.c_row + j0 + column[v];
            if (i0 + row[u] < shape.rows && j0 + column[v] < shape.columns)
                p.c[at] = p.plus ? p.plus[at] + sum[u][v] : sum[u][v];
        }
}

#endif
