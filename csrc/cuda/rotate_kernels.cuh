/* What the rotate_*.cu files have in common on the host, and what rotate.cu chooses from. */
#ifndef BOFT_ROTATE_KERNELS_CUH
#define BOFT_ROTATE_KERNELS_CUH

#include "launch.cuh"

/*
 * Rows are split so that thread blocks are about as many as the 132 multiprocessors of H100 and H200 hold at a time:
 * one wave, since each thread block prepares blocks of R first. A constant, so that sums over rows are split in the
 * same way on every device.
 */
enum { MULTIPROCESSORS = 132 };
/* A split of the gradient costs a pass over the blocks, so it sums at least this many rows. */
enum { SPLIT_ROWS = 64, WIDE_SPLIT_ROWS = 128 };
/* Kernels count the rows of a split in 32 bits. */
enum { MOST_ROWS = 1 << 30 };

static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline boft_status check_grid(const char *what, int64_t blocks)
{
    if (blocks > INT32_MAX)
        return boft_refuse(BOFT_BAD_SHAPE, "%s: %lld thread blocks are more than a launch can have", what,
                           (long long)blocks);
    return BOFT_OK;
}

/* Splits of at least `least` rows each and at most MOST_ROWS, for about `resident` blocks on each multiprocessor. */
static inline int64_t splits_for(int64_t tiles, int64_t rows, int64_t resident, int64_t least)
{
    const int64_t wanted = min(MULTIPROCESSORS * resident / tiles, ceil_div(rows, least));
    return max(max((int64_t)1, ceil_div(rows, MOST_ROWS)), wanted);
}

/* Of the gradient: none where there are more tiles than counters. */
static inline int64_t outer_splits_for(int64_t tiles, int64_t rows, int64_t resident, int64_t least)
{
    return tiles > BOFT_CUDA_COUNTERS ? 1 : splits_for(tiles, rows, resident, least);
}

static inline int is_aligned(const void *data, int64_t stride, size_t element)
{
    return (uintptr_t)data % 16 == 0 && stride * (int64_t)element % 16 == 0;
}

/* dx is dy times the transposes of what x met. */
static inline boft_rotate_args args_of_dx(const boft_rotate_backward_args *args)
{
    boft_rotate_args back;
    back.plan = args->plan;
    back.dtype = args->dtype;
    back.transpose = !args->transpose;
    back.rows = args->rows;
    back.x = args->dy;
    back.x_stride = args->dy_stride;
    back.blocks = args->blocks;
    back.y = args->dx;
    back.y_stride = args->dx_stride;
    return back;
}

/*
 * Each way to rotate has the functions of boft_cuda.h for checked arguments with rows: y = x R or x R^T, and the
 * backward with dblocks, whose dx may be NULL. The backward's workspace is that of the way which is taken.
 *   tensor   16-bit rows aligned to 16 bytes, one level of groups that fit a tile
 *   wide     the same for groups of more than 128 channels
 *   general  everything, also without rows; the only one with a factor for each row of y (NULL for ones)
 */
int tensor_serves(const boft_plan *plan, boft_dtype dtype);
boft_status tensor_rotate(const boft_rotate_args *args, void *stream);
size_t tensor_backward_workspace(const boft_plan *plan, int64_t rows);
boft_status tensor_rotate_backward(const boft_rotate_backward_args *args, void *workspace, unsigned *counters,
                                   void *stream);

int wide_serves(const boft_plan *plan, boft_dtype dtype);
boft_status wide_rotate(const boft_rotate_args *args, void *stream);
size_t wide_backward_workspace(const boft_plan *plan, int64_t rows);
boft_status wide_rotate_backward(const boft_rotate_backward_args *args, void *workspace, unsigned *counters,
                                 void *stream);

size_t general_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows);
boft_status general_rotate(const boft_rotate_args *args, const void *factors, void *workspace, void *stream);
size_t general_backward_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows);
boft_status general_rotate_backward(const boft_rotate_backward_args *args, void *workspace, unsigned *counters,
                                    void *stream);

#endif
