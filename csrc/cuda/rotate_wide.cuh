/*
 * Products of rows of bfloat16 or float16 with blocks of more than 128 channels, and their gradient, on tensor cores,
 * as rotate_words.cuh describes; x is added to the sums where its chunk comes by.
 *
 * A group has more chunks than one thread block can hold E of. So a tile of the product is a piece of WIDE_PIECE chunks
 * of a group's columns: E of that piece lies in shared memory, and all chunks of x pass through registers. The gradient
 * of a group consists of squares of WIDE_PIECE by WIDE_PIECE chunks, one in the registers of each warp.
 */
#ifndef BOFT_ROTATE_WIDE_CUH
#define BOFT_ROTATE_WIDE_CUH

#include "rotate_words.cuh"

enum {
    WIDE_WARPS = 4,
    WIDE_THREADS = 32 * WIDE_WARPS,
    WIDE_PIECE = 2,
    WIDE_HELD = 2, /* row tiles of a warp, which share the fragments of E that it loads */
    WIDE_ROWS = WIDE_WARPS * WIDE_HELD * TENSOR_ROWS,
    WIDE_CHUNK_BYTES = WIDE_PIECE * FRAGMENTS * 32 * 16, /* of E, for each chunk of x */
    WIDE_CHUNKS = 12,
    /* Thread blocks that a multiprocessor shall hold at a time. */
    WIDE_RESIDENT = 3,
    WIDE_BACKWARD_RESIDENT = 2
};

/* out = in times the blocks, or times their transposes. Thread block i: tile i % tiles, split i / tiles of the rows. */
typedef struct wide_product {
    const uint16_t *in;
    uint16_t *out;
    int64_t in_stride, out_stride;
    const float *blocks;
    int transpose;
    int group, chunks;  /* channels of a group, and chunks of 32 that they are in */
    int pieces;         /* tiles of a group */
    int64_t tiles;      /* of all groups */
    int64_t rows, splits;
} wide_product;

/* dblocks = left^T right by group, WIDE_WARPS squares a tile; of several splits by the last, from their parts. */
typedef struct wide_outer {
    const uint16_t *left, *right;
    int64_t left_stride, right_stride;
    float *dblocks, *parts;
    unsigned *counters;
    int group, side; /* channels of a group, and squares along a side of its gradient */
    int64_t groups, tiles;
    int64_t rows, splits;
} wide_outer;

/* Fragments of E of the piece that starts at column `first` of a group, or of its transpose: pairs (out, in). */
template <class D> DEVICE void stage_piece(const wide_product &p, int64_t group, int first, uint4 *fragments)
{
    const int n = p.group;
    const float *block = p.blocks + group * n * n;
    for (int at = (int)threadIdx.x; at < p.chunks * WIDE_PIECE * FRAGMENTS * 32; at += WIDE_THREADS) {
        const fragment_place to = place_of_fragment(at);
        const int k = to.pair % p.chunks * CHUNK + to.k, c = first + to.pair / p.chunks * CHUNK + to.c;
        float e[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = p.transpose ? c : k + i, column = p.transpose ? k + i : c;
            e[i] = row >= n || column >= n ? 0.0f : block[row * n + column] - (row == column ? 1.0f : 0.0f);
        }
        fragments[at] = fragment_of<D>(e);
    }
}

