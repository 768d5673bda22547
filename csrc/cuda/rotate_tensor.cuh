/*
 * Products of rows of bfloat16 or float16 with the blocks of one level, and their gradient, on tensor cores, as
 * rotate_words.cuh describes; sums start at x. A tile of columns is CHUNKS chunks: as many whole groups as fit, `width`
 * channels in all.
 */
#ifndef BOFT_ROTATE_TENSOR_CUH
#define BOFT_ROTATE_TENSOR_CUH

#include "rotate_words.cuh"

enum { LARGEST_CHUNKS = 4 };

/* Groups of a level in tiles of `width` channels. */
typedef struct tensor_level {
    int64_t d, tiles;
    int group, width;
    unsigned meets; /* bit (out chunks + in): whether a group has channels in both chunks */
} tensor_level;

/* out = in times the blocks, or times their transposes. Thread block i: tile i % tiles, split i / tiles of the rows. */
typedef struct tensor_product {
    tensor_level level;
    const uint16_t *in;
    uint16_t *out;
    int64_t in_stride, out_stride;
    const float *blocks;
    int transpose;
    int64_t rows, splits;
} tensor_product;

/* Besides, with in = dy: dblocks = x^T dy, or its transpose; of several splits by the last, from their parts. */
typedef struct tensor_outer {
    const uint16_t *x;
    int64_t x_stride;
    int transpose;
    float *dblocks, *parts;
    unsigned *counters;
} tensor_outer;

template <int CHUNKS> struct tensor_size {
    static constexpr int warps = 4; /* of the product, each with its own rows */
    /* Fragments of E from shared memory serve two row tiles; those of a single chunk stay in registers. */
    static constexpr int held = CHUNKS == 1 ? 1 : 2;
    static constexpr int rows = warps * held * TENSOR_ROWS;
    static constexpr int fragment_bytes = CHUNKS * CHUNKS * FRAGMENTS * 32 * 16;
    /* The backward has a warp for each chunk of the tile and each of these parts of the rows. */
    static constexpr int row_parts = CHUNKS == 1 ? 4 : 1;
    static constexpr int backward_threads = 32 * CHUNKS * row_parts;
    static constexpr int backward_rows = row_parts * TENSOR_ROWS;
    /* Thread blocks that a multiprocessor shall hold at a time: with more, some of these kernels spill registers. */
    static constexpr int resident = CHUNKS == 1 ? 6 : CHUNKS == 2 ? 4 : 3;
    static constexpr int backward_resident = CHUNKS <= 2 ? 4 : 2;
    static constexpr int sum_pitch = CHUNKS * CHUNK + 1;
    static constexpr int sum_bytes = CHUNKS * CHUNK * sum_pitch * 4;
    static constexpr int backward_bytes = fragment_bytes > sum_bytes ? fragment_bytes : sum_bytes;
};

/* Entry (k, c) of E or its transpose in a tile that starts at channel `start`; 0 where no group holds both. */
DEVICE float entry_of_e(const tensor_product &p, int64_t start, int k, int c)
{
    const int n = p.level.group, unit = k / n;
    if (unit != c / n || k >= p.level.width || c >= p.level.width || start + k >= p.level.d)
        return 0;
    const int row = p.transpose ? c : k, column = p.transpose ? k : c;
    return p.blocks[(start + row) * n + (column - unit * n)] - (k == c ? 1.0f : 0.0f);
}

/* The fragments of chunk pairs (out, in). */
template <class D, int CHUNKS>
DEVICE void stage_fragments(const tensor_product &p, int64_t start, int threads, uint4 *fragments)
{
    for (int at = (int)threadIdx.x; at < CHUNKS * CHUNKS * FRAGMENTS * 32; at += threads) {
        const fragment_place to = place_of_fragment(at);
        const int k = to.pair % CHUNKS * CHUNK + to.k, c = to.pair / CHUNKS * CHUNK + to.c;
        float e[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            e[i] = entry_of_e(p, start, k + i, c);
        fragments[at] = fragment_of<D>(e);
    }
}

/* Ones in the halves of a word that hold an infinity or a NaN: an exponent of ones carries into the sign. */
template <class D> DEVICE uint32_t not_finite(uint32_t word)
{
    return (((word & 0x7fff7fffu) + D::exponent_carry) >> 15 & 0x00010001u) * 0xffffu;
}

/*
 * An infinity or a NaN times a zero that lies between two groups would reach the other group. So it is set to 0 where
 * tiles have several groups, and spoil_groups() follows. Returns whether there was one, in the whole warp.
 */
template <class D, int COUNT> DEVICE int take_not_finite(const tensor_level &level, words *x)
{
    if (level.width == level.group)
        return 0;
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < 8 * COUNT; i++)
        found |= not_finite<D>(x[i / 8][i / 4 % 2][i % 4]);
    const int any = any_lane(found != 0);
    if (any)
#pragma unroll
        for (int i = 0; i < 8 * COUNT; i++)
            x[i / 8][i / 4 % 2][i % 4] &= ~not_finite<D>(x[i / 8][i / 4 % 2][i % 4]);
    return any;
}

