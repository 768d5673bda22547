/*
 * z s + bias (1 - s) and its backward.
 *
 * Columns are cut into strips of 32 lanes x 16 bytes, rows into parts; a block takes one strip of one part. Its warps
 * take rows in turn, and the columns of a lane stay the same, so that scales, biases and column sums stay in registers.
 * Where 16-byte accesses are not possible a lane takes every 32nd column of the strip, one element at a time. Sums are
 * the same either way: by warp, over the warps of a block, and over parts, in the last block of a strip to finish.
 */
#include "launch.cuh"

enum {
    WARPS = 8,
    THREADS = 32 * WARPS,
    /* Blocks that fill 132 processors, with enough bytes in flight for their share of the memory: 2 to 8 each. */
    FEW_BLOCKS = 264,
    MANY_BLOCKS = 1056,
    FORWARD_ROWS_LEAST = 16, /* of a part: below, reading scales and biases shows */
    FORWARD_ROWS_MOST = 64,
    BACKWARD_ROWS_LEAST = 32, /* of a part: below, adding up the parts shows */
    BACKWARD_ROWS_MANY = 256  /* the sums of a part are 1/200 of its bytes here, so that more blocks cost nothing */
};

/* Values of a lane. */
template <class D> constexpr int VALUES = 16 / sizeof(typename D::stored);
template <class D> constexpr int STRIP = 32 * VALUES<D>;

/* Column of a strip that is value i of a lane. */
template <class D, bool ALIGNED> DEVICE int strip_column(int lane, int i)
{
    return ALIGNED ? lane * VALUES<D> + i : lane + 32 * i;
}

/* The lane's values of a row of a strip that has `columns` columns; 0 past them. */
template <class D, bool ALIGNED> DEVICE uint4 load_row(const typename D::stored *row, int lane, int columns)
{
    if constexpr (ALIGNED) {
        return lane * VALUES<D> < columns ? load16(row + lane * VALUES<D>) : make_uint4(0, 0, 0, 0);
    } else {
        typename D::stored values[VALUES<D>];
        uint4 bits;
#pragma unroll
        for (int i = 0; i < VALUES<D>; i++) {
            const int column = strip_column<D, ALIGNED>(lane, i);
            values[i] = column < columns ? row[column] : (typename D::stored)0;
        }
        memcpy(&bits, values, 16);
        return bits;
    }
}

template <class D, bool ALIGNED> DEVICE void store_row(typename D::stored *row, int lane, int columns, uint4 bits)
{
    if constexpr (ALIGNED) {
        if (lane * VALUES<D> < columns)
            store16(row + lane * VALUES<D>, bits);
    } else {
        typename D::stored values[VALUES<D>];
        memcpy(values, &bits, 16);
#pragma unroll
        for (int i = 0; i < VALUES<D>; i++) {
            const int column = strip_column<D, ALIGNED>(lane, i);
            if (column < columns)
                row[column] = values[i];
        }
    }
}

/* The lane's columns of reals that begin at the strip; 0 past them, and everywhere if `from` is NULL. */
template <class D, bool ALIGNED>
DEVICE void load_columns(typename D::real *values, const typename D::real *from, int lane, int columns)
{
    constexpr int WIDTH = ALIGNED ? 16 / sizeof(typename D::real) : 1;
#pragma unroll
    for (int i = 0; i < VALUES<D>; i += WIDTH) {
        const int column = strip_column<D, ALIGNED>(lane, i);
        const int inside = from && column < columns;
        if constexpr (ALIGNED) {
            const uint4 bits = inside ? load16(from + column) : make_uint4(0, 0, 0, 0);
            memcpy(values + i, &bits, 16);
        } else {
            values[i] = inside ? from[column] : 0;
        }
    }
}

/* Rows that a warp reads before it uses the first; single elements need more registers. */
template <bool ALIGNED> constexpr int FORWARD_FLIGHT = ALIGNED ? 4 : 2;
template <bool ALIGNED> constexpr int BACKWARD_FLIGHT = ALIGNED ? 2 : 1;

/* What a block works on. */
typedef struct region {
    int64_t column, first, past; /* its first column; its rows */
    int64_t strip, part;
    int columns, lane, warp;
} region;

