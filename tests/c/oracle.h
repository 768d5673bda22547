/*
 * The mathematics of BOFT in double, straight from the definition at the top of boft.h and independent of the core: no
 * levels, no tiles, one factor after the other. Sizes are trusted.
 */
#ifndef ORACLE_H
#define ORACLE_H

#include <stdint.h>

/* Channel k of block n of factor i: chunk n' or n' XOR 2^i, of b / 2 channels each; for factor 0 it is n b + k. */
int64_t factor_channel(int64_t b, int64_t i, int64_t n, int64_t k);

/*
 * x = x F_{first+count-1} ... F_first in place, or x = x F_first^T ... F_{first+count-1}^T if transpose.
 * x: (rows, d); q: (m, d / b, b, b), of which factors first ... first+count-1 are read.
 */
void apply_factors(int64_t rows, int64_t d, int64_t b, int64_t first, int64_t count, int transpose, const double *q,
                   double *x);

/* dq of <dy, x F_{first+count-1} ... F_first>: blocks of those factors are written. x, dy: (rows, d), overwritten. */
void factors_backward(int64_t rows, int64_t d, int64_t b, int64_t first, int64_t count, const double *q, double *x,
                      double *dy, double *dq);

/* c = a b (n x n), or a^T b, or a b^T; c overlaps neither. */
void multiply(int64_t n, const double *a, const double *b, double *c);
void multiply_tn(int64_t n, const double *a, const double *b, double *c);
void multiply_nt(int64_t n, const double *a, const double *b, double *c);

/* Absolute values: the same sums of them bound the rounding of any order of summation. */
void absolute(int64_t n, const double *x, double *out);

double largest(int64_t n, const double *x); /* max |x|; NaN if any is */

#endif