/* NaN in those results of the lane in a chunk whose groups have a value that is not finite; rows r and r + 8. */
template <class D>
DEVICE void spoil_groups(const tensor_level &level, int chunk, const uint16_t *in, int64_t in_stride, uint16_t *out,
                         int64_t out_stride, int left)
{
    const int own = chunk * CHUNK + (int)threadIdx.x % 4 * 8; /* of the lane's channels, in the tile */
#pragma unroll 1
    for (int h = 0; h < 2 && left > 8 * h; h++)
#pragma unroll 1
        for (int c = 0; c < 8; c++) {
            const int first = (own + c) / level.group * level.group - own;
            uint32_t found = 0;
#pragma unroll 1
            for (int k = first; k < first + level.group; k++)
                found |= not_finite<D>(in[8 * h * in_stride + k]);
            if (found)
                out[8 * h * out_stride + c] = D::round(NAN);
        }
}

/* out = chunk `chunk` of x + x E; x[in] holds the row tiles of chunk `in`, `own` those of the result's. */
template <class D, int CHUNKS, int HELD, int STEP>
DEVICE void rotate_words(words *out, const tensor_level &level, int chunk, const words *own, const words (*x)[HELD],
                         const uint4 *e)
{
    float acc[HELD][4][4];
#pragma unroll
    for (int h = 0; h < HELD; h++)
        start_at<D>(acc[h], own[h]);
#pragma unroll
    for (int in = 0; in < CHUNKS; in++)
        if (CHUNKS == 1 || level.meets >> (chunk * CHUNKS + in) & 1)
            multiply_words<D, HELD, STEP>(acc, x[in], e + (chunk * CHUNKS + in) * FRAGMENTS * STEP);
#pragma unroll
    for (int h = 0; h < HELD; h++)
        round_words<D>(out[h], acc[h]);
}

template <class D, int CHUNKS>
__global__ void __launch_bounds__(128, tensor_size<CHUNKS>::resident) rotate_tensor(tensor_product p)
{
    typedef tensor_size<CHUNKS> size;
    DYN_SHARED(uint4, fragments);
    const int lane = (int)threadIdx.x % 32, channel = lane % 4 * 8;
    const unsigned tiles = (unsigned)p.level.tiles, tile = blockIdx.x % tiles, split = blockIdx.x / tiles;
    const int64_t start = (int64_t)tile * p.level.width;
    const int64_t first = tensor_split_start(p.rows, p.splits, split, size::rows);
    const int row = (int)threadIdx.x / 32 * size::held * TENSOR_ROWS + lane / 4;
    /* Rows from the lane's first one on, and channels from its first one on. */
    int left = (int)(tensor_split_start(p.rows, p.splits, split + 1, size::rows) - first) - row;
    const int width = (int)min((int64_t)p.level.width, p.level.d - start) - channel;
    const uint16_t *in = p.in + (first + row) * p.in_stride + start + channel;
    uint16_t *out = p.out + (first + row) * p.out_stride + start + channel;

    words x[CHUNKS][size::held];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int h = 0; h < size::held; h++)
            load_words(x[c][h], in + c * CHUNK + h * TENSOR_ROWS * p.in_stride, p.in_stride,
                       width > c * CHUNK ? left - h * TENSOR_ROWS : 0);
    stage_fragments<D, CHUNKS>(p, start, 128, fragments);
    __syncthreads();
    uint4 e[FRAGMENTS];
    if constexpr (CHUNKS == 1)
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++)
            e[i] = fragments[i * 32 + lane];

