/*
 * Blocks of at most 32 x 32, everything in one launch: a CUDA block makes whole groups of one level.
 *
 * Forward: Cayley of the groups' blocks into q, then the products, which read q back (global memory written before a
 * barrier is visible to the block). Backward: gradients of the factors into da, then Cayley's backward in place. A
 * strip of whole chunks of rows goes through all factors at a time, with rows after count-3 ... 0 in shared memory.
 */
#ifndef BOFT_BLOCKS_GROUP_CUH
#define BOFT_BLOCKS_GROUP_CUH

#include "blocks_cayley.cuh"
#include "blocks_tile.cuh"

enum { GROUP_MOST_THREADS = 256 };

/* How a launch divides the groups of all levels. */
struct group_tasks {
    int threads;
    size_t shared_bytes;
    int64_t count;  /* CUDA blocks */
    int together;   /* backward: blocks of a CUDA block whose Cayley is done at a time */
    struct {
        int64_t first;  /* CUDA block of this level */
        int64_t groups; /* d / group, since dividing takes long there */
        int log_groups; /* 2^log_groups groups a CUDA block, fewer in the last */
        int log_strip; /* 2^log_strip chunks a strip */
    } level[BOFT_MAX_LEVELS];
};

/* What a CUDA block works on. */
struct group_task {
    factors_of_level level;
    int64_t first_group;
    int groups, log_strip;
    int chunks, blocks; /* of all its groups */
};

DEVICE group_task task_of_block(const boft_plan &plan, const group_tasks &tasks)
{
    int l = 0;
    while (l + 1 < plan.levels && blockIdx.x >= tasks.level[l + 1].first)
        l++;
    group_task task;
    task.level = level_of_plan(plan, l);
    task.first_group = (int64_t)(blockIdx.x - tasks.level[l].first) << tasks.level[l].log_groups;
    const int64_t left = tasks.level[l].groups - task.first_group;
    task.groups = (int)min((int64_t)1 << tasks.level[l].log_groups, left);
    task.log_strip = tasks.level[l].log_strip;
    task.chunks = task.groups << task.level.count;
    task.blocks = task.groups * task.level.count << (task.level.count - 1);
    return task;
}

/* Block i of task.blocks: its place among (m, D, b, b). */
DEVICE int64_t block_of_task(const group_task &task, int i)
{
    const int k = task.level.count, at = i & ((1 << (k - 1)) - 1), f = (i >> (k - 1)) % k, group = (i >> (k - 1)) / k;
    return block_of_factor(task.level, task.first_group + group, f, at >> f, at & ((1 << f) - 1));
}

/* Where a block of a level of one factor lies in the collapsed blocks. */
DEVICE int64_t place_of_single(const factors_of_level &level, int64_t block)
{
    return level.offset + (block - level.first * level.blocks_per_factor) * level.b * level.b;
}

/* A strip of chunks: chunk i of it is chunk `chunk(i)` of group `group(i)`. */
struct strip {
    int first, chunks; /* counted through the groups of the task */
};

DEVICE strip strip_of_task(const group_task &task, int s)
{
    const int first = s << task.log_strip;
    return {first, min(1 << task.log_strip, task.chunks - first)};
}

DEVICE int64_t group_of_chunk(const group_task &task, const strip &s, int i)
{
    return task.first_group + ((s.first + i) >> task.level.count);
}

DEVICE int chunk_in_group(const group_task &task, const strip &s, int i)
{
    return (s.first + i) & ((1 << task.level.count) - 1);
}

template <class T> struct rows {
    T *at;
    int stride;
};

/* Rows after 0 ... count-3 of a strip in shared memory, one array after the other. */
template <class T> DEVICE rows<T> rows_in_shared(const group_task &task, T *shared, int e, int i)
{
    const int c = task.level.chunk, k = task.level.count, width = width_after(task.level, e);
    const int before = ((1 << k) - (1 << (k - e))) * c * c;
    return {shared + (before << task.log_strip) + i * c * width, width};
}

/* Elements of that, in strips of 2^log_strip chunks of c rows of k factors. */
static inline __host__ __device__ int rows_in_shared_size(int k, int c, int log_strip)
{
    return k < 3 ? 0 : (((1 << k) - 4) * c * c) << log_strip;
}

/* Rows after e >= 0 of chunk i of the strip: in q or in shared memory. */
template <class T>
DEVICE rows<const T> rows_after(const group_task &task, const strip &s, const T *q, T *shared, int e, int i)
{
    if (e == task.level.count - 2)
        return {q + top_rows(task.level, group_of_chunk(task, s, i), chunk_in_group(task, s, i)), task.level.b};
    const rows<T> in = rows_in_shared(task, shared, e, i);
    return {in.at, in.stride};
}

