/* Tile sizes shared by the kernels of all variants and by the public functions that size workspaces. */
#ifndef BOFT_TILES_H
#define BOFT_TILES_H

#include "boft.h"

enum {
    /* Rows that rotate and its backward work on together: each group's block is read once per tile. */
    BOFT_TILE_ROWS = 32,
    BOFT_TILE_ROWS_BACKWARD = 64,
    /* Channels of a tile, rounded up to whole super groups: 1 KiB of each float32 row, enough for the prefetcher. */
    BOFT_TILE_CHANNELS = 256,
    /* Rows whose products one split of scale's backward sums. */
    BOFT_SCALE_SPLIT_ROWS = 256,
};

/* Channels of a tile: a multiple of plan->super, at most d. Every tile of a plan but the last has this many. */
static inline int64_t boft_tile_channels(const boft_plan *plan)
{
    int64_t channels = (BOFT_TILE_CHANNELS + plan->super - 1) / plan->super * plan->super;
    return channels < plan->d ? channels : plan->d;
}

static inline int64_t boft_tiles_across(const boft_plan *plan)
{
    int64_t channels = boft_tile_channels(plan);
    return (plan->d + channels - 1) / channels;
}

static inline int64_t boft_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t boft_max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

#endif
