/* See oracle.h. */
#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int64_t factor_channel(int64_t b, int64_t i, int64_t n, int64_t k)
{
    if (i == 0)
        return n * b + k;
    const int64_t half = b / 2, distance = (int64_t)1 << i;
    const int64_t low = (n >> i) * (2 * distance) + (n & (distance - 1));
    return k < half ? low * half + k : (low ^ distance) * half + k - half;
}

/* out (b, b) = the block, transposed if asked. */
static void copy_block(int64_t b, int transpose, const double *block, double *out)
{
    for (int64_t k = 0; k < b; k++)
        for (int64_t j = 0; j < b; j++)
            out[k * b + j] = transpose ? block[j * b + k] : block[k * b + j];
}

static void *scratch(int64_t n)
{
    void *made = malloc((size_t)n * sizeof(double));
    if (!made)
        abort();
    return made;
}

static void apply_factor(int64_t rows, int64_t d, int64_t b, int64_t i, int transpose, const double *q, double *x)
{
    double *block = scratch(b * b), *in = scratch(b), *out = scratch(b);
    for (int64_t n = 0; n < d / b; n++) {
        copy_block(b, transpose, q + (i * (d / b) + n) * b * b, block);
        for (int64_t t = 0; t < rows; t++) {
            double *row = x + t * d;
            for (int64_t k = 0; k < b; k++)
                in[k] = row[factor_channel(b, i, n, k)];
            memset(out, 0, (size_t)b * sizeof *out);
            for (int64_t k = 0; k < b; k++)
                if (in[k] != 0) /* half of what the tests apply is unit vectors */
                    for (int64_t j = 0; j < b; j++)
                        out[j] += in[k] * block[k * b + j];
            for (int64_t k = 0; k < b; k++)
                row[factor_channel(b, i, n, k)] = out[k];
        }
    }
    free(block);
    free(in);
    free(out);
}

void apply_factors(int64_t rows, int64_t d, int64_t b, int64_t first, int64_t count, int transpose, const double *q,
                   double *x)
{
    for (int64_t step = 0; step < count; step++)
        apply_factor(rows, d, b, transpose ? first + step : first + count - 1 - step, transpose, q, x);
}

void factors_backward(int64_t rows, int64_t d, int64_t b, int64_t first, int64_t count, const double *q, double *x,
                      double *dy, double *dq)
{
    /* inputs: the row vectors that factor first + f meets, at f (rows, d). */
    double *inputs = scratch(count * rows * d + 1);
    const size_t bytes = (size_t)(rows * d) * sizeof *x;
    for (int64_t f = count - 1; f >= 0; f--) {
        memcpy(inputs + f * rows * d, x, bytes);
        apply_factor(rows, d, b, first + f, 0, q, x);
    }
    for (int64_t f = 0; f < count; f++) {
        const int64_t i = first + f;
        for (int64_t n = 0; n < d / b; n++) {
            double *block = dq + (i * (d / b) + n) * b * b;
            memset(block, 0, (size_t)(b * b) * sizeof *block);
            for (int64_t t = 0; t < rows; t++) {
                const double *in = inputs + (f * rows + t) * d, *grad = dy + t * d;
                for (int64_t k = 0; k < b; k++) {
                    const double value = in[factor_channel(b, i, n, k)];
                    for (int64_t j = 0; value != 0 && j < b; j++)
                        block[k * b + j] += value * grad[factor_channel(b, i, n, j)];
                }
            }
        }
        apply_factor(rows, d, b, i, 1, q, dy);
    }
    free(inputs);
}

void multiply(int64_t n, const double *a, const double *b, double *c)
{
    memset(c, 0, (size_t)(n * n) * sizeof *c);
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < n; k++)
            for (int64_t j = 0; j < n; j++)
                c[i * n + j] += a[i * n + k] * b[k * n + j];
}

void multiply_tn(int64_t n, const double *a, const double *b, double *c)
{
    double *turned = scratch(n * n);
    copy_block(n, 1, a, turned);
    multiply(n, turned, b, c);
    free(turned);
}

void multiply_nt(int64_t n, const double *a, const double *b, double *c)
{
    double *turned = scratch(n * n);
    copy_block(n, 1, b, turned);
    multiply(n, a, turned, c);
    free(turned);
}

void absolute(int64_t n, const double *x, double *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = fabs(x[i]);
}

double largest(int64_t n, const double *x)
{
    double result = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(x[i]))
            return NAN;
        result = fabs(x[i]) > result ? fabs(x[i]) : result;
    }
    return result;
}
