/*
 * Rows packed into 4- or 8-bit integers, and back.
 *
 * Plain loops over the 64 channels of one block, which the compiler vectorises with the instructions that every
 * processor has.
 */
#include "convert.h"
#include "status.h"

/* Channels that share a scale. */
enum { BLOCK = 64 };
/* Adding and taking away 1.5 * 2^23 leaves a float below 2^22 rounded to the nearest even integer. */
#define ROUNDER 12582912.0f

static size_t block_bytes(int64_t channels, int bits)
{
    return sizeof(uint16_t) + (size_t)(bits == 4 ? (channels + 1) / 2 : channels);
}

size_t boft_pack_bytes(int64_t n, int bits)
{
    const int64_t rest = n % BLOCK;
    return (size_t)(n / BLOCK) * block_bytes(BLOCK, bits) + (rest ? block_bytes(rest, bits) : 0);
}

/* The bits of the smallest bfloat16 that is no smaller than a finite value >= 0. */
static uint16_t bf16_above(float value)
{
    return (uint16_t)((boft_bits_of_float(value) + 0xffff) >> 16);
}

/* `channels` values from `first` on as float32; float64 beyond its range becomes infinite. */
static void load(boft_dtype dtype, const void *row, int64_t first, int64_t channels, float *to)
{
    if (dtype == BOFT_F32)
        memcpy(to, (const float *)row + first, (size_t)channels * sizeof *to);
    else if (dtype == BOFT_F64)
        for (int64_t i = 0; i < channels; i++)
            to[i] = (float)((const double *)row)[first + i];
    else if (dtype == BOFT_BF16)
        for (int64_t i = 0; i < channels; i++)
            to[i] = boft_from_bf16(((const uint16_t *)row)[first + i]);
    else
        for (int64_t i = 0; i < channels; i++)
            to[i] = boft_from_f16(((const uint16_t *)row)[first + i]);
}

static void store(boft_dtype dtype, void *row, int64_t first, int64_t channels, const float *from)
{
    if (dtype == BOFT_F32)
        memcpy((float *)row + first, from, (size_t)channels * sizeof *from);
    else if (dtype == BOFT_F64)
        for (int64_t i = 0; i < channels; i++)
            ((double *)row)[first + i] = from[i];
    else if (dtype == BOFT_BF16)
        for (int64_t i = 0; i < channels; i++)
            ((uint16_t *)row)[first + i] = boft_to_bf16(from[i]);
    else
        for (int64_t i = 0; i < channels; i++)
            ((uint16_t *)row)[first + i] = boft_to_f16(from[i]);
}

/* Packs the BLOCK values of `from`, of which `channels` count and the rest are 0. */
static void pack_block(int bits, int64_t channels, const float *from, unsigned char *to)
{
    /* Absolute values compare like their bits, NaN above infinity above all finite ones. */
    int32_t largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        const int32_t size = (int32_t)(boft_bits_of_float(from[i]) & 0x7fffffff);
        largest = size > largest ? size : largest;
    }
    const int finite = largest < 0x7f800000;
    const uint16_t scale =
        finite ? bf16_above(boft_float_of_bits((uint32_t)largest) / (bits == 4 ? 7.0f : 127.0f)) : 0x7fc0;
    memcpy(to, &scale, sizeof scale);
    to += sizeof scale;
    int8_t q[BLOCK] = {0};
    /* A processor that takes subnormal numbers for 0 sees a scale of 0 here too. */
    const float divisor = boft_from_bf16(scale);
    if (finite && divisor > 0)
        for (int i = 0; i < BLOCK; i++)
            q[i] = (int8_t)(int32_t)(boft_bits_of_float(from[i] / divisor + ROUNDER) - 0x4b400000u);
    if (bits == 8) {
        memcpy(to, q, (size_t)channels);
        return;
    }
    const int64_t half = (channels + 1) / 2;
    for (int64_t i = 0; i < half; i++)
        to[i] = (unsigned char)((q[i] & 15) | (q[half + i] & 15) << 4);
}

static void unpack_block(int bits, int64_t channels, const unsigned char *from, float *to)
{
    uint16_t bits_of_scale;
    memcpy(&bits_of_scale, from, sizeof bits_of_scale);
    from += sizeof bits_of_scale;
    const float scale = boft_from_bf16(bits_of_scale);
    if (bits == 8) {
        for (int64_t i = 0; i < channels; i++)
            to[i] = (float)(int8_t)from[i] * scale;
        return;
    }
    const int64_t half = (channels + 1) / 2;
    for (int64_t i = 0; i < half; i++) {
        to[i] = (float)(((from[i] & 15) ^ 8) - 8) * scale;
        to[half + i] = (float)((from[i] >> 4 ^ 8) - 8) * scale;
    }
}

static size_t size_of(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? sizeof(double) : dtype == BOFT_F32 ? sizeof(float) : sizeof(uint16_t);
}

static boft_status check(const char *what, boft_dtype dtype, int bits, int64_t rows, int64_t n, int64_t stride,
                         int64_t least_stride, int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = boft_check_data(what, dtype)) || (status = boft_check_range(what, begin, end, rows)))
        return status;
    if (bits != 4 && bits != 8)
        return boft_refuse(BOFT_BAD_ARGUMENT, "%s: 4 or 8 bits, not %d", what, bits);
    if (n < 0 || stride < least_stride)
        return boft_refuse(BOFT_BAD_SHAPE, "%s: stride %lld for %lld channels", what, (long long)stride, (long long)n);
    return BOFT_OK;
}

boft_status boft_pack(boft_dtype dtype, int bits, int64_t rows, int64_t n, const void *x, int64_t stride, void *packed,
                      int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = check("pack", dtype, bits, rows, n, stride, 0, begin, end)))
        return status;
    if (begin == end || n == 0)
        return BOFT_OK;
    if ((status = boft_check_pointer("pack: x", x)) || (status = boft_check_pointer("pack: packed", packed)))
        return status;
    unsigned char *to = (unsigned char *)packed + (size_t)begin * boft_pack_bytes(n, bits);
    for (int64_t t = begin; t < end; t++) {
        const char *row = (const char *)x + (size_t)(t * stride) * size_of(dtype);
        for (int64_t first = 0; first < n; first += BLOCK) {
            const int64_t channels = n - first < BLOCK ? n - first : BLOCK;
            float values[BLOCK];
            if (channels < BLOCK)
                memset(values, 0, sizeof values);
            load(dtype, row, first, channels, values);
            pack_block(bits, channels, values, to);
            to += block_bytes(channels, bits);
        }
    }
    return BOFT_OK;
}

boft_status boft_unpack(boft_dtype dtype, int bits, int64_t rows, int64_t n, const void *packed, void *x,
                        int64_t stride, int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = check("unpack", dtype, bits, rows, n, stride, n, begin, end)))
        return status;
    if (begin == end || n == 0)
        return BOFT_OK;
    if ((status = boft_check_pointer("unpack: packed", packed)) || (status = boft_check_pointer("unpack: x", x)))
        return status;
    const unsigned char *from = (const unsigned char *)packed + (size_t)begin * boft_pack_bytes(n, bits);
    for (int64_t t = begin; t < end; t++) {
        char *row = (char *)x + (size_t)(t * stride) * size_of(dtype);
        for (int64_t first = 0; first < n; first += BLOCK) {
            const int64_t channels = n - first < BLOCK ? n - first : BLOCK;
            float values[BLOCK];
            unpack_block(bits, channels, from, values);
            store(dtype, row, first, channels, values);
            from += block_bytes(channels, bits);
        }
    }
    return BOFT_OK;
}