#pragma unroll 1
    for (; left + lane / 4 > 0; left -= size::rows) {
        in += size::rows * p.in_stride;
        words next[1];
        if constexpr (CHUNKS == 1)
            load_words(next[0], in, p.in_stride, width > 0 ? left - size::rows : 0);
        const int spoilt = take_not_finite<D, CHUNKS * size::held>(p.level, x[0]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            words y[size::held];
            if constexpr (CHUNKS == 1)
                rotate_words<D, CHUNKS, size::held, 1>(y, p.level, c, x[c], x, e);
            else
                rotate_words<D, CHUNKS, size::held, 32>(y, p.level, c, x[c], x, fragments + lane);
#pragma unroll
            for (int h = 0; h < size::held; h++)
                store_words(y[h], out + c * CHUNK + h * TENSOR_ROWS * p.out_stride, p.out_stride,
                            width > c * CHUNK ? left - h * TENSOR_ROWS : 0);
        }
        if (spoilt)
#pragma unroll 1
            for (int i = 0; i < CHUNKS * size::held; i++) {
                const int c = i % CHUNKS, h = i / CHUNKS;
                spoil_groups<D>(p.level, c, in + c * CHUNK + (h * TENSOR_ROWS - size::rows) * p.in_stride, p.in_stride,
                                out + c * CHUNK + h * TENSOR_ROWS * p.out_stride, p.out_stride,
                                width > c * CHUNK ? left - h * TENSOR_ROWS : 0);
            }
        out += size::rows * p.out_stride;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int h = 0; h < size::held; h++) {
                if constexpr (CHUNKS == 1)
                    memcpy(x[c][h], next[h], sizeof(words));
                else
                    load_words(x[c][h], in + c * CHUNK + h * TENSOR_ROWS * p.in_stride, p.in_stride,
                               width > c * CHUNK ? left - size::rows - h * TENSOR_ROWS : 0);
            }
    }
}

/* acc[c][t][j] += of chunk `x` and chunk c of dy: rows of word 2t and 2t + 1 of x, columns of word j of dy. */
template <class D, int CHUNKS>
DEVICE void add_outer(float acc[CHUNKS][2][4][4], const tensor_level &level, int chunk, const words x, const words *dy)
{
    uint32_t left[2][4];
#pragma unroll
    for (int p = 0; p < 4; p++)
        left[0][p] = movmatrix(x[0][p]), left[1][p] = movmatrix(x[1][p]);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        if (CHUNKS > 1 && !(level.meets >> (chunk * CHUNKS + c) & 1))
            continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t b[2] = {movmatrix(dy[c][0][j]), movmatrix(dy[c][1][j])};
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const uint32_t a[4] = {left[0][2 * t], left[0][2 * t + 1], left[1][2 * t], left[1][2 * t + 1]};
                D::mma(acc[c][t][j], a, b);
            }
        }
    }
}

/* Puts a warp's sums into the thread block's, sum[row of the gradient][column], or adds them. */
template <int CHUNKS>
DEVICE void put_sums(float *sum, const float acc[CHUNKS][2][4][4], int chunk, int transpose, int add)
{
    constexpr int pitch = tensor_size<CHUNKS>::sum_pitch;
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int k = chunk * CHUNK + lane / 8 * 8 + 2 * (2 * t + i / 2) + lane / 4 % 2;
                    const int n = c * CHUNK + lane % 4 * 8 + 2 * j + i % 2;
                    float *to = sum + (transpose ? n * pitch + k : k * pitch + n);
                    *to = add ? *to + acc[c][t][j][i] : acc[c][t][j][i];
                }
}

