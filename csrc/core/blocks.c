/* From parameters to collapsed blocks: Cayley, collapse, transpose; checks, sizes, and the call of the variant. */
#include "cayley_sizes.h"
#include "kernels.h"
#include "status.h"
#include "tiles.h"

size_t boft_cayley_workspace(int64_t b)
{
    const size_t square = (size_t)(b * b), padded = (size_t)(b * boft_padded(b)) * sizeof(double);
    const size_t forward = padded + boft_invert_workspace(b);
    const size_t backward = 2 * square * sizeof(double) + boft_product_workspace(b, b, sizeof(double));
    size_t lanes = 0;
    if (b <= BOFT_LANES_MAX_B)
        lanes = (2 * square + 5 * (size_t)b) * BOFT_VECTOR_BYTES + square * sizeof(double);
    if (b <= BOFT_LANES_MAX_B_BACKWARD)
        lanes += square * BOFT_VECTOR_BYTES;
    const size_t larger = forward > backward ? forward : backward;
    return larger > lanes ? larger : lanes;
}

static boft_status check_cayley(const char *what, boft_dtype dtype, int64_t b, int64_t begin, int64_t end)
{
    boft_status status;
    if ((status = boft_check_real(what, dtype)) || (status = boft_check_range(what, begin, end, INT64_MAX)))
        return status;
    if (b < 1)
        return boft_refuse(BOFT_BAD_SHAPE, "%s: block size b = %lld must be at least 1", what, (long long)b);
    return BOFT_OK;
}

boft_status boft_cayley(boft_dtype dtype, int64_t b, int64_t begin, int64_t end, const void *a,
                        const unsigned char *keep, void *q, void *workspace)
{
    boft_status status;
    if ((status = check_cayley("cayley", dtype, b, begin, end)))
        return status;
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("cayley: a", a)) || (status = boft_check_pointer("cayley: q", q)) ||
        (status = boft_check_pointer("cayley: workspace", workspace)))
        return status;
    boft_kernels_current()->cayley[boft_real_index(dtype)](b, begin, end, a, keep, q, workspace);
    return BOFT_OK;
}

boft_status boft_cayley_backward(boft_dtype dtype, int64_t b, int64_t begin, int64_t end, const void *dq, const void *q,
                                 const unsigned char *keep, void *da, void *workspace)
{
    boft_status status;
    if ((status = check_cayley("cayley backward", dtype, b, begin, end)))
        return status;
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("cayley backward: dq", dq)) || (status = boft_check_pointer("cayley backward: q", q)) ||
        (status = boft_check_pointer("cayley backward: da", da)) ||
        (status = boft_check_pointer("cayley backward: workspace", workspace)))
        return status;
    boft_kernels_current()->cayley_backward[boft_real_index(dtype)](b, begin, end, dq, q, keep, da, workspace);
    return BOFT_OK;
}

size_t boft_collapse_workspace(const boft_plan *plan, boft_dtype dtype)
{
    /*
     * Backward of the largest level: the products of its lower factors and their gradients, less than group x group
     * each, and half a row of chunks transposed. The scalar variant: a product, its gradient, and a row of a block.
     */
    int64_t group = 0;
    for (int64_t i = 0; i < plan->levels; i++)
        group = boft_max(group, plan->level[i].group);
    const size_t real = boft_real_size(dtype);
    const size_t alone = (size_t)(2 * group * group + group * plan->b + plan->b) * real;
    if (plan->b > BOFT_COLLAPSE_LANES_MAX_B)
        return alone;
    /* In lanes: the factors' blocks and the products of several groups, and a block for lanes that are not used. */
    const size_t lanes = (size_t)(group * plan->b * plan->m + 2 * group * group) * BOFT_VECTOR_BYTES;
    const size_t together = lanes + (size_t)(group * group) * real;
    return together > alone ? together : alone;
}

static boft_status check_level(const char *what, const boft_plan *plan, boft_dtype dtype, int64_t level, int64_t begin,
                               int64_t end)
{
    boft_status status;
    if ((status = boft_check_pointer(what, plan)) || (status = boft_check_real(what, dtype)))
        return status;
    if (level < 0 || level >= plan->levels)
        return boft_refuse(BOFT_BAD_SHAPE, "%s: level %lld of %lld", what, (long long)level, (long long)plan->levels);
    return boft_check_range(what, begin, end, plan->d / plan->level[level].group);
}

boft_status boft_collapse(const boft_plan *plan, boft_dtype dtype, int64_t level, int64_t begin, int64_t end,
                          const void *q, void *blocks, void *workspace)
{
    boft_status status;
    if ((status = check_level("collapse", plan, dtype, level, begin, end)))
        return status;
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("collapse: q", q)) || (status = boft_check_pointer("collapse: blocks", blocks)) ||
        (status = boft_check_pointer("collapse: workspace", workspace)))
        return status;
    boft_kernels_current()->collapse[boft_real_index(dtype)](plan, &plan->level[level], begin, end, q, blocks, workspace);
    return BOFT_OK;
}

boft_status boft_collapse_backward(const boft_plan *plan, boft_dtype dtype, int64_t level, int64_t begin, int64_t end,
                                   const void *dblocks, const void *q, void *dq, void *workspace)
{
    boft_status status;
    if ((status = check_level("collapse backward", plan, dtype, level, begin, end)))
        return status;
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("collapse backward: dblocks", dblocks)) ||
        (status = boft_check_pointer("collapse backward: q", q)) ||
        (status = boft_check_pointer("collapse backward: dq", dq)) ||
        (status = boft_check_pointer("collapse backward: workspace", workspace)))
        return status;
    boft_kernels_current()->collapse_backward[boft_real_index(dtype)](plan, &plan->level[level], begin, end, dblocks, q,
                                                                      dq, workspace);
    return BOFT_OK;
}

boft_status boft_transpose(const boft_plan *plan, boft_dtype dtype, int64_t level, int64_t begin, int64_t end,
                           const void *blocks, void *transposed)
{
    boft_status status;
    if ((status = check_level("transpose", plan, dtype, level, begin, end)))
        return status;
    if (begin == end)
        return BOFT_OK;
    if ((status = boft_check_pointer("transpose: blocks", blocks)) ||
        (status = boft_check_pointer("transpose: transposed", transposed)))
        return status;
    boft_kernels_current()->transpose[boft_real_index(dtype)](&plan->level[level], begin, end, blocks, transposed);
    return BOFT_OK;
}
