/*
 * boft_cuda.h - the butterfly orthogonal transform (BOFT) on CUDA devices: the whole C interface of csrc/cuda.
 *
 * The mathematics, the plan and the layout of blocks are those of boft.h; results agree with the functions there up to
 * the rounding of float32 (float64) sums, and 16-bit results are rounded once. Valid C11 and C++; needs no CUDA header.
 *
 * Conventions for every function:
 *   - Data pointers are device pointers of the current device; sizes and strides are int64_t in elements. Rows may have
 *     any stride and any alignment of their element type; where everything is aligned to 16 bytes they run faster.
 *   - Work is queued on `stream` (a cudaStream_t) and nothing waits for it. Nothing allocates, synchronises or changes
 *     the device, so that calls may be captured into CUDA graphs; a call may run beside any other on another stream as
 *     long as outputs, workspaces and counters are its own.
 *   - Every result is bitwise the same from call to call on devices of one architecture: no atomic sums.
 *   - Workspaces have the stated number of bytes and are aligned to 256. `counters` are BOFT_CUDA_COUNTERS unsigned
 *     numbers that are all 0 when the work begins, and are again when it has finished.
 *   - Zero rows are valid. Outputs must not overlap inputs unless said otherwise.
 *   - A function returns BOFT_OK, or the reason for refusing with boft_last_error() naming the values; nothing was queued
 *     then, except after BOFT_CUDA_FAILED, which names what cudaGetLastError reported of a launch. All are thread-safe.
 */
#ifndef BOFT_CUDA_H
#define BOFT_CUDA_H

#include "boft.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { BOFT_CUDA_COUNTERS = 16384 };

/* ---- Blocks: Cayley, multiplicative dropout and collapse ------------------------------------------------------------ */

/* Bytes for either direction; 0 for the usual shapes. dtype: BOFT_F32 or BOFT_F64. */
BOFT_API size_t boft_cuda_blocks_workspace(const boft_plan *plan, boft_dtype dtype);

/*
 * a (m, D, b, b) -> q = Cayley(a), with the identity where keep (NULL, or m D bytes) is 0, and the collapsed blocks of
 * all levels, plan->count reals. q may be NULL when m is 1, where it would equal blocks. dtype: BOFT_F32 or BOFT_F64.
 */
BOFT_API boft_status boft_cuda_blocks(const boft_plan *plan, boft_dtype dtype, const void *a, const unsigned char *keep,
                                      void *q, void *blocks, void *workspace, void *stream);

/* da (m, D, b, b) from dblocks (plan->count reals); q as from boft_cuda_blocks, for m = 1 the blocks themselves. */
BOFT_API boft_status boft_cuda_blocks_backward(const boft_plan *plan, boft_dtype dtype, const void *dblocks,
                                               const void *q, const unsigned char *keep, void *da, void *workspace,
                                               void *stream);

/* ---- Rotate, merge --------------------------------------------------------------------------------------------------- */

/* Bytes for boft_cuda_rotate; 0 for one level. */
BOFT_API size_t boft_cuda_rotate_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows);

/*
 * y = x R or x R^T, as boft_rotate with its arguments, except that `blocks` always are those of boft_cuda_blocks, never
 * transposed.
 */
BOFT_API boft_status boft_cuda_rotate(const boft_rotate_args *args, void *workspace, void *stream);

/*
 * diag(s) W R^T in one launch, as boft_merge with its arguments, except that `blocks` always are those of
 * boft_cuda_blocks, never transposed. s: rows reals on the device, or NULL for ones. The workspace is
 * boft_cuda_rotate's.
 */
BOFT_API boft_status boft_cuda_merge(const boft_rotate_args *args, const void *s, void *workspace, void *stream);

BOFT_API size_t boft_cuda_rotate_backward_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows);

/*
 * As boft_rotate_backward with its arguments, except that `blocks` are those of boft_cuda_blocks, needed whenever dx is
 * wanted or plan->levels > 1, `blocks_back` is not read, and `dblocks` are plan->count reals, summed over all rows in an
 * order that the shape prescribes.
 */
BOFT_API boft_status boft_cuda_rotate_backward(const boft_rotate_backward_args *args, void *workspace,
                                               unsigned *counters, void *stream);

/* ---- Scale ----------------------------------------------------------------------------------------------------------- */

/* As boft_scale; out may be z. */
BOFT_API boft_status boft_cuda_scale(const boft_scale_args *args, void *stream);

BOFT_API size_t boft_cuda_scale_backward_workspace(boft_dtype dtype, int64_t rows, int64_t n);

/* As boft_scale_backward, except that ds and dbias are n reals, summed over all rows; dz may be dy. */
BOFT_API boft_status boft_cuda_scale_backward(const boft_scale_backward_args *args, void *workspace, unsigned *counters,
                                              void *stream);

#ifdef __cplusplus
}
#endif

#endif
