/*
 * bfloat16 products by the tiles of AMX (tdpbf16ps: 16 x 16 sums of up to 32 products each), for rotate_bf16.h.
 * Included by isa_amx.c alone.
 *
 * Forward: x R with R held as hi + lo, two bfloat16 numbers. The identity need not be taken out of R: hi of a diagonal
 * element is 1 or next to it and lo the rest, to 2^-17 of R. Gradient: x^T dy has exact factors, but a tile has the rows
 * that are summed beside each other, so x is transposed, in registers.
 */

enum {
    AMX_ROWS = 16,                  /* of a tile */
    AMX_DEPTH = 32,                 /* most channels or rows that one instruction sums over */
    BF16_ROWS = 2 * AMX_ROWS,       /* two tiles of rows for every tile of blocks that is loaded */
    BF16_BACK_ROWS = AMX_DEPTH,
};

/* What each tile register holds. The intrinsics take nothing but numbers. */
#define SUMS 0
#define SUMS_BELOW 1
#define ROWS 2
#define ROWS_BELOW 3
#define BLOCK_HI 4
#define BLOCK_LO 5
#define LEFT 6
#define RIGHT 7

/* Cache lines of `rows` rows of a group. */
VEC_FN int64_t amx_lines(int64_t rows, int64_t group)
{
    return rows * group * (int64_t)sizeof(uint16_t) / BOFT_LINE_BYTES;
}

/* The `channels` channels of the rows ahead. */
VEC_FN boft_stream amx_stream(bf16_rows x, int64_t channels)
{
    return boft_stream_of(x.data, sizeof *x.data, x.stride, x.ahead, channels);
}

/* 16 rows of 16 floats, or of 16 pairs: what a tile register holds. */
typedef struct amx_tile {
    float real[AMX_ROWS][BF16_LANES];
} __attribute__((aligned(BOFT_LINE_BYTES))) amx_tile;

/* Channels of a group that one instruction sums over. */
VEC_FN int64_t amx_depth(int64_t group)
{
    return group % AMX_DEPTH ? BF16_LANES : AMX_DEPTH;
}

/* What was written lies in memory: gcc does not see that _tile_loadd reads it. */
static inline __attribute__((always_inline)) void amx_written(void)
{
    __asm__ volatile("" ::: "memory");
}

/* What _tile_loadconfig reads. */
typedef struct amx_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} amx_shapes;

static inline amx_shapes amx_whole_tiles(void)
{
    amx_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.bytes[i] = BOFT_LINE_BYTES;
        shapes.rows[i] = AMX_ROWS;
    }
    return shapes;
}

/* Shapes the tile registers. The system saves their contents at every change of threads until bf16_end. */
VEC_ATTR static void bf16_begin(int64_t group)
{
    amx_shapes shapes = amx_whole_tiles();
    const int64_t depth = amx_depth(group);
    shapes.bytes[ROWS] = shapes.bytes[ROWS_BELOW] = (uint16_t)(depth * (int64_t)sizeof(uint16_t));
    shapes.rows[BLOCK_HI] = shapes.rows[BLOCK_LO] = (uint8_t)(depth / 2);
    amx_written();
    _tile_loadconfig(&shapes);
}

VEC_ATTR static void bf16_end(void)
{
    _tile_release();
}

VEC_ATTR static bf16_blocks bf16_pack(int64_t group, int64_t groups, const float *blocks, __m512i *packed)
{
    bf16_split(0, 2, group, groups, blocks, packed);
    return (bf16_blocks){packed, 2};
}

/* `rows` rows of sums, row t times factors[t] unless that is NULL, rounded to y. */
VEC_FN void amx_store(const amx_tile *sums, int64_t rows, const float *factors, uint16_t *y, int64_t stride)
{
    for (int64_t t = 0; t < rows; t++) {
        const vec_float sum = load_float(sums->real[t]);
        store_bf16(y + t * stride, factors ? mul_float(sum, set1_float(factors[t])) : sum);
    }
}

/*
 * `rows` rows of whole groups, which fill `tiles` tiles (a constant, 1 or 2) or the last of them in part: y = x R.
 * Rows that fill no tile are copied to where they do.
 */
