/* 16-bit floating point to float and back, rounding to nearest even, in portable C. */
#ifndef BOFT_CONVERT_H
#define BOFT_CONVERT_H

#include <stdint.h>
#include <string.h>

static inline float boft_float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t boft_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float boft_from_bf16(uint16_t value)
{
    return boft_float_of_bits((uint32_t)value << 16);
}

static inline uint16_t boft_to_bf16(float value)
{
    uint32_t bits = boft_bits_of_float(value);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float boft_from_f16(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000) << 16;
    uint32_t magnitude = value & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity and NaN */
        return boft_float_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x0400) /* normal: the exponent bias goes from 15 to 127 */
        return boft_float_of_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
    float subnormal = (float)magnitude * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

static inline uint16_t boft_to_f16(float value)
{
    uint32_t bits = boft_bits_of_float(value);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000) /* 65520 and above round to infinity */
        return sign | 0x7c00;
    if (magnitude >= 0x38800000) /* normal in 16 bits */
        return sign | (uint16_t)((magnitude + 0xfff + (magnitude >> 13 & 1) - ((127 - 15) << 23)) >> 13);
    /* Adding 1/2 leaves the value in units of 2^-24, rounded by the addition itself. */
    float rounded = boft_float_of_bits(magnitude) + 0.5f;
    return sign | (uint16_t)(boft_bits_of_float(rounded) - 0x3f000000);
}

#endif
