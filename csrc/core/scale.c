/* z s + bias (1 - s) and its backward: checks and the call of the current variant. */
#include "kernels.h"
#include "status.h"
#include "tiles.h"

boft_status boft_scale(const boft_scale_args *args, int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = boft_check_pointer("scale: args", args)) || (status = boft_check_data("scale", args->dtype)) ||
        (status = boft_check_range("scale: rows", begin, end, args->rows)))
        return status;
    if (args->n < 0 || args->z_stride < 0 || args->out_stride < args->n)
        return boft_refuse(BOFT_BAD_SHAPE, "scale: strides %lld and %lld for %lld outputs", (long long)args->z_stride,
                           (long long)args->out_stride, (long long)args->n);
    if (begin == end || args->n == 0)
        return BOFT_OK;
    if ((status = boft_check_pointer("scale: z", args->z)) || (status = boft_check_pointer("scale: s", args->s)) ||
        (status = boft_check_pointer("scale: out", args->out)))
        return status;
    boft_kernels_current()->scale[boft_real_index(args->dtype)](args, begin, end);
    return BOFT_OK;
}

int64_t boft_scale_backward_splits(int64_t rows)
{
    int64_t splits = 1;
    while (splits * BOFT_SPLIT_ROWS < rows)
        splits *= 2;
    return splits;
}

boft_status boft_scale_backward(const boft_scale_backward_args *args, int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = boft_check_pointer("scale backward: args", args)) ||
        (status = boft_check_data("scale backward", args->dtype)))
        return status;
    if (args->rows < 0 || args->n < 0 || args->dy_stride < 0 || (args->ds && args->z_stride < 0) ||
        (args->dz && args->dz_stride < args->n))
        return boft_refuse(BOFT_BAD_SHAPE, "scale backward: %lld rows with strides %lld, %lld and %lld for %lld outputs",
                           (long long)args->rows, (long long)args->dy_stride, (long long)args->z_stride,
                           (long long)args->dz_stride, (long long)args->n);
    if ((status = boft_check_range("scale backward: splits", begin, end, boft_scale_backward_splits(args->rows))))
        return status;
    if (begin == end || args->n == 0)
        return BOFT_OK;
    if (args->rows > 0) {
        if ((status = boft_check_pointer("scale backward: dy", args->dy)) ||
            (status = boft_check_pointer("scale backward: s", args->s)))
            return status;
        if (args->ds && (status = boft_check_pointer("scale backward: z", args->z)))
            return status;
    }
    boft_kernels_current()->scale_backward[boft_real_index(args->dtype)](args, begin, end);
    return BOFT_OK;
}
