/*
 * Vectors of AVX-512 (F, BW, DQ, VL). The names that every vec_*.h gives: for T = float and double, the type vec_T of
 * VEC_LANES_T lanes, and zero, set1, load, store, loadn, storen (the first n lanes, others zero), fma (a b + c), add,
 * sub, mul, each with suffix _T; for 16-bit data, load, loadn, store and storen with suffixes _bf16 and _f16 that
 * convert VEC_LANES_float values from and to vec_float. Included once, by the isa_*.c of the same name.
 */
#include "convert.h"

#include <immintrin.h>

#define VEC_ATTR __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define VEC_FN static inline __attribute__((always_inline)) VEC_ATTR
enum { VEC_LANES_float = 16, VEC_LANES_double = 8, VEC_TILE_ROWS_WIDE = 8 };
typedef __m512 vec_float;
typedef __m512d vec_double;

VEC_FN __mmask16 first_lanes(int64_t n)
{
    return (__mmask16)((1u << n) - 1);
}

VEC_FN vec_float zero_float(void) { return _mm512_setzero_ps(); }
VEC_FN vec_float set1_float(float a) { return _mm512_set1_ps(a); }
VEC_FN vec_float load_float(const float *p) { return _mm512_loadu_ps(p); }
VEC_FN vec_float loadn_float(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
VEC_FN void store_float(float *p, vec_float a) { _mm512_storeu_ps(p, a); }
VEC_FN void storen_float(float *p, vec_float a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
VEC_FN vec_float fma_float(vec_float a, vec_float b, vec_float c) { return _mm512_fmadd_ps(a, b, c); }
VEC_FN vec_float add_float(vec_float a, vec_float b) { return _mm512_add_ps(a, b); }
VEC_FN vec_float sub_float(vec_float a, vec_float b) { return _mm512_sub_ps(a, b); }
VEC_FN vec_float mul_float(vec_float a, vec_float b) { return _mm512_mul_ps(a, b); }

VEC_FN vec_double zero_double(void) { return _mm512_setzero_pd(); }
VEC_FN vec_double set1_double(double a) { return _mm512_set1_pd(a); }
VEC_FN vec_double load_double(const double *p) { return _mm512_loadu_pd(p); }
VEC_FN vec_double loadn_double(const double *p, int64_t n)
{
    return _mm512_maskz_loadu_pd((__mmask8)first_lanes(n), p);
}
VEC_FN void store_double(double *p, vec_double a) { _mm512_storeu_pd(p, a); }
VEC_FN void storen_double(double *p, vec_double a, int64_t n)
{
    _mm512_mask_storeu_pd(p, (__mmask8)first_lanes(n), a);
}
VEC_FN vec_double fma_double(vec_double a, vec_double b, vec_double c) { return _mm512_fmadd_pd(a, b, c); }
VEC_FN vec_double add_double(vec_double a, vec_double b) { return _mm512_add_pd(a, b); }
VEC_FN vec_double sub_double(vec_double a, vec_double b) { return _mm512_sub_pd(a, b); }
VEC_FN vec_double mul_double(vec_double a, vec_double b) { return _mm512_mul_pd(a, b); }

VEC_FN vec_float widen_bf16(__m256i a)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}

VEC_FN __m256i narrow_bf16(vec_float a)
{
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
}

VEC_FN vec_float load_bf16(const uint16_t *p) { return widen_bf16(_mm256_loadu_si256((const __m256i *)p)); }
VEC_FN vec_float loadn_bf16(const uint16_t *p, int64_t n)
{
    return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
VEC_FN void store_bf16(uint16_t *p, vec_float a) { _mm256_storeu_si256((__m256i *)p, narrow_bf16(a)); }
VEC_FN void storen_bf16(uint16_t *p, vec_float a, int64_t n)
{
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(a));
}

VEC_FN vec_float load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
VEC_FN vec_float loadn_f16(const uint16_t *p, int64_t n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
VEC_FN void store_f16(uint16_t *p, vec_float a)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
VEC_FN void storen_f16(uint16_t *p, vec_float a, int64_t n)
{
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
