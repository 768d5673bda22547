/* Tile sizes shared by the kernels of all variants and by the public functions that size workspaces. */
#ifndef BOFT_TILES_H
#define BOFT_TILES_H

#include "boft.h"

enum {
    /*
     * Rows whose sums are in registers together where groups are small: half a vector at most, or one or two vectors. Four
     * are read as streams across the channels of a tile, at FMA peak from cache (two Zen 4 cores: 1.0 times the floor at
     * 1024 x 768 and 1024 x 2048, where 32 rows took 1.1 and 3.7 because rows 8 KiB apart share the sets of the first-level
     * cache; gradients summed over 16 rows in registers: 1.2 and 1.5 instead of 1.15 and 1.25, from memory a quarter more).
     */
    BOFT_ROWS_ONCE = 4,
    /*
     * Rows that rotate and its backward work on in one tile. With small groups several times as many as at once, as a tile
     * takes 60 instructions before its first product; but no more where it is converted first, which would fetch too much
     * at a time (bfloat16 in groups of 8, from memory: 0.7 instead of 0.5 of the time without fetching). The blocks of
     * larger groups are reused over more rows: 8 in the forward of groups of whole vectors (1024 x 1024, groups of 64: 1.5
     * times the floor, with 32 rows 1.75) or, where registers hold the sums of six, 24 (AVX2 on a Zen 3 core, 512 x 320,
     * groups of 80: 64 GF/s with 8, 72 with 24), 32 elsewhere (groups of 20: 2.0 instead of 3.6 with 4 rows; backward
     * of groups of 32 with AVX2 on a Zen 3 core, 512 x 768: 51 GF/s with 4 rows, 70 with 32).
     */
    BOFT_TILE_ROWS_SMALL = 16,
    BOFT_TILE_ROWS_MIDDLE = 8,
    BOFT_TILE_ROWS_SIXES = 24,
    BOFT_TILE_ROWS = 32,
    BOFT_SMALL_GROUP = 32,
    BOFT_MIDDLE_GROUP = 128,
    /*
     * Rows that go through the tiles of a span one tile after the other. The blocks of a tile and their gradients then stay
     * in the first-level cache for several tiles of rows, which still lie close enough to be read as streams (one Emerald
     * Rapids core, 512 x 768 in groups of 16: forward 84 to 98 GF/s, backward 82 to 97; with 64 rows of 2048 channels less).
     */
    BOFT_BAND_ROWS = 16,
    /* Bytes that the caches of all processors at hand move together. */
    BOFT_LINE_BYTES = 64,
    /* Channels of a tile, rounded up to whole super groups: strips of it stay in the first-level cache. */
    BOFT_TILE_CHANNELS = 256,
    /* Bytes of blocks that stay in the second-level cache while rows stream by. */
    BOFT_SPAN_BYTES = 1 << 18,
    /* Rows from which on bfloat16 blocks are worth packing into pairs. */
    BOFT_PAIRS_ROWS_MIN = 16,
    /* Largest group of pairs: 160 still gains (step of a 1280 x 1280 layer 1.57 times frozen instead of 1.67). */
    BOFT_PAIRS_GROUP_MOST = 256,
    /*
     * Rows of x, and of the weight, that linear multiplies with each other together, and outputs between which it scales:
     * sums of them stay in the first-level cache.
     */
    BOFT_LINEAR_ROWS = 4,
    BOFT_LINEAR_OUTPUTS = 64,
    /* Rows at most that one split of scale's backward sums, and in which the splits of rotate's backward end. */
    BOFT_SPLIT_ROWS = 128,
};

static inline int64_t boft_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t boft_max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static inline int64_t boft_quotient_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/*
 * Asks for `rows` rows of `count` elements of `size` bytes, `ahead` rows below those at `at`, to be brought into the
 * second-level cache; for nothing if ahead is 0. Tiles change rows too often for the processor to see streams, and it
 * cannot look past the multiply-adds of a tile, so it would wait for data from memory after every tile. One Zen 4 core,
 * 512 rows of 768 channels in groups of 16, as multiples of the time without: from memory float32 rotate 0.57, backward
 * 0.63, x^T dy alone 0.55; bfloat16 0.80, 0.72 and 0.48, by kernels without bfloat16 instructions 0.57, 0.64 and 0.49;
 * from the third-level cache float32 rotate 1.05. Into the first-level cache, all of it from memory: 0.88 to 0.95.
 */
