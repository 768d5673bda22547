/*
 * float32 rows times a packed matrix (product_template.h) where registers hold the sums of eight rows with two vectors
 * and the processor multiplies by a number in memory: AVX-512. Eight rows of x, as they lie, stay in the first-level
 * cache while panels come from the second.
 */

VEC_ATTR static void product_panel_of_f32(const boft_product_args *args, int64_t rows, int64_t row, int64_t column)
{
    const float *x = (const float *)args->x + row * args->x_stride;
    const float *packed = (const float *)args->packed + column * args->depth;
    float *y = (float *)args->y + row * args->y_stride + column;
    product_bias_of_f32(args, rows, column, y);
    gemm_two_of_float(0, rows, args->depth, x, args->x_stride, 1, packed, PRODUCT_WIDTH, y, args->y_stride,
                      args->bias != NULL);
}

VEC_ATTR static void product_of_f32(const boft_product_args *args, int64_t begin, int64_t end)
{
    product_by_panels(args, begin, end, PRODUCT_WIDTH, sizeof(float), product_panel_of_f32);
}
