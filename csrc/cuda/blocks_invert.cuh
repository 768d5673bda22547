/*
 * Cayley of blocks larger than 32 x 32: Gauss-Jordan in place in float64, PANEL or WIDE_PANEL columns at a time.
 *
 * The steps of a panel are first taken in its own columns K. In place, these then hold the panel's whole
 * transformation: every other column j becomes A_ij + P_i A_Kj, and P_i A_Kj alone in rows i of K, where P is the panel
 * and A_Kj the rows of K as they were, after the swaps of rows. Blocks of up to INVERT_SHARED_B fit the shared memory
 * that every device has: one CUDA block makes each. Larger ones lie in the workspace, and take two phases a panel: one
 * CUDA block a block makes the panel, in shared memory up to PANEL_SHARED_B, and all of them transform the rest.
 */
#ifndef BOFT_BLOCKS_INVERT_CUH
#define BOFT_BLOCKS_INVERT_CUH

#include "blocks_eliminate.cuh"
#include "blocks_tile.cuh"
#include "phases.cuh"

enum { PANEL = 16, WIDE_PANEL = 32, INVERT_SHARED_B = 96, PANEL_SHARED_B = 368, SKEW_TILE = 32 };

/* For all threads of a CUDA block: the largest `size`, and where: the first of several. A barrier. */
DEVICE double largest_of_block(double size, int *at)
{
    SHARED(double, sizes, 32);
    SHARED(int, places, 32);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int round = 0; round < 2; round++) { /* in each warp, then of the warps */
#pragma unroll
        for (int off = 1; off < 32; off *= 2) {
            const double other = shuffle_xor(size, off);
            const int other_at = shuffle_xor(*at, off);
            if (other > size || (other == size && other_at < *at)) {
                size = other;
                *at = other_at;
            }
        }
        if (round == 0) {
            __syncthreads();
            if (lane == 0) {
                sizes[warp] = size;
                places[warp] = *at;
            }
            __syncthreads();
            const int from = min(lane, (int)blockDim.x / 32 - 1);
            size = sizes[from];
            *at = places[from];
        }
    }
    return size;
}

/* A matrix of n rows, and which row of I + S each of its rows is. */
template <class Index> struct square {
    double *x;
    Index stride;
    int n;
    int *origin;
};

/* All threads of a CUDA block: the steps of s.x's `width` <= WIDEST columns, for rows from k on. pivots: rows taken. */
template <int WIDEST, class Index>
DEVICE void eliminate_panel(const square<Index> &s, int k, int width, int pivoted, int *pivots)
{
    SHARED(double, pivot_row, WIDEST);
    double *const x = s.x;
    const int column = threadIdx.x % WIDEST;
    for (int l = 0; l < width; l++) {
        double *const row = x + (k + l) * s.stride;
        if (pivoted) {
            double size = -1;
            int p = k + l;
            for (int i = k + l + (int)threadIdx.x; i < s.n; i += blockDim.x)
                if (fabs(x[i * s.stride + l]) > size) {
                    size = fabs(x[i * s.stride + l]);
                    p = i;
                }
            largest_of_block(size, &p);
            if ((int)threadIdx.x < width) {
                double *const other = x + p * s.stride;
                const double swapped = row[column];
                row[column] = other[column];
                other[column] = swapped;
            }
            if (threadIdx.x == 0) {
                const int swapped = s.origin[k + l];
                s.origin[k + l] = s.origin[p];
                s.origin[p] = swapped;
                pivots[l] = p;
            }
            __syncthreads();
        }
        if ((int)threadIdx.x < WIDEST) {
            const double inverse = 1 / (row[l] == 0 ? LEAST_PIVOT : row[l]);
            pivot_row[column] = column == l ? inverse : column < width ? row[column] * inverse : 0;
        }
        __syncthreads();
        for (int first = 0; first < s.n; first += blockDim.x / WIDEST) {
            const int i = first + threadIdx.x / WIDEST, inside = i < s.n && column < width;
            double *const own = x + i * s.stride;
            const double factor = inside ? own[l] : 0, before = inside && column != l ? own[column] : 0;
            __syncwarp();
            if (inside)
                own[column] = i == k + l ? pivot_row[column] : before - factor * pivot_row[column];
        }
        __syncthreads();
    }
}

