/*
 * float32 rows times a packed matrix (product_template.h) where registers are few: AVX2. A tile of six rows takes two
 * loads, six broadcasts and twelve multiply-adds for each row of the matrix, and little besides if the rows lie in the
 * order of their use, one number of each after the other, so that one pointer serves several steps. Rows are copied so
 * in bands, which stay in the second-level cache while all panels of the matrix go by; a piece of a panel stays in the
 * first-level cache while a band goes by. Pieces add to the same sums in the same order.
 *
 * Two Zen 3 cores shared with others, 256 rows at a time, medians in GF/s: rows as they lie and one step at a time,
 * copied, and MKL: 1024 x 768 x 768 131, 143, 125; 1576 x 384 x 384 145, 169, 143; 1576 x 384 x 1536 136, 167, 137;
 * 1024 x 1280 x 1280 115, 137, 126; 1024 x 2048 x 768 119, 142, 135. Eight steps are 0.9 times as fast as four;
 * bands of 48 to 192 rows and pieces of 192 to 384 are alike within the noise.
 */

enum {
    BAND_ROWS = 96,
    BAND_DEPTH = 384,
    /* Rows of the matrix that a tile takes at a time, which divide BOFT_PRODUCT_DEPTH. */
    BAND_STEPS = 4,
};

/* Rows of the next tile of a band of which `left` are left. One or two alone would wait for their sums. */
static inline int64_t band_tile_rows(int64_t left)
{
    if (left <= VEC_TILE_ROWS_WIDE)
        return left;
    return left < VEC_TILE_ROWS_WIDE + 3 ? 4 : VEC_TILE_ROWS_WIDE;
}

/* Copies a band, tile by tile: number k of all rows of a tile, then number k + 1. Writes a vector past its end. */
VEC_ATTR static void band_copy(int64_t rows, int64_t depth, const float *x, int64_t stride, float *band)
{
    for (int64_t tile; rows > 0; rows -= tile, x += tile * stride, band += tile * depth) {
        tile = band_tile_rows(rows);
        for (int64_t k = 0; k < depth; k += VEC_LANES_float) {
            vec_float columns[VEC_LANES_float];
            load_tile_of_float(tile, VEC_LANES_float, x + k, stride, columns);
            transpose_float(columns);
            /* What a store writes beyond its tile's rows is the place of the next one. */
#pragma GCC unroll 8
            for (int i = 0; i < VEC_LANES_float; i++)
                store_float(band + (k + i) * tile, columns[i]);
        }
    }
}

/*
 * `rows` rows of a band, a constant, times a piece of a panel. KEEP: what a product was made of is used once more, so
 * that no sum may take its register; gcc 12 has the sums change places otherwise, and copies them once a round.
 */
VEC_FN void band_tile_product(const int rows, int64_t depth, const float *x, const float *packed, float *y,
                              int64_t stride, int accumulate)
{
    vec_float sum[8][2];
    gemm_begin_of_float(rows, 2, 0, 0, y, stride, accumulate, sum);
    for (int64_t k = 0; k < depth; k += BAND_STEPS, x += BAND_STEPS * rows, packed += BAND_STEPS * PRODUCT_WIDTH) {
#pragma GCC unroll 4
        for (int u = 0; u < BAND_STEPS; u++) {
            const vec_float left = load_float(packed + u * PRODUCT_WIDTH);
            const vec_float right = load_float(packed + u * PRODUCT_WIDTH + VEC_LANES_float);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                const vec_float factor = set1_float(x[u * rows + i]);
                sum[i][0] = fma_float(factor, left, sum[i][0]);
                sum[i][1] = fma_float(factor, right, sum[i][1]);
                VEC_KEEP(factor);
            }
            VEC_KEEP(left);
            VEC_KEEP(right);
        }
    }
    gemm_end_of_float(rows, 2, 0, 0, sum, y, stride);
}

/* The same, each number of rows by a function of its own, so that the loops have the registers to themselves. */
typedef void band_tile(int64_t depth, const float *x, const float *packed, float *y, int64_t stride, int accumulate);
#define DEFINE_TILE(rows)                                                                                              \
    VEC_ATTR static void band_tile_##rows(int64_t depth, const float *x, const float *packed, float *y,                \
                                          int64_t stride, int accumulate)                                              \
    {                                                                                                                  \
        band_tile_product(rows, depth, x, packed, y, stride, accumulate);                                              \
    }
DEFINE_TILE(1)
DEFINE_TILE(2)
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)
#undef DEFINE_TILE

/* The band of `rows` rows from `row` on, times `depth` rows, from row k on, of the panel at `column`. */
VEC_ATTR static void band_product(const boft_product_args *args, const float *band, int64_t rows, int64_t row,
                                  int64_t k, int64_t depth, int64_t column)
{
    static band_tile *const tiles[] = {
        NULL, band_tile_1, band_tile_2, band_tile_3, band_tile_4, band_tile_5, band_tile_6,
    };
    const float *packed = (const float *)args->packed + column * args->depth + k * PRODUCT_WIDTH;
    const int64_t stride = args->y_stride;
    float *y = (float *)args->y + row * stride + column;
    if (k == 0)
        product_bias_of_f32(args, rows, column, y);
    for (int64_t tile; rows > 0; rows -= tile, band += tile * depth, y += tile * stride) {
        tile = band_tile_rows(rows);
        tiles[tile](depth, band, packed, y, stride, k > 0 || args->bias);
    }
}

VEC_ATTR static void product_of_f32(const boft_product_args *args, int64_t begin, int64_t end)
{
    float band[BAND_ROWS * BAND_DEPTH + VEC_LANES_float] __attribute__((aligned(BOFT_LINE_BYTES)));
    const int64_t pieces = boft_quotient_up(args->depth, BAND_DEPTH);
    const int64_t piece = boft_quotient_up(args->depth, pieces * BOFT_PRODUCT_DEPTH) * BOFT_PRODUCT_DEPTH;
    for (int64_t row = begin, rows; row < end; row += rows) {
        rows = product_block_rows(end - row, BAND_ROWS);
        for (int64_t k = 0; k < args->depth; k += piece) {
            const int64_t depth = boft_min(piece, args->depth - k);
            band_copy(rows, depth, (const float *)args->x + row * args->x_stride + k, args->x_stride, band);
            for (int64_t column = 0; column < args->columns; column += PRODUCT_WIDTH)
                band_product(args, band, rows, row, k, depth, column);
        }
    }
}
