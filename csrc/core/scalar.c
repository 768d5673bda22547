/* The scalar reference: every kernel in plain loops. All other variants are tested against it. */
#include "convert.h"
#include "digest_keys.h"
#include "gather.h"
#include "invert.h"
#include "kernels.h"
#include "tiles.h"

#include <math.h>
#include <string.h>

#define REAL float
#define FN(name) name##_float
#include "scalar_template.h"
#undef REAL
#undef FN

#define REAL double
#define FN(name) name##_double
#include "scalar_template.h"
#undef REAL
#undef FN

static void digest(const void *data, size_t bytes, uint64_t out[BOFT_DIGEST_WORDS])
{
    const unsigned char *from = data;
    for (int i = 0; i < BOFT_DIGEST_WORDS; i++)
        out[i] = bytes;
    for (uint64_t turn = 0; bytes > 0; turn++) {
        uint64_t words[BOFT_DIGEST_WORDS] = {0};
        const size_t taken = bytes < sizeof words ? bytes : sizeof words;
        memcpy(words, from, taken);
        for (int i = 0; i < BOFT_DIGEST_WORDS; i++) {
            const uint64_t mixed = words[i] ^ boft_digest_key(i, turn);
            out[i] += words[i ^ 1] + (mixed & 0xffffffff) * (mixed >> 32);
        }
        from += taken;
        bytes -= taken;
    }
}

const boft_kernels boft_kernels_scalar = {
    .name = "scalar",
    .cayley = {cayley_float, cayley_double},
    .cayley_backward = {cayley_backward_float, cayley_backward_double},
    .collapse = {collapse_float, collapse_double},
    .collapse_backward = {collapse_backward_float, collapse_backward_double},
    .transpose = {transpose_float, transpose_double},
    .rotate = {rotate_float, rotate_double},
    .rotate_backward = {rotate_backward_float, rotate_backward_double},
    .scale = {scale_float, scale_double},
    .scale_backward = {scale_backward_float, scale_backward_double},
    .linear = {linear_float, linear_double},
    .digest = digest,
};
