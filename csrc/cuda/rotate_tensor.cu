/* Groups of up to 128 channels of 16-bit numbers: tiles and launches. */
#include "rotate_kernels.cuh"
#include "rotate_tensor.cuh"

static int chunks_of(int64_t width)
{
    return (int)ceil_div(width, CHUNK);
}

/*
 * Channels of a tile: whole groups that start at multiples of 16 bytes, in the fewest chunks of which at least 3/4 are
 * used, or the most that can be; 0 if no tile holds a group.
 */
static int tensor_width(int64_t group)
{
    int64_t least = group;
    while (least % 8 != 0 && least <= LARGEST_CHUNKS * CHUNK)
        least += group;
    int64_t best = 0;
    for (int64_t width = least; width <= LARGEST_CHUNKS * CHUNK; width += least) {
        const int64_t all = chunks_of(width) * CHUNK, best_all = best ? chunks_of(best) * CHUNK : 1;
        if (best * 4 < best_all * 3 ? width * best_all > best * all : all == best_all)
            best = width;
    }
    return (int)best;
}

static tensor_level tensor_level_of(const boft_plan *plan)
{
    tensor_level level;
    level.d = plan->d;
    level.group = (int)plan->super;
    level.width = tensor_width(plan->super);
    level.tiles = ceil_div(plan->d, level.width);
    level.meets = 0;
    const int chunks = chunks_of(level.width);
    for (int a = 0; a < chunks; a++)
        for (int b = 0; b < chunks; b++)
            if ((min(a, b) * CHUNK + CHUNK - 1) / level.group >= max(a, b) * CHUNK / level.group)
                level.meets |= 1u << (a * chunks + b);
    return level;
}

int tensor_serves(const boft_plan *plan, boft_dtype dtype)
{
    return (dtype == BOFT_BF16 || dtype == BOFT_F16) && plan->levels == 1 && plan->d % 8 == 0 &&
           plan->super <= LARGEST_CHUNKS * CHUNK && tensor_width(plan->super) > 0;
}

static int64_t tensor_splits(const tensor_level &level, int64_t rows)
{
    const int resident[LARGEST_CHUNKS] = {tensor_size<1>::resident, tensor_size<2>::resident, tensor_size<3>::resident,
                                          tensor_size<4>::resident};
    const int chunks = chunks_of(level.width);
    return splits_for(level.tiles, rows, resident[chunks - 1], chunks == 1 ? SPLIT_ROWS : WIDE_SPLIT_ROWS);
}

static int64_t tensor_outer_splits(const tensor_level &level, int64_t rows)
{
    const int resident[LARGEST_CHUNKS] = {tensor_size<1>::backward_resident, tensor_size<2>::backward_resident,
                                          tensor_size<3>::backward_resident, tensor_size<4>::backward_resident};
    return outer_splits_for(level.tiles, rows, resident[chunks_of(level.width) - 1], SPLIT_ROWS);
}

size_t tensor_backward_workspace(const boft_plan *plan, int64_t rows)
{
    const int64_t splits = tensor_outer_splits(tensor_level_of(plan), rows);
    return splits > 1 ? (size_t)(splits * plan->count) * sizeof(float) : 0;
}

static tensor_product tensor_product_of(const boft_rotate_args *args)
{
    tensor_product p;
    p.level = tensor_level_of(args->plan);
    p.in = (const uint16_t *)args->x;
    p.in_stride = args->x_stride;
    p.out = (uint16_t *)args->y;
    p.out_stride = args->y_stride;
    p.blocks = (const float *)args->blocks;
    p.transpose = args->transpose;
    p.rows = args->rows;
    p.splits = tensor_splits(p.level, args->rows);
    return p;
}

template <class D, int CHUNKS> static boft_status launch_tensor_of(const tensor_product &p, void *stream)
{
    const int64_t blocks = p.level.tiles * p.splits;
    boft_status status = check_grid("rotate", blocks);
    if (status || (status = allow_shared(rotate_tensor<D, CHUNKS>, tensor_size<CHUNKS>::fragment_bytes, "rotate")))
        return status;
    LAUNCH((rotate_tensor<D, CHUNKS>), (unsigned)blocks, 128, tensor_size<CHUNKS>::fragment_bytes, stream, p);
    return launched("rotate");
}

template <class D, int CHUNKS>
static boft_status launch_tensor_backward_of(const tensor_product &p, const tensor_outer &outer, void *stream)
{
    typedef tensor_size<CHUNKS> size;
    const int64_t blocks = p.level.tiles * p.splits;
    boft_status status = check_grid("rotate backward", blocks);
    if (status || (status = allow_shared(rotate_backward_tensor<D, CHUNKS>, size::backward_bytes, "rotate backward")))
        return status;
    LAUNCH((rotate_backward_tensor<D, CHUNKS>), (unsigned)blocks, size::backward_threads, size::backward_bytes,
           stream, p, outer);
    return launched("rotate backward");
}

template <class D> static boft_status launch_tensor(const tensor_product &p, const tensor_outer *outer, void *stream)
{
    switch (chunks_of(p.level.width)) {
    case 1:
        return outer ? launch_tensor_backward_of<D, 1>(p, *outer, stream) : launch_tensor_of<D, 1>(p, stream);
    case 2:
        return outer ? launch_tensor_backward_of<D, 2>(p, *outer, stream) : launch_tensor_of<D, 2>(p, stream);
    case 3:
        return outer ? launch_tensor_backward_of<D, 3>(p, *outer, stream) : launch_tensor_of<D, 3>(p, stream);
    default:
        return outer ? launch_tensor_backward_of<D, 4>(p, *outer, stream) : launch_tensor_of<D, 4>(p, stream);
    }
}

/* outer: NULL, or the gradient, too. */
static boft_status launch_tensor(boft_dtype dtype, const tensor_product &p, const tensor_outer *outer, void *stream)
{
    return dtype == BOFT_BF16 ? launch_tensor<bf16>(p, outer, stream) : launch_tensor<f16>(p, outer, stream);
}

boft_status tensor_rotate(const boft_rotate_args *args, void *stream)
{
    return launch_tensor(args->dtype, tensor_product_of(args), NULL, stream);
}

boft_status tensor_rotate_backward(const boft_rotate_backward_args *args, void *workspace, unsigned *counters,
                                   void *stream)
{
    const boft_rotate_args back = args_of_dx(args);
    tensor_product p = tensor_product_of(&back);
    p.splits = tensor_outer_splits(p.level, args->rows);
    const tensor_outer outer = {(const uint16_t *)args->x, args->x_stride, args->transpose, (float *)args->dblocks,
                                (float *)workspace, counters};
    return launch_tensor(args->dtype, p, &outer, stream);
}