/* Rows after f-1 of a strip from those after f: to shared memory, or to the collapsed blocks for f = 0. */
template <class T>
DEVICE void multiply_factor(const group_task &task, const strip &s, int f, const T *q, T *shared, T *blocks)
{
    const int b = task.level.b, c = task.level.chunk, log_highs = task.level.count - 1 - f;
    const int across = quarter(b), down = quarter(c), count = (s.chunks << log_highs) * down * across;
    for (int n = threadIdx.x; n < count; n += blockDim.x) {
        const int tile = n / across, j = n % across, piece = tile / down, i = tile % down;
        const int chunk = piece >> log_highs, h = piece & ((1 << log_highs) - 1);
        const int64_t g = group_of_chunk(task, s, chunk);
        const int t = chunk_in_group(task, s, chunk);
        const rows<const T> from = rows_after(task, s, q, shared, f, chunk);
        const rows<T> to = f == 0 ? rows<T>{blocks + collapsed_rows(task.level, g, t), task.level.group}
                                  : rows_in_shared(task, shared, f - 1, chunk);
        T sum[4][4] = {};
        int row[4], column[4];
        four_of(i, c, from.stride, row);
        four_of(j, b, 1, column);
        add_products(sum, from.at + h * c, row, 1, q + factor_rows(task.level, g, t, f, h), column, b, c);
        store_four(sum, to.at + h * b, i, c, to.stride, j, b);
    }
}

/* Element i of a b x b matrix, and the one `by` further on, without a division for each. */
struct tile_cursor {
    int i, row, column;
};

DEVICE tile_cursor tile_start(int i, int b)
{
    return {i, i / b, i % b};
}

DEVICE void tile_step(tile_cursor *at, int by, int b)
{
    at->i += by;
    for (at->column += by; at->column >= b; at->column -= b)
        at->row++;
}

/* a, keep, q, blocks: boft_cuda_blocks. B: lanes a block, b <= B. */
template <class T, int B>
__global__ void __launch_bounds__(GROUP_MOST_THREADS)
    blocks_of_groups(const boft_plan plan, const group_tasks tasks, const T *a, const unsigned char *keep, T *q,
                     T *blocks)
{
    DYN_SHARED(double, shared);
    const group_task task = task_of_block(plan, tasks);
    const int b = task.level.b, size = b * b, ld = b | 1;
    const int teams = blockDim.x / B, team = threadIdx.x / B, lane = threadIdx.x % B;
    double *pivot_rows = shared + team * 2 * B;
    T *tile = (T *)(shared + teams * 2 * B) + team * b * ld;
    for (int first = 0; first < task.blocks; first += teams) {
        const int active = first + team < task.blocks;
        const int64_t block = active ? block_of_task(task, first + team) : 0;
        const int kept = active && (!keep || keep[block]);
        for (tile_cursor at = tile_start(lane, b); kept && at.i < size; tile_step(&at, B, b))
            tile[at.row * ld + at.column] = a[block * size + at.i];
        __syncwarp();
        cayley_in_lanes<T, B>(b, kept, tile, pivot_rows);
        for (tile_cursor at = tile_start(lane, b); active && at.i < size; tile_step(&at, B, b)) {
            const T value = tile[at.row * ld + at.column]; /* the next block's goes there by this lane too */
            if (q)
                q[block * size + at.i] = value;
            if (task.level.count == 1)
                blocks[place_of_single(task.level, block) + at.i] = value;
        }
    }
    for (int first = 0; task.level.count > 1 && first < task.chunks; first += 1 << task.log_strip) {
        const strip s = strip_of_task(task, first >> task.log_strip);
        for (int f = task.level.count - 2; f >= 0; f--) {
            __syncthreads();
            multiply_factor(task, s, f, (const T *)q, (T *)shared, blocks);
        }
    }
}

/* Elements of what the backward keeps beside these: a factor's blocks of the strip's groups, and gradients of rows. */
static inline __host__ __device__ int factor_in_shared_size(int k, int b, int log_strip)
{
    return (1 << (log_strip > k ? log_strip - 1 : k - 1)) * b * (b | 1);
}

static inline __host__ __device__ int gradients_in_shared_size(int k, int c, int e, int log_strip)
{
    return e > k - 3 ? 0 : (c * c << (k - 1 - e)) << log_strip;
}

template <class T> struct gradient_room {
    T *factor;     /* rows b | 1 apart */
    T *even, *odd; /* gradients of rows after e = 0 ... count-3 */
};

