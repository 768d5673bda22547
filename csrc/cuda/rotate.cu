/* x R, x R^T, the merge and the backward: checks, and the choice of kernels. */
#include "rotate_kernels.cuh"

/* ---- Forward ----------------------------------------------------------------------------------------------------- */

size_t boft_cuda_rotate_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    return general_workspace(plan, dtype, rows);
}

static boft_status check_rotate(const boft_rotate_args *args, const void *workspace)
{
    boft_status status;
    if ((status = boft_check_pointer("rotate: args", args)) ||
        (status = boft_check_pointer("rotate: plan", args->plan)) ||
        (status = boft_check_data("rotate", args->dtype)))
        return status;
    if (args->rows < 0 || args->x_stride < 0 || args->y_stride < args->plan->d)
        return boft_refuse(BOFT_BAD_SHAPE, "rotate: %lld rows with strides %lld and %lld for %lld channels",
                           (long long)args->rows, (long long)args->x_stride, (long long)args->y_stride,
                           (long long)args->plan->d);
    if (args->rows > 0 &&
        ((status = boft_check_pointer("rotate: x", args->x)) || (status = boft_check_pointer("rotate: y", args->y)) ||
         (status = boft_check_pointer("rotate: blocks", args->blocks))))
        return status;
    if (args->rows > 0 && args->plan->levels > 1)
        return boft_check_pointer("rotate: workspace", workspace);
    return BOFT_OK;
}

/* Of checked arguments with rows. */
static boft_status rotate(const boft_rotate_args *args, void *workspace, void *stream)
{
    const int aligned = is_aligned(args->x, args->x_stride, 2) && is_aligned(args->y, args->y_stride, 2);
    if (aligned && tensor_serves(args->plan, args->dtype))
        return tensor_rotate(args, stream);
    if (aligned && wide_serves(args->plan, args->dtype))
        return wide_rotate(args, stream);
    return general_rotate(args, NULL, workspace, stream);
}

boft_status boft_cuda_rotate(const boft_rotate_args *args, void *workspace, void *stream)
{
    const boft_status status = check_rotate(args, workspace);
    return status || args->rows == 0 ? status : rotate(args, workspace, stream);
}

boft_status boft_cuda_merge(const boft_rotate_args *args, const void *s, void *workspace, void *stream)
{
    if (!s)
        return boft_cuda_rotate(args, workspace, stream);
    const boft_status status = check_rotate(args, workspace);
    return status || args->rows == 0 ? status : general_rotate(args, s, workspace, stream);
}

/* ---- Backward ---------------------------------------------------------------------------------------------------- */

size_t boft_cuda_rotate_backward_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    /* Misaligned rows of any shape go the general way. */
    const size_t general = general_backward_workspace(plan, dtype, rows);
    if (tensor_serves(plan, dtype))
        return max(general, tensor_backward_workspace(plan, rows));
    if (wide_serves(plan, dtype))
        return max(general, wide_backward_workspace(plan, rows));
    return general;
}

static boft_status check_rotate_backward(const boft_rotate_backward_args *args, const void *workspace,
                                         const unsigned *counters)
{
    boft_status status;
    if ((status = boft_check_pointer("rotate backward: args", args)) ||
        (status = boft_check_pointer("rotate backward: plan", args->plan)) ||
        (status = boft_check_data("rotate backward", args->dtype)))
        return status;
    if (args->rows < 0 || args->dy_stride < 0 || (args->dblocks && args->x_stride < 0) ||
        (args->dx && args->dx_stride < args->plan->d))
        return boft_refuse(BOFT_BAD_SHAPE,
                           "rotate backward: %lld rows with strides %lld, %lld and %lld for %lld channels",
                           (long long)args->rows, (long long)args->dy_stride, (long long)args->x_stride,
                           (long long)args->dx_stride, (long long)args->plan->d);
    if (args->rows == 0)
        return BOFT_OK;
    if ((status = boft_check_pointer("rotate backward: dy", args->dy)) ||
        (args->dblocks && (status = boft_check_pointer("rotate backward: x", args->x))) ||
        ((args->dx || args->plan->levels > 1) &&
         (status = boft_check_pointer("rotate backward: blocks", args->blocks))) ||
        (boft_cuda_rotate_backward_workspace(args->plan, args->dtype, args->rows) > 0 &&
         (status = boft_check_pointer("rotate backward: workspace", workspace))))
        return status;
    return args->dblocks ? boft_check_pointer("rotate backward: counters", counters) : BOFT_OK;
}

boft_status boft_cuda_rotate_backward(const boft_rotate_backward_args *args, void *workspace, unsigned *counters,
                                      void *stream)
{
    const boft_status status = check_rotate_backward(args, workspace, counters);
    if (status || (!args->dx && !args->dblocks) || (args->rows == 0 && !args->dblocks))
        return status;
    if (!args->dblocks) {
        const boft_rotate_args back = args_of_dx(args);
        return rotate(&back, workspace, stream);
    }
    const int aligned = args->rows > 0 && is_aligned(args->dy, args->dy_stride, 2) &&
                        is_aligned(args->x, args->x_stride, 2) &&
                        (!args->dx || is_aligned(args->dx, args->dx_stride, 2));
    if (aligned && tensor_serves(args->plan, args->dtype))
        return tensor_rotate_backward(args, workspace, counters, stream);
    if (aligned && wide_serves(args->plan, args->dtype))
        return wide_rotate_backward(args, workspace, counters, stream);
    return general_rotate_backward(args, workspace, counters, stream);
}
