/* Vectors of AVX2, FMA and F16C; the names are those that vec_avx512.h lists. */
#include "convert.h"

#include <immintrin.h>

#define VEC_ATTR __attribute__((target("avx2,fma,f16c")))
#define VEC_FN static inline __attribute__((always_inline)) VEC_ATTR
enum { VEC_LANES_float = 8, VEC_LANES_double = 4, VEC_TILE_ROWS_WIDE = 4 };
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
