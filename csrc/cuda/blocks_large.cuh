/* Blocks larger than 32 x 32, everything in one launch: the phases of blocks_invert.cuh and blocks_product.cuh. */
#ifndef BOFT_BLOCKS_LARGE_CUH
#define BOFT_BLOCKS_LARGE_CUH

#include "blocks_invert.cuh"
#include "blocks_product.cuh"

/* Threads of a CUDA block; wide: for blocks above INVERT_SHARED_B, whose panels occupy one CUDA block alone. */
enum { LARGE_THREADS = 256, WIDE_THREADS = 512, LARGE_RESIDENT = 2 };

/* a, keep, q, blocks: boft_cuda_blocks. b <= INVERT_SHARED_B. */
template <class T>
__global__ void __launch_bounds__(LARGE_THREADS, LARGE_RESIDENT)
    large_blocks(const boft_plan plan, const product_steps steps, const product_data<T> data, const T *a,
                 const unsigned char *keep, T *q, T *blocks)
{
    DYN_SHARED(double, shared);
    for (int64_t block = blockIdx.x; block < plan.m * plan.blocks; block += gridDim.x)
        cayley_in_shared(plan, a, keep, q, blocks, block, shared);
    multiply_steps(plan, steps, data, (T *)shared);
}

/* The same for any b, in the workspace. */
template <class T>
__global__ void __launch_bounds__(WIDE_THREADS)
    wide_blocks(const boft_plan plan, const product_steps steps, const product_data<T> data, const invert_room room,
                const T *a, const unsigned char *keep, T *q, T *blocks)
{
    DYN_SHARED(double, shared);
    cayley_in_workspace(plan, a, keep, q, blocks, room, shared);
    multiply_steps(plan, steps, data, (T *)shared);
}

/* keep: boft_cuda_blocks_backward. Steps up to those of Cayley, then dA = (X^T - X) / 4 of what these made. */
template <class T>
__global__ void __launch_bounds__(LARGE_THREADS, LARGE_RESIDENT)
    large_blocks_backward(const boft_plan plan, const product_steps steps, const product_data<T> data,
                          const unsigned char *keep)
{
    DYN_SHARED(T, shared);
    multiply_steps(plan, steps, data, shared);
    grid_barrier();
    skew((unsigned)(plan.m * plan.blocks), plan.b, (const T *)data.whole, keep, (T)-0.25, data.da, (double *)NULL,
         shared);
}

#endif
