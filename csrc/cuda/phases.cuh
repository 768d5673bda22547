/*
 * Several phases in one launch: what all blocks wrote before a grid_barrier, each of them may read after it.
 *
 * All blocks of such a launch are resident on the device at the same time, or the barrier would wait for ever. So their
 * number depends on the device, and a kernel divides the work of every phase among gridDim.x blocks, whatever it is:
 *
 *     for (int64_t n = blockIdx.x; n < tasks; n += gridDim.x)
 *         ...
 *     grid_barrier();
 *
 * Results must not depend on it. The barrier's state is the driver's: no counter, and nothing to be set to zero.
 */
#ifndef BOFT_PHASES_CUH
#define BOFT_PHASES_CUH

#include "launch.cuh"

#ifndef BOFT_CUDA_ON_CPU
#include <cooperative_groups.h>
#endif

/*
 * For all threads of all blocks, none of which has returned. It is a __syncthreads too. What other blocks wrote must
 * not be read through a const __restrict__ pointer, whose loads may come from a cache that this does not clear.
 */
DEVICE void grid_barrier()
{
#ifdef BOFT_CUDA_ON_CPU
    on_cpu_grid_barrier();
#else
    cooperative_groups::this_grid().sync();
#endif
}

/*
 * LAUNCH_COOPERATIVE((kernel<A, B>), blocks, threads, shared_bytes, stream, arguments...): as LAUNCH, with a grid of as
 * many of the `blocks` as the current device has room for. `blocks`: unsigned, those that the kernel has use for. Above
 * 48 KB, allow_shared comes first.
 */
#ifdef BOFT_CUDA_ON_CPU
#define LAUNCH_COOPERATIVE(kernel, blocks, threads, shared_bytes, stream, ...)                                         \
    on_cpu_launch(1, #kernel, kernel, dim3(blocks), threads, shared_bytes, (void *)(stream), __VA_ARGS__)
#else
#define LAUNCH_COOPERATIVE(kernel, blocks, threads, shared_bytes, stream, ...)                                         \
    launch_cooperative(kernel, blocks, threads, shared_bytes, (cudaStream_t)(stream), __VA_ARGS__)

/* What fails is left to cudaGetLastError. */
template <class... P, class... A>
static inline void launch_cooperative(void (*kernel)(P...), unsigned blocks, int threads, size_t shared_bytes,
                                      cudaStream_t stream, A &&...arguments)
{
    int device = 0, multiprocessors = 0, of_each = 0;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, shared_bytes))
        return;
    cudaLaunchAttribute cooperative = {};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(min(blocks, (unsigned)(multiprocessors * of_each)));
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    (void)cudaLaunchKernelEx(&config, kernel, arguments...);
}
#endif

#endif
