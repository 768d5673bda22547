/*
 * The elimination of the Cayley transform, in double for both types of parameters.
 *
 * I + S has a symmetric part of at least I, so Gauss-Jordan without pivoting meets no pivot below 1. Its error still
 * grows with the entries, and entries above 1e154 would overflow, so a matrix with a large entry is scaled to at most 1
 * and eliminated with row pivoting.
 */
#ifndef BOFT_INVERT_H
#define BOFT_INVERT_H

#include "cayley_sizes.h"

#include <math.h>
#include <stdint.h>

/* Largest |S| that is eliminated without pivoting: the error stays below 1e-12, far under a float's rounding. */
#define BOFT_UNPIVOTED_MAX 16.0

/* A pivot that rounding has made zero becomes this, relative to entries of at most 1, so that results stay finite. */
#define BOFT_LEAST_PIVOT 0x1p-53

/*
 * What stands for 1 in a matrix S of this largest entry, once S has been divided by it: 1 / largest. Larger matrices
 * than 2^500 count as that large, which their direction alone decides, so that products of two pivots cannot overflow.
 */
static inline double boft_scaled_one(double largest)
{
    return largest < 0x1p500 ? 1 / largest : 0x1p-500;
}

/* max |s| over the b x b matrix with rows of boft_padded(b), or NaN if an entry is not finite. */
static inline double boft_largest(int64_t b, const double *s)
{
    double largest = 0;
    for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++) {
            double size = fabs(s[i * boft_padded(b) + j]);
            if (!(size <= 1.7976931348623157e308))
                return NAN;
            largest = size > largest ? size : largest;
        }
    return largest;
}

/* Row at or below k with the largest entry in column k. */
static inline int64_t boft_pivot_row(int64_t b, const double *s, int64_t k)
{
    int64_t row = k;
    for (int64_t i = k + 1; i < b; i++)
        if (fabs(s[i * boft_padded(b) + k]) > fabs(s[row * boft_padded(b) + k]))
            row = i;
    return row;
}

static inline void boft_swap(int64_t n, double *x, double *y)
{
    for (int64_t k = 0; x != y && k < n; k++) {
        double t = x[k];
        x[k] = y[k];
        y[k] = t;
    }
}

static inline void boft_swap_rows(int64_t b, double *s, int64_t i, int64_t j)
{
    boft_swap(b, s + i * boft_padded(b), s + j * boft_padded(b));
}

/* The inverse of a row-permuted matrix has its columns permuted: undo in reverse order. */
static inline void boft_unswap_columns(int64_t b, double *s, const int64_t *pivots)
{
    for (int64_t k = b - 1; k >= 0; k--)
        for (int64_t i = 0; pivots[k] != k && i < b; i++) {
            double t = s[i * boft_padded(b) + k];
            s[i * boft_padded(b) + k] = s[i * boft_padded(b) + pivots[k]];
            s[i * boft_padded(b) + pivots[k]] = t;
        }
}

#endif
