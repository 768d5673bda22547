/* Packed rows: bounds of the round trip, odd widths, strided rows, values that are not finite, refusals. */
#include "support.h"

#include <math.h>
#include <string.h>

static const boft_dtype dtypes[] = {BOFT_F32, BOFT_BF16, BOFT_F16, BOFT_F64};
static const int64_t widths[] = {1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 200};
enum { ROWS = 3, GAP = 5, BLOCK = 64 };

/* Checks block by block that `back` is near `values`, or NaN where a value of the block is not finite. */
static void check_block(boft_dtype dtype, int bits, int64_t channels, const double *values, const double *back)
{
    double largest = 0;
    int finite = 1;
    for (int64_t i = 0; i < channels; i++) {
        finite &= isfinite(values[i]) != 0;
        largest = fmax(largest, fabs(values[i]));
    }
    /* Half a scale, which was rounded up to 8 bits, and the roundings of the arithmetic and of a 16-bit dtype. */
    const double bound = largest / (bits == 4 ? 14 : 254) * (1 + 0x1p-7) + 0x1p-22 * largest + 0x1p-134 +
                         (dtype_size(dtype) == 2 ? unit_roundoff(dtype) * 1.1 * largest + smallest_step(dtype) : 0);
    for (int64_t i = 0; i < channels; i++)
        if (finite)
            EXPECT(fabs(back[i] - values[i]) <= bound, "value %lld: %.9g, not %.9g", (long long)i, back[i], values[i]);
        else
            EXPECT(isnan(back[i]), "value %lld: %.9g, not NaN", (long long)i, back[i]);
}

/* kind: 0 random, 1 zeros, 2 one NaN, 3 one infinity, 4 tiny values. */
static void round_trip(boft_dtype dtype, int bits, int64_t n, int kind, guard side)
{
    test_case("%s, %d bits, %lld wide, kind %d", dtype_name(dtype), bits, (long long)n, kind);
    const int64_t stride = n + GAP, count = extent(ROWS, n, stride);
    double *values = doubles(ROWS * n), *back = doubles(n), *all = doubles(count);
    memset(all, 0xff, (size_t)count * sizeof *all);
    const int64_t odd_one = random_below(n);
    for (int64_t t = 0; t < ROWS; t++)
        for (int64_t i = 0; i < n; i++) {
            double value = kind == 1 ? 0 : ldexp(random_unit(), kind == 4 ? -130 : (int)random_below(12));
            if (t == 1 && i == odd_one && (kind == 2 || kind == 3))
                value = kind == 2 ? NAN : -INFINITY;
            values[t * n + i] = rounded(dtype, value);
            put(dtype, all, t * stride + i, value);
        }
    const size_t size = dtype_size(dtype), bytes = ROWS * boft_pack_bytes(n, bits);
    const void *x = guarded_copy(all, (size_t)count * size, size, side);
    void *packed = guarded(bytes, 1, side), *again = guarded(bytes, 1, side);
    void *out = guarded((size_t)count * size, size, side);
    EXPECT_OK(boft_pack(dtype, bits, ROWS, n, x, stride, packed, 0, ROWS));
    for (int64_t t = ROWS; t-- > 0;)
        EXPECT_OK(boft_pack(dtype, bits, ROWS, n, x, stride, again, t, t + 1));
    EXPECT(memcmp(packed, again, bytes) == 0, "packing row by row gives other bytes");
    EXPECT_OK(boft_unpack(dtype, bits, ROWS, n, packed, out, stride, 0, 2));
    EXPECT_OK(boft_unpack(dtype, bits, ROWS, n, packed, out, stride, 2, ROWS));
    EXPECT_GAPS("out", dtype, out, stride, ROWS, n);
    for (int64_t t = 0; t < ROWS; t++) {
        for (int64_t i = 0; i < n; i++)
            back[i] = get(dtype, out, t * stride + i);
        for (int64_t first = 0; first < n; first += BLOCK)
            check_block(dtype, bits, n - first < BLOCK ? n - first : BLOCK, values + t * n + first, back + first);
    }
    release_memory();
}

/* Ties go to the even neighbour: with a scale of 1, 0.5 and 2.5 go down and 1.5 up. */
static void test_ties(void)
{
    test_case("ties");
    const float x[] = {7, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -7}, wanted[] = {7, 0, 2, 2, 0, -2, -7};
    unsigned char packed[8];
    float out[7];
    EXPECT(boft_pack_bytes(7, 4) == 6 && boft_pack_bytes(64, 4) == 34 && boft_pack_bytes(65, 8) == 69, "sizes");
    EXPECT_OK(boft_pack(BOFT_F32, 4, 1, 7, x, 7, packed, 0, 1));
    EXPECT_OK(boft_unpack(BOFT_F32, 4, 1, 7, packed, out, 7, 0, 1));
    for (int i = 0; i < 7; i++)
        EXPECT(out[i] == wanted[i], "%g became %g", x[i], out[i]);
}

static void test_refusals(void)
{
    test_case("refusals");
    float x[8] = {0};
    unsigned char packed[16];
    EXPECT_REFUSED(boft_pack((boft_dtype)44, 8, 1, 8, x, 8, packed, 0, 1), BOFT_BAD_DTYPE, "44");
    EXPECT_REFUSED(boft_pack(BOFT_F32, 5, 1, 8, x, 8, packed, 0, 1), BOFT_BAD_ARGUMENT, "5");
    EXPECT_REFUSED(boft_pack(BOFT_F32, 8, 1, 8, x, -3, packed, 0, 1), BOFT_BAD_SHAPE, "-3");
    EXPECT_REFUSED(boft_pack(BOFT_F32, 8, 1, 8, x, 8, packed, 0, 2), BOFT_BAD_SHAPE, "2");
    EXPECT_REFUSED(boft_pack(BOFT_F32, 8, 1, 8, NULL, 8, packed, 0, 1), BOFT_BAD_ARGUMENT, "x");
    EXPECT_REFUSED(boft_unpack(BOFT_F32, 8, 1, 8, packed, x, 7, 0, 1), BOFT_BAD_SHAPE, "7 8");
    EXPECT_REFUSED(boft_unpack(BOFT_F32, 8, 1, 8, NULL, x, 8, 0, 1), BOFT_BAD_ARGUMENT, "packed");
    EXPECT_OK(boft_pack(BOFT_F32, 8, 0, 8, NULL, 8, NULL, 0, 0));
}

int main(int argc, char **argv)
{
    test_start("test_pack", argc, argv);
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++)
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
            for (int bits = 4; bits <= 8; bits += 4)
                for (int kind = 0; kind < 5; kind++)
                    round_trip(dtypes[d], bits, widths[w], kind, kind & 1 ? GUARD_START : GUARD_END);
    test_ties();
    test_refusals();
    return test_finish();
}
