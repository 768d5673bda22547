/*
 * Products of rows with the blocks of one level, and their gradient, in float or double by multiply-adds: any shape,
 * type of data and alignment. VECTOR: rows of float32 that 16-byte accesses reach, in a level of contiguous groups.
 *
 * A tile has COLUMNS columns: whole groups, each padded with zeros to `unit` columns, a multiple of 4, so that four
 * columns that a thread computes belong to one group; or a slice of one group that is larger than COLUMNS. Padding is
 * never stored, and a NaN stays in its group.
 */
#ifndef BOFT_ROTATE_GENERAL_CUH
#define BOFT_ROTATE_GENERAL_CUH

#include "launch.cuh"

enum { GENERAL_THREADS = 128, GENERAL_ROWS = 64, OUTER_ROWS = 32 };

template <class REAL> struct general_size {
    static constexpr int columns = sizeof(REAL) == 8 ? 32 : 64;
    static constexpr int pitch = columns + 4;
    static constexpr int across = columns / 4;                  /* threads that share a row */
    static constexpr int down = GENERAL_THREADS / across;       /* rows that threads take at a time */
    static constexpr int product_bytes = (GENERAL_ROWS + columns) * pitch * (int)sizeof(REAL);
    static constexpr int outer_bytes = 2 * OUTER_ROWS * pitch * (int)sizeof(REAL);
};

/* Groups of a level in tiles. */
typedef struct general_level {
    int64_t group, chunk, inner, groups;
    int unit, units; /* columns of a group in a tile, and groups of a tile */
    int64_t slices;  /* tiles of a group across its columns */
} general_level;

typedef struct general_rows {
    void *data; /* only read as an input */
    int64_t stride;
    boft_dtype dtype;
} general_rows;

/* out = in times the blocks of a level, or times their transposes. Thread block i: tile i % tiles, split i / tiles. */
typedef struct general_product {
    general_level level;
    general_rows in, out;
    const void *blocks;
    int transpose;
    int64_t rows, tiles, splits;
} general_product;

/* dblocks = left^T right, group by group; of several splits by the last, from their parts. */
typedef struct general_outer {
    general_level level;
    general_rows left, right;
    void *dblocks, *parts;
    unsigned *counters;
    int64_t rows, tiles, splits;
} general_outer;

template <class REAL> struct alignas(16) quad {
    REAL at[4];
};

template <class REAL> DEVICE REAL load_real(boft_dtype dtype, const void *data, int64_t i)
{
    if constexpr (sizeof(REAL) == 8)
        return ((const double *)data)[i];
    else if (dtype == BOFT_F32)
        return ((const float *)data)[i];
    else if (dtype == BOFT_BF16)
        return bf16::widen(((const uint16_t *)data)[i]);
    else
        return f16::widen(((const uint16_t *)data)[i]);
}

template <class REAL> DEVICE void store_real(boft_dtype dtype, void *data, int64_t i, REAL value)
{
    if constexpr (sizeof(REAL) == 8)
        ((double *)data)[i] = value;
    else if (dtype == BOFT_F32)
        ((float *)data)[i] = value;
    else if (dtype == BOFT_BF16)
        ((uint16_t *)data)[i] = bf16::round(value);
    else
        ((uint16_t *)data)[i] = f16::round(value);
}

/* Column c of a tile that starts at group `group` and its channel `offset`: -1 if it is padding. */
typedef struct general_column {
    int64_t group, in_group, channel;
} general_column;

DEVICE general_column column_at(const general_level &level, int64_t group, int64_t offset, int c)
{
    general_column at;
    at.group = group + c / level.unit;
    at.in_group = offset + c % level.unit;
    const int exists = c / level.unit < level.units && at.group < level.groups && at.in_group < level.group;
    at.channel = at.group / level.inner * level.inner * level.group + at.group % level.inner * level.chunk +
                 at.in_group / level.chunk * level.inner * level.chunk + at.in_group % level.chunk;
    if (!exists)
        at.channel = -1;
    return at;
}

/* How a thread carries ROWS rows of a tile to shared memory: in registers, `count` times `width` columns. */
template <class REAL, bool VECTOR, int ROWS> struct general_carry {
    static constexpr int width = VECTOR ? 4 : 1;
    static constexpr int across = general_size<REAL>::columns / width;
    static constexpr int step = GENERAL_THREADS / across;
    static constexpr int count = ROWS / step;
    REAL at[count][width];
};

/* Rows first ... first+ROWS-1 of the tile; zeros in padding and from row `past` on. */
template <class REAL, bool VECTOR, int ROWS>
DEVICE void fetch(general_carry<REAL, VECTOR, ROWS> &carry, const general_level &level, const general_rows &from,
                  int64_t group, int64_t offset, int64_t first, int64_t past)
{
    typedef general_carry<REAL, VECTOR, ROWS> size;
    const int64_t channel = column_at(level, group, offset, (int)threadIdx.x % size::across * size::width).channel;
#pragma unroll
    for (int i = 0; i < size::count; i++) {
        const int64_t t = first + (int)threadIdx.x / size::across + i * size::step;
        const int there = channel >= 0 && t < past;
        if constexpr (VECTOR) {
            const uint4 zero = make_uint4(0, 0, 0, 0);
            widen16<f32>(carry.at[i], there ? load16((const float *)from.data + t * from.stride + channel) : zero);
        } else {
            carry.at[i][0] = there ? load_real<REAL>(from.dtype, from.data, t * from.stride + channel) : (REAL)0;
        }
    }
}

