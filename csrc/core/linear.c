/* (x weight^T) s + bias for few rows: checks and the call of the current variant. */
#include "kernels.h"
#include "status.h"

boft_status boft_linear(const boft_linear_args *args, int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = boft_check_pointer("linear: args", args)) || (status = boft_check_data("linear", args->dtype)) ||
        (status = boft_check_range("linear: outputs", begin, end, args->n)))
        return status;
    if (args->rows < 0 || args->d < 0 || args->x_stride < 0 || args->weight_stride < 0 || args->out_stride < args->n)
        return boft_refuse(BOFT_BAD_SHAPE, "linear: %lld rows with strides %lld, %lld and %lld, %lld to %lld channels",
                           (long long)args->rows, (long long)args->x_stride, (long long)args->weight_stride,
                           (long long)args->out_stride, (long long)args->d, (long long)args->n);
    if (begin == end || args->rows == 0)
        return BOFT_OK;
    if ((status = boft_check_pointer("linear: s", args->s)) || (status = boft_check_pointer("linear: out", args->out)))
        return status;
    if (args->d > 0 && ((status = boft_check_pointer("linear: x", args->x)) ||
                        (status = boft_check_pointer("linear: weight", args->weight))))
        return status;
    boft_kernels_current()->linear[boft_real_index(args->dtype)](args, begin, end);
    return BOFT_OK;
}
