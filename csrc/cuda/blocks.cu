/* From parameters to the collapsed blocks of all levels and back: checks, and the choice of kernels. */
#include "blocks_group.cuh"
#include "blocks_large.cuh"

/* ---- Blocks of at most 32 x 32 ----------------------------------------------------------------------------------- */

enum { GROUP_LARGEST_B = 32, GROUP_LEAST_THREADS = 64, STRIP_ROWS = 64, LITTLE_SHARED_BYTES = 48 * 1024 };

static int lanes_of_block(int64_t b)
{
    return b <= 4 ? 4 : b <= 8 ? 8 : b <= 16 ? 16 : 32;
}

/* Bytes of shared memory for strips of 2^log_strip chunks of a level. */
static size_t strip_bytes(const boft_plan *plan, int k, int log_strip, size_t real, int backward)
{
    const int b = (int)plan->b, c = b / 2;
    int count = rows_in_shared_size(k, c, log_strip);
    if (backward)
        count += factor_in_shared_size(k, b, log_strip) + gradients_in_shared_size(k, c, 0, log_strip) +
                 gradients_in_shared_size(k, c, 1, log_strip);
    return (size_t)count * real;
}

/* threads_a_block: those that work on one of the blocks at the same time. */
static group_tasks divide_groups(const boft_plan *plan, size_t real, int backward, int threads_a_block)
{
    group_tasks tasks = {};
    const int b = (int)plan->b;
    int most = 0;
    for (int64_t l = 0; l < plan->levels; l++) {
        const int k = (int)plan->level[l].factors, threads = (k << (k - 1)) * threads_a_block;
        most = threads > most ? threads : most;
    }
    most = (most + 31) / 32 * 32;
    tasks.threads = most < GROUP_LEAST_THREADS  ? GROUP_LEAST_THREADS
                    : most > GROUP_MOST_THREADS ? GROUP_MOST_THREADS
                                                : most;
    tasks.together = 1;
    for (int64_t l = 0; l < plan->levels; l++) {
        const int k = (int)plan->level[l].factors, blocks = k << (k - 1);
        const int64_t groups = plan->d / plan->level[l].group;
        int log_groups = 0, log_strip = 0;
        while ((blocks * threads_a_block) << (log_groups + 1) <= tasks.threads && (int64_t)1 << log_groups < groups)
            log_groups++;
        while (log_strip < log_groups + k && (b / 2) << (log_strip + 1) <= STRIP_ROWS)
            log_strip++;
        while (log_strip > 0 && k > 1 && strip_bytes(plan, k, log_strip, real, backward) > LITTLE_SHARED_BYTES)
            log_strip--;
        tasks.level[l].first = tasks.count;
        tasks.level[l].groups = groups;
        tasks.level[l].log_groups = log_groups;
        tasks.level[l].log_strip = log_strip;
        tasks.count += (groups + ((int64_t)1 << log_groups) - 1) >> log_groups;
        const size_t bytes = k > 1 ? strip_bytes(plan, k, log_strip, real, backward) : 0;
        tasks.shared_bytes = bytes > tasks.shared_bytes ? bytes : tasks.shared_bytes;
        tasks.together = blocks << log_groups > tasks.together ? blocks << log_groups : tasks.together;
    }
    return tasks;
}

template <class T, int B>
static boft_status launch_groups(const boft_plan *plan, const T *a, const unsigned char *keep, T *q, T *blocks,
                                 void *stream)
{
    group_tasks tasks = divide_groups(plan, sizeof(T), 0, B);
    const size_t cayley = tasks.threads / B * (2 * B * sizeof(double) + (size_t)(plan->b * (plan->b | 1)) * sizeof(T));
    tasks.shared_bytes = cayley > tasks.shared_bytes ? cayley : tasks.shared_bytes;
    const boft_status status = allow_shared(blocks_of_groups<T, B>, tasks.shared_bytes, "cuda blocks");
    if (status)
        return status;
    LAUNCH((blocks_of_groups<T, B>), (unsigned)tasks.count, tasks.threads, tasks.shared_bytes, stream, *plan, tasks, a,
           keep, q, blocks);
    return launched("cuda blocks");
}

template <class T>
static boft_status make_groups(const boft_plan *plan, const T *a, const unsigned char *keep, T *q, T *blocks,
                               void *stream)
{
    switch (lanes_of_block(plan->b)) {
    case 4:
        return launch_groups<T, 4>(plan, a, keep, q, blocks, stream);
    case 8:
        return launch_groups<T, 8>(plan, a, keep, q, blocks, stream);
    case 16:
        return launch_groups<T, 16>(plan, a, keep, q, blocks, stream);
    default:
        return launch_groups<T, 32>(plan, a, keep, q, blocks, stream);
    }
}