template <class D> DEVICE void wide_product_rows(const wide_product &p, unsigned index, uint4 *fragments)
{
    const int lane = (int)threadIdx.x % 32, channel = lane % 4 * 8;
    const unsigned tiles = (unsigned)p.tiles, tile = index % tiles, split = index / tiles;
    const int64_t group = tile / (unsigned)p.pieces, start = group * p.group;
    const int piece = (int)(tile % (unsigned)p.pieces) * WIDE_PIECE; /* its first chunk */
    const int64_t first = tensor_split_start(p.rows, p.splits, split, WIDE_ROWS);
    const int row = (int)threadIdx.x / 32 * WIDE_HELD * TENSOR_ROWS + lane / 4;
    /* Rows from the lane's first one on, and channels from its first one on. */
    int left = (int)(tensor_split_start(p.rows, p.splits, split + 1, WIDE_ROWS) - first) - row;
    const int width = p.group - channel;
    const uint16_t *in = p.in + (first + row) * p.in_stride + start + channel;
    uint16_t *out = p.out + (first + row) * p.out_stride + start + channel + piece * CHUNK;

    words x[WIDE_HELD];
#pragma unroll
    for (int h = 0; h < WIDE_HELD; h++)
        load_words(x[h], in + h * TENSOR_ROWS * p.in_stride, p.in_stride, left - h * TENSOR_ROWS);
    stage_piece<D>(p, group, piece * CHUNK, fragments);
    __syncthreads();

#pragma unroll 1
    for (; left + lane / 4 > 0; left -= WIDE_ROWS) {
        float acc[WIDE_PIECE][WIDE_HELD][4][4];
#pragma unroll
        for (int i = 0; i < WIDE_PIECE * WIDE_HELD * 16; i++)
            acc[i / 16 / WIDE_HELD][i / 16 % WIDE_HELD][i / 4 % 4][i % 4] = 0;
#pragma unroll 1
        for (int c = 0; c < p.chunks; c++) {
            const int is_last = c + 1 == p.chunks; /* then the first chunk of the next rows follows */
            const uint16_t *at = in + (is_last ? WIDE_ROWS * p.in_stride : (c + 1) * CHUNK);
            const int rows_left = width > (c + 1) * CHUNK ? left : is_last ? left - WIDE_ROWS : 0;
            words next[WIDE_HELD];
#pragma unroll
            for (int h = 0; h < WIDE_HELD; h++)
                load_words(next[h], at + h * TENSOR_ROWS * p.in_stride, p.in_stride, rows_left - h * TENSOR_ROWS);
#pragma unroll
            for (int o = 0; o < WIDE_PIECE; o++) {
                if (piece + o >= p.chunks)
                    continue;
                if (c == piece + o)
#pragma unroll
                    for (int h = 0; h < WIDE_HELD; h++)
                        add_words<D>(acc[o][h], x[h]);
                multiply_words<D, WIDE_HELD, 32>(acc[o], x, fragments + (o * p.chunks + c) * FRAGMENTS * 32 + lane);
            }
            memcpy(x, next, sizeof x);
        }
#pragma unroll
        for (int o = 0; o < WIDE_PIECE; o++)
#pragma unroll
            for (int h = 0; h < WIDE_HELD; h++) {
                words y;
                round_words<D>(y, acc[o][h]);
                store_words(y, out + o * CHUNK + h * TENSOR_ROWS * p.out_stride, p.out_stride,
                            width > (piece + o) * CHUNK ? left - h * TENSOR_ROWS : 0);
            }
        in += WIDE_ROWS * p.in_stride;
        out += WIDE_ROWS * p.out_stride;
    }
}

DEVICE void store_entries(float *to, const float sum[4], int is_aligned)
{
    if (is_aligned)
        store16(to, round16<f32>(sum));
    else
#pragma unroll
        for (int e = 0; e < 4; e++)
            to[e] = sum[e];
}

