/* Rows times a packed matrix: checks and the calls of the current variant. */
#include "kernels.h"
#include "status.h"

static boft_product_kernels kernels_of(boft_dtype dtype)
{
    const boft_kernels *kernels = boft_kernels_current();
    const boft_product_kernels none = {NULL, NULL};
    return dtype == BOFT_F32 ? kernels->product_f32 : dtype == BOFT_BF16 ? kernels->product_bf16 : none;
}

int boft_product_serves(boft_dtype dtype, int64_t depth, int64_t columns)
{
    return kernels_of(dtype).multiply != NULL && depth > 0 && columns > 0 && depth % BOFT_PRODUCT_DEPTH == 0 &&
           columns % BOFT_PRODUCT_COLUMNS == 0;
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
    const int64_t first = args->first, rows = args->rows;
    if (first < 0 || rows < 0 || rows > args->depth - first || first % BOFT_PRODUCT_DEPTH || rows % BOFT_PRODUCT_DEPTH)
        return boft_refuse(BOFT_BAD_SHAPE, "product pack: %lld rows from row %lld on of %lld, in steps of %d",
                           (long long)rows, (long long)first, (long long)args->depth, BOFT_PRODUCT_DEPTH);
    if (args->stride < (args->transposed ? rows : args->columns))
        return boft_refuse(BOFT_BAD_SHAPE, "product pack: stride %lld of a matrix of %lld x %lld",
                           (long long)args->stride, (long long)rows, (long long)args->columns);
    if (begin == end || rows == 0)
        return BOFT_OK;
    if ((status = boft_check_pointer("product pack: matrix", args->matrix)) ||
        (status = boft_check_pointer("product pack: packed", args->packed)))
        return status;
    kernels_of(args->dtype).pack(args, begin, end);
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
    kernels_of(args->dtype).multiply(args, begin, end);
    return BOFT_OK;
}
