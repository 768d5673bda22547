/*
 * bfloat16 rows times a packed matrix (product_pack.h) by pairs. Included by isa_avx512bf16.c alone, after
 * rotate_pairs.h. One Zen 4 core, 512 rows of 96 to 2048 channels: 221 to 233 of 234 GF/s.
 */
#include "product_pack.h"

/* The sums of `rows` (a constant) rows with a panel, rounded with the bias to y. */
VEC_FN void product_rows(const int rows, int64_t depth, bf16_rows x, const uint16_t *packed, const uint16_t *bias,
                         bf16_room y)
{
    vec_float sum[PRODUCT_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            sum[i][v] = bias ? load_bf16(bias + v * BF16_LANES) : zero_float();
    const uint16_t *upper = x.data, *lower = x.data + 4 * x.stride;
    for (int64_t k = 0; k < depth; k += BOFT_PRODUCT_DEPTH, packed += PRODUCT_TILE)
        for (int q = 0; q < PRODUCT_PAIRS; q++, packed += 2 * BF16_LANES, upper += 2, lower += 2) {
            const __m512i left = _mm512_loadu_si512(packed), right = _mm512_loadu_si512(packed + PRODUCT_TILE);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                const uint16_t *pair = i < 4 ? upper + i * x.stride : lower + (i - 4) * x.stride;
                sum[i][0] = add_products(sum[i][0], left, pair);
                sum[i][1] = add_products(sum[i][1], right, pair);
            }
        }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        store_two_bf16(y.data + i * y.stride, sum[i][0], sum[i][1]);
}

/* The same, each number of rows by a function of its own, so that the loops have the registers to themselves. */
typedef void product_block(int64_t depth, bf16_rows x, const uint16_t *packed, const uint16_t *bias, bf16_room y);
#define DEFINE_BLOCK(rows)                                                                                             \
    VEC_ATTR static void product_##rows(int64_t depth, bf16_rows x, const uint16_t *packed, const uint16_t *bias,      \
                                        bf16_room y)                                                                   \
    {                                                                                                                  \
        product_rows(rows, depth, x, packed, bias, y);                                                                 \
    }
DEFINE_BLOCK(1)
DEFINE_BLOCK(2)
DEFINE_BLOCK(3)
DEFINE_BLOCK(4)
DEFINE_BLOCK(5)
DEFINE_BLOCK(6)
DEFINE_BLOCK(7)
DEFINE_BLOCK(8)
#undef DEFINE_BLOCK

VEC_ATTR static void product_panel_of_bf16(const boft_product_args *args, int64_t rows, int64_t row, int64_t column)
{
    static product_block *const blocks[PRODUCT_ROWS + 1] = {
        NULL, product_1, product_2, product_3, product_4, product_5, product_6, product_7, product_8,
    };
    const bf16_rows x = {(const uint16_t *)args->x + row * args->x_stride, args->x_stride, 0};
    const bf16_room y = {(uint16_t *)args->y + row * args->y_stride + column, args->y_stride, 0};
    blocks[rows](args->depth, x, (const uint16_t *)args->packed + column * args->depth,
                 args->bias ? (const uint16_t *)args->bias + column : NULL, y);
}

VEC_ATTR static void product_of_bf16(const boft_product_args *args, int64_t begin, int64_t end)
{
    product_by_panels(args, begin, end, BOFT_PRODUCT_COLUMNS, sizeof(uint16_t), product_panel_of_bf16);
}