template <class REAL, bool VECTOR, int ROWS> DEVICE void put(const general_carry<REAL, VECTOR, ROWS> &carry, REAL *tile)
{
    typedef general_carry<REAL, VECTOR, ROWS> size;
    REAL *to = tile + (int)threadIdx.x / size::across * general_size<REAL>::pitch +
               (int)threadIdx.x % size::across * size::width;
#pragma unroll
    for (int i = 0; i < size::count; i++, to += size::step * general_size<REAL>::pitch) {
        if constexpr (VECTOR)
            store16(to, round16<f32>(carry.at[i]));
        else
            *to = carry.at[i][0];
    }
}

/* tile[k][c] = entry (depth + k, column c) of the blocks or their transposes, for k < count; zeros in padding. */
template <class REAL>
DEVICE void stage_blocks(const general_product &p, int64_t group, int64_t offset, int64_t depth, int count, REAL *tile)
{
    constexpr int columns = general_size<REAL>::columns, pitch = general_size<REAL>::pitch;
    const REAL *blocks = (const REAL *)p.blocks;
    const int64_t n = p.level.group;
    const int lane = (int)threadIdx.x % columns; /* neighbouring threads read neighbouring numbers */
    for (int i = (int)threadIdx.x / columns; i < (p.transpose ? columns : count); i += GENERAL_THREADS / columns) {
        const int k = p.transpose ? lane : i, c = p.transpose ? i : lane;
        const general_column at = column_at(p.level, group, offset, c);
        if (k < count)
            tile[k * pitch + c] = at.channel < 0 || depth + k >= n ? (REAL)0
                                  : p.transpose ? blocks[(at.group * n + at.in_group) * n + depth + k]
                                                : blocks[(at.group * n + depth + k) * n + at.in_group];
    }
}

/* acc += rows of x times blocks; a thread has rows threadIdx.x / across + i down and four columns. */
template <class REAL> DEVICE void multiply(REAL acc[][4], const REAL *x, const REAL *blocks, int count)
{
    typedef general_size<REAL> size;
    for (int k = 0; k < count; k += 4) {
        quad<REAL> row[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            row[i] = *(const quad<REAL> *)(blocks + (k + i) * size::pitch);
#pragma unroll
        for (int i = 0; i < GENERAL_ROWS / size::down; i++) {
            const quad<REAL> left = *(const quad<REAL> *)(x + i * size::down * size::pitch + k);
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][e] += left.at[j] * row[j].at[e];
        }
    }
}

DEVICE int64_t split_start(int64_t rows, int64_t splits, int64_t split, int64_t step)
{
    const int64_t steps = (rows + step - 1) / step, at = steps * split / splits * step;
    return at < rows ? at : rows;
}