template <class T> DEVICE gradient_room<T> gradient_room_of(const group_task &task, T *shared)
{
    const int b = task.level.b, c = task.level.chunk, k = task.level.count;
    gradient_room<T> room;
    room.factor = shared + rows_in_shared_size(k, c, task.log_strip);
    room.even = room.factor + factor_in_shared_size(k, b, task.log_strip);
    room.odd = room.even + gradients_in_shared_size(k, c, 0, task.log_strip);
    return room;
}

/* Gradients of rows after e of chunk i of the strip: in dblocks, in da, or in shared memory. */
template <class T>
DEVICE rows<const T> gradients_after(const group_task &task, const strip &s, const gradient_room<T> &room,
                                     const T *dblocks, int e, int i)
{
    if (e == -1)
        return {dblocks + collapsed_rows(task.level, group_of_chunk(task, s, i), chunk_in_group(task, s, i)),
                task.level.group};
    const int width = width_after(task.level, e);
    return {(e % 2 ? room.odd : room.even) + i * task.level.chunk * width, width};
}

/* The blocks of factor f that a strip meets, into room.factor. */
template <class T>
DEVICE void load_factor(const group_task &task, const strip &s, int f, const T *q, const gradient_room<T> &room)
{
    const int b = task.level.b, size = b * b, ld = b | 1, k = task.level.count, log_half = k - 1;
    const int groups = (s.chunks + (1 << k) - 1) >> k, count = (groups << log_half) * size;
    for (int n = threadIdx.x; n < count; n += blockDim.x) {
        const int block = n / size, i = n % size, at = block & ((1 << log_half) - 1);
        const int64_t g = group_of_chunk(task, s, block >> log_half << k);
        const int64_t from = block_of_factor(task.level, g, f, at >> f, at & ((1 << f) - 1)) * size + i;
        room.factor[(block * b + i / b) * ld + i % b] = q[from];
    }
}

/* Gradients of rows after f from those of rows after f-1, times the factor's transpose; for f = count-2 into da. */
template <class T>
DEVICE void multiply_back(const group_task &task, const strip &s, int f, const T *dblocks, const gradient_room<T> &room,
                          T *da)
{
    const int b = task.level.b, c = task.level.chunk, ld = b | 1, k = task.level.count, log_highs = k - 1 - f;
    const int across = quarter(c), count = (s.chunks << log_highs) * across * across;
    for (int n = threadIdx.x; n < count; n += blockDim.x) {
        const int tile = n / across, j = n % across, piece = tile / across, i = tile % across;
        const int chunk = piece >> log_highs, h = piece & ((1 << log_highs) - 1), t = chunk_in_group(task, s, chunk);
        const rows<const T> from = gradients_after(task, s, room, dblocks, f - 1, chunk);
        const int width = width_after(task.level, f);
        const rows<T> to = f == k - 2 ? rows<T>{da + top_rows(task.level, group_of_chunk(task, s, chunk), t), b}
                                      : rows<T>{(f % 2 ? room.odd : room.even) + chunk * c * width, width};
        const int block = ((chunk >> k) << (k - 1)) + (h << f) + (t & ((1 << f) - 1));
        T sum[4][4] = {};
        int row[4], column[4];
        four_of(i, c, from.stride, row);
        four_of(j, c, ld, column);
        add_products(sum, from.at + h * b, row, 1, room.factor + (block * b + (t >> f & 1) * c) * ld, column, 1, b);
        store_four(sum, to.at + h * c, i, c, to.stride, j, c);
    }
}

/*
 * Adds a strip's part of the gradient of factor f to da: that of its blocks' rows from c bit on is the sum over chunks
 * t = (x, bit, low) of (rows after f, columns of h)^T (gradients after f-1, columns of h). The first strip with such a
 * chunk, that of x = 0, sets it.
 */
template <class T>
DEVICE void add_factor_gradient(const group_task &task, const strip &s, int f, const T *q, const T *dblocks, T *shared,
                                const gradient_room<T> &room, T *da)
{
    const int b = task.level.b, c = task.level.chunk, k = task.level.count, log_highs = k - 1 - f;
    const int across = quarter(b), down = quarter(c);
    const int first = chunk_in_group(task, s, 0), chunks = min(s.chunks, 1 << k); /* of the strip in a group */
    const int groups = s.chunks / chunks, count = (groups << k) * down * across;
    for (int n = threadIdx.x; n < count; n += blockDim.x) {
        const int tile = n / across, j = n % across, piece = tile / down, i = tile % down;
        const int step = 2 << f, group = piece >> k, h = piece & ((1 << log_highs) - 1);
        const int lowest = (piece >> log_highs) & (step - 1);
        const int start = first <= lowest ? lowest : first + ((lowest - first) & (step - 1));
        if (start >= first + chunks)
            continue;
        T *const to = da + factor_rows(task.level, task.first_group + ((s.first >> k) + group), lowest, f, h);
        T sum[4][4] = {};
        int row[4], column[4];
        four_of(i, c, 1, row);
        four_of(j, b, 1, column);
        if (start != lowest)
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int v = 0; v < 4; v++)
                    sum[u][v] = to[row[u] * b + column[v]];
        for (int t = start; t < first + chunks; t += step) {
            const int chunk = (group << k) + t - first;
            const rows<const T> left = rows_after(task, s, q, shared, f, chunk);
            const rows<const T> right = gradients_after(task, s, room, dblocks, f - 1, chunk);
            add_products(sum, left.at + h * c, row, left.stride, right.at + h * b, column, right.stride, c);
        }
        store_four(sum, to, i, c, b, j, b);
    }
}

