/*
 * Runs the kernels of csrc/cuda on the CPU, for tests: csrc/cuda/launch.cuh includes this instead of the CUDA headers.
 *
 * Each thread of a CUDA block is a fiber. Blocks run one after the other, and in a block one warp after the other, each
 * as far as it gets without the others: so two threads that race differ between the two orders. BOFT_CUDA_ORDER=reverse
 * in the environment runs the last block, warp and lane first; otherwise the first. The blocks of a cooperative launch
 * do so between two grid barriers, up to on_cpu_resident of them.
 *
 * Shared memory is a heap block of the exact size, filled with NaN for every CUDA block, so that AddressSanitizer sees
 * what is outside and results show what was not written. These end the program with a message that names kernel, block
 * and thread: lanes of a warp that meet different collectives, a partial mask, lanes, threads or blocks that returned
 * before a collective or barrier that others wait at, different barriers in one block, a grid barrier in a launch that
 * is not cooperative.
 *
 * The multiplication of matrices adds exactly and rounds once, which no device does: it can set no tolerance. Blocks
 * that run one after the other cannot show what is missing between them: a __threadfence, or the barrier before a
 * ticket, which is why kernels leave both to last_block and grid_barrier.
 */
#ifndef ON_CPU_H
#define ON_CPU_H

#include <stddef.h>
#include <stdint.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };

static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim; /* of the fiber that runs */

/* ---- Host -------------------------------------------------------------------------------------------------------- */

typedef struct on_cpu_stream *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaGetLastError(void);
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);

/* For tests to read and set: CUDA blocks a cooperative launch runs at most, 1 ... 32; and launches that ran so far. */
extern int on_cpu_resident, on_cpu_launches;

/* Runs body(context) once per thread and returns when all have; what a device refuses cudaGetLastError tells. */
void on_cpu_run(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared_bytes, int cooperative,
                void (*body)(const void *context), const void *context);

template <class T> struct on_cpu_same {
    typedef T type;
};

/* Arguments become the kernel's parameters once, as at a launch. */
template <class... P>
static inline void on_cpu_launch(int cooperative, const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                                 size_t shared_bytes, void * /* stream */,
                                 typename on_cpu_same<P>::type... arguments)
{
    const auto body = [=] { kernel(arguments...); };
    on_cpu_run(name, (const void *)kernel, grid, block, shared_bytes, cooperative,
               [](const void *b) { (*(decltype(body) *)b)(); }, &body);
}

/* ---- Threads ----------------------------------------------------------------------------------------------------- */

void *on_cpu_shared(const void *site, size_t bytes);
void *on_cpu_dynamic_shared(void);

void __syncthreads(void);
void on_cpu_grid_barrier(void);

/*
 * All 32 lanes of a warp come here with the same `kind`; the last to come calls compute(lanes), where lanes[l] is the
 * `own` of lane l.
 */
void on_cpu_collective(const char *kind, unsigned mask, void *own, void (*compute)(void *const lanes[32]));

static inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    on_cpu_collective("__syncwarp", mask, NULL, [](void *const *) {});
}

template <class T> struct on_cpu_exchange {
    T in, out;
    int from;
};

template <class T> static inline T on_cpu_shuffle(const char *kind, unsigned mask, T value, int from)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    on_cpu_exchange<T> own = {value, value, from};
    on_cpu_collective(kind, mask, &own, [](void *const lanes[32]) {
        for (int l = 0; l < 32; l++) {
            on_cpu_exchange<T> *lane = (on_cpu_exchange<T> *)lanes[l];
            lane->out = ((on_cpu_exchange<T> *)lanes[lane->from & 31])->in;
        }
    });
    return own.out;
}

template <class T> static inline T __shfl_sync(unsigned mask, T value, int lane)
{
    return on_cpu_shuffle("__shfl_sync", mask, value, lane);
}

template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask)
{
    return on_cpu_shuffle("__shfl_xor_sync", mask, value, (int)(threadIdx.x % 32) ^ lane_mask);
}

static inline int __any_sync(unsigned mask, int predicate)
{
    int own = predicate;
    on_cpu_collective("__any_sync", mask, &own, [](void *const lanes[32]) {
        int any = 0;
        for (int l = 0; l < 32; l++)
            any |= *(int *)lanes[l];
        for (int l = 0; l < 32; l++)
            *(int *)lanes[l] = any != 0;
    });
    return own;
}

uint32_t on_cpu_movmatrix(uint32_t pair);
void on_cpu_mma(float acc[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t));

static inline void __threadfence(void) {}

static inline unsigned atomicInc(unsigned *counter, unsigned last)
{
    const unsigned old = *counter;
    *counter = old >= last ? 0 : old + 1;
    return old;
}

#endif
