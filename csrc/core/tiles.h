/* Tile sizes shared by the kernels of all variants and by the public functions that size workspaces. */
#ifndef BOFT_TILES_H
#define BOFT_TILES_H

#include "boft.h"

enum {
    /*
     * Rows that rotate and its backward work on together. With one level of groups of one or two vectors four: rows are
     * then read as streams across all channels, at FMA peak from cache (two Zen 4 cores: 1.0 times the floor at 1024 x
     * 768 and 1024 x 2048, where tiles of 32 rows took 1.1 and 3.7 because rows 8 KiB apart share the sets of the
     * first-level cache). Larger groups are reused over more rows: 8 in the forward of groups of whole vectors
     * (1024 x 1024, groups of 64: 1.5 times the floor, with 32 rows 1.75), 32 elsewhere (groups of 20: 2.0 instead of
     * 3.6 with 4 rows; backward of groups of 32 with AVX2 on a Zen 3 core, 512 x 768: 51 GF/s with 4 rows, 70 with 32).
     */
    BOFT_TILE_ROWS_SMALL = 4,
    BOFT_TILE_ROWS_MIDDLE = 8,
    BOFT_TILE_ROWS = 32,
    BOFT_SMALL_GROUP = 32,
    BOFT_MIDDLE_GROUP = 128,
    /*
     * Rows that go through the tiles of a span one tile after the other. The blocks of a tile and their gradients then stay
     * in the first-level cache for several tiles of rows, which still lie close enough to be read as streams (one Emerald
     * Rapids core, 512 x 768 in groups of 16: forward 84 to 98 GF/s, backward 82 to 97; with 64 rows of 2048 channels less).
     */
    BOFT_BAND_ROWS = 16,
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

/* Rows of a tile of the forward, at most BOFT_TILE_ROWS. */
static inline int64_t boft_tile_rows(const boft_plan *plan, int64_t lanes)
{
    if (boft_is_small(plan, lanes))
        return BOFT_TILE_ROWS_SMALL;
    const int middle = plan->levels == 1 && plan->super % 16 == 0 && plan->super <= BOFT_MIDDLE_GROUP;
    return middle ? BOFT_TILE_ROWS_MIDDLE : BOFT_TILE_ROWS;
}

/*
 * Rows of a tile of the backward, at most BOFT_TILE_ROWS. A sum over more rows loads and stores the gradients of larger
 * groups less often.
 */
static inline int64_t boft_backward_tile_rows(const boft_plan *plan, int64_t lanes)
{
    return boft_is_small(plan, lanes) ? BOFT_TILE_ROWS_SMALL : BOFT_TILE_ROWS;
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
