/* Vectors of AVX2, FMA and F16C; the names are those that vec_avx512.h lists. */
#include "convert.h"

#include <immintrin.h>

#define VEC_ATTR __attribute__((target("avx2,fma,f16c")))
#define VEC_FN static inline __attribute__((always_inline)) VEC_ATTR
enum { VEC_LANES_float = 8, VEC_LANES_double = 4, VEC_TILE_ROWS_WIDE = 6 };
#define VEC_PRODUCT "product_bands.h"
#define VEC_KEEP(a) __asm__ volatile("" : : "x"(a))
typedef __m256 vec_float;
typedef __m256d vec_double;

/* Sign bits set in the first n of 8 lanes. */
VEC_FN __m256i first_lanes(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

VEC_FN __m256i first_lanes_double(int64_t n)
{
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

VEC_FN vec_float zero_float(void) { return _mm256_setzero_ps(); }
VEC_FN vec_float set1_float(float a) { return _mm256_set1_ps(a); }
VEC_FN vec_float load_float(const float *p) { return _mm256_loadu_ps(p); }
VEC_FN vec_float loadn_float(const float *p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
VEC_FN void store_float(float *p, vec_float a) { _mm256_storeu_ps(p, a); }
VEC_FN void storen_float(float *p, vec_float a, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), a); }
VEC_FN vec_float fma_float(vec_float a, vec_float b, vec_float c) { return _mm256_fmadd_ps(a, b, c); }
VEC_FN vec_float add_float(vec_float a, vec_float b) { return _mm256_add_ps(a, b); }
VEC_FN vec_float sub_float(vec_float a, vec_float b) { return _mm256_sub_ps(a, b); }
VEC_FN vec_float mul_float(vec_float a, vec_float b) { return _mm256_mul_ps(a, b); }

VEC_FN vec_double zero_double(void) { return _mm256_setzero_pd(); }
VEC_FN vec_double set1_double(double a) { return _mm256_set1_pd(a); }
VEC_FN vec_double load_double(const double *p) { return _mm256_loadu_pd(p); }
VEC_FN vec_double loadn_double(const double *p, int64_t n) { return _mm256_maskload_pd(p, first_lanes_double(n)); }
VEC_FN void store_double(double *p, vec_double a) { _mm256_storeu_pd(p, a); }
VEC_FN void storen_double(double *p, vec_double a, int64_t n) { _mm256_maskstore_pd(p, first_lanes_double(n), a); }
VEC_FN vec_double fma_double(vec_double a, vec_double b, vec_double c) { return _mm256_fmadd_pd(a, b, c); }
VEC_FN vec_double add_double(vec_double a, vec_double b) { return _mm256_add_pd(a, b); }
VEC_FN vec_double sub_double(vec_double a, vec_double b) { return _mm256_sub_pd(a, b); }
VEC_FN vec_double mul_double(vec_double a, vec_double b) { return _mm256_mul_pd(a, b); }

typedef __m256i vec_words;
VEC_FN vec_words set1_words(uint64_t a) { return _mm256_set1_epi64x((int64_t)a); }
VEC_FN vec_words load_words(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
VEC_FN void store_words(void *p, vec_words a) { _mm256_storeu_si256((__m256i *)p, a); }
VEC_FN vec_words add_words(vec_words a, vec_words b) { return _mm256_add_epi64(a, b); }
VEC_FN vec_words xor_words(vec_words a, vec_words b) { return _mm256_xor_si256(a, b); }
VEC_FN vec_words swap_words(vec_words a) { return _mm256_shuffle_epi32(a, _MM_SHUFFLE(1, 0, 3, 2)); }
VEC_FN vec_words multiply_halves(vec_words a) { return _mm256_mul_epu32(a, _mm256_srli_epi64(a, 32)); }

typedef __m256i index_float;
typedef __m256i index_double; /* pairs of 32-bit lanes */
VEC_FN index_float load_index_float(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
VEC_FN index_double load_index_double(const int32_t *p)
{
    const __m256i pairs = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm_loadu_si128((const __m128i *)p)), 1);
    return _mm256_or_si256(_mm256_or_si256(pairs, _mm256_slli_epi64(pairs, 32)), _mm256_set1_epi64x((int64_t)1 << 32));
}
VEC_FN vec_float permute_float(vec_float a, index_float from) { return _mm256_permutevar8x32_ps(a, from); }
VEC_FN vec_double permute_double(vec_double a, index_double from)
{
    return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(a), from));
}

/* 16-bit values have no masked moves before AVX-512: the first n go through a buffer. */
VEC_FN __m128i loadn_16(const uint16_t *p, int64_t n)
{
    uint16_t buffer[8] = {0};
    memcpy(buffer, p, (size_t)n * sizeof *p);
    return _mm_loadu_si128((const __m128i *)buffer);
}

VEC_FN void storen_16(uint16_t *p, __m128i a, int64_t n)
{
    uint16_t buffer[8];
    _mm_storeu_si128((__m128i *)buffer, a);
    memcpy(p, buffer, (size_t)n * sizeof *p);
}

VEC_FN vec_float widen_bf16(__m128i a)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}

