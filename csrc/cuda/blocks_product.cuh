/*
 * Products of the matrices of blocks larger than 32 x 32, in phases of one launch: those of blocks_tile.cuh, in global
 * memory. A team of threads makes a tile of a product; the tiles of all products of a phase are spread over all teams.
 */
#ifndef BOFT_BLOCKS_PRODUCT_CUH
#define BOFT_BLOCKS_PRODUCT_CUH

#include "blocks_tile.cuh"
#include "phases.cuh"

enum { PRODUCT_TILE = 32, PRODUCT_DEPTH = 16, PRODUCT_STRIDE = PRODUCT_TILE + 1, TEAM_THREADS = 64 };

/* Which product: a step down, its two gradients, and the two of Cayley's backward. */
enum product_kind { ROWS, ROW_GRADIENTS, FACTOR_GRADIENT, CAYLEY_HALF, CAYLEY_WHOLE };

/* One kind of product of all groups of a level and a factor (0, 0 for Cayley's); waits: for all of those before. */
struct product_step {
    unsigned char kind, level, factor, waits;
};

struct product_steps {
    int count;
    product_step step[3 * BOFT_MAX_LEVELS];
};

/* What products read and write; of a level: of factor f. */
template <class T> struct product_data {
    const T *q;
    T *rows, *gradients; /* workspace: rows after 0 ... count-3 of all levels and their gradients */
    T *blocks;           /* ROWS: collapsed blocks */
    const T *dblocks;
    T *da;         /* gradients of q until Cayley's backward */
    T *half, *whole; /* workspace (m, D, b, b): J^T dQ and J^T dQ J^T for J = I + Q */
};

/* c = plus (0 if NULL) + a b, or for a part of the depth, `parts` of which add up. */
template <class T> struct product {
    const T *a, *b, *plus;
    T *c;
    int a_row, a_next, b_next, b_column, c_row; /* of plus as of c */
};

struct product_shape {
    int rows, columns, depth, parts;
    unsigned pieces;
    unsigned across, tiles; /* of each piece */
};

/* Elements of rows after 0 ... count-3 of all groups of the levels before `level`. */
static inline __host__ __device__ int64_t rows_before_level(const boft_plan &plan, int64_t level)
{
    int64_t before = 0;
    for (int64_t l = 0; l < level; l++)
        if (plan.level[l].factors > 2)
            before += plan.d * (plan.b / 2) * (((int64_t)1 << plan.level[l].factors) - 4);
    return before;
}

/* Rows after e of chunk t of a group, in q (da) for count-2, in the collapsed blocks for -1, else in the workspace. */
template <class T>
DEVICE T *rows_of(const factors_of_level &level, T *top, T *between, T *bottom, int64_t g, int t, int e,
                  int *stride)
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

static inline __host__ __device__ product_shape shape_of_step(const boft_plan &plan, const product_step &step)
{
    const int b = (int)plan.b, c = b / 2, above = (int)plan.level[step.level].factors - 1 - step.factor;
    product_shape s = {c, b, c, 1, (unsigned)(2 * plan.blocks) << above, 0, 0};
    if (step.kind == ROW_GRADIENTS) {
        s.columns = c;
        s.depth = b;
    } else if (step.kind == FACTOR_GRADIENT) {
        s.parts = 1 << above;
        s.pieces = (unsigned)(2 * plan.blocks);
    } else if (step.kind != ROWS) {
        s.rows = s.depth = b;
        s.pieces = (unsigned)(plan.m * plan.blocks);
    }
    s.across = (unsigned)(s.columns + PRODUCT_TILE - 1) / PRODUCT_TILE;
    s.tiles = s.across * ((unsigned)(s.rows + PRODUCT_TILE - 1) / PRODUCT_TILE);
    return s;
}

template <class T>
DEVICE product<T> product_of_level(const boft_plan &plan, const product_step &step, const product_data<T> &data,
                                   int64_t before, int64_t piece, int part)
{
    const factors_of_level level = level_of_plan(plan, step.level);
    T *const rows = data.rows + before, *const gradients = data.gradients + before;
    const int kind = step.kind, f = step.factor, k = level.count, b = level.b, c = level.chunk;
    const int log_highs = k - 1 - f, h = piece & ((1 << log_highs) - 1);
    const int64_t g = piece >> (kind == FACTOR_GRADIENT ? k : k + log_highs);
    product<T> p = {};
    if (kind == FACTOR_GRADIENT) {
        const int lowest = (piece >> log_highs) & ((2 << f) - 1), t = part * (2 << f) + lowest;
        p.a = rows_of(level, data.q, (const T *)rows, (const T *)NULL, g, t, f, &p.a_next) + h * c;
        p.b = rows_of(level, (const T *)NULL, (const T *)gradients, data.dblocks, g, t, f - 1, &p.b_next) + h * b;
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
        p.a = rows_of(level, data.q, (const T *)rows, (const T *)NULL, g, t, f, &p.a_row) + h * c;
        p.c = rows_of(level, (T *)NULL, rows, data.blocks, g, t, f - 1, &p.c_row) + h * b;
        p.b_next = b;
        p.b_column = 1;
    } else {
        p.a = rows_of(level, (const T *)NULL, (const T *)gradients, data.dblocks, g, t, f - 1, &p.a_row) + h * b;
        p.c = rows_of(level, data.da, gradients, (T *)NULL, g, t, f, &p.c_row) + h * c;
        p.b_next = 1;
        p.b_column = b;
    }
    return p;
}