template <class REAL, bool VECTOR> DEVICE void product_rows(const general_product &p, int64_t index, REAL *shared)
{
    typedef general_size<REAL> size;
    constexpr int held = GENERAL_ROWS / size::down;
    REAL *x = shared, *blocks = shared + GENERAL_ROWS * size::pitch;
    const int64_t tile = index % p.tiles, split = index / p.tiles;
    const int64_t group = tile / p.level.slices * p.level.units, offset = tile % p.level.slices * size::columns;
    const int64_t first = split_start(p.rows, p.splits, split, GENERAL_ROWS);
    const int64_t past = split_start(p.rows, p.splits, split + 1, GENERAL_ROWS);
    const int64_t depth = p.level.slices > 1 ? p.level.group : p.level.unit;
    const int own = (int)threadIdx.x % size::across * 4, row = (int)threadIdx.x / size::across;
    const int start = own / p.level.unit < p.level.units ? own / p.level.unit * p.level.unit : 0;
    int64_t channel[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
        channel[e] = column_at(p.level, group, offset, own + e).channel;

    general_carry<REAL, VECTOR, GENERAL_ROWS> next;
    fetch(next, p.level, p.in, group, 0, first, past);
    for (int64_t t = first; t < past; t += GENERAL_ROWS) {
        REAL acc[held][4];
#pragma unroll
        for (int i = 0; i < held; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[i][e] = 0;
        for (int64_t k = 0; k < depth; k += size::columns) {
            const int count = (int)min((int64_t)size::columns, (depth - k + 3) / 4 * 4);
            put(next, x);
            if (p.level.slices > 1 || t == first)
                stage_blocks<REAL>(p, group, offset, k, count, blocks);
            __syncthreads();
            if (k + size::columns < depth)
                fetch(next, p.level, p.in, group, k + size::columns, t, past);
            else
                fetch(next, p.level, p.in, group, 0, t + GENERAL_ROWS, past);
            multiply<REAL>(acc, x + row * size::pitch + start, blocks + own, count);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < held; i++) {
            const int64_t at = t + row + i * size::down;
            if constexpr (VECTOR) {
                if (at < past && channel[0] >= 0)
                    store16((float *)p.out.data + at * p.out.stride + channel[0], round16<f32>(acc[i]));
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (at < past && channel[e] >= 0)
                        store_real<REAL>(p.out.dtype, p.out.data, at * p.out.stride + channel[e], acc[i][e]);
            }
        }
    }
}

/* A thread has rows threadIdx.x / across + i down of a tile of the gradient and four of its columns. */
template <class REAL, bool VECTOR> DEVICE void outer_rows(const general_outer &p, int64_t index, REAL *shared)
{
    typedef general_size<REAL> size;
    constexpr int held = size::columns / size::down;
    REAL *left = shared, *right = shared + OUTER_ROWS * size::pitch;
    const int64_t tile = index % p.tiles, split = index / p.tiles, slices = p.level.slices;
    const int64_t group = tile / (slices * slices) * p.level.units;
    const int64_t offset = tile % slices * size::columns, depth = tile / slices % slices * size::columns;
    const int64_t first = split_start(p.rows, p.splits, split, OUTER_ROWS);
    const int64_t past = split_start(p.rows, p.splits, split + 1, OUTER_ROWS);
    const int own = (int)threadIdx.x % size::across * 4, row = (int)threadIdx.x / size::across;
    const int start = own / p.level.unit < p.level.units ? own / p.level.unit * p.level.unit : 0;
    REAL acc[held][4];
#pragma unroll
    for (int i = 0; i < held; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            acc[i][e] = 0;

    general_carry<REAL, VECTOR, OUTER_ROWS> next_left, next_right;
    fetch(next_left, p.level, p.left, group, depth, first, past);
    fetch(next_right, p.level, p.right, group, offset, first, past);
    for (int64_t t = first; t < past; t += OUTER_ROWS) {
        put(next_left, left);
        put(next_right, right);
        __syncthreads();
        fetch(next_left, p.level, p.left, group, depth, t + OUTER_ROWS, past);
        fetch(next_right, p.level, p.right, group, offset, t + OUTER_ROWS, past);
#pragma unroll 4
        for (int s = 0; s < OUTER_ROWS; s++) {
            const quad<REAL> times = *(const quad<REAL> *)(right + s * size::pitch + own);
#pragma unroll
            for (int i = 0; i < held; i++) {
                const int k = row + i * size::down;
                if (i * size::down < p.level.unit) {
                    /* Rows past the unit's would lie outside the tile; their sums are not stored. */
                    const REAL factor = left[s * size::pitch + (k < p.level.unit ? start + k : 0)];
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        acc[i][e] += factor * times.at[e];
                }
            }
        }
        __syncthreads();
    }

    const int64_t n = p.level.group, all = p.level.groups * n * n;
    REAL *to = p.splits > 1 ? (REAL *)p.parts + split * all : (REAL *)p.dblocks;
    int64_t at[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const general_column column = column_at(p.level, group, offset, own + e);
        at[e] = column.channel < 0 ? -1 : (column.group * n + depth + row) * n + column.in_group;
    }
#pragma unroll
    for (int i = 0; i < held; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (at[e] >= 0 && row + i * size::down < p.level.unit && depth + row + i * size::down < n)
                to[at[e] + i * size::down * n] = acc[i][e];
    if (p.splits == 1 || !last_block(p.counters + tile, (unsigned)p.splits))
        return;
    const REAL *parts = (const REAL *)p.parts;
#pragma unroll 1
    for (int i = 0; i < held; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (at[e] >= 0 && row + i * size::down < p.level.unit && depth + row + i * size::down < n) {
                const int64_t entry = at[e] + i * size::down * n;
                REAL sum = parts[entry];
                for (int64_t s = 1; s < p.splits; s++)
                    sum += parts[s * all + entry];
                ((REAL *)p.dblocks)[entry] = sum;
            }
}

template <class REAL, bool VECTOR>
__global__ void __launch_bounds__(GENERAL_THREADS, 3) rotate_general(general_product p)
{
    DYN_SHARED(REAL, shared);
    product_rows<REAL, VECTOR>(p, blockIdx.x, shared);
}

/*
 * The first thread blocks compute the product, `products` of them, and the others the gradient of the blocks. If they
 * are as many, they take turns, so that dy comes from the second-level cache when it is read again.
 */
template <class REAL, bool VECTOR>
__global__ void __launch_bounds__(GENERAL_THREADS, 3)
    rotate_backward_general(general_product p, int64_t products, general_outer outer)
{
    DYN_SHARED(REAL, shared);
    const int turns = products * 2 == gridDim.x;
    if (turns ? blockIdx.x % 2 == 0 : blockIdx.x < products)
        product_rows<REAL, VECTOR>(p, turns ? blockIdx.x / 2 : blockIdx.x, shared);
    else
        outer_rows<REAL, VECTOR>(outer, turns ? blockIdx.x / 2 : blockIdx.x - products, shared);
}

#endif
