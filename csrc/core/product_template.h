/*
 * float32 rows times a packed matrix. Packed, a panel has 32 columns of every row of the matrix, one row after the
 * other.
 */
#include "product_panels.h"

VEC_ATTR static void product_pack_of_f32(const boft_product_pack_args *args, int64_t begin, int64_t end)
{
    enum { WIDTH = BOFT_PRODUCT_COLUMNS };
    for (int64_t panel = begin; panel < end; panel++) {
        const float *from = (const float *)args->matrix + panel * WIDTH * (args->transposed ? args->stride : 1);
        float *to = (float *)args->packed + (panel * args->depth + args->first) * WIDTH;
        if (args->transposed)
            transpose_matrix_of_float(WIDTH, args->rows, from, args->stride, to, WIDTH);
        else
            for (int64_t k = 0; k < args->rows; k++)
                memcpy(to + k * WIDTH, from + k * args->stride, WIDTH * sizeof *to);
    }
}

VEC_ATTR static void product_panel_of_f32(const boft_product_args *args, int64_t rows, int64_t row, int64_t column)
{
    const float *x = (const float *)args->x + row * args->x_stride;
    const float *packed = (const float *)args->packed + column * args->depth;
    float *y = (float *)args->y + row * args->y_stride + column;
    for (int64_t t = 0; args->bias && t < rows; t++)
        memcpy(y + t * args->y_stride, (const float *)args->bias + column, BOFT_PRODUCT_COLUMNS * sizeof *y);
    gemm_of_float(rows, BOFT_PRODUCT_COLUMNS, args->depth, x, args->x_stride, 1, packed, BOFT_PRODUCT_COLUMNS, y,
                  args->y_stride, args->bias != NULL);
}

VEC_ATTR static void product_of_f32(const boft_product_args *args, int64_t begin, int64_t end)
{
    product_by_panels(args, sizeof(float), begin, end, product_panel_of_f32);
}