static inline __attribute__((always_inline)) void boft_fetch(const void *at, int64_t size, int64_t stride, int64_t ahead,
                                                             int64_t rows, int64_t count)
{
    if (!ahead)
        return;
    uintptr_t line = (uintptr_t)at + (uintptr_t)(ahead * stride * size);
#pragma GCC unroll 8
    for (int64_t t = 0; t < rows; t++, line += (uintptr_t)(stride * size))
#pragma GCC unroll 2
        for (int64_t byte = 0; byte < count * size; byte += BOFT_LINE_BYTES)
            __builtin_prefetch((const void *)(line + (uintptr_t)byte), 0, 2);
}

/*
 * The same for the groups of a tile one after the other: the call for group g fetches one row alone, row g % rows, but
 * for as many groups as there are rows. Complete where `rows`, a constant, divides the number of groups. Lines that follow
 * each other cost less where the data are in cache already than as many of rows 4 KiB apart do (one Zen 4 core, float32, 512
 * rows in groups of 16: at 1024 channels rotate 1.11 times the floor instead of 1.16, x^T dy 1.17 instead of 1.26; at 768
 * equal within 2 %), and from memory 1 to 7 % more.
 */
static inline __attribute__((always_inline)) void boft_fetch_in_turn(const void *tile, int64_t size, int64_t stride,
                                                                     int64_t ahead, int64_t rows, int64_t g, int64_t group)
{
    const int64_t from = g % rows * stride + g / rows * rows * group;
    boft_fetch((const char *)tile + from * size, size, stride, ahead, 1, rows * group);
}

/* Rows of a tile that lie ahead, `bytes` each, which are fetched bit by bit in the order in which they lie. */
typedef struct boft_stream {
    uintptr_t row;
    int64_t bytes, stride, at;
} boft_stream;

static inline boft_stream boft_stream_of(const void *tile, int64_t size, int64_t stride, int64_t ahead, int64_t count)
{
    const uintptr_t row = (uintptr_t)tile + (uintptr_t)(ahead * stride * size);
    return (boft_stream){row, ahead ? count * size : 0, stride * size, 0};
}

/*
 * Fetches the next `lines` lines of a stream; nothing if its rows are not to be fetched. For tiles of more rows than
 * the processor can follow as streams of its own: one Sapphire Rapids core, bfloat16, 788 x 384 in groups of 16 over
 * 32 rows by AMX, from memory: rotate 0.61 and x^T dy 0.63 of the time with boft_fetch for the columns of a group, from
 * cache 0.80 and 0.76.
 */
static inline __attribute__((always_inline)) void boft_fetch_next(boft_stream *stream, int64_t lines)
{
    if (!stream->bytes)
        return;
    while (lines > 0) {
        const int64_t own = boft_min(lines, boft_quotient_up(stream->bytes - stream->at, BOFT_LINE_BYTES));
        const uintptr_t from = stream->row + (uintptr_t)stream->at;
        for (int64_t i = 0; i < own; i++)
            __builtin_prefetch((const void *)(from + (uintptr_t)(i * BOFT_LINE_BYTES)), 0, 2);
        lines -= own;
        stream->at += own * BOFT_LINE_BYTES;
        if (stream->at >= stream->bytes) {
            stream->at = 0;
            stream->row += (uintptr_t)stream->stride;
        }
    }
}

/* How many rows ahead a tile of `rows` rows from `row` on fetches: a band, or none where that is past `all` rows. */
static inline int64_t boft_ahead(int64_t band, int64_t row, int64_t rows, int64_t all)
{
    return row + rows + band <= all ? band : 0;
}

/* A tile: rows from `row` and channels from `channel` on, and how many rows ahead it fetches. */
typedef struct boft_tile {
    int64_t row, rows, channel, channels, ahead;
} boft_tile;

