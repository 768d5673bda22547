/*
 * What the test programs share: cases and checks, random numbers, guarded memory, and the four types of data.
 *
 * Every program takes an optional seed as its only argument, prints it, and ends with a line "<program>: N passed, N
 * failed", where N counts cases. It exits with 1 if a case failed. A crash first names the case it happened in.
 */
#ifndef SUPPORT_H
#define SUPPORT_H

#include "boft.h"

/* ---- Cases ----------------------------------------------------------------------------------------------------- */

void test_start(const char *program, int argc, char **argv);

/* Prints the counts; the exit status of the program. */
int test_finish(void);

/* Ends the case before, if any, and starts one of this name; a case fails if a check in it fails. */
void test_case(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A check: on failure prints file, line, case and the message. Returns `ok`. */
#define EXPECT(ok, ...) expect_at(__FILE__, __LINE__, (ok) != 0, __VA_ARGS__)
int expect_at(const char *file, int line, int ok, const char *format, ...) __attribute__((format(printf, 4, 5)));

/* Checks that a call succeeded. */
#define EXPECT_OK(call) expect_ok_at(__FILE__, __LINE__, call, #call)
void expect_ok_at(const char *file, int line, boft_status status, const char *call);

/* Checks the status of a refusal and that boft_last_error() holds every word of a space-separated list. */
#define EXPECT_REFUSED(call, wanted, words) expect_refused_at(__FILE__, __LINE__, call, wanted, words, #call)
void expect_refused_at(const char *file, int line, boft_status status, boft_status wanted, const char *words,
                       const char *call);

/*
 * Selects the variant of that index or the next one that this machine supports, moves *index past it and returns its
 * name; NULL past the last one, which is the scalar reference and stays selected.
 */
const char *next_variant(int *index);

/* ---- Random numbers -------------------------------------------------------------------------------------------- */

uint64_t random_bits(void);
int64_t random_below(int64_t n); /* 0 ... n-1 */
double random_unit(void);        /* uniform in [-1, 1) */

/* ---- Memory ---------------------------------------------------------------------------------------------------- */

/* Where a buffer lies in its pages: its end, or its start, touches a page that must not be touched. */
typedef enum guard { GUARD_END, GUARD_START } guard;

/*
 * `bytes` bytes of 0xFF, which is NaN in every type, between two inaccessible pages, aligned to `align`. The rest of
 * the pages is filled with another value, which release_memory() checks. With GUARD_END the buffer ends at the guard
 * page if `bytes` is a multiple of `align`, and less than `align` before it otherwise.
 */
void *guarded(size_t bytes, size_t align, guard side);

/* A guarded copy that must not be written to. */
void *guarded_copy(const void *data, size_t bytes, size_t align, guard side);

/*
 * Rows of `row_bytes` bytes each of 0xFF, `stride` bytes apart, with nothing accessible between them but the rest of
 * their pages: rows may be further apart than memory would hold. stride: more than row_bytes by a few pages.
 */
void *far_rows(int64_t rows, size_t row_bytes, size_t stride);

/* Fills a guarded buffer with 0xFF again. */
void scrub(void *buffer);

/* n doubles, zero, freed by release_memory(). */
double *doubles(int64_t n);

/* Frees all guarded buffers and doubles, and checks the slack around the former. */
void release_memory(void);

/* 1 if all bytes are still 0xFF. */
int untouched(const void *data, size_t bytes);

/* ---- Types ----------------------------------------------------------------------------------------------------- */

const char *dtype_name(boft_dtype dtype);
size_t dtype_size(boft_dtype dtype);
boft_dtype real_of(boft_dtype dtype);   /* the type of arithmetic and blocks */
double unit_roundoff(boft_dtype dtype); /* half the distance from 1 to the next number */
double smallest_step(boft_dtype dtype); /* the smallest subnormal number */

/*
 * Value of a 16-bit pattern, and the pattern nearest to a value, ties to even: by the definition of the formats
 * (powers of two and one rounding to integer), not by the shifts and masks that fast conversions use.
 */
double half_value(boft_dtype dtype, uint16_t pattern);
uint16_t half_pattern(boft_dtype dtype, double value);

double get(boft_dtype dtype, const void *data, int64_t i);
void put(boft_dtype dtype, void *data, int64_t i, double value); /* rounded once, to nearest even */
double rounded(boft_dtype dtype, double value);

/* ---- Rows ------------------------------------------------------------------------------------------------------ */

/* A guarded buffer for n elements. */
void *room(boft_dtype dtype, int64_t n, guard side);

/*
 * A (rows, cols) matrix of `values`, one after the other, as guarded rows `stride` elements apart that must not be
 * written to. Gaps hold NaN, which must not leak into results.
 */
const void *stored_rows(boft_dtype dtype, int64_t rows, int64_t cols, int64_t stride, const double *values, guard side);

/* The same in far_rows, for strides of 2^31 elements, where 32-bit indices would not do. values may be NULL. */
void *far_values(boft_dtype dtype, int64_t rows, int64_t cols, int64_t stride, const double *values);

/* ---- Comparison ------------------------------------------------------------------------------------------------ */

/*
 * Checks a (rows, cols) matrix: |got - truth| <= bound + the one rounding to a 16-bit type that is due, entry by
 * entry; with bound NULL, equality with the truth rounded to dtype. NaN matches NaN only; equal infinities match.
 */
#define EXPECT_CLOSE(what, dtype, got, stride, rows, cols, truth, bound) \
    expect_close_at(__FILE__, __LINE__, what, dtype, got, stride, rows, cols, truth, bound)
void expect_close_at(const char *file, int line, const char *what, boft_dtype dtype, const void *got, int64_t stride,
                     int64_t rows, int64_t cols, const double *truth, const double *bound);

/* Checks that two (rows, cols) matrices of one row stride, gaps included, are the same bytes. */
#define EXPECT_SAME(what, dtype, a, b, stride, rows, cols) \
    expect_same_at(__FILE__, __LINE__, what, dtype, a, b, stride, rows, cols)
void expect_same_at(const char *file, int line, const char *what, boft_dtype dtype, const void *a, const void *b,
                    int64_t stride, int64_t rows, int64_t cols);

/* Checks that the gaps between the rows of a (rows, cols) matrix were not written. */
#define EXPECT_GAPS(what, dtype, data, stride, rows, cols) \
    expect_gaps_at(__FILE__, __LINE__, what, dtype, data, stride, rows, cols)
void expect_gaps_at(const char *file, int line, const char *what, boft_dtype dtype, const void *data, int64_t stride,
                    int64_t rows, int64_t cols);

/* Elements from the first to the last of a (rows, cols) matrix. */
int64_t extent(int64_t rows, int64_t cols, int64_t stride);

/* ---- Shapes ---------------------------------------------------------------------------------------------------- */

typedef struct shape {
    int64_t d, b, m;
} shape;

enum { MAX_SHAPES = 512 };

/*
 * The shapes that tests go through: block sizes from 1 to 320, odd ones too, m from 1 to what mixes `largest_super`
 * channels, d from one such group (dense) to several, odd numbers of them too; and some wide ones with many levels.
 * Returns how many were written.
 */
int all_shapes(int64_t largest_super, shape out[MAX_SHAPES]);

/* Channel j of group g of a level, from the description of levels in boft.h. */
int64_t level_channel(const boft_level *level, int64_t g, int64_t j);

/* ---- Ranges ---------------------------------------------------------------------------------------------------- */

/* [0, count) whole, in random pieces some of which are empty, or one by one; pieces run last to first. */
typedef enum division { WHOLE, PIECES, SINGLES } division;
enum { MAX_PIECES = 6 };
typedef struct ranges {
    int64_t count, pieces;
    int64_t cut[MAX_PIECES + 1];
    division how;
} ranges;

ranges divide(int64_t count, division how);

/* The i-th range to run, i from 0; 0 past the last. */
int range_at(const ranges *r, int64_t i, int64_t *begin, int64_t *end);

#endif
