/*
 * All levels in one launch, by the tiles of rotate_general.cuh: a phase for each level, with rows of REAL in a
 * workspace between two phases. Step s meets level levels-1-s for x R, and level s for x R^T.
 *
 * The backward needs the inputs of all steps again, and the gradients of all outputs. Both chains are independent:
 * phase i computes the input of step i+1 and the gradient of the input of step levels-1-i. The gradient of a step's
 * blocks follows in the first phase after both of its factors are there.
 */
#ifndef BOFT_ROTATE_LEVELS_CUH
#define BOFT_ROTATE_LEVELS_CUH

#include "phases.cuh"
#include "rotate_general.cuh"

/* A step: its level, where its blocks and what belongs to them begin, and how the work is divided. */
typedef struct general_step {
    general_level level;
    int64_t blocks, parts, counters; /* elements */
    int64_t tiles, splits, outer_tiles, outer_splits;
} general_step;

/*
 * Forward: y = x R or x R^T, rows times factors unless they are NULL. Backward: dx, unless it is NULL, from dy, and
 * dblocks; strips are the inputs of all steps but the first, then the gradients of the outputs of all but the last.
 */
typedef struct general_levels {
    int levels, transpose;
    int64_t rows;
    general_rows x, y, dy, dx;
    const void *blocks, *factors;
    void *strips;
    int64_t strip_size, part_size, d; /* elements of a strip, of all parts, and of a row */
    void *dblocks, *parts;
    unsigned *counters;
    general_step step[BOFT_MAX_LEVELS];
} general_levels;

static_assert(sizeof(general_levels) <= 4096, "parameters of a kernel");

template <class REAL> DEVICE general_rows strip(const general_levels &w, int index)
{
    return {(REAL *)w.strips + index * w.strip_size, w.d, sizeof(REAL) == 8 ? BOFT_F64 : BOFT_F32};
}

template <class REAL>
DEVICE general_product product_of(const general_levels &w, int step, int transpose, general_rows in, general_rows out,
                                  const void *factors)
{
    const general_step &s = w.step[step];
    return {s.level, in, out, (const REAL *)w.blocks + s.blocks, factors, transpose, w.rows, s.tiles, s.splits};
}

template <class REAL> __global__ void __launch_bounds__(GENERAL_THREADS, 3) rotate_levels(general_levels w)
{
    DYN_SHARED(REAL, shared);
    SHARED(general_product, p, 1); /* registers do not hold it, too */
    for (int step = 0; step < w.levels; step++) {
        const int last = step == w.levels - 1;
        if (threadIdx.x == 0)
            *p = product_of<REAL>(w, step, w.transpose, step == 0 ? w.x : strip<REAL>(w, (step - 1) % 2),
                                  last ? w.y : strip<REAL>(w, step % 2), last ? w.factors : NULL);
        __syncthreads();
        for (int64_t i = blockIdx.x; i < p->tiles * p->splits; i += gridDim.x)
            product_rows<REAL, false>(*p, i, shared);
        if (!last)
            grid_barrier();
    }
}

template <class REAL> DEVICE general_rows input_of(const general_levels &w, int step)
{
    return step == 0 ? w.x : strip<REAL>(w, step - 1);
}

/* The gradient of a step's output. */
template <class REAL> DEVICE general_rows gradient_of(const general_levels &w, int step)
{
    return step == w.levels - 1 ? w.dy : strip<REAL>(w, w.levels - 1 + step);
}

template <class REAL> DEVICE general_outer outer_of(const general_levels &w, int step)
{
    const general_step &s = w.step[step];
    const general_rows in = input_of<REAL>(w, step), dy = gradient_of<REAL>(w, step);
    /* For x R^T the gradient is of the untransposed blocks. */
    return {s.level, w.transpose ? dy : in, w.transpose ? in : dy, (REAL *)w.dblocks + s.blocks,
            (REAL *)w.parts + s.parts, w.counters + s.counters, w.rows, s.outer_tiles, s.outer_splits};
}

/*
 * The work of a phase: products with the step `phase` and with the step `back`, whose input's gradient it computes, and
 * the gradients of their blocks, where both factors are there since the last phase. past: where in it each of these
 * ends.
 */
DEVICE void divide_phase(const general_levels &w, int phase, int back, int64_t past[4])
{
    const general_step &a = w.step[phase], &b = w.step[back];
    past[0] = back > 0 ? a.tiles * a.splits : 0;
    past[1] = past[0] + (back > 0 || w.dx.data ? b.tiles * b.splits : 0);
    past[2] = past[1] + (phase >= back ? a.outer_tiles * a.outer_splits : 0);
    past[3] = past[2] + (phase > back ? b.outer_tiles * b.outer_splits : 0);
}

/* VECTOR: only where there is one level. */
template <class REAL, bool VECTOR>
__global__ void __launch_bounds__(GENERAL_THREADS, 3) rotate_backward_levels(general_levels w)
{
    DYN_SHARED(REAL, shared);
    SHARED(int64_t, past, 4); /* registers do not hold these, too */
    SHARED(general_product, p, 1);
    SHARED(general_outer, outer, 1);
    for (int phase = 0; phase < w.levels; phase++) {
        const int back = w.levels - 1 - phase;
        if (threadIdx.x == 0)
            divide_phase(w, phase, back, past);
        __syncthreads();
        for (int64_t i = blockIdx.x; i < past[3]; i += gridDim.x) {
            if (threadIdx.x == 0 && i < past[0])
                *p = product_of<REAL>(w, phase, w.transpose, input_of<REAL>(w, phase), input_of<REAL>(w, phase + 1),
                                      NULL);
            else if (threadIdx.x == 0 && i < past[1])
                *p = product_of<REAL>(w, back, !w.transpose, gradient_of<REAL>(w, back),
                                      back == 0 ? w.dx : gradient_of<REAL>(w, back - 1), NULL);
            else if (threadIdx.x == 0)
                *outer = outer_of<REAL>(w, i < past[2] ? phase : back);
            __syncthreads();
            if (i < past[1])
                product_rows<REAL, VECTOR>(*p, i < past[0] ? i : i - past[0], shared);
            else
                outer_rows<REAL, VECTOR>(*outer, i < past[2] ? i - past[1] : i - past[2], shared);
            __syncthreads();
        }
        if (back > 0)
            grid_barrier();
    }
}

#endif