template <class T>
DEVICE product<T> product_of_cayley(int kind, const boft_plan &plan, const product_data<T> &data, int64_t block)
{
    const int b = (int)plan.b;
    const int64_t at = block * b * b, place = place_if_single(plan, block);
    const T *const dq = place < 0 ? data.da + at : data.dblocks + place;
    if (kind == CAYLEY_HALF)
        return {data.q + at, dq, dq, data.half + at, 1, b, b, 1, b};
    return {data.half + at, data.q + at, data.half + at, data.whole + at, b, 1, 1, b, b};
}

/* depth x width values, columns `next` apart in depth and `stride` across, to rows of PRODUCT_STRIDE; 0 outside. */
template <class T>
DEVICE void load_product_tile(T *tile, const T *from, int stride, int next, int width, int depth)
{
    for (int n = threadIdx.x % TEAM_THREADS; n < PRODUCT_TILE * PRODUCT_DEPTH; n += TEAM_THREADS) {
        const int along = next == 1; /* neighbours in memory to neighbouring threads */
        const int k = along ? n % PRODUCT_DEPTH : n / PRODUCT_TILE, i = along ? n / PRODUCT_DEPTH : n % PRODUCT_TILE;
        tile[k * PRODUCT_STRIDE + i] = i < width && k < depth ? from[(int64_t)i * stride + (int64_t)k * next] : 0;
    }
}

/* For all teams of a CUDA block: a team's tile, the n-th of the step; none past the last. before: rows_before_level. */
template <class T>
DEVICE void multiply_tile(const boft_plan &plan, const product_step &step, const product_shape &shape,
                          const product_data<T> &data, int64_t before, unsigned n, T *shared)
{
    T *const left = shared + threadIdx.x / TEAM_THREADS * (2 * PRODUCT_DEPTH * PRODUCT_STRIDE);
    T *const right = left + PRODUCT_DEPTH * PRODUCT_STRIDE;
    const int active = n < shape.pieces * shape.tiles, thread = threadIdx.x % TEAM_THREADS;
    const int64_t piece = active ? n / shape.tiles : 0;
    const int tile = (int)(n % shape.tiles), i0 = tile / (int)shape.across * PRODUCT_TILE;
    const int j0 = tile % (int)shape.across * PRODUCT_TILE;
    const int rows = active ? shape.rows - i0 : 0, columns = active ? shape.columns - j0 : 0;
    T sum[4][4] = {};
    int row[4], column[4];
#pragma unroll
    for (int u = 0; u < 4; u++) {
        row[u] = thread / 8 + 8 * u;
        column[u] = thread % 8 + 8 * u;
    }
    product<T> p;
    for (int part = 0; part < shape.parts; part++) {
        if (step.kind == CAYLEY_HALF || step.kind == CAYLEY_WHOLE)
            p = product_of_cayley(step.kind, plan, data, piece);
        else
            p = product_of_level(plan, step, data, before, piece, part);
        for (int k = 0; k < shape.depth; k += PRODUCT_DEPTH) {
            __syncthreads();
            const T *const a = p.a + (int64_t)i0 * p.a_row + (int64_t)k * p.a_next;
            const T *const b = p.b + (int64_t)j0 * p.b_column + (int64_t)k * p.b_next;
            load_product_tile(left, a, p.a_row, p.a_next, rows, shape.depth - k);
            load_product_tile(right, b, p.b_column, p.b_next, columns, shape.depth - k);
            __syncthreads();
            add_products(sum, (const T *)left, row, (int)PRODUCT_STRIDE, (const T *)right, column, (int)PRODUCT_STRIDE,
                         PRODUCT_DEPTH);
        }
    }
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
        for (int v = 0; v < 4; v++) {
            const int64_t at = (int64_t)(i0 + row[u]) * p.c_row + j0 + column[v];
            if (row[u] < rows && column[v] < columns)
                p.c[at] = p.plus ? p.plus[at] + sum[u][v] : sum[u][v];
        }
}

static inline size_t product_shared_bytes(int threads, size_t real)
{
    return (size_t)(threads / TEAM_THREADS * 2 * PRODUCT_DEPTH * PRODUCT_STRIDE) * real;
}

/* All threads of the grid: all steps. shared: product_shared_bytes. */
template <class T>
DEVICE void multiply_steps(const boft_plan &plan, const product_steps &steps, const product_data<T> &data, T *shared)
{
    const unsigned across_teams = threadIdx.x / TEAM_THREADS * gridDim.x;
    unsigned begun = 0; /* tiles of this phase */
    for (int i = 0; i < steps.count; i++) {
        const product_step step = steps.step[i];
        if (step.waits) {
            grid_barrier();
            begun = 0;
        }
        const product_shape shape = shape_of_step(plan, step);
        const int64_t before = rows_before_level(plan, step.level);
        /* The first tiles go to CUDA blocks that have none of the steps before; teams of a block are far apart. */
        unsigned first = (blockIdx.x + gridDim.x - begun % gridDim.x) % gridDim.x;
        for (; first < shape.pieces * shape.tiles; first += blockDim.x / TEAM_THREADS * gridDim.x)
            multiply_tile(plan, step, shape, data, before, first + across_teams, shared);
        begun += shape.pieces * shape.tiles;
    }
}

#endif
