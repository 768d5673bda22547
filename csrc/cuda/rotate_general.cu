/* Any shape, type of data and alignment: launches. */
#include "rotate_kernels.cuh"
#include "rotate_levels.cuh"

enum { GENERAL_RESIDENT = 3 };

static size_t real_size(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? sizeof(double) : sizeof(float);
}

static general_level general_level_of(const boft_plan *plan, int64_t index, boft_dtype dtype)
{
    const boft_level *level = &plan->level[index];
    const int columns = dtype == BOFT_F64 ? general_size<double>::columns : general_size<float>::columns;
    general_level out;
    out.group = (int)level->group;
    out.chunk = (int)level->chunk;
    out.inner = (int)level->inner;
    out.groups = plan->d / level->group;
    out.unit = level->group <= columns ? (int)(level->group + 3) / 4 * 4 : columns;
    out.units = columns / out.unit;
    out.slices = (int)ceil_div(level->group, columns);
    return out;
}

/*
 * All steps of a rotation. Tiles of the gradient have counters of their own, and parts, where there are several splits;
 * how levels are divided does not depend on `transpose`.
 */
static general_levels levels_of(const boft_plan *plan, boft_dtype dtype, int64_t rows, int transpose)
{
    general_levels w = {};
    int64_t parts = 0, counters = 0;
    for (int64_t i = 0; i < plan->levels; i++) {
        general_step *s = &w.step[transpose ? i : plan->levels - 1 - i];
        s->level = general_level_of(plan, i, dtype);
        s->blocks = plan->level[i].offset;
        s->tiles = ceil_div(s->level.groups, s->level.units) * s->level.slices;
        s->splits = splits_for(s->tiles, rows, GENERAL_RESIDENT, GENERAL_ROWS);
        s->outer_tiles = s->tiles * s->level.slices;
        s->outer_splits = counters + s->outer_tiles > BOFT_CUDA_COUNTERS
                              ? 1
                              : splits_for(s->outer_tiles, rows, GENERAL_RESIDENT, SPLIT_ROWS);
        s->parts = parts;
        s->counters = counters;
        if (s->outer_splits > 1) {
            parts += s->outer_splits * plan->d * s->level.group;
            counters += s->outer_tiles;
        }
    }
    w.levels = (int)plan->levels;
    w.transpose = transpose;
    w.rows = rows;
    w.d = plan->d;
    w.strip_size = (rows * plan->d + 255) / 256 * 256;
    w.part_size = parts;
    return w;
}

static int is_vector(const general_level &level, const general_rows &rows)
{
    return rows.dtype == BOFT_F32 && level.inner == 1 && level.group % 4 == 0 && is_aligned(rows.data, rows.stride, 4);
}

/* ---- Forward ----------------------------------------------------------------------------------------------------- */

size_t general_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    return (size_t)(min(plan->levels - 1, (int64_t)2) * levels_of(plan, dtype, rows, 0).strip_size) * real_size(dtype);
}

static boft_status launch_product(const general_product &p, boft_dtype dtype, void *stream)
{
    const int64_t blocks = p.tiles * p.splits;
    const boft_status status = check_grid("rotate", blocks);
    if (status)
        return status;
    if (dtype == BOFT_F64)
        LAUNCH((rotate_general<double, false>), (unsigned)blocks, GENERAL_THREADS, general_size<double>::bytes, stream,
               p);
    else if (is_vector(p.level, p.in) && is_vector(p.level, p.out))
        LAUNCH((rotate_general<float, true>), (unsigned)blocks, GENERAL_THREADS, general_size<float>::bytes, stream, p);
    else
        LAUNCH((rotate_general<float, false>), (unsigned)blocks, GENERAL_THREADS, general_size<float>::bytes, stream,
               p);
    return launched("rotate");
}

/* As many thread blocks as a phase has work for; a cooperative launch takes fewer. */
static unsigned blocks_for(int64_t work)
{
    return (unsigned)min(work, (int64_t)INT32_MAX);
}

boft_status general_rotate(const boft_rotate_args *args, const void *factors, void *workspace, void *stream)
{
    general_levels w = levels_of(args->plan, args->dtype, args->rows, args->transpose);
    w.x = {(void *)args->x, args->x_stride, args->dtype};
    w.y = {args->y, args->y_stride, args->dtype};
    w.blocks = args->blocks;
    w.factors = factors;
    w.strips = workspace;
    const general_step &only = w.step[0];
    if (w.levels == 1)
        return launch_product({only.level, w.x, w.y, args->blocks, factors, args->transpose, args->rows, only.tiles,
                               only.splits}, args->dtype, stream);
    int64_t work = 0;
    for (int i = 0; i < w.levels; i++)
        work = max(work, w.step[i].tiles * w.step[i].splits);
    if (args->dtype == BOFT_F64)
        LAUNCH_COOPERATIVE((rotate_levels<double>), blocks_for(work), GENERAL_THREADS, general_size<double>::bytes,
                           stream, w);
    else
        LAUNCH_COOPERATIVE((rotate_levels<float>), blocks_for(work), GENERAL_THREADS, general_size<float>::bytes,
                           stream, w);
    return launched("rotate");
}