/*
 * Cayley's backward of the task's blocks, `together` of them at a time in shared memory, 3 b (b | 1) elements each:
 * with J = I + Q, dA = (X^T - X) / 4 for X = J^T dQ J^T.
 */
template <class T>
DEVICE void cayley_backward_of_task(const group_task &task, int together, const T *dblocks, const T *q,
                                    const unsigned char *keep, T *da, T *shared)
{
    const int b = task.level.b, size = b * b, ld = b | 1, padded = b * ld, across = quarter(b), tiles = across * across;
    T *const q_tiles = shared, *const d_tiles = q_tiles + together * padded;
    T *const half_tiles = d_tiles + together * padded;
    for (int first = 0; first < task.blocks; first += together) {
        const int count = min(together, task.blocks - first);
        __syncthreads();
        for (int n = threadIdx.x; n < count * size; n += blockDim.x) {
            const int i = n % size, at = n / size * padded + i / b * ld + i % b;
            const int64_t block = block_of_task(task, first + n / size);
            q_tiles[at] = q[block * size + i];
            d_tiles[at] =
                task.level.count == 1 ? dblocks[place_of_single(task.level, block) + i] : da[block * size + i];
        }
        for (int pass = 0; pass < 2; pass++) { /* half = J^T dQ, then X = half J^T over dQ */
            __syncthreads();
            for (int n = threadIdx.x; n < count * tiles; n += blockDim.x) {
                const int at = n / tiles * padded, i = n % tiles / across, j = n % tiles % across;
                const T *const from = (pass ? half_tiles : d_tiles) + at;
                T sum[4][4];
                int row[4], row_of_q[4], column[4];
                four_of(i, b, ld, row);
                four_of(i, b, 1, row_of_q);
                four_of(j, b, pass ? ld : 1, column);
#pragma unroll
                for (int u = 0; u < 4; u++)
#pragma unroll
                    for (int v = 0; v < 4; v++)
                        sum[u][v] = from[row[u] + min(j + v * across, b - 1)];
                if (pass)
                    add_products(sum, from, row, 1, (const T *)q_tiles + at, column, 1, b);
                else
                    add_products(sum, (const T *)q_tiles + at, row_of_q, ld, from, column, ld, b);
                store_four(sum, (pass ? d_tiles : half_tiles) + at, i, b, ld, j, b);
            }
        }
        __syncthreads();
        for (int n = threadIdx.x; n < count * size; n += blockDim.x) {
            const int i = n % size;
            const T *const x = d_tiles + n / size * padded;
            const int64_t block = block_of_task(task, first + n / size);
            da[block * size + i] = keep && !keep[block] ? 0 : (x[i % b * ld + i / b] - x[i / b * ld + i % b]) / 4;
        }
    }
}

/* dblocks, q, keep, da: boft_cuda_blocks_backward. */
template <class T>
__global__ void __launch_bounds__(GROUP_MOST_THREADS)
    blocks_of_groups_backward(const boft_plan plan, const group_tasks tasks, const T *dblocks, const T *q,
                              const unsigned char *keep, T *da)
{
    DYN_SHARED(T, shared);
    const group_task task = task_of_block(plan, tasks);
    const int k = task.level.count;
    for (int first = 0; k > 1 && first < task.chunks; first += 1 << task.log_strip) {
        const strip s = strip_of_task(task, first >> task.log_strip);
        const gradient_room<T> room = gradient_room_of(task, shared);
        for (int f = k - 2; f > 0; f--) {
            __syncthreads();
            multiply_factor(task, s, f, q, shared, (T *)NULL);
        }
        for (int f = 0; f < k - 1; f++) {
            __syncthreads();
            load_factor(task, s, f, q, room);
            __syncthreads();
            add_factor_gradient(task, s, f, q, dblocks, shared, room, da);
            multiply_back(task, s, f, dblocks, room, da);
        }
    }
    cayley_backward_of_task(task, tasks.together, dblocks, q, keep, da, shared);
}

#endif
