/*
 * Products of rows with the blocks of one level, and their gradient, in float or double by multiply-adds: any shape,
 * type of data and alignment. VECTOR: rows of float32 that 16-byte accesses reach, in a level of contiguous groups.
 * What an entry of a product is does not depend on how rows and columns are divided.
 *
 * A tile has COLUMNS columns: whole groups, each padded with zeros to `unit` columns, a multiple of 4, so that four
 * columns that a thread computes belong to one group; or a slice of one group that is larger than COLUMNS. Padding is
 * never stored, and a NaN stays in its group.
 */
#ifndef BOFT_ROTATE_GENERAL_CUH
#define BOFT_ROTATE_GENERAL_CUH

#include "launch.cuh"

enum { GENERAL_THREADS = 128, GENERAL_ROWS = 64, OUTER_ROWS = GENERAL_ROWS / 2 };

template <class REAL> struct general_size {
    static constexpr int columns = sizeof(REAL) == 8 ? 32 : 64;
    static constexpr int pitch = columns + 4;
    static constexpr int across = columns / 4;                  /* threads that share a row */
    static constexpr int down = GENERAL_THREADS / across;       /* rows that threads take at a time */
    /* Rows of one operand of a product, or of both of a gradient, and blocks. */
    static constexpr int bytes = (GENERAL_ROWS + columns) * pitch * (int)sizeof(REAL);
};

/* Groups of a level in tiles. */
typedef struct general_level {
    int64_t groups;
    int group, chunk, inner; /* as in boft_level */
    int unit, units;         /* columns of a group in a tile, and groups of a tile */
    int slices;              /* tiles of a group across its columns */
} general_level;

typedef struct general_rows {
    void *data; /* only read as an input */
    int64_t stride;
    boft_dtype dtype;
} general_rows;

/*
 * out = in times the blocks of a level, or times their transposes; factors: NULL, or a REAL for each row of out, which
 * multiplies it. Thread block i: tile i % tiles, split i / tiles.
 */