template <class T>
static boft_status make_groups_backward(const boft_plan *plan, const T *dblocks, const T *q, const unsigned char *keep,
                                        T *da, void *stream)
{
    group_tasks tasks = divide_groups(plan, sizeof(T), 1, quarter((int)plan->b) * quarter((int)plan->b));
    const size_t block = 3 * (size_t)(plan->b * (plan->b | 1)) * sizeof(T);
    const int fit = (int)(LITTLE_SHARED_BYTES / block);
    tasks.together = fit < 1 ? 1 : tasks.together < fit ? tasks.together : fit;
    tasks.shared_bytes = tasks.together * block > tasks.shared_bytes ? tasks.together * block : tasks.shared_bytes;
    const boft_status status = allow_shared(blocks_of_groups_backward<T>, tasks.shared_bytes, "cuda blocks backward");
    if (status)
        return status;
    LAUNCH((blocks_of_groups_backward<T>), (unsigned)tasks.count, tasks.threads, tasks.shared_bytes, stream, *plan,
           tasks, dblocks, q, keep, da);
    return launched("cuda blocks backward");
}

/* ---- Larger blocks ---------------------------------------------------------------------------------------------- */

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t large_workspace(const boft_plan *plan, size_t real)
{
    const int64_t blocks = plan->m * plan->blocks;
    const size_t rows = (size_t)rows_before_level(*plan, plan->levels) * real;
    const size_t backward = (size_t)(2 * blocks * plan->b * plan->b) * real;
    const size_t inverses = plan->b > INVERT_SHARED_B ? invert_room_bytes(blocks, plan->b) : 0;
    return larger(larger(2 * rows, backward), inverses);
}

static void add_step(product_steps *steps, product_kind kind, int64_t level, int64_t f, int waits)
{
    steps->step[steps->count++] = {(unsigned char)kind, (unsigned char)level, (unsigned char)f, (unsigned char)waits};
}

/* The most factors of a level. */
static int64_t most_factors(const boft_plan *plan)
{
    int64_t most = 0;
    for (int64_t l = 0; l < plan->levels; l++)
        most = plan->level[l].factors > most ? plan->level[l].factors : most;
    return most;
}

/* A phase for each factor below the top one of its level: rows after count-3 ... -1. */
static product_steps steps_forward(const boft_plan *plan)
{
    product_steps steps = {};
    for (int64_t down = 2; down <= most_factors(plan); down++) {
        int waits = 1;
        for (int64_t l = 0; l < plan->levels; l++)
            if (plan->level[l].factors >= down) {
                add_step(&steps, ROWS, l, plan->level[l].factors - down, waits);
                waits = 0;
            }
    }
    return steps;
}

/*
 * In phase p, rows after count-3-p, which the gradients of factors need, and the gradients of rows after p; then the
 * gradients of those factors f that have both since then: rows after f, and the gradients of rows after f-1. At the end
 * Cayley's two.
 */
static product_steps steps_backward(const boft_plan *plan)
{
    product_steps steps = {};
    for (int64_t p = 0; p < most_factors(plan) - 1; p++) {
        int waits = p > 0;
        for (int64_t l = 0; l < plan->levels; l++) {
            const int64_t top = plan->level[l].factors - 2;
            if (p > top)
                continue;
            add_step(&steps, ROW_GRADIENTS, l, p, waits);
            waits = 0;
            if (top - p > 0)
                add_step(&steps, ROWS, l, top - p, 0);
            for (int64_t f = 0; f <= top; f++)
                if ((f > top - f ? f : top - f) == p)
                    add_step(&steps, FACTOR_GRADIENT, l, f, 0);
        }
    }
    add_step(&steps, CAYLEY_HALF, 0, 0, steps.count > 0);
    add_step(&steps, CAYLEY_WHOLE, 0, 0, 1);
    return steps;
}

/* CUDA blocks with something to do in the steps, or `others` if these are more. */
static unsigned most_tasks(const boft_plan *plan, const product_steps &steps, unsigned others)
{
    unsigned most = others, of_phase = 0;
    for (int i = 0; i < steps.count; i++) {
        const product_shape shape = shape_of_step(*plan, steps.step[i]);
        of_phase = (steps.step[i].waits ? 0 : of_phase) + shape.pieces * shape.tiles;
        most = of_phase > most ? of_phase : most;
    }
    return most;
}

template <class T>
static boft_status make_large(const boft_plan *plan, const T *a, const unsigned char *keep, T *q, T *blocks,
                              void *workspace, void *stream)
{
    const product_steps steps = steps_forward(plan);
    const int wide = plan->b > INVERT_SHARED_B;
    const unsigned count = (unsigned)(plan->m * plan->blocks);
    const unsigned tasks = most_tasks(plan, steps, wide ? count * skew_tiles(plan->b) : count);
    product_data<T> data = {};
    data.q = q;
    data.rows = (T *)workspace;
    data.blocks = blocks;
    boft_status status;
    if (!wide) {
        const size_t bytes = larger(invert_shared_bytes((int)plan->b), product_shared_bytes(LARGE_THREADS, sizeof(T)));
        if ((status = allow_shared(large_blocks<T>, bytes, "cuda blocks")))
            return status;
        LAUNCH_COOPERATIVE((large_blocks<T>), tasks, LARGE_THREADS, bytes, stream, *plan, steps, data, a, keep, q,
                           blocks);
        return launched("cuda blocks");
    }
    const invert_room room = invert_room_of(workspace, count, plan->b);
    const size_t bytes = larger(larger(panel_shared_bytes(plan->b), skew_shared_bytes(sizeof(double))),
                                product_shared_bytes(WIDE_THREADS, sizeof(T)));
    if ((status = allow_shared(wide_blocks<T>, bytes, "cuda blocks")))
        return status;
    LAUNCH_COOPERATIVE((wide_blocks<T>), tasks, WIDE_THREADS, bytes, stream, *plan, steps, data, room, a, keep, q,
                       blocks);
    return launched("cuda blocks");
}

