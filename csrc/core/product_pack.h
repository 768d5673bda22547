/*
 * The packed matrix of product_amx.h and product_pairs.h: a panel of 32 columns has for every 32 rows of the matrix two
 * tiles, of 16 columns each: pair q of rows of all of them, for q = 0 ... 15.
 */

enum {
    PRODUCT_PAIRS = BOFT_PRODUCT_DEPTH / 2,         /* of rows, in a tile */
    PRODUCT_TILE = BOFT_PRODUCT_DEPTH * BF16_LANES, /* numbers of a tile */
};

VEC_ATTR static void product_pack_of_bf16(const boft_product_pack_args *args, int64_t begin, int64_t end)
{
    const uint16_t *matrix = args->matrix;
    const int64_t stride = args->stride;
    for (int64_t panel = begin; panel < end; panel++) {
        uint16_t *packed = (uint16_t *)args->packed + (panel * args->depth + args->first) * BOFT_PRODUCT_COLUMNS;
        for (int64_t k = 0; k < args->rows; k += BOFT_PRODUCT_DEPTH)
            for (int64_t j = panel * BOFT_PRODUCT_COLUMNS; j < (panel + 1) * BOFT_PRODUCT_COLUMNS; j += BF16_LANES) {
                __m512i pairs[PRODUCT_PAIRS];
                vec_float rows[PRODUCT_PAIRS];
                if (args->transposed) {
#pragma GCC unroll 16
                    for (int q = 0; q < PRODUCT_PAIRS; q++)
                        rows[q] = load_float((const float *)(const void *)(matrix + (j + q) * stride + k));
                    transpose_float(rows);
                } else {
                    bf16_load(PRODUCT_PAIRS, BOFT_PRODUCT_DEPTH, matrix + k * stride + j, stride, pairs);
#pragma GCC unroll 16
                    for (int q = 0; q < PRODUCT_PAIRS; q++)
                        rows[q] = _mm512_castsi512_ps(pairs[q]);
                }
#pragma GCC unroll 16
                for (int q = 0; q < PRODUCT_PAIRS; q++, packed += 2 * BF16_LANES)
                    store_float((float *)(void *)packed, rows[q]);
            }
    }
}
