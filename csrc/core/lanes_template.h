/*
 * x R and its backward for groups of at most half a vector: a vector holds the channels of several groups, a window, and
 * channel k of each group reaches the lanes of its group by a permutation. Blocks and their gradients are packed
 * accordingly: for each window and k one vector that holds row k of the blocks of the window's groups.
 */
enum { FN(LANES_GROUP) = VEC(VEC_LANES) / 2, FN(LANES_ROWS) = BOFT_ROWS_ONCE };

typedef struct FN(lanes) {
    int64_t group;    /* channels per group, 0 if the plan's groups do not go into lanes */
    int64_t width;    /* channels per window, whole groups */
    int64_t first;    /* first channel of the span that is packed */
    int64_t tile;     /* channels per tile; windows start anew in each */
    const REAL *packed;
    REAL *gradients;  /* packed, added to */
    int32_t index[FN(LANES_GROUP) + 1][VEC(VEC_LANES)]; /* index[k]: for each lane the lane of channel k of its group */
} FN(lanes);

VEC_FN FN(lanes) FN(lanes_of)(const boft_plan *plan, int64_t first)
{
    FN(lanes) lanes = {0};
    if (plan->levels > 1 || plan->super > FN(LANES_GROUP))
        return lanes;
    lanes.group = plan->super;
    lanes.width = VEC(VEC_LANES) / plan->super * plan->super;
    lanes.first = first;
    lanes.tile = boft_tile_channels(plan);
    for (int64_t k = 0; k < lanes.group; k++)
        for (int64_t p = 0; p < VEC(VEC_LANES); p++)
            lanes.index[k][p] = (int32_t)(p < lanes.width ? p / lanes.group * lanes.group + k : p);
    return lanes;
}

/* REALs before the packed blocks of the tile that starts `channels` after the first one. */
VEC_FN int64_t FN(lanes_offset)(const FN(lanes) *lanes, int64_t channels)
{
    const int64_t windows = (lanes->tile + lanes->width - 1) / lanes->width;
    return channels / lanes->tile * windows * lanes->group * VEC(VEC_LANES);
}

/* REALs of the packed blocks of a span. */
VEC_FN int64_t FN(lanes_size)(const FN(lanes) *lanes, int64_t channels)
{
    return FN(lanes_offset)(lanes, channels + lanes->tile - 1);
}

/* Where row k of the block of the group at `channel`, counted from the span's start, is packed. */
VEC_FN int64_t FN(lanes_row)(const FN(lanes) *lanes, int64_t channel, int64_t k)
{
    const int64_t within = channel % lanes->tile;
    return FN(lanes_offset)(lanes, channel) +
           (within / lanes->width * lanes->group + k) * VEC(VEC_LANES) + within % lanes->width;
}

VEC_FN void FN(lanes_pack)(FN(lanes) *lanes, int64_t channels, const REAL *blocks, REAL *packed)
{
    const int64_t group = lanes->group;
    memset(packed, 0, (size_t)FN(lanes_size)(lanes, channels) * sizeof(REAL));
    for (int64_t channel = 0; channel < channels; channel += group)
        for (int64_t k = 0; k < group; k++)
            memcpy(packed + FN(lanes_row)(lanes, channel, k), blocks + (lanes->first + channel + k) * group,
                   (size_t)group * sizeof(REAL));
    lanes->packed = packed;
}

VEC_FN void FN(lanes_unpack)(const FN(lanes) *lanes, int64_t channels, REAL *dblocks)
{
    const int64_t group = lanes->group;
    for (int64_t channel = 0; channel < channels; channel += group)
        for (int64_t k = 0; k < group; k++)
            memcpy(dblocks + (lanes->first + channel + k) * group, lanes->gradients + FN(lanes_row)(lanes, channel, k),
                   (size_t)group * sizeof(REAL));
}

/* `rows` vectors of a window at channel `at`, `width` channels wide. A fetch of constant size keeps the loops short. */
VEC_FN void FN(lanes_load)(int64_t rows, int64_t width, FN(strip) from, int64_t at, VEC(vec) out[FN(LANES_ROWS)])
{
    if (rows == FN(LANES_ROWS))
        FN(fetch)(from, at, FN(LANES_ROWS), VEC(VEC_LANES));
#pragma GCC unroll 4
    for (int i = 0; i < FN(LANES_ROWS); i++) {
        if (i >= rows)
            out[i] = VEC(zero)();
        else
            out[i] = width == VEC(VEC_LANES) ? VEC(load)(from.data + i * from.stride + at)
                                             : VEC(loadn)(from.data + i * from.stride + at, width);
    }
}