template <class T>
static boft_status make_large_backward(const boft_plan *plan, const T *dblocks, const T *q, const unsigned char *keep,
                                       T *da, void *workspace, void *stream)
{
    const int64_t blocks = plan->m * plan->blocks, b = plan->b;
    const product_steps steps = steps_backward(plan);
    product_data<T> data = {};
    data.q = q;
    data.dblocks = dblocks;
    data.da = da;
    data.rows = (T *)workspace;
    data.gradients = data.rows + rows_before_level(*plan, plan->levels);
    data.half = (T *)workspace;
    data.whole = data.half + blocks * b * b;
    const size_t bytes = larger(product_shared_bytes(LARGE_THREADS, sizeof(T)), skew_shared_bytes(sizeof(T)));
    const boft_status status = allow_shared(large_blocks_backward<T>, bytes, "cuda blocks backward");
    if (status)
        return status;
    LAUNCH_COOPERATIVE((large_blocks_backward<T>), most_tasks(plan, steps, (unsigned)blocks * skew_tiles(b)),
                       LARGE_THREADS, bytes, stream, *plan, steps, data, keep);
    return launched("cuda blocks backward");
}

/* ---- Interface -------------------------------------------------------------------------------------------------- */

/* Kernels count their tasks, of which a launch may have 2^31, in 32 bits: enough up to 64 GiB of float32. */
static const int64_t most_numbers = (int64_t)1 << 34;

static int in_groups(const boft_plan *plan)
{
    return plan->b <= GROUP_LARGEST_B;
}

extern "C" size_t boft_cuda_blocks_workspace(const boft_plan *plan, boft_dtype dtype)
{
    return in_groups(plan) ? 0 : large_workspace(plan, dtype == BOFT_F64 ? sizeof(double) : sizeof(float));
}

static boft_status check_blocks(const char *what, const boft_plan *plan, boft_dtype dtype, const void *workspace)
{
    boft_status status;
    if ((status = boft_check_pointer(what, plan)) || (status = boft_check_real(what, dtype)))
        return status;
    if (plan->m * plan->d * plan->b > most_numbers || plan->count > most_numbers)
        return boft_refuse(BOFT_BAD_SHAPE, "%s: d = %lld, b = %lld, m = %lld are more than 2^34 numbers", what,
                           (long long)plan->d, (long long)plan->b, (long long)plan->m);
    if (!workspace && boft_cuda_blocks_workspace(plan, dtype) > 0)
        return boft_refuse(BOFT_BAD_ARGUMENT, "%s: the workspace is NULL", what);
    return BOFT_OK;
}

extern "C" boft_status boft_cuda_blocks(const boft_plan *plan, boft_dtype dtype, const void *a,
                                        const unsigned char *keep, void *q, void *blocks, void *workspace,
                                        void *stream)
{
    boft_status status;
    if ((status = check_blocks("cuda blocks", plan, dtype, workspace)) ||
        (status = boft_check_pointer("cuda blocks: a", a)) ||
        (plan->m > 1 && (status = boft_check_pointer("cuda blocks: q, which m > 1 needs", q))) ||
        (status = boft_check_pointer("cuda blocks: blocks", blocks)))
        return status;
    if (in_groups(plan)) {
        REAL_SWITCH(dtype, T, return make_groups(plan, (const T *)a, keep, (T *)q, (T *)blocks, stream))
    }
    REAL_SWITCH(dtype, T, return make_large(plan, (const T *)a, keep, (T *)q, (T *)blocks, workspace, stream))
}

extern "C" boft_status boft_cuda_blocks_backward(const boft_plan *plan, boft_dtype dtype, const void *dblocks,
                                                 const void *q, const unsigned char *keep, void *da, void *workspace,
                                                 void *stream)
{
    boft_status status;
    if ((status = check_blocks("cuda blocks backward", plan, dtype, workspace)) ||
        (status = boft_check_pointer("cuda blocks backward: dblocks", dblocks)) ||
        (status = boft_check_pointer("cuda blocks backward: q", q)) ||
        (status = boft_check_pointer("cuda blocks backward: da", da)))
        return status;
    if (in_groups(plan)) {
        REAL_SWITCH(dtype, T,
                    return make_groups_backward(plan, (const T *)dblocks, (const T *)q, keep, (T *)da, stream))
    }
    REAL_SWITCH(dtype, T,
                return make_large_backward(plan, (const T *)dblocks, (const T *)q, keep, (T *)da, workspace, stream))
}