/* All threads of a CUDA block: swaps rows as in the panel in the other columns, and copies the panel's to `taken`. */
template <class Index>
DEVICE void take_pivot_rows(const square<Index> &s, int k, int width, int pivoted, const int *pivots, double *taken)
{
    for (int j = threadIdx.x; j < s.n; j += blockDim.x) {
        double *const x = s.x + j;
        if (j >= k && j < k + width)
            continue;
        for (int l = 0; pivoted && l < width; l++) {
            const double swapped = x[(k + l) * s.stride];
            x[(k + l) * s.stride] = x[pivots[l] * s.stride];
            x[pivots[l] * s.stride] = swapped;
        }
        for (int l = 0; l < width; l++)
            taken[l * s.stride + j] = x[(k + l) * s.stride];
    }
}

/* The panel's transformation of four rows and columns, tile n of quarter(n)^2. */
template <class Index>
DEVICE void transform_tile(const square<Index> &s, int k, int width, const double *taken, int64_t tile)
{
    const int across = quarter(s.n), i = (int)(tile / across), j = (int)(tile % across);
    double sum[4][4] = {};
    Index row[4], column[4];
    four_of(i, s.n, s.stride, row);
    four_of(j, s.n, (Index)1, column);
    add_products(sum, (const double *)s.x + k, row, (Index)1, taken, column, s.stride, width);
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
        for (int v = 0; v < 4; v++) {
            const int to_row = i + u * across, to_column = j + v * across;
            if (to_row >= s.n || to_column >= s.n || (to_column >= k && to_column < k + width))
                continue;
            double *const to = s.x + row[u] + to_column;
            *to = sum[u][v] + (to_row >= k && to_row < k + width ? 0 : *to);
        }
}

/* All threads of a CUDA block: S becomes what is eliminated, and rows are in their places. */
template <class Index> DEVICE void prepare(const square<Index> &s, const elimination &how)
{
    for (int64_t i = threadIdx.x; i < (int64_t)s.n * s.n && (how.sick || how.pivoted); i += blockDim.x) {
        double *const x = s.x + i / s.n * s.stride + i % s.n;
        *x = how.sick ? 0 : *x * how.scale;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < s.n; i += blockDim.x) {
        s.x[i * s.stride + i] = how.one;
        s.origin[i] = i;
    }
    __syncthreads();
}

/* Element i of block `block`, which starts at `place` in `blocks` too unless place is -1. q may be NULL. */
template <class T> DEVICE void store_q(T *q, T *blocks, int64_t b, int64_t block, int64_t place, int64_t i, T value)
{
    if (q)
        q[block * b * b + i] = value;
    if (place >= 0)
        blocks[place + i] = value;
}

/* ---- In shared memory ------------------------------------------------------------------------------------------- */

static inline __host__ __device__ size_t invert_shared_bytes(int b)
{
    return (size_t)((b + PANEL) * (b | 1)) * sizeof(double) + (size_t)(b + PANEL) * sizeof(int);
}

/* All threads of a CUDA block: one of the m D blocks, in invert_shared_bytes. a, keep, q, blocks: boft_cuda_blocks. */
template <class T>
DEVICE void cayley_in_shared(const boft_plan &plan, const T *a, const unsigned char *keep, T *q, T *blocks,
                             int64_t block, double *shared)
{
    const int b = (int)plan.b, size = b * b, ld = b | 1;
    double *const taken = shared + b * ld;
    int *const origin = (int *)(taken + PANEL * ld), *const pivots = origin + b;
    const square<int> s = {shared, ld, b, origin};
    const int kept = !keep || keep[block];
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        s.x[i / b * ld + i % b] = kept ? a[block * size + i] : 0;
    __syncthreads();
    double largest = 0;
    for (int n = threadIdx.x; n < size; n += blockDim.x) {
        const int i = n / b, j = n % b;
        double *const here = s.x + i * ld + j, *const there = s.x + j * ld + i;
        if (j > i)
            continue;
        const double entry = *here / 2 - *there / 2;
        largest = max(largest, size_of_entry(entry));
        *here = entry;
        *there = -entry;
    }
    int nowhere = 0;
    const elimination how = how_to_eliminate(largest_of_block(largest, &nowhere));
    prepare(s, how);
    for (int k = 0; k < b; k += PANEL) {
        const int width = min((int)PANEL, b - k), across = quarter(b);
        eliminate_panel<PANEL>(square<int>{s.x + k, ld, b, origin}, k, width, how.pivoted, pivots);
        take_pivot_rows(s, k, width, how.pivoted, pivots, taken);
        __syncthreads();
        for (int tile = threadIdx.x; tile < across * across; tile += blockDim.x)
            transform_tile(s, k, width, taken, tile);
        __syncthreads();
    }
    const int64_t place = place_if_single(plan, block);
    for (int n = threadIdx.x; n < size; n += blockDim.x) {
        const int i = n / b, j = origin[n % b];
        store_q(q, blocks, b, block, place, i * b + j, entry_of_q<T>(how, s.x[i * ld + n % b], i == j));
    }
}

