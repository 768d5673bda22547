/*
 * Vectors of AVX-512 (F, BW, DQ, VL). The names that every vec_*.h gives: for T = float and double, the type vec_T of
 * VEC_LANES_T lanes, and zero, set1, load, store, loadn, storen (the first n lanes, others zero), fma (a b + c), add,
 * sub, mul, each with suffix _T; the type index_T of lane numbers with load_index and permute (lane i of the result is
 * lane from[i]); for 16-bit data, load, loadn, store and storen with suffixes _bf16 and _f16 that convert
 * VEC_LANES_float values from and to vec_float; vec_words, as many 64-bit numbers as vec_double has lanes, with set1,
 * load, store, add, xor, swap (lanes 2 i and 2 i + 1) and multiply_halves (the upper 32 bits of each times its lower);
 * VEC_TILE_ROWS_WIDE, the rows of two vectors whose sums registers hold; VEC_PRODUCT, the file of its float32 product
 * (which may want more: VEC_KEEP).
 * Included once in a source: by isa_avx512.c; with VEC_NATIVE_BF16 defined by isa_avx512bf16.c; with VEC_NATIVE_TILES
 * besides by isa_amx.c.
 */
#include "convert.h"

#include <immintrin.h>

#if defined(VEC_NATIVE_TILES)
#define VEC_ATTR                                                                                                       \
    __attribute__((target("amx-tile,amx-bf16,avx512vbmi,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#elif defined(VEC_NATIVE_BF16)
#define VEC_ATTR __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#else
#define VEC_ATTR __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#endif
#define VEC_FN static inline __attribute__((always_inline)) VEC_ATTR
enum { VEC_LANES_float = 16, VEC_LANES_double = 8, VEC_TILE_ROWS_WIDE = 8 };
#define VEC_PRODUCT "product_streams.h"
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

typedef __m512i vec_words;
VEC_FN vec_words set1_words(uint64_t a) { return _mm512_set1_epi64((int64_t)a); }
VEC_FN vec_words load_words(const void *p) { return _mm512_loadu_si512(p); }
VEC_FN void store_words(void *p, vec_words a) { _mm512_storeu_si512(p, a); }
VEC_FN vec_words add_words(vec_words a, vec_words b) { return _mm512_add_epi64(a, b); }
VEC_FN vec_words xor_words(vec_words a, vec_words b) { return _mm512_xor_si512(a, b); }
VEC_FN vec_words swap_words(vec_words a) { return _mm512_shuffle_epi32(a, _MM_PERM_BADC); }
VEC_FN vec_words multiply_halves(vec_words a) { return _mm512_mul_epu32(a, _mm512_srli_epi64(a, 32)); }

typedef __m512i index_float;
typedef __m512i index_double;
VEC_FN index_float load_index_float(const int32_t *p) { return _mm512_loadu_si512(p); }
VEC_FN index_double load_index_double(const int32_t *p)
{
    return _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)p));
}
VEC_FN vec_float permute_float(vec_float a, index_float from) { return _mm512_permutexvar_ps(from, a); }
VEC_FN vec_double permute_double(vec_double a, index_double from) { return _mm512_permutexvar_pd(from, a); }

VEC_FN vec_float widen_bf16(__m256i a)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}

VEC_FN __m256i round_bf16(vec_float a)
{
    const __m512i bits = _mm512_castps_si512(a), half = _mm512_set1_epi32(0x7fff);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
    const __mmask16 ordered = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
    const __m512i below = _mm512_add_epi32(bits, half);
    const __m512i rounded = _mm512_mask_add_epi32(below, odd, below, _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), ordered, rounded, 16));
}

#ifdef VEC_NATIVE_BF16
/* The instruction flushes subnormal numbers to zero and keeps the payloads of NaN: vectors with either are rounded by hand. */
VEC_FN __mmask16 unlike_bf16(vec_float a)
{
    enum { QUIET_NAN = 0x01, SUBNORMAL = 0x20, SIGNALLING_NAN = 0x80 };
    return _mm512_fpclass_ps_mask(a, QUIET_NAN | SUBNORMAL | SIGNALLING_NAN);
}

VEC_FN __m256i narrow_bf16(vec_float a)
{
    if (__builtin_expect(unlike_bf16(a) != 0, 0))
        return round_bf16(a);
    return (__m256i)_mm512_cvtneps_pbh(a);
}

/* One check for both, and whole lines (one Zen 4 core, scale of 512 x 384 in cache: 13 us instead of 17). */
VEC_FN void store_two_bf16(uint16_t *p, vec_float a, vec_float b)
{
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    if (__builtin_expect((unlike_bf16(a) | unlike_bf16(b)) != 0, 0))
        both = _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(a)), round_bf16(b), 1);
    _mm512_storeu_si512(p, both);
}
#else
VEC_FN __m256i narrow_bf16(vec_float a) { return round_bf16(a); }
#endif

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

