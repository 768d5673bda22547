/*
 * float32 rows times a packed matrix: how it is packed; VEC_PRODUCT, which it includes, multiplies. A panel has two
 * vectors of every row of the matrix, one row after the other.
 */
#include "product_panels.h"

/* Columns of a panel. */
enum { PRODUCT_WIDTH = 2 * VEC_LANES_float };

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

/* Writes the bias of a panel's columns to `rows` rows of y, for its sums to begin with; nothing without a bias. */
VEC_FN void product_bias_of_f32(const boft_product_args *args, int64_t rows, int64_t column, float *y)
{
    for (int64_t t = 0; args->bias && t < rows; t++)
        memcpy(y + t * args->y_stride, (const float *)args->bias + column, PRODUCT_WIDTH * sizeof *y);
}

#include VEC_PRODUCT
