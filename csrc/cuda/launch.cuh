/*
 * What the kernels of this directory are written in. A kernel source includes this header and .cuh files only, and
 * compiles two ways: by nvcc for a device, and, with -DBOFT_CUDA_ON_CPU, by any C++17 compiler for tests/cuda, where
 * one fiber per thread runs the same source.
 *
 * Kernel sources may use, apart from the language and the mathematics of <math.h>:
 *   __global__, __launch_bounds__, __restrict__, DEVICE (a function), #pragma unroll, min, max
 *   threadIdx.x, blockDim.x (a multiple of 32; blocks have one dimension), blockIdx.x/y/z, gridDim.x/y/z
 *   SHARED, DYN_SHARED            shared memory: pointers, undefined until written
 *   __syncthreads, __syncwarp()   of all threads: no thread returns before a barrier or collective that others reach
 *   shuffle, shuffle_xor, any_lane  of all 32 lanes, as are movmatrix and D::mma
 *   uint2, uint4, float2, float4 and their make_ functions; load16, store16, widen16, round16
 *   last_block, __threadfence, atomic_ticket; grid_barrier (phases.cuh)
 *   f32, f64, bf16, f16           the types of data, as template arguments: see below
 * and host code LAUNCH, LAUNCH_COOPERATIVE (phases.cuh), launched, allow_shared, MAX_SHARED_BYTES, DTYPE_SWITCH,
 * REAL_SWITCH.
 *
 * Not: <<< >>>, __shared__, asm, partial masks, texture and cooperative group interfaces, the types of cuda_fp16.h and
 * cuda_bf16.h.
 */
#ifndef BOFT_LAUNCH_CUH
#define BOFT_LAUNCH_CUH

#include "boft_cuda.h"

extern "C" {
#include "../core/status.h"
}

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BOFT_CUDA_ON_CPU
#include "convert.h"
#include "on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#define DEVICE static __device__ __forceinline__

/* ---- Launches and shared memory ---------------------------------------------------------------------------------- */

/*
 * LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...): `kernel` in parentheses for its commas. Then
 * `return launched("what it does")`.
 */
