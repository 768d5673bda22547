/*
 * Vectors of 16 bytes by the compiler's vector extension, for any processor; the names are those that vec_avx512.h
 * lists. fma() rounds twice unless the compiler is allowed to contract.
 */
#include "convert.h"

#define VEC_ATTR
#define VEC_FN static inline __attribute__((always_inline))
enum { VEC_LANES_float = 4, VEC_LANES_double = 2, VEC_TILE_ROWS_WIDE = 4 };
#define VEC_PRODUCT "product_bands.h"
#define VEC_KEEP(a)
typedef float vec_float __attribute__((vector_size(16)));
typedef double vec_double __attribute__((vector_size(16)));

#define VEC_PORTABLE(T)                                                                                                \
    VEC_FN vec_##T zero_##T(void) { return (vec_##T){0}; }                                                             \
    VEC_FN vec_##T set1_##T(T a) { return a - (vec_##T){0}; }                                                          \
    VEC_FN vec_##T loadn_##T(const T *p, int64_t n)                                                                    \
    {                                                                                                                  \
        vec_##T a = {0};                                                                                               \
        memcpy(&a, p, (size_t)n * sizeof(T));                                                                          \
        return a;                                                                                                      \
    }                                                                                                                  \
    VEC_FN vec_##T load_##T(const T *p) { return loadn_##T(p, VEC_LANES_##T); }                                        \
    VEC_FN void storen_##T(T *p, vec_##T a, int64_t n) { memcpy(p, &a, (size_t)n * sizeof(T)); }                       \
    VEC_FN void store_##T(T *p, vec_##T a) { storen_##T(p, a, VEC_LANES_##T); }                                        \
    VEC_FN vec_##T fma_##T(vec_##T a, vec_##T b, vec_##T c) { return a * b + c; }                                      \
    VEC_FN vec_##T add_##T(vec_##T a, vec_##T b) { return a + b; }                                                     \
    VEC_FN vec_##T sub_##T(vec_##T a, vec_##T b) { return a - b; }                                                     \
    VEC_FN vec_##T mul_##T(vec_##T a, vec_##T b) { return a * b; }

VEC_PORTABLE(float)
VEC_PORTABLE(double)
#undef VEC_PORTABLE

typedef uint64_t vec_words __attribute__((vector_size(16)));
VEC_FN vec_words set1_words(uint64_t a) { return (vec_words){a, a}; }
VEC_FN vec_words load_words(const void *p)
{
    vec_words a;
    memcpy(&a, p, sizeof a);
    return a;
}
VEC_FN void store_words(void *p, vec_words a) { memcpy(p, &a, sizeof a); }
VEC_FN vec_words add_words(vec_words a, vec_words b) { return a + b; }
VEC_FN vec_words xor_words(vec_words a, vec_words b) { return a ^ b; }
VEC_FN vec_words swap_words(vec_words a) { return (vec_words){a[1], a[0]}; }
VEC_FN vec_words multiply_halves(vec_words a) { return (a & 0xffffffff) * (a >> 32); }

#define VEC_PORTABLE_PERMUTE(T)                                                                                        \
    typedef const int32_t *index_##T;                                                                                  \
    VEC_FN index_##T load_index_##T(const int32_t *p) { return p; }                                                    \
    VEC_FN vec_##T permute_##T(vec_##T a, index_##T from)                                                              \
    {                                                                                                                  \
        vec_##T out = a;                                                                                               \
        for (int i = 0; i < VEC_LANES_##T; i++)                                                                        \
            out[i] = a[from[i]];                                                                                       \
        return out;                                                                                                    \
    }

VEC_PORTABLE_PERMUTE(float)
VEC_PORTABLE_PERMUTE(double)
#undef VEC_PORTABLE_PERMUTE

#define VEC_PORTABLE_16(S)                                                                                             \
    VEC_FN vec_float loadn_##S(const uint16_t *p, int64_t n)                                                           \
    {                                                                                                                  \
        vec_float a = {0};                                                                                             \
        for (int64_t i = 0; i < n; i++)                                                                                \
            a[i] = boft_from_##S(p[i]);                                                                                \
        return a;                                                                                                      \
    }                                                                                                                  \
    VEC_FN vec_float load_##S(const uint16_t *p) { return loadn_##S(p, VEC_LANES_float); }                             \
    VEC_FN void storen_##S(uint16_t *p, vec_float a, int64_t n)                                                        \
    {                                                                                                                  \
        for (int64_t i = 0; i < n; i++)                                                                                \
            p[i] = boft_to_##S(a[i]);                                                                                  \
    }                                                                                                                  \
    VEC_FN void store_##S(uint16_t *p, vec_float a) { storen_##S(p, a, VEC_LANES_float); }

VEC_PORTABLE_16(bf16)
VEC_PORTABLE_16(f16)
#undef VEC_PORTABLE_16

VEC_FN vec_double div_double(vec_double a, vec_double b) { return a / b; }
VEC_FN vec_double max_double(vec_double a, vec_double b)
{
    return (vec_double){a[0] > b[0] ? a[0] : b[0], a[1] > b[1] ? a[1] : b[1]};
}
VEC_FN vec_double lane_double(vec_double a, int i) { return set1_double(a[i]); }
VEC_FN vec_double with_lane_double(vec_double a, int i, vec_double b)
{
    a[i] = b[i];
    return a;
}

#define VEC_PORTABLE_LANES(T)                                                                                          \
    VEC_FN vec_double load_wide_##T(const T *p) { return (vec_double){p[0], p[1]}; }                                   \
    VEC_FN vec_double loadn_wide_##T(const T *p, int64_t n)                                                            \
    {                                                                                                                  \
        return (vec_double){n > 0 ? p[0] : 0, n > 1 ? p[1] : 0};                                                       \
    }                                                                                                                  \
    VEC_FN void storen_narrow_##T(T *p, vec_double a, int64_t n)                                                       \
    {                                                                                                                  \
        for (int64_t i = 0; i < n; i++)                                                                                \
            p[i] = (T)a[i];                                                                                            \
    }                                                                                                                  \
    VEC_FN void store_narrow_##T(T *p, vec_double a) { storen_narrow_##T(p, a, VEC_LANES_double); }                    \
    VEC_FN void transpose_##T(vec_##T v[])                                                                             \
    {                                                                                                                  \
        _Pragma("GCC unroll 4") for (int i = 0; i < VEC_LANES_##T; i++)                                                \
            _Pragma("GCC unroll 4") for (int j = 0; j < i; j++)                                                        \
            {                                                                                                          \
                const T above = v[j][i];                                                                               \
                v[j][i] = v[i][j];                                                                                     \
                v[i][j] = above;                                                                                       \
            }                                                                                                          \
    }

VEC_PORTABLE_LANES(float)
VEC_PORTABLE_LANES(double)
#undef VEC_PORTABLE_LANES