VEC_FN void amx_multiply_rows(const int tiles, int64_t group, int64_t groups, int64_t rows, bf16_rows x,
                              const __m512i *packed, const float *factors, bf16_room y)
{
    const int64_t depth = amx_depth(group), across = group / BF16_LANES, pairs_bytes = 2 * across * BOFT_LINE_BYTES;
    boft_stream x_ahead = amx_stream(x, groups * group), y_ahead = amx_stream(bf16_rows_of(y), groups * group);
    const int64_t lines = amx_lines(BF16_ROWS, group);
    /* Every column of tiles reads the whole group, which y in the place of x would change. */
    const int copied = rows < tiles * AMX_ROWS || (y.data == x.data && group > BF16_LANES);
    for (int64_t g = 0; g < groups; g++, x.data += group, y.data += group, packed += group * across) {
        boft_fetch_next(&x_ahead, lines);
        boft_fetch_next(&y_ahead, lines);
        uint16_t copy[BF16_ROWS * BOFT_PAIRS_GROUP_MOST];
        bf16_rows in = x;
        if (copied) {
            memset(copy + rows * group, 0, (size_t)((tiles * AMX_ROWS - rows) * group) * sizeof *copy);
            for (int64_t t = 0; t < rows; t++)
                memcpy(copy + t * group, x.data + t * x.stride, (size_t)group * sizeof *copy);
            in = (bf16_rows){copy, group, 0};
        }
        amx_written();
        const size_t stride = (size_t)in.stride * sizeof *copy;
        for (int64_t column = 0; column < group; column += BF16_LANES) {
            amx_tile sums[2];
            _tile_zero(SUMS);
            if (tiles > 1)
                _tile_zero(SUMS_BELOW);
            for (int64_t k = 0; k < group; k += depth) {
                const __m512i *block = packed + (k * group + column) / BF16_LANES;
                _tile_loadd(BLOCK_HI, block, pairs_bytes);
                _tile_loadd(BLOCK_LO, block + across, pairs_bytes);
                _tile_loadd(ROWS, in.data + k, stride);
                _tile_dpbf16ps(SUMS, ROWS, BLOCK_HI);
                if (tiles > 1) {
                    _tile_loadd(ROWS_BELOW, in.data + AMX_ROWS * in.stride + k, stride);
                    _tile_dpbf16ps(SUMS_BELOW, ROWS_BELOW, BLOCK_HI);
                    _tile_dpbf16ps(SUMS_BELOW, ROWS_BELOW, BLOCK_LO);
                }
                _tile_dpbf16ps(SUMS, ROWS, BLOCK_LO);
            }
            _tile_stored(SUMS, &sums[0], BOFT_LINE_BYTES);
            if (tiles > 1)
                _tile_stored(SUMS_BELOW, &sums[1], BOFT_LINE_BYTES);
            amx_store(&sums[0], boft_min(rows, AMX_ROWS), factors, y.data + column, y.stride);
            if (tiles > 1)
                amx_store(&sums[1], rows - AMX_ROWS, factors ? factors + AMX_ROWS : NULL,
                          y.data + AMX_ROWS * y.stride + column, y.stride);
        }
    }
}

/* Not inlined, so that its loops have the registers to themselves, and with the smallest group as a constant. */
VEC_ATTR static __attribute__((noinline)) void amx_multiply_one(int64_t groups, bf16_rows x, const __m512i *packed,
                                                                const float *factors, bf16_room y)
{
    amx_multiply_rows(2, BF16_LANES, groups, BF16_ROWS, x, packed, factors, y);
}

VEC_ATTR static __attribute__((noinline)) void bf16_multiply(int64_t group, int64_t groups, int64_t rows, bf16_rows x,
                                                             bf16_blocks blocks, const float *factors, bf16_room y)
{
    if (group == BF16_LANES && rows == BF16_ROWS)
        amx_multiply_one(groups, x, blocks.pairs, factors, y);
    else if (rows > AMX_ROWS)
        amx_multiply_rows(2, group, groups, rows, x, blocks.pairs, factors, y);
    else
        amx_multiply_rows(1, group, groups, rows, x, blocks.pairs, factors, y);
}

/* `rows` rows of 16 channels as pairs of rows: row q of the tile has pair q of every channel, transposed row k all pairs
 * of channel k. `transposed` is a constant. */
VEC_FN void amx_load(const int transposed, int64_t rows, const uint16_t *data, int64_t stride, amx_tile *tile)
{
    __m512i pairs[AMX_ROWS];
    bf16_load(AMX_ROWS, rows, data, stride, pairs);
    vec_float row[AMX_ROWS];
#pragma GCC unroll 16
    for (int q = 0; q < AMX_ROWS; q++)
        row[q] = _mm512_castsi512_ps(pairs[q]);
    if (transposed)
        transpose_float(row);
#pragma GCC unroll 16
    for (int q = 0; q < AMX_ROWS; q++)
        store_float(tile->real[q], row[q]);
}

VEC_FN void bf16_gradient_rows(int64_t group, int64_t groups, int64_t rows, bf16_rows x, bf16_rows dy, float *dblocks,
                               int start)
{
    const size_t stride = (size_t)group * sizeof *dblocks;
    boft_stream x_ahead = amx_stream(x, groups * group), dy_ahead = amx_stream(dy, groups * group);
    const int64_t lines = amx_lines(BF16_BACK_ROWS, group);
    for (int64_t g = 0; g < groups; g++, x.data += group, dy.data += group, dblocks += group * group) {
        boft_fetch_next(&x_ahead, lines);
        boft_fetch_next(&dy_ahead, lines);
        amx_tile left[BOFT_PAIRS_GROUP_MOST / BF16_LANES], right[BOFT_PAIRS_GROUP_MOST / BF16_LANES];
        const int64_t across = group / BF16_LANES;
        for (int64_t part = 0; part < across; part++) {
            amx_load(1, rows, x.data + part * BF16_LANES, x.stride, &left[part]);
            amx_load(0, rows, dy.data + part * BF16_LANES, dy.stride, &right[part]);
        }
        amx_written();
        for (int64_t i = 0; i < across; i++) {
            _tile_loadd(LEFT, &left[i], BOFT_LINE_BYTES);
            for (int64_t j = 0; j < across; j++) {
                float *sums = dblocks + (i * group + j) * BF16_LANES;
                if (start)
                    _tile_zero(SUMS);
                else
                    _tile_loadd(SUMS, sums, stride);
                _tile_loadd(RIGHT, &right[j], BOFT_LINE_BYTES);
                _tile_dpbf16ps(SUMS, LEFT, RIGHT);
                _tile_stored(SUMS, sums, stride);
            }
        }
    }
}

#undef SUMS
#undef SUMS_BELOW
#undef ROWS
#undef ROWS_BELOW
#undef BLOCK_HI
#undef BLOCK_LO
#undef LEFT
#undef RIGHT