VEC_FN void FN(lanes_store)(int64_t rows, int64_t width, const VEC(vec) in[FN(LANES_ROWS)], FN(room) to, int64_t at)
{
    if (rows == FN(LANES_ROWS))
        FN(fetch)(FN(strip_of)(to), at, FN(LANES_ROWS), VEC(VEC_LANES));
#pragma GCC unroll 4
    for (int i = 0; i < FN(LANES_ROWS); i++) {
        if (i >= rows)
            return;
        if (width == VEC(VEC_LANES))
            VEC(store)(to.data + i * to.stride + at, in[i]);
        else
            VEC(storen)(to.data + i * to.stride + at, in[i], width);
    }
}

/* `rows` rows, at most LANES_ROWS, of the tile at `channel`: out = x times the packed blocks. */
VEC_FN void FN(lanes_multiply)(const FN(lanes) *lanes, int64_t channel, int64_t rows, int64_t channels, FN(strip) x,
                               FN(room) out)
{
    const REAL *packed = lanes->packed + FN(lanes_offset)(lanes, channel - lanes->first);
    for (int64_t at = 0; at < channels; at += lanes->width, packed += lanes->group * VEC(VEC_LANES)) {
        const int64_t width = boft_min(lanes->width, channels - at);
        VEC(vec) in[FN(LANES_ROWS)], sum[FN(LANES_ROWS)];
        FN(lanes_load)(rows, width, x, at, in);
#pragma GCC unroll 4
        for (int i = 0; i < FN(LANES_ROWS); i++)
            sum[i] = VEC(zero)();
        for (int64_t k = 0; k < lanes->group; k++) {
            const VEC(vec) row = VEC(load)(packed + k * VEC(VEC_LANES));
            const VEC(index) from = VEC(load_index)(lanes->index[k]);
#pragma GCC unroll 4
            for (int i = 0; i < FN(LANES_ROWS); i++)
                sum[i] = VEC(fma)(VEC(permute)(in[i], from), row, sum[i]);
        }
        FN(lanes_store)(rows, width, sum, out, at);
    }
}

/* The tile at `channel`: out = x times the packed blocks. */
VEC_FN void FN(lanes_rotate)(const FN(lanes) *lanes, int64_t channel, int64_t rows, int64_t channels, FN(strip) x,
                             FN(room) out)
{
    for (int64_t once; rows > 0; rows -= once, x.data += once * x.stride, out.data += once * out.stride) {
        once = boft_min(FN(LANES_ROWS), rows);
        FN(lanes_multiply)(lanes, channel, once, channels, x, out);
    }
}

/* `rows` rows, at most LANES_ROWS, of the tile at `channel`: gradients += left^T right. */
VEC_FN void FN(lanes_gradient)(const FN(lanes) *lanes, int64_t channel, int64_t rows, int64_t channels, FN(strip) left,
                               FN(strip) right)
{
    REAL *gradients = lanes->gradients + FN(lanes_offset)(lanes, channel - lanes->first);
    for (int64_t at = 0; at < channels; at += lanes->width, gradients += lanes->group * VEC(VEC_LANES)) {
        const int64_t width = boft_min(lanes->width, channels - at);
        VEC(vec) a[FN(LANES_ROWS)], b[FN(LANES_ROWS)];
        FN(lanes_load)(rows, width, left, at, a);
        FN(lanes_load)(rows, width, right, at, b);
        for (int64_t k = 0; k < lanes->group; k++) {
            const VEC(index) from = VEC(load_index)(lanes->index[k]);
            VEC(vec) sum = VEC(load)(gradients + k * VEC(VEC_LANES));
#pragma GCC unroll 4
            for (int i = 0; i < FN(LANES_ROWS); i++)
                if (i < rows) /* a row of zeros would still turn -0 into 0 */
                    sum = VEC(fma)(VEC(permute)(a[i], from), b[i], sum);
            VEC(store)(gradients + k * VEC(VEC_LANES), sum);
        }
    }
}

/*
 * The tile at `channel`: gradients += x^T dy if wanted (x and dy change places for x R^T), and dx, unless its data is
 * NULL, = dy times the packed blocks.
 */
VEC_FN void FN(lanes_backward)(FN(lanes) *lanes, int transpose, int64_t channel, int64_t rows, int64_t channels,
                               FN(strip) x, FN(strip) dy, int want_gradients, FN(room) dx)
{
    FN(strip) left = transpose ? dy : x, right = transpose ? x : dy;
    for (int64_t t = 0, once; want_gradients && t < rows; t += once) {
        once = boft_min(FN(LANES_ROWS), rows - t);
        FN(lanes_gradient)(lanes, channel, once, channels, left, right);
        left.data += once * left.stride;
        right.data += once * right.stride;
    }
    if (want_gradients)
        dy.ahead = 0;
    if (dx.data)
        FN(lanes_rotate)(lanes, channel, rows, channels, dy, dx);
}