template <class D> DEVICE region own_region(int64_t rows, int64_t n, int64_t part_rows)
{
    const unsigned strips = (unsigned)((n + STRIP<D> - 1) / STRIP<D>);
    region own;
    own.strip = blockIdx.x % strips;
    own.part = blockIdx.x / strips;
    own.column = own.strip * STRIP<D>;
    own.columns = (int)min(n - own.column, (int64_t)STRIP<D>);
    own.first = own.part * part_rows;
    own.past = min(own.first + part_rows, rows);
    own.lane = (int)threadIdx.x % 32;
    own.warp = (int)threadIdx.x / 32;
    return own;
}

template <class D, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, ALIGNED ? 4 : 2) scale_kernel(boft_scale_args args, int64_t part_rows)
{
    typedef typename D::stored stored;
    typedef typename D::real real;
    constexpr int FLIGHT = FORWARD_FLIGHT<ALIGNED>;
    const region own = own_region<D>(args.rows, args.n, part_rows);
    const stored *z = (const stored *)args.z + (own.first + own.warp) * args.z_stride + own.column;
    stored *out = (stored *)args.out + (own.first + own.warp) * args.out_stride + own.column;
    real s[VALUES<D>], shift[VALUES<D>];
    load_columns<D, ALIGNED>(s, (const real *)args.s + own.column, own.lane, own.columns);
    load_columns<D, ALIGNED>(shift, args.bias ? (const real *)args.bias + own.column : NULL, own.lane, own.columns);
#pragma unroll
    for (int i = 0; i < VALUES<D>; i++)
        shift[i] *= 1 - s[i];
#pragma unroll 1
    for (int64_t left = own.past - own.first - own.warp; left > 0; left -= WARPS * FLIGHT) {
        uint4 bits[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++)
            bits[u] = left > WARPS * u ? load_row<D, ALIGNED>(z + u * WARPS * args.z_stride, own.lane, own.columns)
                                       : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            real values[VALUES<D>];
            widen16<D>(values, bits[u]);
#pragma unroll
            for (int i = 0; i < VALUES<D>; i++)
                values[i] = values[i] * s[i] + shift[i];
            if (left > WARPS * u)
                store_row<D, ALIGNED>(out + u * WARPS * args.out_stride, own.lane, own.columns, round16<D>(values));
        }
        z += WARPS * FLIGHT * args.z_stride;
        out += WARPS * FLIGHT * args.out_stride;
    }
}

/* Adds all rows of sums (ROWS, COUNT) into the first; entry i is complete in the thread i % THREADS alone. */
template <class real, int COUNT, int ROWS> DEVICE void add_rows(real *sums)
{
#pragma unroll
    for (int at = 0; at < COUNT; at += THREADS) {
        const int i = at + (int)threadIdx.x;
        if (i >= COUNT)
            continue;
        real sum = sums[i];
#pragma unroll
        for (int row = 1; row < ROWS; row++)
            sum += sums[row * COUNT + i];
        sums[i] = sum;
    }
}

/*
 * Adds arrays of COUNT reals, `parts` of them one after the other, into sums[0 ... COUNT-1] in shared memory, which has
 * room for 16 bytes a thread: a thread adds 16 bytes of every SHARES-th array, then the shares are added as by
 * add_rows.
 */
template <class real, int COUNT> DEVICE void add_parts(real *sums, const real *arrays, int64_t parts)
{
    constexpr int WIDTH = 16 / sizeof(real), CHUNKS = COUNT / WIDTH, SHARES = THREADS / CHUNKS;
    const int chunk = (int)threadIdx.x % CHUNKS, share = (int)threadIdx.x / CHUNKS;
    real total[WIDTH] = {};
#pragma unroll 8
    for (int64_t part = share; part < parts; part += SHARES) {
        real values[WIDTH];
        const uint4 bits = load16(arrays + part * COUNT + chunk * WIDTH);
        memcpy(values, &bits, 16);
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
            total[j] += values[j];
    }
#pragma unroll
    for (int j = 0; j < WIDTH; j++)
        sums[share * COUNT + chunk * WIDTH + j] = total[j];
    __syncthreads();
    add_rows<real, COUNT, SHARES>(sums);
}