/* Warp w has chunk w % CHUNKS of the result and, of the gradient, the rows (of x) in that chunk. */
template <class D, int CHUNKS>
__global__ void __launch_bounds__(tensor_size<CHUNKS>::backward_threads, tensor_size<CHUNKS>::backward_resident)
    rotate_backward_tensor(tensor_product p, tensor_outer outer)
{
    typedef tensor_size<CHUNKS> size;
    constexpr bool ahead = CHUNKS <= 2; /* beyond, registers do not hold the next rows of dy, too */
    DYN_SHARED(uint4, fragments);
    const int lane = (int)threadIdx.x % 32, own = (int)threadIdx.x / 32 % CHUNKS, part = (int)threadIdx.x / 32 / CHUNKS;
    const unsigned tiles = (unsigned)p.level.tiles, tile = blockIdx.x % tiles, split = blockIdx.x / tiles;
    const int64_t start = (int64_t)tile * p.level.width;
    const int64_t first = tensor_split_start(p.rows, p.splits, split, size::backward_rows);
    const int row = part * TENSOR_ROWS + lane / 4, channel = lane % 4 * 8;
    /* Rows from the lane's first one on, and channels from its first one on. */
    int left = (int)(tensor_split_start(p.rows, p.splits, split + 1, size::backward_rows) - first) - row;
    const int width = (int)min((int64_t)p.level.width, p.level.d - start) - channel;
    const uint16_t *dy_at = p.in + (first + row) * p.in_stride + start + channel;
    const uint16_t *x_at = outer.x + (first + row) * outer.x_stride + start + channel + own * CHUNK;
    uint16_t *dx_at = p.out ? p.out + (first + row) * p.out_stride + start + channel + own * CHUNK : NULL;

    words dy[CHUNKS][1], x, next_dy[CHUNKS][1];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        load_words(dy[c][0], dy_at + c * CHUNK, p.in_stride, width > c * CHUNK ? left : 0);
    load_words(x, x_at, outer.x_stride, width > own * CHUNK ? left : 0);
    if (p.out)
        stage_fragments<D, CHUNKS>(p, start, size::backward_threads, fragments);
    __syncthreads();
    uint4 e[FRAGMENTS];
    if constexpr (CHUNKS == 1) {
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++)
            e[i] = p.out ? fragments[i * 32 + lane] : make_uint4(0, 0, 0, 0);
    }
    float acc[CHUNKS][2][4][4];
#pragma unroll
    for (int i = 0; i < CHUNKS * 32; i++)
        acc[i / 32][i / 16 % 2][i / 4 % 4][i % 4] = 0;

#pragma unroll 1
    for (; left + lane / 4 > 0; left -= size::backward_rows) {
        dy_at += size::backward_rows * p.in_stride;
        x_at += size::backward_rows * outer.x_stride;
        if constexpr (ahead)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                load_words(next_dy[c][0], dy_at + c * CHUNK, p.in_stride,
                           width > c * CHUNK ? left - size::backward_rows : 0);
        add_outer<D, CHUNKS>(acc, p.level, own, x, (const words *)dy);
        load_words(x, x_at, outer.x_stride, width > own * CHUNK ? left - size::backward_rows : 0);
        if (p.out) {
            const int spoilt = take_not_finite<D, CHUNKS>(p.level, dy[0]);
            words mine[1], dx[1];
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                if (c == own)
                    memcpy(mine[0], dy[c][0], sizeof(words));
            if constexpr (CHUNKS == 1)
                rotate_words<D, CHUNKS, 1, 1>(dx, p.level, own, mine, dy, e);
            else
                rotate_words<D, CHUNKS, 1, 32>(dx, p.level, own, mine, dy, fragments + lane);
            store_words(dx[0], dx_at, p.out_stride, width > own * CHUNK ? left : 0);
            if (spoilt)
                spoil_groups<D>(p.level, own, dy_at + own * CHUNK - size::backward_rows * p.in_stride, p.in_stride,
                                dx_at, p.out_stride, width > own * CHUNK ? left : 0);
            dx_at += size::backward_rows * p.out_stride;
        }
        if constexpr (ahead) {
            memcpy(dy, next_dy, sizeof dy);
        } else {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                load_words(dy[c][0], dy_at + c * CHUNK, p.in_stride,
                           width > c * CHUNK ? left - size::backward_rows : 0);
        }
    }

    float *sum = (float *)fragments;
#pragma unroll 1
    for (int round = 0; round < size::row_parts; round++) {
        __syncthreads();
        if (part == round)
            put_sums<CHUNKS>(sum, acc, own, outer.transpose, round > 0);
    }
    __syncthreads();
    const int n = p.level.group, entries = (width + channel) * n;
    const int64_t all = p.level.d * n, at = (int64_t)tile * p.level.width * n;
    float *to = p.splits > 1 ? outer.parts + split * all : outer.dblocks;
    for (int i = (int)threadIdx.x; i < entries; i += size::backward_threads)
        to[at + i] = sum[i / n * size::sum_pitch + i / n / n * n + i % n];
    if (p.splits == 1 || !last_block(outer.counters + tile, (unsigned)p.splits))
        return;
    for (int i = (int)threadIdx.x; i < entries; i += size::backward_threads) {
        const float *part_of = outer.parts + at + i;
        float total = *part_of;
#pragma unroll 8
        for (int64_t s = 1; s < p.splits; s++)
            total += part_of[s * all];
        outer.dblocks[at + i] = total;
    }
}

#endif