#ifdef BOFT_CUDA_ON_CPU
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                         \
    on_cpu_launch(0, #kernel, kernel, grid, block, shared_bytes, (void *)(stream), __VA_ARGS__)
#else
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                         \
    (kernel)<<<grid, block, shared_bytes, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#endif

/* SHARED(float, name, 32): an array for the block, aligned to 16 bytes; `count` is a constant. */
/* DYN_SHARED(float, name): a pointer to the shared_bytes of the launch, aligned to 16 bytes. */
#ifdef BOFT_CUDA_ON_CPU
#define SHARED(T, name, count)                                                                                         \
    static char name##_site;                                                                                           \
    T *const name = (T *)on_cpu_shared(&name##_site, sizeof(T) * (count))
#define DYN_SHARED(T, name) T *const name = (T *)on_cpu_dynamic_shared()
#else
#define SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define DYN_SHARED(T, name)                                                                                            \
    extern __shared__ __align__(16) unsigned char boft_dynamic_shared[];                                               \
    T *const name = (T *)boft_dynamic_shared
#endif

/* The most a block may have on every device since sm_80: 8.6, 8.9 and 12.0 have the least. */
enum { MAX_SHARED_BYTES = 99 * 1024 };

/* Whether what was launched before could be. */
static inline boft_status launched(const char *what)
{
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        return boft_refuse(BOFT_CUDA_FAILED, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
    return BOFT_OK;
}

/* To be called before a launch with more than 48 KB; cheap, and allowed while a graph is captured. */
template <class Kernel> static inline boft_status allow_shared(Kernel *kernel, size_t bytes, const char *what)
{
    if (bytes > 48 * 1024)
        (void)cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    return launched(what);
}

/*
 * DTYPE_SWITCH(dtype, D, return run<D>(args)): the statement with D as the struct of `dtype`, which has been checked.
 * REAL_SWITCH: the same for BOFT_F32 and BOFT_F64 alone, with D as float or double.
 */
#define DTYPE_SWITCH(dtype, D, ...)                                                                                    \
    switch (dtype) {                                                                                                   \
    case BOFT_F32: { typedef f32 D; __VA_ARGS__; break; }                                                              \
    case BOFT_F64: { typedef f64 D; __VA_ARGS__; break; }                                                              \
    case BOFT_BF16: { typedef bf16 D; __VA_ARGS__; break; }                                                            \
    case BOFT_F16: { typedef f16 D; __VA_ARGS__; break; }                                                              \
    }
#define REAL_SWITCH(dtype, D, ...)                                                                                     \
    if ((dtype) == BOFT_F64) { typedef double D; __VA_ARGS__; }                                                        \
    else { typedef float D; __VA_ARGS__; }

/* ---- Warps ------------------------------------------------------------------------------------------------------- */

#define FULL_WARP 0xffffffffu

/* Of all 32 lanes; T: int, unsigned, float, double or (unsigned) long long. */
template <class T> DEVICE T shuffle(T value, int lane)
{
    return __shfl_sync(FULL_WARP, value, lane);
}

template <class T> DEVICE T shuffle_xor(T value, int lane_mask)
{
    return __shfl_xor_sync(FULL_WARP, value, lane_mask);
}

/* Whether any lane of the warp has a predicate that is not 0. */
DEVICE int any_lane(int predicate)
{
    return __any_sync(FULL_WARP, predicate);
}

/* An 8x8 matrix of 16-bit numbers, transposed: lane l holds row l / 4, columns 2 (l % 4) and one more. */
DEVICE uint32_t movmatrix(uint32_t pair)
{
#ifdef BOFT_CUDA_ON_CPU
    return on_cpu_movmatrix(pair);
#else
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
#endif
}

/* ---- Types of data ----------------------------------------------------------------------------------------------- */

/*
 * Each type of data is a struct D with
 *   D::stored, D::real          how it lies in memory (16-bit types: uint16_t) and the type of arithmetic
 *   D::widen(stored)            its value
 *   D::round(real)              the nearest, ties to even; NaN stays NaN, subnormals stay
 * and the 16-bit types also with
 *   D::low(pair), D::high(pair) the values of two neighbours, the first in the low half
 *   D::pack(low, high)          the pair of two rounded values
 *   D::exponent_carry           what carries into both signs of a pair if added to exponents of ones
 *   D::mma(acc, a, b)           acc += a b by mma.m16n8k16 with acc in float32. In lane l, with g = l / 4, q = l % 4:
 *                               a (16 x 16) a[0] row g, columns 2q and 2q+1; a[1] row g+8; a[2], a[3] columns + 8
 *                               b (16 x 8)  b[0] rows 2q and 2q+1, column g; b[1] rows + 8
 *                               acc (16 x 8) acc[0], acc[1] row g, columns 2q and 2q+1; acc[2], acc[3] row g+8
 */
struct f32 {
    typedef float stored;
    typedef float real;
    static __device__ __forceinline__ float widen(float value) { return value; }
    static __device__ __forceinline__ float round(float value) { return value; }
};

struct f64 {
    typedef double stored;
    typedef double real;
    static __device__ __forceinline__ double widen(double value) { return value; }
    static __device__ __forceinline__ double round(double value) { return value; }
};

struct bf16 {
    typedef uint16_t stored;
    typedef float real;
    static constexpr uint32_t exponent_carry = 0x00800080u;
#ifdef BOFT_CUDA_ON_CPU
    static float low(uint32_t pair) { return boft_from_bf16((uint16_t)pair); }
    static float high(uint32_t pair) { return boft_from_bf16((uint16_t)(pair >> 16)); }
    static uint32_t pack(float low, float high) { return boft_to_bf16(low) | (uint32_t)boft_to_bf16(high) << 16; }
    static void mma(float acc[4], const uint32_t a[4], const uint32_t b[2]) { on_cpu_mma(acc, a, b, boft_from_bf16); }
#else
    static __device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
    static __device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        uint32_t pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
    static __device__ __forceinline__ void mma(float acc[4], const uint32_t a[4], const uint32_t b[2])
    {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
    static __device__ __forceinline__ float widen(uint16_t value) { return low(value); }
    static __device__ __forceinline__ uint16_t round(float value) { return (uint16_t)pack(value, 0); }
};

struct f16 {
    typedef uint16_t stored;
    typedef float real;
    static constexpr uint32_t exponent_carry = 0x04000400u;
#ifdef BOFT_CUDA_ON_CPU
    static float widen(uint16_t value) { return boft_from_f16(value); }
    static uint16_t round(float value) { return boft_to_f16(value); }
    static uint32_t pack(float low, float high) { return boft_to_f16(low) | (uint32_t)boft_to_f16(high) << 16; }
    static void mma(float acc[4], const uint32_t a[4], const uint32_t b[2]) { on_cpu_mma(acc, a, b, boft_from_f16); }
#else
    static __device__ __forceinline__ float widen(uint16_t value)
    {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
        return wide;
    }
    static __device__ __forceinline__ uint16_t round(float value)
    {
        uint16_t bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        uint32_t pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
    static __device__ __forceinline__ void mma(float acc[4], const uint32_t a[4], const uint32_t b[2])
    {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
    static __device__ __forceinline__ float low(uint32_t pair) { return widen((uint16_t)pair); }
    static __device__ __forceinline__ float high(uint32_t pair) { return widen((uint16_t)(pair >> 16)); }
};

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

/* 16 bytes in one access; the address is aligned to 16. */
DEVICE uint4 load16(const void *from)
{
    return *(const uint4 *)from;
}

DEVICE void store16(void *to, uint4 bits)
{
    *(uint4 *)to = bits;
}

/* The values in 16 bytes, 16 / sizeof(D::stored) of them, and back, rounded. */
template <class D> DEVICE void widen16(typename D::real *values, uint4 bits)
{
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    if constexpr (sizeof(typename D::stored) == 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            values[2 * i] = D::low(words[i]);
            values[2 * i + 1] = D::high(words[i]);
        }
    } else {
        memcpy(values, words, 16);
    }
}

template <class D> DEVICE uint4 round16(const typename D::real *values)
{
    uint32_t words[4];
    if constexpr (sizeof(typename D::stored) == 2) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            words[i] = D::pack(values[2 * i], values[2 * i + 1]);
    } else {
        memcpy(words, values, 16);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/* Returns 0, 1, ... n-1 to n callers and leaves the counter at 0 again. */
DEVICE unsigned atomic_ticket(unsigned *counter, unsigned n)
{
    return atomicInc(counter, n - 1);
}

/*
 * For all threads of a block, when they have written their part of a workspace: 1 in the last of the n blocks that
 * share `counter`, which then sees the parts of all others, 0 elsewhere. A barrier. The parts must not be read through
 * a const __restrict__ pointer, whose loads may come from a cache that this does not clear.
 */
DEVICE int last_block(unsigned *counter, unsigned n)
{
    SHARED(unsigned, ticket, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        ticket[0] = atomic_ticket(counter, n);
    __syncthreads();
    const int last = ticket[0] == n - 1;
    if (last)
        __threadfence();
    return last;
}

#endif