/* ---- In the workspace ------------------------------------------------------------------------------------------- */

/* What the elimination of `count` blocks keeps in the workspace: arrays of one entry per block. */
struct invert_room {
    double *x;       /* (b, b) */
    double *taken;   /* (WIDE_PANEL, b) */
    double *partial; /* (tiles): the largest entries of S */
    double *largest; /* of S */
    int *origin;     /* (b) */
};

/* Tiles on and below the diagonal of a b x b matrix. */
static inline __host__ __device__ unsigned skew_tiles(int64_t b)
{
    const unsigned across = (unsigned)((b + SKEW_TILE - 1) / SKEW_TILE);
    return across * (across + 1) / 2;
}

static inline size_t invert_room_bytes(int64_t count, int64_t b)
{
    const int64_t doubles_a_block = (b + WIDE_PANEL) * b + skew_tiles(b) + 1;
    return (size_t)(count * doubles_a_block) * sizeof(double) + (size_t)(count * b) * sizeof(int);
}

static inline invert_room invert_room_of(void *workspace, int64_t count, int64_t b)
{
    invert_room room;
    room.x = (double *)workspace;
    room.taken = room.x + count * b * b;
    room.partial = room.taken + count * WIDE_PANEL * b;
    room.largest = room.partial + count * skew_tiles(b);
    room.origin = (int *)(room.largest + count);
    return room;
}

static inline size_t skew_shared_bytes(size_t real)
{
    return 2 * SKEW_TILE * (SKEW_TILE + 1) * real;
}

/*
 * All threads of the grid: to = half (from - from^T), 0 where keep is 0, for `count` blocks (b, b), a tile and its
 * mirror image a CUDA block at a time, in skew_shared_bytes. partial: NULL, or the largest entry of each tile.
 */
template <class From, class To>
DEVICE void skew(unsigned count, int64_t b, const From *from, const unsigned char *keep, To half, To *to,
                 double *partial, To *tile)
{
    enum { STRIDE = SKEW_TILE + 1 };
    To *const mirror = tile + SKEW_TILE * STRIDE;
    const unsigned tiles = skew_tiles(b);
    const int column = threadIdx.x % SKEW_TILE, first = threadIdx.x / SKEW_TILE, next = blockDim.x / SKEW_TILE;
    for (unsigned n = blockIdx.x; n < count * tiles; n += gridDim.x) {
        const unsigned block = n / tiles, at = n % tiles;
        unsigned down = 0;
        while ((down + 1) * (down + 2) / 2 <= at)
            down++;
        const int64_t i0 = down * SKEW_TILE, j0 = (at - down * (down + 1) / 2) * SKEW_TILE, start = block * b * b;
        const int kept = !keep || keep[block];
        __syncthreads();
        for (int row = first; row < SKEW_TILE; row += next) {
            if (i0 + row < b && j0 + column < b)
                tile[row * STRIDE + column] = kept ? (To)from[start + (i0 + row) * b + j0 + column] : 0;
            if (j0 + row < b && i0 + column < b)
                mirror[row * STRIDE + column] = kept ? (To)from[start + (j0 + row) * b + i0 + column] : 0;
        }
        __syncthreads();
        double largest = 0;
        for (int row = first; row < SKEW_TILE; row += next) {
            if (i0 + row < b && j0 + column < b) {
                const To entry = half * tile[row * STRIDE + column] - half * mirror[column * STRIDE + row];
                to[start + (i0 + row) * b + j0 + column] = entry;
                largest = max(largest, size_of_entry(entry));
            }
            if (i0 > j0 && j0 + row < b && i0 + column < b)
                to[start + (j0 + row) * b + i0 + column] =
                    half * mirror[row * STRIDE + column] - half * tile[column * STRIDE + row];
        }
        if (partial) {
            int nowhere = 0;
            largest = largest_of_block(largest, &nowhere);
            if (threadIdx.x == 0)
                partial[n] = largest;
        }
    }
}

