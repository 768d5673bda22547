/* The scalar reference: every kernel in plain loops. All other variants are tested against it. */
#include "convert.h"
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

#define VEC_ATTR
#include "digest_template.h"
#undef VEC_ATTR

const boft_kernels boft_kernels_scalar = {
    .name = "scalar",
    .cayley = {cayley_float, cayley_double},
    .cayley_backward = {cayley_backward_float, cayley_backward_double},
    .collapse = {collapse_float, collapse_double},
    .collapse_backward = {collapse_backward_float, collapse_backward_double},
    .rotate = {rotate_float, rotate_double},
    .rotate_backward = {rotate_backward_float, rotate_backward_double},
    .scale = {scale_float, scale_double},
    .scale_backward = {scale_backward_float, scale_backward_double},
    .digest = digest,
};