/*
 * SUMS 1: ds = sum_t dy (z - bias). SUMS 2: dbias too, from the sum of dy; ds may be NULL then. With several parts
 * their sums meet in workspace (strips, parts, SUMS * STRIP), where value i of a lane is entry i * 32 + lane.
 */
template <class D, bool ALIGNED, int SUMS>
__global__ void __launch_bounds__(THREADS, ALIGNED && SUMS == 1 ? 3 : 2)
    scale_backward_kernel(boft_scale_backward_args args, int64_t part_rows, int64_t parts, typename D::real *workspace,
                          unsigned *counters)
{
    typedef typename D::stored stored;
    typedef typename D::real real;
    constexpr int FLIGHT = BACKWARD_FLIGHT<ALIGNED>;
    constexpr int COUNT = SUMS * STRIP<D>;
    static_assert(WARPS * COUNT * sizeof(real) >= THREADS * 16, "add_parts has too little room");
    SHARED(real, sums, WARPS * COUNT);
    const region own = own_region<D>(args.rows, args.n, part_rows);
    const stored *dy = (const stored *)args.dy + (own.first + own.warp) * args.dy_stride + own.column;
    const stored *z = args.ds ? (const stored *)args.z + (own.first + own.warp) * args.z_stride + own.column : NULL;
    stored *dz = args.dz ? (stored *)args.dz + (own.first + own.warp) * args.dz_stride + own.column : NULL;
    const real *scales = (const real *)args.s + own.column;
    real s[VALUES<D>], bias[VALUES<D>], ds_sum[VALUES<D>] = {}, dy_sum[VALUES<D>] = {};
    load_columns<D, ALIGNED>(s, dz ? scales : NULL, own.lane, own.columns);
    load_columns<D, ALIGNED>(bias, args.bias ? (const real *)args.bias + own.column : NULL, own.lane, own.columns);
#pragma unroll 1
    for (int64_t left = own.past - own.first - own.warp; left > 0; left -= WARPS * FLIGHT) {
        uint4 dy_bits[FLIGHT], z_bits[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            const int inside = left > WARPS * u;
            dy_bits[u] = inside ? load_row<D, ALIGNED>(dy + u * WARPS * args.dy_stride, own.lane, own.columns)
                                : make_uint4(0, 0, 0, 0);
            z_bits[u] = inside && z ? load_row<D, ALIGNED>(z + u * WARPS * args.z_stride, own.lane, own.columns)
                                    : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < FLIGHT; u++) {
            if (left <= WARPS * u)
                continue;
            real values[VALUES<D>], outputs[VALUES<D>];
            widen16<D>(values, dy_bits[u]);
            widen16<D>(outputs, z_bits[u]);
#pragma unroll
            for (int i = 0; i < VALUES<D>; i++) {
                ds_sum[i] += values[i] * (outputs[i] - bias[i]);
                if (SUMS == 2)
                    dy_sum[i] += values[i];
                values[i] *= s[i];
            }
            if (dz)
                store_row<D, ALIGNED>(dz + u * WARPS * args.dz_stride, own.lane, own.columns, round16<D>(values));
        }
        dy += WARPS * FLIGHT * args.dy_stride;
        z = z ? z + WARPS * FLIGHT * args.z_stride : NULL;
        dz = dz ? dz + WARPS * FLIGHT * args.dz_stride : NULL;
    }

#pragma unroll
    for (int i = 0; i < VALUES<D>; i++) {
        sums[own.warp * COUNT + i * 32 + own.lane] = ds_sum[i];
        if (SUMS == 2)
            sums[own.warp * COUNT + STRIP<D> + i * 32 + own.lane] = dy_sum[i];
    }
    __syncthreads();
    add_rows<real, COUNT, WARPS>(sums);

    if (parts > 1) {
        real *of_strip = workspace + own.strip * parts * COUNT;
#pragma unroll
        for (int at = 0; at < COUNT; at += THREADS) {
            const int i = at + (int)threadIdx.x;
            if (i < COUNT)
                of_strip[own.part * COUNT + i] = sums[i];
        }
        if (!last_block(counters + own.strip, (unsigned)parts))
            return;
        add_parts<real, COUNT>(sums, of_strip, parts);
    }
#pragma unroll
    for (int at = 0; at < COUNT; at += THREADS) {
        const int i = at + (int)threadIdx.x, value = i % STRIP<D> / 32;
        const int column = strip_column<D, ALIGNED>(i % 32, value);
        if (i >= COUNT || column >= own.columns)
            continue;
        if (i >= STRIP<D>)
            ((real *)args.dbias)[own.column + column] = sums[i] * (args.bias_detached ? 1 : 1 - scales[column]);
        else if (args.ds)
            ((real *)args.ds)[own.column + column] = sums[i];
    }
}