typedef struct general_product {
    general_level level;
    general_rows in, out;
    const void *blocks, *factors;
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

/* For a pointer that comes out of shared memory, from which the compiler cannot tell that it leads to global memory. */
template <class T> DEVICE T *in_global(T *pointer)
{
#ifndef BOFT_CUDA_ON_CPU
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
}

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

/* Column c of a tile that starts at group `group` and its channel `offset`. */
typedef struct general_column {
    int64_t group, channel; /* channel: -1 if the column is padding */
    int in_group;
} general_column;

DEVICE general_column column_at(const general_level &level, int64_t group, int offset, int c)
{
    general_column at;
    at.group = group + c / level.unit;
    at.in_group = offset + c % level.unit;
    const int64_t outer = at.group / level.inner, inner = at.group - outer * level.inner;
    const int64_t run = at.in_group / level.chunk, in_run = at.in_group % level.chunk;
    at.channel = outer * level.inner * level.group + (run * level.inner + inner) * level.chunk + in_run;
    if (c / level.unit >= level.units || at.group >= level.groups || at.in_group >= level.group)
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

/* The channel of the first column that a thread carries; -1 in padding. */
template <class REAL, bool VECTOR> DEVICE int64_t carried_channel(const general_level &level, int64_t group, int offset)
{
    typedef general_carry<REAL, VECTOR, GENERAL_ROWS> size;
    return column_at(level, group, offset, (int)threadIdx.x % size::across * size::width).channel;
}

/* Rows first ... first+ROWS-1 of the tile; zeros in padding and from row `past` on. */
template <class REAL, bool VECTOR, int ROWS>
DEVICE void fetch(general_carry<REAL, VECTOR, ROWS> &carry, const general_rows &from, int64_t channel, int64_t first,
                  int64_t past)
{
    typedef general_carry<REAL, VECTOR, ROWS> size;
    const int64_t t = first + (int)threadIdx.x / size::across;
    const int left = channel < 0 ? 0 : (int)min((int64_t)ROWS, past - t);
    const void *data = in_global(from.data);
    int64_t at = t * from.stride + channel;
#pragma unroll
    for (int i = 0; i < size::count; i++, at += size::step * from.stride) {
        const int there = i * size::step < left;
        if constexpr (VECTOR) {
            const uint4 zero = make_uint4(0, 0, 0, 0);
            widen16<f32>(carry.at[i], there ? load16((const float *)data + at) : zero);
        } else {
            carry.at[i][0] = there ? load_real<REAL>(from.dtype, data, at) : (REAL)0;
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
DEVICE void stage_blocks(const general_product &p, int64_t group, int offset, int depth, int count, REAL *tile)
{
    constexpr int columns = general_size<REAL>::columns, pitch = general_size<REAL>::pitch;
    const REAL *blocks = (const REAL *)in_global(p.blocks);
    const int n = p.level.group;
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

/* acc += ROWS rows of x times blocks; a thread has rows threadIdx.x / across + i down and four columns. */
template <class REAL, int ROWS> DEVICE void multiply(REAL acc[][4], const REAL *x, const REAL *blocks, int count)
{
    typedef general_size<REAL> size;
    for (int k = 0; k < count; k += 4) {
        quad<REAL> row[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            row[i] = *(const quad<REAL> *)(blocks + (k + i) * size::pitch);
#pragma unroll
        for (int i = 0; i < ROWS / size::down; i++) {
            const quad<REAL> left = *(const quad<REAL> *)(x + i * size::down * size::pitch + k);
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][e] += left.at[j] * row[j].at[e];
        }
    }
}

/* The four columns of a tile that a thread computes, and its first row. */
typedef struct general_place {
    int own, row, start; /* first column; row; column at which its group's columns start */
} general_place;

template <class REAL> DEVICE general_place place_of_thread(const general_level &level)
{
    const int own = (int)threadIdx.x % general_size<REAL>::across * 4, unit = own / level.unit;
    return {own, (int)threadIdx.x / general_size<REAL>::across, unit < level.units ? unit * level.unit : 0};
}

DEVICE void channels_of(int64_t channel[4], const general_level &level, int64_t group, int offset, int own)
{
#pragma unroll
    for (int e = 0; e < 4; e++)
        channel[e] = column_at(level, group, offset, own + e).channel;
}

/* Of ROWS rows those of the thread, the first being row t, times their factors. */
template <class REAL, int ROWS> DEVICE void scale_rows(REAL acc[][4], const REAL *factors, int64_t t, int64_t past)
{
    constexpr int down = general_size<REAL>::down;
#pragma unroll
    for (int i = 0; i < ROWS / down; i++) {
        const REAL factor = t + i * down < past ? factors[t + i * down] : (REAL)1;
#pragma unroll
        for (int e = 0; e < 4; e++)
            acc[i][e] *= factor;
    }
}

/* Of ROWS rows those of the thread, the first being row t; channels of its four columns. */
template <class REAL, bool VECTOR, int ROWS>
DEVICE void store_rows(const general_rows &out, const REAL acc[][4], const int64_t channel[4], int64_t t, int64_t past)
{
    constexpr int down = general_size<REAL>::down;
    void *data = in_global(out.data);
#pragma unroll
    for (int i = 0; i < ROWS / down; i++) {
        const int64_t at = t + i * down;
        if constexpr (VECTOR) {
            if (at < past && channel[0] >= 0)
                store16((float *)data + at * out.stride + channel[0], round16<f32>(acc[i]));
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (at < past && channel[e] >= 0)
                    store_real<REAL>(out.dtype, data, at * out.stride + channel[e], acc[i][e]);
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
    REAL *x = shared, *blocks = shared + GENERAL_ROWS * size::pitch;
    const int64_t tile = index % p.tiles, split = index / p.tiles, group = tile / p.level.slices * p.level.units;
    const int offset = (int)(tile % p.level.slices) * size::columns;
    const int64_t first = split_start(p.rows, p.splits, split, GENERAL_ROWS);
    const int64_t past = split_start(p.rows, p.splits, split + 1, GENERAL_ROWS);
    const int depth = p.level.slices > 1 ? p.level.group : p.level.unit;
    const general_place at = place_of_thread<REAL>(p.level);
    const int64_t carried = carried_channel<REAL, VECTOR>(p.level, group, 0);
    int64_t channel[4];
    channels_of(channel, p.level, group, offset, at.own);

    general_carry<REAL, VECTOR, GENERAL_ROWS> next;
    fetch(next, p.in, carried, first, past);
    for (int64_t t = first; t < past; t += GENERAL_ROWS) {
        REAL acc[GENERAL_ROWS / size::down][4] = {};
        for (int k = 0; k < depth; k += size::columns) {
            const int count = min(size::columns, (depth - k + 3) / 4 * 4);
            put(next, x);
            if (p.level.slices > 1 || t == first)
                stage_blocks<REAL>(p, group, offset, k, count, blocks);
            __syncthreads();
            const int more = k + size::columns < depth;
            fetch(next, p.in, more ? carried_channel<REAL, VECTOR>(p.level, group, k + size::columns) : carried,
                  more ? t : t + GENERAL_ROWS, past);
            multiply<REAL, GENERAL_ROWS>(acc, x + at.row * size::pitch + at.start, blocks + at.own, count);
            __syncthreads();
        }
        if (p.factors)
            scale_rows<REAL, GENERAL_ROWS>(acc, (const REAL *)in_global(p.factors), t + at.row, past);
        store_rows<REAL, VECTOR, GENERAL_ROWS>(p.out, acc, channel, t + at.row, past);
    }
}

/*
 * acc += left^T right of OUTER_ROWS rows: a thread has rows threadIdx.x / across + i down of a tile of the gradient and
 * four of its columns.
 */
template <class REAL>
DEVICE void multiply_outer(REAL acc[][4], const general_place &at, int unit, const REAL *left, const REAL *right)
{
    typedef general_size<REAL> size;
#pragma unroll 4
    for (int s = 0; s < OUTER_ROWS; s++) {
        const quad<REAL> times = *(const quad<REAL> *)(right + s * size::pitch + at.own);
#pragma unroll
        for (int i = 0; i < size::columns / size::down; i++) {
            const int k = at.row + i * size::down;
            if (i * size::down < unit) {
                /* Rows past the unit's would lie outside the tile; their sums are not stored. */
                const REAL factor = left[s * size::pitch + (k < unit ? at.start + k : 0)];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][e] += factor * times.at[e];
            }
        }
    }
}

/* What multiply_outer() summed over the rows of a split, of the tile at row `depth`, column `offset`. */
template <class REAL>
DEVICE void finish_outer(const general_outer &p, const REAL acc[][4], const general_place &at, int64_t group,
                         int offset, int depth, int64_t tile, int64_t split)
{
    typedef general_size<REAL> size;
    constexpr int held = size::columns / size::down;
    const int64_t n = p.level.group, all = p.level.groups * n * n;
    REAL *dblocks = (REAL *)in_global(p.dblocks), *parts = (REAL *)in_global(p.parts);
    REAL *to = in_global(p.splits > 1 ? parts + split * all : dblocks);
    int64_t entry[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const general_column column = column_at(p.level, group, offset, at.own + e);
        entry[e] = column.channel < 0 ? -1 : (column.group * n + depth + at.row) * n + column.in_group;
    }
#pragma unroll
    for (int i = 0; i < held; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (entry[e] >= 0 && at.row + i * size::down < p.level.unit && depth + at.row + i * size::down < n)
                to[entry[e] + i * size::down * n] = acc[i][e];
    if (p.splits == 1 || !last_block(in_global(p.counters) + tile, (unsigned)p.splits))
        return;
#pragma unroll 1
    for (int i = 0; i < held; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (entry[e] >= 0 && at.row + i * size::down < p.level.unit && depth + at.row + i * size::down < n) {
                const int64_t from = entry[e] + i * size::down * n;
                REAL sum = parts[from];
                for (int64_t s = 1; s < p.splits; s++)
                    sum += parts[s * all + from];
                dblocks[from] = sum;
            }
}

template <class REAL, bool VECTOR> DEVICE void outer_rows(const general_outer &p, int64_t index, REAL *shared)
{
    typedef general_size<REAL> size;
    REAL *left = shared, *right = shared + OUTER_ROWS * size::pitch;
    const int slices = p.level.slices;
    const int64_t tile = index % p.tiles, split = index / p.tiles, group = tile / slices / slices * p.level.units;
    const int offset = (int)(tile % slices) * size::columns, depth = (int)(tile / slices % slices) * size::columns;
    const int64_t first = split_start(p.rows, p.splits, split, OUTER_ROWS);
    const int64_t past = split_start(p.rows, p.splits, split + 1, OUTER_ROWS);
    const int64_t left_channel = carried_channel<REAL, VECTOR>(p.level, group, depth);
    const int64_t right_channel = carried_channel<REAL, VECTOR>(p.level, group, offset);
    const general_place at = place_of_thread<REAL>(p.level);
    REAL acc[size::columns / size::down][4] = {};

    general_carry<REAL, VECTOR, OUTER_ROWS> next_left, next_right;
    fetch(next_left, p.left, left_channel, first, past);
    fetch(next_right, p.right, right_channel, first, past);
    for (int64_t t = first; t < past; t += OUTER_ROWS) {
        put(next_left, left);
        put(next_right, right);
        __syncthreads();
        fetch(next_left, p.left, left_channel, t + OUTER_ROWS, past);
        fetch(next_right, p.right, right_channel, t + OUTER_ROWS, past);
        multiply_outer(acc, at, p.level.unit, left, right);
        __syncthreads();
    }
    finish_outer(p, acc, at, group, offset, depth, tile, split);
}

template <class REAL, bool VECTOR>
__global__ void __launch_bounds__(GENERAL_THREADS, 3) rotate_general(general_product p)
{
    DYN_SHARED(REAL, shared);
    product_rows<REAL, VECTOR>(p, blockIdx.x, shared);
}

/*
 * The product, unless p.out.data is NULL, and the gradient of a level whose tiles hold whole groups, each row read
 * once: p.in is outer.right, or outer.left if `swapped`. Thread block i: tile i % outer.tiles, split i / outer.tiles.
 */
template <class REAL, bool VECTOR>
__global__ void __launch_bounds__(GENERAL_THREADS, 3)
    rotate_backward_groups(general_product p, general_outer outer, int swapped)
{
    typedef general_size<REAL> size;
    DYN_SHARED(REAL, left);
    REAL *right = left + OUTER_ROWS * size::pitch, *blocks = right + OUTER_ROWS * size::pitch;
    const int64_t tile = blockIdx.x % outer.tiles, split = blockIdx.x / outer.tiles, group = tile * outer.level.units;
    const int64_t first = split_start(outer.rows, outer.splits, split, OUTER_ROWS);
    const int64_t past = split_start(outer.rows, outer.splits, split + 1, OUTER_ROWS);
    const int unit = outer.level.unit;
    const general_place at = place_of_thread<REAL>(outer.level);
    const int64_t carried = carried_channel<REAL, VECTOR>(outer.level, group, 0);
    int64_t channel[4];
    channels_of(channel, outer.level, group, 0, at.own);
    REAL acc[size::columns / size::down][4] = {};

    general_carry<REAL, VECTOR, OUTER_ROWS> next_left, next_right;
    fetch(next_left, outer.left, carried, first, past);
    fetch(next_right, outer.right, carried, first, past);
    if (p.out.data)
        stage_blocks<REAL>(p, group, 0, 0, unit, blocks);
    for (int64_t t = first; t < past; t += OUTER_ROWS) {
        put(next_left, left);
        put(next_right, right);
        __syncthreads();
        fetch(next_left, outer.left, carried, t + OUTER_ROWS, past);
        fetch(next_right, outer.right, carried, t + OUTER_ROWS, past);
        multiply_outer(acc, at, unit, left, right);
        if (p.out.data) {
            REAL out[OUTER_ROWS / size::down][4] = {};
            multiply<REAL, OUTER_ROWS>(out, (swapped ? left : right) + at.row * size::pitch + at.start, blocks + at.own,
                                       unit);
            store_rows<REAL, VECTOR, OUTER_ROWS>(p.out, out, channel, t + at.row, past);
        }
        __syncthreads();
    }
    finish_outer(outer, acc, at, group, 0, 0, tile, split);
}

#endif
