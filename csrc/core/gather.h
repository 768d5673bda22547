/* Where the channels of a group lie. */
#ifndef BOFT_GATHER_H
#define BOFT_GATHER_H

#include "boft.h"

/* Of the blocks of all levels, the first that acts on a tile starting at `channel`, a multiple of plan->super. */
static inline int64_t boft_tile_blocks(const boft_level *level, int64_t channel)
{
    return level->offset + channel * level->group;
}

/* First channel of group g of a level, counted from a multiple of plan->super, as is g. Run r starts boft_run_stride() * r channels later. */
static inline int64_t boft_group_start(const boft_level *level, int64_t g)
{
    return g / level->inner * level->inner * level->group + g % level->inner * level->chunk;
}

static inline int64_t boft_run_stride(const boft_level *level)
{
    return level->inner * level->chunk;
}

/*
 * Block of factor first + f that acts, within group g, on the chunks (high, 0, low) and (high, 1, low): the bit of the
 * factor lies between the factors - 1 - f bits of `high` and the f bits of `low`.
 */
static inline int64_t boft_factor_block(const boft_level *level, int64_t g, int64_t f, int64_t high, int64_t low)
{
    int64_t outer = g / level->inner, lane = g % level->inner;
    int64_t highs = (int64_t)1 << (level->factors - 1 - f);
    return ((outer * highs + high) << (level->first + f)) + low * level->inner + lane;
}

#endif