VEC_FN __m128i narrow_bf16(vec_float a)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    __m256i packed = _mm256_packus_epi32(rounded, rounded); /* within each half: lanes 0 0 | 2 2 */
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

VEC_FN vec_float load_bf16(const uint16_t *p) { return widen_bf16(_mm_loadu_si128((const __m128i *)p)); }
VEC_FN vec_float loadn_bf16(const uint16_t *p, int64_t n) { return widen_bf16(loadn_16(p, n)); }
VEC_FN void store_bf16(uint16_t *p, vec_float a) { _mm_storeu_si128((__m128i *)p, narrow_bf16(a)); }
VEC_FN void storen_bf16(uint16_t *p, vec_float a, int64_t n) { storen_16(p, narrow_bf16(a), n); }

VEC_FN __m128i narrow_f16(vec_float a)
{
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

VEC_FN vec_float load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
VEC_FN vec_float loadn_f16(const uint16_t *p, int64_t n) { return _mm256_cvtph_ps(loadn_16(p, n)); }
VEC_FN void store_f16(uint16_t *p, vec_float a) { _mm_storeu_si128((__m128i *)p, narrow_f16(a)); }
VEC_FN void storen_f16(uint16_t *p, vec_float a, int64_t n) { storen_16(p, narrow_f16(a), n); }

VEC_FN vec_double div_double(vec_double a, vec_double b) { return _mm256_div_pd(a, b); }
VEC_FN vec_double max_double(vec_double a, vec_double b) { return _mm256_max_pd(a, b); }
VEC_FN vec_double lane_double(vec_double a, int i)
{
    const __m256i both = _mm256_setr_epi32(2 * i, 2 * i + 1, 2 * i, 2 * i + 1, 2 * i, 2 * i + 1, 2 * i, 2 * i + 1);
    return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(a), both));
}
VEC_FN vec_double with_lane_double(vec_double a, int i, vec_double b)
{
    const __m256i here = _mm256_cmpeq_epi64(_mm256_set1_epi64x(i), _mm256_setr_epi64x(0, 1, 2, 3));
    return _mm256_blendv_pd(a, b, _mm256_castsi256_pd(here));
}

VEC_FN vec_double load_wide_float(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
VEC_FN vec_double loadn_wide_float(const float *p, int64_t n)
{
    return _mm256_cvtps_pd(_mm_maskload_ps(p, _mm256_castsi256_si128(first_lanes(n))));
}
VEC_FN void store_narrow_float(float *p, vec_double a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a)); }
VEC_FN void storen_narrow_float(float *p, vec_double a, int64_t n)
{
    _mm_maskstore_ps(p, _mm256_castsi256_si128(first_lanes(n)), _mm256_cvtpd_ps(a));
}
VEC_FN vec_double load_wide_double(const double *p) { return load_double(p); }
VEC_FN vec_double loadn_wide_double(const double *p, int64_t n) { return loadn_double(p, n); }
VEC_FN void store_narrow_double(double *p, vec_double a) { store_double(p, a); }
VEC_FN void storen_narrow_double(double *p, vec_double a, int64_t n) { storen_double(p, a, n); }

VEC_FN void transpose_double(vec_double v[4])
{
    const vec_double even01 = _mm256_unpacklo_pd(v[0], v[1]), odd01 = _mm256_unpackhi_pd(v[0], v[1]);
    const vec_double even23 = _mm256_unpacklo_pd(v[2], v[3]), odd23 = _mm256_unpackhi_pd(v[2], v[3]);
    v[0] = _mm256_permute2f128_pd(even01, even23, 0x20);
    v[1] = _mm256_permute2f128_pd(odd01, odd23, 0x20);
    v[2] = _mm256_permute2f128_pd(even01, even23, 0x31);
    v[3] = _mm256_permute2f128_pd(odd01, odd23, 0x31);
}

VEC_FN void transpose_float(vec_float v[8])
{
    vec_double column[4][2]; /* [k][g]: columns k and k + 4 of rows 4g ... 4g + 3 */
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
        const vec_double low01 = _mm256_castps_pd(_mm256_unpacklo_ps(v[4 * g], v[4 * g + 1]));
        const vec_double high01 = _mm256_castps_pd(_mm256_unpackhi_ps(v[4 * g], v[4 * g + 1]));
        const vec_double low23 = _mm256_castps_pd(_mm256_unpacklo_ps(v[4 * g + 2], v[4 * g + 3]));
        const vec_double high23 = _mm256_castps_pd(_mm256_unpackhi_ps(v[4 * g + 2], v[4 * g + 3]));
        column[0][g] = _mm256_unpacklo_pd(low01, low23);
        column[1][g] = _mm256_unpackhi_pd(low01, low23);
        column[2][g] = _mm256_unpacklo_pd(high01, high23);
        column[3][g] = _mm256_unpackhi_pd(high01, high23);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        v[k] = _mm256_castpd_ps(_mm256_permute2f128_pd(column[k][0], column[k][1], 0x20));
        v[4 + k] = _mm256_castpd_ps(_mm256_permute2f128_pd(column[k][0], column[k][1], 0x31));
    }
}