/* ---- Backward ---------------------------------------------------------------------------------------------------- */

/* The workspace: strips, then parts. */
static int64_t backward_strips(const boft_plan *plan)
{
    return 2 * (plan->levels - 1);
}

size_t general_backward_workspace(const boft_plan *plan, boft_dtype dtype, int64_t rows)
{
    const general_levels w = levels_of(plan, dtype, rows, 0);
    return (size_t)(backward_strips(plan) * w.strip_size + w.part_size) * real_size(dtype);
}

static boft_status launch_groups(const general_product &p, const general_outer &outer, int swapped, boft_dtype dtype,
                                 void *stream)
{
    const int64_t blocks = outer.tiles * outer.splits;
    const boft_status status = check_grid("rotate backward", blocks);
    if (status)
        return status;
    if (dtype == BOFT_F64)
        LAUNCH((rotate_backward_groups<double, false>), (unsigned)blocks, GENERAL_THREADS, general_size<double>::bytes,
               stream, p, outer, swapped);
    else if (is_vector(outer.level, outer.left) && is_vector(outer.level, outer.right) &&
             (!p.out.data || is_vector(outer.level, p.out)))
        LAUNCH((rotate_backward_groups<float, true>), (unsigned)blocks, GENERAL_THREADS, general_size<float>::bytes,
               stream, p, outer, swapped);
    else
        LAUNCH((rotate_backward_groups<float, false>), (unsigned)blocks, GENERAL_THREADS, general_size<float>::bytes,
               stream, p, outer, swapped);
    return launched("rotate backward");
}

/* Of one level. */
static boft_status launch_slices(const general_levels &w, boft_dtype dtype, void *stream)
{
    const general_step &only = w.step[0];
    const int64_t blocks = (w.dx.data ? only.tiles * only.splits : 0) + only.outer_tiles * only.outer_splits;
    const boft_status status = check_grid("rotate backward", blocks);
    if (status)
        return status;
    if (dtype == BOFT_F64)
        LAUNCH((rotate_backward_levels<double, false>), (unsigned)blocks, GENERAL_THREADS, general_size<double>::bytes,
               stream, w);
    else if (is_vector(only.level, w.x) && is_vector(only.level, w.dy) && (!w.dx.data || is_vector(only.level, w.dx)))
        LAUNCH((rotate_backward_levels<float, true>), (unsigned)blocks, GENERAL_THREADS, general_size<float>::bytes,
               stream, w);
    else
        LAUNCH((rotate_backward_levels<float, false>), (unsigned)blocks, GENERAL_THREADS, general_size<float>::bytes,
               stream, w);
    return launched("rotate backward");
}

boft_status general_rotate_backward(const boft_rotate_backward_args *args, void *workspace, unsigned *counters,
                                    void *stream)
{
    const boft_dtype dtype = args->dtype;
    general_levels w = levels_of(args->plan, dtype, args->rows, args->transpose);
    w.x = {(void *)args->x, args->x_stride, dtype};
    w.dy = {(void *)args->dy, args->dy_stride, dtype};
    w.dx = {args->rows > 0 ? args->dx : NULL, args->dx_stride, dtype};
    w.blocks = args->blocks;
    w.strips = workspace;
    w.dblocks = args->dblocks;
    w.parts = (char *)workspace + (size_t)(backward_strips(args->plan) * w.strip_size) * real_size(dtype);
    w.counters = counters;
    const general_step &only = w.step[0];
    if (w.levels == 1 && only.level.slices == 1)
        return launch_groups({only.level, w.dy, w.dx, w.blocks, NULL, !w.transpose, w.rows, only.tiles, only.splits},
                             {only.level, w.transpose ? w.dy : w.x, w.transpose ? w.x : w.dy, w.dblocks, w.parts,
                              counters, w.rows, only.outer_tiles, only.outer_splits},
                             w.transpose, dtype, stream);
    if (w.levels == 1)
        return launch_slices(w, dtype, stream);
    int64_t work = 0; /* of half a phase */
    for (int i = 0; i < w.levels; i++)
        work = max(work, w.step[i].tiles * w.step[i].splits + w.step[i].outer_tiles * w.step[i].outer_splits);
    if (dtype == BOFT_F64)
        LAUNCH_COOPERATIVE((rotate_backward_levels<double, false>), blocks_for(2 * work), GENERAL_THREADS,
                           general_size<double>::bytes, stream, w);
    else
        LAUNCH_COOPERATIVE((rotate_backward_levels<float, false>), blocks_for(2 * work), GENERAL_THREADS,
                           general_size<float>::bytes, stream, w);
    return launched("rotate backward");
}
