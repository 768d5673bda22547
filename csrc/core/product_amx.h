/*
 * bfloat16 rows times a packed matrix (product_pack.h) by the tiles of AMX. Included by isa_amx.c alone, after
 * rotate_amx.h. Rows are multiplied as they lie, 32 with a panel at a time: four tiles of sums, for each 32 of whose
 * products two tiles of rows and two of the matrix are loaded.
 */
#include "product_pack.h"

enum {
    AMX_PRODUCT_ROWS = 2 * AMX_ROWS,
};

/* What each tile register holds: sums of the upper rows and the left columns, and so on. */
#define UPPER_LEFT 0
#define UPPER_RIGHT 1
#define LOWER_LEFT 2
#define LOWER_RIGHT 3
#define UPPER 4
#define LOWER 5
#define LEFT 6
#define RIGHT 7

/* Shapes the tile registers for `rows` rows, at most AMX_PRODUCT_ROWS; the lower ones are not used by 16 or fewer. */
VEC_ATTR static void amx_product_begin(int64_t rows)
{
    amx_shapes shapes = amx_whole_tiles();
    shapes.rows[UPPER] = shapes.rows[UPPER_LEFT] = shapes.rows[UPPER_RIGHT] = (uint8_t)boft_min(rows, AMX_ROWS);
    if (rows > AMX_ROWS)
        shapes.rows[LOWER] = shapes.rows[LOWER_LEFT] = shapes.rows[LOWER_RIGHT] = (uint8_t)(rows - AMX_ROWS);
    amx_written();
    _tile_loadconfig(&shapes);
}

/* The sums of `tiles` (a constant, 1 or 2) tiles of rows with a panel, rounded with the bias to `rows` rows of y. */
VEC_FN void amx_block(const int tiles, int64_t depth, int64_t rows, bf16_rows x, const uint16_t *packed,
                      const uint16_t *bias, bf16_room y)
{
    float sums[AMX_PRODUCT_ROWS][BOFT_PRODUCT_COLUMNS] __attribute__((aligned(BOFT_LINE_BYTES)));
    const size_t stride = (size_t)x.stride * sizeof *x.data, across = sizeof *sums;
    _tile_zero(UPPER_LEFT);
    _tile_zero(UPPER_RIGHT);
    if (tiles > 1) {
        _tile_zero(LOWER_LEFT);
        _tile_zero(LOWER_RIGHT);
    }
    for (int64_t k = 0; k < depth; k += AMX_DEPTH, packed += 2 * PRODUCT_TILE) {
        _tile_loadd(LEFT, packed, BOFT_LINE_BYTES);
        _tile_loadd(UPPER, x.data + k, stride);
        _tile_dpbf16ps(UPPER_LEFT, UPPER, LEFT);
        if (tiles > 1) {
            _tile_loadd(LOWER, x.data + AMX_ROWS * x.stride + k, stride);
            _tile_dpbf16ps(LOWER_LEFT, LOWER, LEFT);
        }
        _tile_loadd(RIGHT, packed + PRODUCT_TILE, BOFT_LINE_BYTES);
        _tile_dpbf16ps(UPPER_RIGHT, UPPER, RIGHT);
        if (tiles > 1)
            _tile_dpbf16ps(LOWER_RIGHT, LOWER, RIGHT);
    }
    _tile_stored(UPPER_LEFT, sums[0], across);
    _tile_stored(UPPER_RIGHT, sums[0] + BF16_LANES, across);
    if (tiles > 1) {
        _tile_stored(LOWER_LEFT, sums[AMX_ROWS], across);
        _tile_stored(LOWER_RIGHT, sums[AMX_ROWS] + BF16_LANES, across);
    }
    amx_written();
    const vec_float left = bias ? load_bf16(bias) : zero_float();
    const vec_float right = bias ? load_bf16(bias + BF16_LANES) : zero_float();
    for (int64_t t = 0; t < rows; t++) {
        store_bf16(y.data + t * y.stride, add_float(load_float(sums[t]), left));
        store_bf16(y.data + t * y.stride + BF16_LANES, add_float(load_float(sums[t] + BF16_LANES), right));
    }
}

VEC_ATTR static void product_of_bf16(const boft_product_args *args, int64_t begin, int64_t end)
{
    const int64_t depth = args->depth, span = product_span(depth, BOFT_PRODUCT_COLUMNS, sizeof(uint16_t));
    amx_product_begin(AMX_PRODUCT_ROWS);
    for (int64_t first = 0; first < args->columns; first += span) {
        const int64_t past = boft_min(first + span, args->columns);
        for (int64_t row = begin; row < end; row += AMX_PRODUCT_ROWS) {
            const int64_t rows = boft_min(AMX_PRODUCT_ROWS, end - row);
            const int64_t ahead = boft_ahead(AMX_PRODUCT_ROWS, row, rows, end);
            const bf16_rows x = {(const uint16_t *)args->x + row * args->x_stride, args->x_stride, ahead};
            bf16_room y = {(uint16_t *)args->y + row * args->y_stride + first, args->y_stride, ahead};
            boft_stream x_ahead = amx_stream(x, depth), y_ahead = amx_stream(bf16_rows_of(y), past - first);
            const int64_t lines = amx_lines(AMX_PRODUCT_ROWS, depth) / ((past - first) / BOFT_PRODUCT_COLUMNS);
            if (rows < AMX_PRODUCT_ROWS)
                amx_product_begin(rows);
            for (int64_t j = first; j < past; j += BOFT_PRODUCT_COLUMNS, y.data += BOFT_PRODUCT_COLUMNS) {
                const uint16_t *packed = (const uint16_t *)args->packed + j * depth;
                const uint16_t *bias = args->bias ? (const uint16_t *)args->bias + j : NULL;
                boft_fetch_next(&x_ahead, lines);
                boft_fetch_next(&y_ahead, amx_lines(AMX_PRODUCT_ROWS, BOFT_PRODUCT_COLUMNS));
                if (rows > AMX_ROWS)
                    amx_block(2, depth, rows, x, packed, bias, y);
                else
                    amx_block(1, depth, rows, x, packed, bias, y);
            }
            if (rows < AMX_PRODUCT_ROWS)
                amx_product_begin(AMX_PRODUCT_ROWS);
        }
    }
    bf16_end();
}

#undef UPPER_LEFT
#undef UPPER_RIGHT
#undef LOWER_LEFT
#undef LOWER_RIGHT
#undef UPPER
#undef LOWER
#undef LEFT
#undef RIGHT