DEVICE square<int64_t> square_of_block(const invert_room &room, int64_t b, int64_t block)
{
    return {room.x + block * b * b, b, (int)b, room.origin + block * b};
}

static inline size_t panel_shared_bytes(int64_t b)
{
    return b > PANEL_SHARED_B ? 0 : (size_t)(b * (WIDE_PANEL + 1)) * sizeof(double);
}

/* All threads of a CUDA block: a panel of a block, in panel_shared_bytes if there are any. */
DEVICE void eliminate_panel_of_block(const invert_room &room, int64_t b, int k, int64_t block, double *shared)
{
    enum { STRIDE = WIDE_PANEL + 1 };
    SHARED(int, pivots, WIDE_PANEL);
    const square<int64_t> s = square_of_block(room, b, block);
    const int width = min((int)WIDE_PANEL, s.n - k), column = threadIdx.x % WIDE_PANEL;
    const int first = threadIdx.x / WIDE_PANEL, next = blockDim.x / WIDE_PANEL;
    if (k == 0) {
        double largest = 0;
        int nowhere = 0;
        for (unsigned i = threadIdx.x; i < skew_tiles(b); i += blockDim.x)
            largest = max(largest, room.partial[block * skew_tiles(b) + i]);
        largest = largest_of_block(largest, &nowhere);
        if (threadIdx.x == 0)
            room.largest[block] = largest;
        __syncthreads();
    }
    const elimination how = how_to_eliminate(room.largest[block]);
    if (k == 0)
        prepare(s, how);
    if (b > PANEL_SHARED_B) {
        eliminate_panel<WIDE_PANEL>(square<int64_t>{s.x + k, b, s.n, s.origin}, k, width, how.pivoted, pivots);
    } else {
        for (int i = first; i < s.n && column < width; i += next)
            shared[i * STRIDE + column] = s.x[i * b + k + column];
        __syncthreads();
        eliminate_panel<WIDE_PANEL>(square<int>{shared, STRIDE, s.n, s.origin}, k, width, how.pivoted, pivots);
        for (int i = first; i < s.n && column < width; i += next)
            s.x[i * b + k + column] = shared[i * STRIDE + column];
    }
    take_pivot_rows(s, k, width, how.pivoted, pivots, room.taken + block * WIDE_PANEL * b);
    __syncthreads();
}

/*
 * All threads of the grid: Q of all blocks, in larger_shared_bytes. a, keep, q, blocks: boft_cuda_blocks. Work that no
 * barrier is part of is divided among warps: first one warp of each CUDA block, then the next.
 */
template <class T>
DEVICE void cayley_in_workspace(const boft_plan &plan, const T *a, const unsigned char *keep, T *q, T *blocks,
                                const invert_room &room, double *shared)
{
    const int64_t b = plan.b;
    const unsigned count = (unsigned)(plan.m * plan.blocks), tiles = (unsigned)(quarter((int)b) * quarter((int)b));
    const unsigned warp = threadIdx.x / 32 * gridDim.x + blockIdx.x, warps = blockDim.x / 32 * gridDim.x;
    const int lane = threadIdx.x % 32;
    skew(count, b, a, keep, 0.5, room.x, room.partial, shared);
    for (int k = 0; k < b; k += WIDE_PANEL) {
        grid_barrier();
        for (unsigned block = blockIdx.x; block < count; block += gridDim.x)
            eliminate_panel_of_block(room, b, k, block, shared);
        grid_barrier();
        for (unsigned n = 32 * warp + lane; n < count * tiles; n += 32 * warps) {
            const square<int64_t> s = square_of_block(room, b, n / tiles);
            transform_tile(s, k, min((int)WIDE_PANEL, s.n - k), room.taken + n / tiles * WIDE_PANEL * b, n % tiles);
        }
    }
    grid_barrier();
    for (unsigned row = warp; row < count * (unsigned)b; row += warps) {
        const unsigned block = row / (unsigned)b, i = row % (unsigned)b;
        const square<int64_t> s = square_of_block(room, b, block);
        const elimination how = how_to_eliminate(room.largest[block]);
        const int64_t place = place_if_single(plan, block);
        for (int n = lane; n < s.n; n += 32) {
            const int j = s.origin[n];
            store_q(q, blocks, b, block, place, i * b + j, entry_of_q<T>(how, s.x[i * b + n], (int)i == j));
        }
    }
}

#endif
