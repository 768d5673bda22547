/* How a skew-symmetric S is eliminated, whatever its size: as on the CPU (csrc/core/invert.h). */
#ifndef BOFT_BLOCKS_ELIMINATE_CUH
#define BOFT_BLOCKS_ELIMINATE_CUH

#include "launch.cuh"

/* The largest |S| that is eliminated without pivoting, and what stands for a pivot of 0. */
#define UNPIVOTED_MAX 16.0
#define LEAST_PIVOT 0x1p-53
#define LARGEST_DOUBLE 1.7976931348623157e308

/* How S is eliminated, by its largest entry (infinity if one is not finite): as it is, or scaled, with pivots. */
struct elimination {
    int sick, pivoted;
    double scale; /* of S */
    double one;   /* what stands for 1 in I + S then; 2^-500 for huge S, whose direction alone decides */
};

DEVICE elimination how_to_eliminate(double largest)
{
    const int sick = !(largest <= LARGEST_DOUBLE), pivoted = !sick && largest > UNPIVOTED_MAX;
    const double scale = pivoted ? 1 / largest : 1;
    return {sick, pivoted, scale, pivoted && largest >= 0x1p500 ? 0x1p-500 : scale};
}

/* |s|, or infinity for NaN: largest entries are compared by max. */
DEVICE double size_of_entry(double s)
{
    return fabs(s) <= LARGEST_DOUBLE ? fabs(s) : (double)INFINITY;
}

/* An entry of Q from the inverse of (I + S) scale. */
template <class T> DEVICE T entry_of_q(const elimination &e, double inverse, int on_diagonal)
{
    return e.sick ? (T)NAN : (T)(2 * e.one * inverse - on_diagonal);
}

#endif