/*
 * For blocks in lanes: div, max, lane (lane i everywhere) and with_lane (lane i of b, others of a) of doubles;
 * load_wide, loadn_wide, store_narrow and storen_narrow, suffix _T, that move VEC_LANES_double values of T from and to
 * a vec_double; and transpose_T of as many vectors as a vector has lanes. max is for numbers: with a NaN it gives
 * either operand.
 */
VEC_FN vec_double div_double(vec_double a, vec_double b) { return _mm512_div_pd(a, b); }
VEC_FN vec_double max_double(vec_double a, vec_double b) { return _mm512_max_pd(a, b); }
VEC_FN vec_double lane_double(vec_double a, int i) { return _mm512_permutexvar_pd(_mm512_set1_epi64(i), a); }
VEC_FN vec_double with_lane_double(vec_double a, int i, vec_double b)
{
    return _mm512_mask_mov_pd(a, (__mmask8)(1u << i), b);
}

VEC_FN vec_double load_wide_float(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
VEC_FN vec_double loadn_wide_float(const float *p, int64_t n)
{
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps((__mmask8)first_lanes(n), p));
}
VEC_FN void store_narrow_float(float *p, vec_double a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
VEC_FN void storen_narrow_float(float *p, vec_double a, int64_t n)
{
    _mm256_mask_storeu_ps(p, (__mmask8)first_lanes(n), _mm512_cvtpd_ps(a));
}
VEC_FN vec_double load_wide_double(const double *p) { return load_double(p); }
VEC_FN vec_double loadn_wide_double(const double *p, int64_t n) { return loadn_double(p, n); }
VEC_FN void store_narrow_double(double *p, vec_double a) { store_double(p, a); }
VEC_FN void storen_narrow_double(double *p, vec_double a, int64_t n) { storen_double(p, a, n); }

/* Quarter l of out k = quarter k of in l. */
VEC_FN void transpose_quarters(const vec_double in[4], vec_double out[4])
{
    const vec_double low01 = _mm512_shuffle_f64x2(in[0], in[1], 0x44);
    const vec_double low23 = _mm512_shuffle_f64x2(in[2], in[3], 0x44);
    const vec_double high01 = _mm512_shuffle_f64x2(in[0], in[1], 0xee);
    const vec_double high23 = _mm512_shuffle_f64x2(in[2], in[3], 0xee);
    out[0] = _mm512_shuffle_f64x2(low01, low23, 0x88);
    out[1] = _mm512_shuffle_f64x2(low01, low23, 0xdd);
    out[2] = _mm512_shuffle_f64x2(high01, high23, 0x88);
    out[3] = _mm512_shuffle_f64x2(high01, high23, 0xdd);
}

VEC_FN void transpose_double(vec_double v[8])
{
    vec_double even[4], odd[4], out[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        even[i] = _mm512_unpacklo_pd(v[2 * i], v[2 * i + 1]);
        odd[i] = _mm512_unpackhi_pd(v[2 * i], v[2 * i + 1]);
    }
    transpose_quarters(even, out);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        v[2 * i] = out[i];
    transpose_quarters(odd, out);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        v[2 * i + 1] = out[i];
}

VEC_FN void transpose_float(vec_float v[16])
{
    vec_double column[4][4]; /* [k][g]: columns k, k + 4, k + 8, k + 12 of rows 4g ... 4g + 3 */
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        const vec_double low01 = _mm512_castps_pd(_mm512_unpacklo_ps(v[4 * g], v[4 * g + 1]));
        const vec_double high01 = _mm512_castps_pd(_mm512_unpackhi_ps(v[4 * g], v[4 * g + 1]));
        const vec_double low23 = _mm512_castps_pd(_mm512_unpacklo_ps(v[4 * g + 2], v[4 * g + 3]));
        const vec_double high23 = _mm512_castps_pd(_mm512_unpackhi_ps(v[4 * g + 2], v[4 * g + 3]));
        column[0][g] = _mm512_unpacklo_pd(low01, low23);
        column[1][g] = _mm512_unpackhi_pd(low01, low23);
        column[2][g] = _mm512_unpacklo_pd(high01, high23);
        column[3][g] = _mm512_unpackhi_pd(high01, high23);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        vec_double out[4];
        transpose_quarters(column[k], out);
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++)
            v[4 * l + k] = _mm512_castpd_ps(out[l]);
    }
}