/* ---- Host ------------------------------------------------------------------------------------------------------- */

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t strips_of(int64_t n, size_t size)
{
    return ceil_div(n, 32 * (16 / (int64_t)size));
}

static int64_t forward_part_rows(int64_t rows, int64_t strips)
{
    const int64_t wanted = ceil_div(rows * strips, MANY_BLOCKS);
    return min(max(wanted, (int64_t)FORWARD_ROWS_LEAST), (int64_t)FORWARD_ROWS_MOST);
}

static int64_t backward_parts(int64_t rows, int64_t strips)
{
    const int64_t few = min(ceil_div(FEW_BLOCKS, strips), ceil_div(rows, BACKWARD_ROWS_LEAST));
    const int64_t many = min(ceil_div(MANY_BLOCKS, strips), ceil_div(rows, BACKWARD_ROWS_MANY));
    return max((int64_t)1, max(few, many));
}

static int is_aligned(const void *pointer)
{
    return (uintptr_t)pointer % 16 == 0;
}

/* Whether every row begins at a multiple of 16 bytes. NULL, for no rows at all, does. */
static int rows_aligned(const void *pointer, int64_t stride, size_t size)
{
    return !pointer || (is_aligned(pointer) && stride * (int64_t)size % 16 == 0);
}

template <class D> static boft_status run_scale(const boft_scale_args *args, void *stream)
{
    const size_t size = sizeof(typename D::stored);
    const int64_t strips = strips_of(args->n, size), part_rows = forward_part_rows(args->rows, strips);
    const unsigned blocks = (unsigned)(strips * ceil_div(args->rows, part_rows));
    const int aligned = args->n % VALUES<D> == 0 && rows_aligned(args->z, args->z_stride, size) &&
                        rows_aligned(args->out, args->out_stride, size) && is_aligned(args->s) &&
                        is_aligned(args->bias);
    if (aligned)
        LAUNCH((scale_kernel<D, true>), blocks, THREADS, 0, stream, *args, part_rows);
    else
        LAUNCH((scale_kernel<D, false>), blocks, THREADS, 0, stream, *args, part_rows);
    return launched("scale");
}

template <class D, int SUMS>
static boft_status run_backward(const boft_scale_backward_args *args, void *workspace, unsigned *counters, void *stream)
{
    const size_t size = sizeof(typename D::stored);
    const int64_t strips = strips_of(args->n, size), parts = backward_parts(args->rows, strips);
    const int64_t part_rows = ceil_div(args->rows, parts);
    const unsigned blocks = (unsigned)(strips * parts);
    const int aligned = args->n % VALUES<D> == 0 && rows_aligned(args->dy, args->dy_stride, size) &&
                        rows_aligned(args->z, args->z_stride, size) && rows_aligned(args->dz, args->dz_stride, size) &&
                        is_aligned(args->s) && is_aligned(args->bias);
    typename D::real *const reals = (typename D::real *)workspace;
    if (aligned)
        LAUNCH((scale_backward_kernel<D, true, SUMS>), blocks, THREADS, 0, stream, *args, part_rows, parts, reals,
               counters);
    else
        LAUNCH((scale_backward_kernel<D, false, SUMS>), blocks, THREADS, 0, stream, *args, part_rows, parts, reals,
               counters);
    return launched("scale backward");
}

template <class D>
static boft_status run_backward(const boft_scale_backward_args *args, void *workspace, unsigned *counters, void *stream)
{
    return args->dbias ? run_backward<D, 2>(args, workspace, counters, stream)
                       : run_backward<D, 1>(args, workspace, counters, stream);
}