template <class D> DEVICE void wide_outer_rows(const wide_outer &p, unsigned index)
{
    const int lane = (int)threadIdx.x % 32, channel = lane % 4 * 8, n = p.group;
    const unsigned tiles = (unsigned)p.tiles, tile = index % tiles, split = index / tiles;
    const int group_tiles = (p.side * p.side + WIDE_WARPS - 1) / WIDE_WARPS;
    const int64_t group = tile / (unsigned)group_tiles;
    const int square = (int)(tile % (unsigned)group_tiles) * WIDE_WARPS + (int)threadIdx.x / 32;
    const int exists = square < p.side * p.side;
    /* First channels of the square in the group: of the gradient, the rows and columns. */
    const int down = square / p.side * WIDE_PIECE * CHUNK, across = square % p.side * WIDE_PIECE * CHUNK;
    const int64_t first = tensor_split_start(p.rows, p.splits, split, TENSOR_ROWS);
    const int rows = (int)(tensor_split_start(p.rows, p.splits, split + 1, TENSOR_ROWS) - first);
    const uint16_t *left_at = p.left + (first + lane / 4) * p.left_stride + group * n + channel + down;
    const uint16_t *right_at = p.right + (first + lane / 4) * p.right_stride + group * n + channel + across;
    float acc[WIDE_PIECE][WIDE_PIECE][2][4][4];
#pragma unroll
    for (int i = 0; i < WIDE_PIECE * WIDE_PIECE * 32; i++)
        acc[i / 32 / WIDE_PIECE][i / 32 % WIDE_PIECE][i / 16 % 2][i / 4 % 4][i % 4] = 0;

    words x[WIDE_PIECE], dy[WIDE_PIECE];
#pragma unroll
    for (int c = 0; c < WIDE_PIECE; c++) {
        load_words(x[c], left_at + c * CHUNK, p.left_stride,
                   exists && down + c * CHUNK + channel < n ? rows - lane / 4 : 0);
        load_words(dy[c], right_at + c * CHUNK, p.right_stride,
                   exists && across + c * CHUNK + channel < n ? rows - lane / 4 : 0);
    }
#pragma unroll 1
    for (int t = 0; exists && t < rows; t += TENSOR_ROWS) {
        const int past = rows - lane / 4 - t - TENSOR_ROWS;
#pragma unroll
        for (int i = 0; i < WIDE_PIECE * 8; i++)
            x[i / 8][i / 4 % 2][i % 4] = movmatrix(x[i / 8][i / 4 % 2][i % 4]);
        words next_x[WIDE_PIECE], next_dy[WIDE_PIECE];
        left_at += TENSOR_ROWS * p.left_stride;
        right_at += TENSOR_ROWS * p.right_stride;
#pragma unroll
        for (int c = 0; c < WIDE_PIECE; c++)
            load_words(next_x[c], left_at + c * CHUNK, p.left_stride, down + c * CHUNK + channel < n ? past : 0);
#pragma unroll
        for (int c = 0; c < WIDE_PIECE; c++)
            load_words(next_dy[c], right_at + c * CHUNK, p.right_stride, across + c * CHUNK + channel < n ? past : 0);
#pragma unroll
        for (int c = 0; c < WIDE_PIECE; c++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t b[2] = {movmatrix(dy[c][0][j]), movmatrix(dy[c][1][j])};
#pragma unroll
                for (int i = 0; i < WIDE_PIECE * 2; i++) {
                    const words &w = x[i / 2];
                    const uint32_t a[4] = {w[0][i % 2 * 2], w[0][i % 2 * 2 + 1], w[1][i % 2 * 2], w[1][i % 2 * 2 + 1]};
                    D::mma(acc[i / 2][c][i % 2][j], a, b);
                }
            }
        memcpy(x, next_x, sizeof x);
        memcpy(dy, next_dy, sizeof dy);
    }

    const int64_t all = p.groups * n * n, at = group * n * n;
    float *to = p.splits > 1 ? p.parts + split * all : p.dblocks;
    const int is_aligned = p.splits > 1 || (uintptr_t)p.dblocks % 16 == 0;
#pragma unroll
    for (int i = 0; i < WIDE_PIECE * WIDE_PIECE * 8; i++) {
        /* Four columns, of words 2v and 2v + 1, in row g or g + 8 of tile t. */
        const int r = i / 8 / WIDE_PIECE, c = i / 8 % WIDE_PIECE, t = i / 4 % 2, h = i / 2 % 2, v = i % 2;
        const int row = down + r * CHUNK + lane / 8 * 8 + 2 * (2 * t + h) + lane / 4 % 2;
        const int column = across + c * CHUNK + channel + 4 * v;
        const float sum[4] = {acc[r][c][t][2 * v][2 * h], acc[r][c][t][2 * v][2 * h + 1],
                              acc[r][c][t][2 * v + 1][2 * h], acc[r][c][t][2 * v + 1][2 * h + 1]};
        if (exists && row < n && column < n)
            store_entries(to + at + row * n + column, sum, is_aligned);
    }
    if (p.splits == 1 || !last_block(p.counters + tile, (unsigned)p.splits))
        return;
#pragma unroll 1
    for (int i = 0; i < WIDE_PIECE * CHUNK * WIDE_PIECE * CHUNK / 4 / 32; i++) {
        constexpr int quads = WIDE_PIECE * CHUNK / 4;
        const int row = down + (i * 32 + lane) / quads, column = across + (i * 32 + lane) % quads * 4;
        if (!exists || row >= n || column >= n)
            continue;
        const float *part = p.parts + at + row * n + column;
        float sum[4], more[4];
        widen16<f32>(sum, load16(part));
#pragma unroll 4
        for (int64_t s = 1; s < p.splits; s++) {
            widen16<f32>(more, load16(part + s * all));
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[e] += more[e];
        }
        store_entries(p.dblocks + at + row * n + column, sum, (uintptr_t)p.dblocks % 16 == 0);
    }
}

template <class D> __global__ void __launch_bounds__(WIDE_THREADS, WIDE_RESIDENT) rotate_wide(wide_product p)
{
    DYN_SHARED(uint4, fragments);
    wide_product_rows<D>(p, blockIdx.x, fragments);
}

/*
 * `products` thread blocks compute the product and the others the gradient of the blocks; they take turns as long as
 * there are both, so that a multiprocessor has one of each and dy comes from the second-level cache when it is read
 * again.
 */
template <class D>
__global__ void __launch_bounds__(WIDE_THREADS, WIDE_BACKWARD_RESIDENT)
    rotate_backward_wide(wide_product p, unsigned products, wide_outer outer)
{
    DYN_SHARED(uint4, fragments);
    const unsigned turns = min(products, gridDim.x - products), i = blockIdx.x;
    if (i < 2 * turns ? i % 2 == 0 : products > turns)
        wide_product_rows<D>(p, i < 2 * turns ? i / 2 : i - turns, fragments);
    else
        wide_outer_rows<D>(outer, i < 2 * turns ? i / 2 : i - turns);
}

#endif
