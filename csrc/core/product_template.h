/*
 * float32 rows times a packed matrix. Packed, a panel has two vectors of every row of the matrix, one row after the
 * other. Panels of more than VEC_PRODUCT_DEPTH rows are multiplied piece by piece, which adds to the same sums in the
 * same order, and VEC_PRODUCT_ROWS rows of x go by a panel before the next one.
 *
 * With AVX-512 the sums of eight rows are in registers, those rows of x in the first-level cache, and whole panels come
 * from the second. AVX2 has registers for six, which meet a panel too seldom for that: pieces of a panel, 24 KiB, stay
 * in the first-level cache, and 48 rows of x in the second. One Zen 3 core, 256 rows of 384 to 2048 channels, beside its
 * multiply-adds at the same time: 0.90 to 1.0, with whole panels from the second-level cache 0.73 to 0.92, then with
 * tiles of four rows 0.62 to 0.78; MKL 0.76 to 0.96. 1024 rows of 1280 without limit 0.78, by 48 or 96 0.91 to 0.95; but
 * 96 rows 8 KiB apart meet in the sets of the second-level cache (1024 rows of 2048 x 768: 79 GF/s, by 48 110, MKL 104).
 */
#include "product_panels.h"

VEC_ATTR static void product_pack_of_f32(const boft_product_pack_args *args, int64_t begin, int64_t end)
{
    /* Rows that are read side by side: column by column they would come from memory in single lines. */
    enum { PANELS = BOFT_PRODUCT_COLUMNS / PRODUCT_WIDTH, ROWS = 8 };
    const int64_t rows = args->transposed ? args->rows : ROWS;
    for (int64_t k = 0; k < args->rows; k += rows)
        for (int64_t panel = begin * PANELS; panel < end * PANELS; panel++) {
            const int64_t column = panel * PRODUCT_WIDTH;
            const float *from = args->matrix;
            float *to = (float *)args->packed + column * args->depth + (args->first + k) * PRODUCT_WIDTH;
            if (args->transposed)
                transpose_matrix_of_float(PRODUCT_WIDTH, rows, from + column * args->stride, args->stride, to,
                                          PRODUCT_WIDTH);
            else
                for (int64_t i = 0; i < rows; i++)
                    memcpy(to + i * PRODUCT_WIDTH, from + (k + i) * args->stride + column, PRODUCT_WIDTH * sizeof *to);
        }
}

/* `rows` rows, from `row` on, times rows k ... k + depth-1 of the panel at `column`. */
VEC_ATTR static void product_piece_of_f32(const boft_product_args *args, int64_t k, int64_t depth, int64_t rows,
                                          int64_t row, int64_t column)
{
    const float *x = (const float *)args->x + row * args->x_stride + k;
    const float *packed = (const float *)args->packed + column * args->depth + k * PRODUCT_WIDTH;
    float *y = (float *)args->y + row * args->y_stride + column;
    for (int64_t t = 0; k == 0 && args->bias && t < rows; t++)
        memcpy(y + t * args->y_stride, (const float *)args->bias + column, PRODUCT_WIDTH * sizeof *y);
    gemm_two_of_float(0, rows, depth, x, args->x_stride, 1, packed, PRODUCT_WIDTH, y, args->y_stride,
                      k > 0 || args->bias);
}

VEC_ATTR static void product_of_f32(const boft_product_args *args, int64_t begin, int64_t end)
{
    const int64_t pieces = boft_quotient_up(args->depth, VEC_PRODUCT_DEPTH);
    const int64_t piece = boft_quotient_up(args->depth, pieces);
    const int64_t panels = product_span(args->depth * PRODUCT_WIDTH * (int64_t)sizeof(float));
    const int64_t span = pieces > 1 ? args->columns : panels * PRODUCT_WIDTH;
    for (int64_t first = 0; first < args->columns; first += span)
        for (int64_t row = begin, rows; row < end; row += rows) {
            rows = product_block_rows(end - row, VEC_PRODUCT_ROWS);
            for (int64_t k = 0; k < args->depth; k += piece)
                for (int64_t j = first; j < boft_min(first + span, args->columns); j += PRODUCT_WIDTH)
                    product_piece_of_f32(args, k, boft_min(piece, args->depth - k), rows, row, j);
        }
}
