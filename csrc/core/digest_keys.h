/*
 * What the variants of boft_digest share. Eight sums of 64 bits begin with the number of bytes. For each 64 bytes, the
 * last ones filled up with zeros, sum i takes the number beside number i as it is, so that no change of a single number
 * goes unseen, and the product of the two halves of number i, mixed with a key that depends on i and the position, so
 * that changes which cancel in the plain sum do not.
 */
#ifndef BOFT_DIGEST_KEYS_H
#define BOFT_DIGEST_KEYS_H

#include <stdint.h>

/* Odd, without pattern: fractions of the golden ratio. */
#define BOFT_DIGEST_KEY UINT64_C(0x9e3779b97f4a7c15)
/* From one turn of 64 bytes to the next. */
#define BOFT_DIGEST_STEP (BOFT_DIGEST_KEY << 4 | 1)

static inline uint64_t boft_digest_key(int i, uint64_t turn)
{
    return BOFT_DIGEST_KEY * (uint64_t)(2 * i + 1) + BOFT_DIGEST_STEP * turn;
}

#endif
