/* Rows times a packed matrix: checks and the calls of the current variant. */
#include "kernels.h"
#include "status.h"

int boft_product_serves(boft_dtype dtype, int64_t depth, int64_t columns)
{
    return dtype == BOFT_BF16 && boft_kernels_current()->product && depth > 0 && columns > 0 &&
           depth % BOFT_PRODUCT_DEPTH == 0 && columns % BOFT_PRODUCT_COLUMNS == 0;
}

static boft_status check_product(boft_dtype dtype, int64_t depth, int64_t columns)
{
    if (boft_product_serves(dtype, depth, columns))
        return BOFT_OK;
    return boft_refuse(BOFT_BAD_SHAPE, "product: variant %s packs no matrix of %lld x %lld and dtype %d",
                       boft_cpu_name(), (long long)depth, (long long)columns, (int)dtype);
}

boft_status boft_product_pack(const boft_product_pack_args *args, int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = boft_check_pointer("product pack: args", args)) ||
        (status = check_product(args->dtype, args->depth, args->columns)) ||
        (status = boft_check_range("product pack: panels", begin, end, args->columns / BOFT_PRODUCT_COLUMNS)))
        return status;
    if (args->stride < (args->transposed ? args->depth : args->columns))
        return boft_refuse(BOFT_BAD_SHAPE, "product pack: stride %lld of a matrix of %lld x %lld",
                           (long long)args->stride, (long long)args->depth, (long long)args->columns);
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("product pack: matrix", args->matrix)) ||
        (status = boft_check_pointer("product pack: packed", args->packed)))
        return status;
    boft_kernels_current()->product_pack(args, begin, end);
    return BOFT_OK;
}

boft_status boft_product(const boft_product_args *args, int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = boft_check_pointer("product: args", args)) ||
        (status = check_product(args->dtype, args->depth, args->columns)) ||
        (status = boft_check_range("product: rows", begin, end, args->rows)))
        return status;
    if (args->x_stride < 0 || args->y_stride < args->columns)
        return boft_refuse(BOFT_BAD_SHAPE, "product: strides %lld and %lld, %lld to %lld columns",
                           (long long)args->x_stride, (long long)args->y_stride, (long long)args->depth,
                           (long long)args->columns);
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("product: x", args->x)) ||
        (status = boft_check_pointer("product: packed", args->packed)) ||
        (status = boft_check_pointer("product: y", args->y)))
        return status;
    boft_kernels_current()->product(args, begin, end);
    return BOFT_OK;
}