static size_t stored_size(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? 8 : dtype == BOFT_F32 ? 4 : 2;
}

boft_status boft_cuda_scale(const boft_scale_args *args, void *stream)
{
    boft_status status;
    if ((status = boft_check_pointer("scale: args", args)) || (status = boft_check_data("scale", args->dtype)))
        return status;
    if (args->rows < 0 || args->n < 0 || args->z_stride < 0 || args->out_stride < args->n)
        return boft_refuse(BOFT_BAD_SHAPE, "scale: %lld rows with strides %lld and %lld for %lld outputs",
                           (long long)args->rows, (long long)args->z_stride, (long long)args->out_stride,
                           (long long)args->n);
    if (args->rows == 0 || args->n == 0)
        return BOFT_OK;
    if ((status = boft_check_pointer("scale: z", args->z)) || (status = boft_check_pointer("scale: s", args->s)) ||
        (status = boft_check_pointer("scale: out", args->out)))
        return status;
    DTYPE_SWITCH(args->dtype, D, return run_scale<D>(args, stream))
    return BOFT_BAD_DTYPE;
}

size_t boft_cuda_scale_backward_workspace(boft_dtype dtype, int64_t rows, int64_t n)
{
    const int64_t strips = strips_of(n, stored_size(dtype)), parts = strips ? backward_parts(rows, strips) : 1;
    const size_t of_strip = 2 * 32 * 16 / stored_size(dtype) * (dtype == BOFT_F64 ? 8 : 4);
    return parts > 1 ? (size_t)(strips * parts) * of_strip : 0;
}

/* Without sums dz = dy s is a scale without a bias. */
static boft_scale_args scale_of_dy(const boft_scale_backward_args *args)
{
    boft_scale_args scale;
    scale.dtype = args->dtype;
    scale.rows = args->rows;
    scale.n = args->n;
    scale.z = args->dy;
    scale.z_stride = args->dy_stride;
    scale.s = args->s;
    scale.bias = NULL;
    scale.out = args->dz;
    scale.out_stride = args->dz_stride;
    return scale;
}

boft_status boft_cuda_scale_backward(const boft_scale_backward_args *args, void *workspace, unsigned *counters,
                                     void *stream)
{
    boft_status status;
    if ((status = boft_check_pointer("scale backward: args", args)) ||
        (status = boft_check_data("scale backward", args->dtype)))
        return status;
    if (args->rows < 0 || args->n < 0 || args->dy_stride < 0 || (args->ds && args->z_stride < 0) ||
        (args->dz && args->dz_stride < args->n))
        return boft_refuse(BOFT_BAD_SHAPE,
                           "scale backward: %lld rows with strides %lld, %lld and %lld for %lld outputs",
                           (long long)args->rows, (long long)args->dy_stride, (long long)args->z_stride,
                           (long long)args->dz_stride, (long long)args->n);
    if (args->n == 0 || (!args->ds && !args->dbias && (!args->dz || args->rows == 0)))
        return BOFT_OK;
    if (args->rows > 0 && ((status = boft_check_pointer("scale backward: dy", args->dy)) ||
                           (status = boft_check_pointer("scale backward: s", args->s)) ||
                           (args->ds && (status = boft_check_pointer("scale backward: z", args->z)))))
        return status;
    if (!args->ds && !args->dbias) {
        const boft_scale_args scale = scale_of_dy(args);
        DTYPE_SWITCH(args->dtype, D, return run_scale<D>(&scale, stream))
    }
    if (boft_cuda_scale_backward_workspace(args->dtype, args->rows, args->n) > 0 &&
        ((status = boft_check_pointer("scale backward: workspace", workspace)) ||
         (status = boft_check_pointer("scale backward: counters", counters))))
        return status;
    boft_scale_backward_args used = *args;
    if (used.rows == 0) { /* nothing may be read then */
        used.dz = NULL;
        used.bias_detached = 1;
    }
    if (!used.ds) {
        used.z = NULL;
        used.bias = NULL;
    }
    DTYPE_SWITCH(args->dtype, D, return run_backward<D>(&used, workspace, counters, stream))
    return BOFT_BAD_DTYPE;
}