static inline boft_tile boft_tile_at(int64_t row, int64_t rows, int64_t channel, int64_t channels, int64_t band,
                                     int64_t all)
{
    return (boft_tile){row, rows, channel, channels, boft_ahead(band, row, rows, all)};
}

/* The first row of split i of n: the splits of a sum over rows, here and in boft.h. */
static inline int64_t boft_split_begin(int64_t rows, int64_t i, int64_t n)
{
    return rows * i / n;
}

/* Whether a group is one vector of `lanes` numbers, or two; vectors of fewer than 8 have no loops of their own for it. */
static inline int boft_is_vectors(int64_t group, int64_t lanes)
{
    return lanes >= 8 && (group == lanes || group == 2 * lanes);
}

/* Whether groups fill half a vector at most, or one or two vectors: they have loops of their own, over few rows. */
static inline int boft_is_small(const boft_plan *plan, int64_t lanes)
{
    return plan->levels == 1 && (plan->super <= 8 || boft_is_vectors(plan->super, lanes));
}

/* Rows of a tile of small groups; `straight`: the data are multiplied as they lie. */
static inline int64_t boft_small_tile_rows(int straight)
{
    return straight ? BOFT_TILE_ROWS_SMALL : BOFT_ROWS_ONCE;
}

/* Rows of a tile of the forward, at most BOFT_TILE_ROWS; registers hold the sums of `tallest` rows. */
static inline int64_t boft_tile_rows(const boft_plan *plan, int64_t lanes, int64_t tallest, int straight)
{
    if (boft_is_small(plan, lanes))
        return boft_small_tile_rows(straight);
    const int middle = plan->levels == 1 && plan->super % 16 == 0 && plan->super <= BOFT_MIDDLE_GROUP;
    if (!middle)
        return BOFT_TILE_ROWS;
    return tallest == 6 ? BOFT_TILE_ROWS_SIXES : BOFT_TILE_ROWS_MIDDLE;
}

/*
 * Rows of a tile of the backward, at most BOFT_TILE_ROWS. A sum over more rows loads and stores the gradients of larger
 * groups less often.
 */
static inline int64_t boft_backward_tile_rows(const boft_plan *plan, int64_t lanes, int straight)
{
    return boft_is_small(plan, lanes) ? boft_small_tile_rows(straight) : BOFT_TILE_ROWS;
}

/* Rows of a band of tiles of `tall` rows, of which BOFT_BAND_ROWS is a multiple or less. */
static inline int64_t boft_band_rows(int64_t tall)
{
    return boft_max(BOFT_BAND_ROWS, tall);
}

/* Whether bfloat16 data is multiplied in pairs, where the processor can: one level of groups of whole vectors. */
static inline int boft_goes_in_pairs(const boft_plan *plan)
{
    return plan->levels == 1 && plan->super % 16 == 0 && plan->super <= BOFT_PAIRS_GROUP_MOST;
}

/* Channels of a tile: a multiple of plan->super, at most d. Every tile of a span but the last has this many. */
static inline int64_t boft_tile_channels(const boft_plan *plan)
{
    /* The blocks of 256 channels in groups of 32 and their gradients, 64 KiB, leave the first-level cache (one Emerald
     * Rapids core, 512 x 768: backward 94 GF/s, with 128 channels 114). */
    const int64_t wanted = plan->super == BOFT_SMALL_GROUP ? BOFT_TILE_CHANNELS / 2 : BOFT_TILE_CHANNELS;
    const int64_t channels = boft_quotient_up(wanted, plan->super) * plan->super;
    return boft_min(channels, plan->d);
}

/* Channels whose blocks are used together for all rows, in whole tiles, at most d. Every span but the last has this many. */
static inline int64_t boft_span_channels(const boft_plan *plan)
{
    const int64_t tile = boft_tile_channels(plan), bytes = tile * (plan->count / plan->d) * (int64_t)sizeof(float);
    return boft_min(boft_max(1, BOFT_SPAN_BYTES / bytes) * tile, plan->d);
}

static inline int64_t boft_spans(const boft_plan *plan)
{
    const int64_t channels = boft_span_channels(plan);
    return boft_quotient_up(plan->d, channels);
}

#endif
