/* See support.h. */
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include "support.h"

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

/* ---- Cases ----------------------------------------------------------------------------------------------------- */

/* Failures printed for one check; more are only counted. */
enum { MESSAGES = 6, MAX_CHECKS = 256 };

static const char *program_name;
static char context[256];
static const char *variant = "";
static int in_case, case_failed;
static long passed, failed;
static struct {
    const char *file;
    int line, failures;
} checks[MAX_CHECKS];

static void say(const char *text)
{
    if (write(STDERR_FILENO, text, strlen(text)) < 0)
        return;
}

static void say_context(void)
{
    say(program_name);
    say(": died in: ");
    say(context);
    say(" [");
    say(variant);
    say("]\n");
}

static struct sigaction before_us[32];

/* Names the case, then lets the fault happen again under the handler that was there before. */
static void on_signal(int number)
{
    say_context();
    sigaction(number, &before_us[number], NULL);
}

static uint64_t random_state;

void test_start(const char *program, int argc, char **argv)
{
    program_name = program;
    random_state = argc > 1 ? strtoull(argv[1], NULL, 10) : 20240507;
    printf("%s: seed %llu, variants", program, (unsigned long long)random_state);
    for (int i = 0; boft_cpu_variant(i); i++)
        printf(" %s%s", boft_cpu_variant(i), boft_cpu_supported(boft_cpu_variant(i)) ? "" : " (not on this machine)");
    printf("\n");
    fflush(stdout);
    const int numbers[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        struct sigaction action = {.sa_handler = on_signal};
        sigaction(numbers[i], &action, &before_us[numbers[i]]);
    }
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_set_death_callback(say_context);
#endif
}

static void close_case(void)
{
    if (in_case && case_failed)
        failed++;
    else if (in_case)
        passed++;
    in_case = case_failed = 0;
}

int test_finish(void)
{
    close_case();
    release_memory();
    printf("%s: %ld passed, %ld failed\n", program_name, passed, failed);
    return failed > 0;
}

void test_case(const char *format, ...)
{
    close_case();
    in_case = 1;
    va_list args;
    va_start(args, format);
    vsnprintf(context, sizeof context, format, args);
    va_end(args);
}

/* How often the check at a place has failed, this time included. */
static int failures_at(const char *file, int line)
{
    int i = 0;
    while (i < MAX_CHECKS - 1 && checks[i].file && (checks[i].line != line || strcmp(checks[i].file, file) != 0))
        i++;
    checks[i].file = file;
    checks[i].line = line;
    return ++checks[i].failures;
}

int expect_at(const char *file, int line, int ok, const char *format, ...)
{
    if (ok)
        return 1;
    case_failed = 1;
    const int failures = failures_at(file, line);
    if (failures > MESSAGES)
        return 0;
    printf("%s:%d: %s [%s]: ", file, line, context, variant);
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf(failures == MESSAGES ? " (more at this line are only counted)\n" : "\n");
    fflush(stdout);
    return 0;
}

void expect_ok_at(const char *file, int line, boft_status status, const char *call)
{
    expect_at(file, line, status == BOFT_OK, "%s returned %d: %s", call, (int)status, boft_last_error());
}

void expect_refused_at(const char *file, int line, boft_status status, boft_status wanted, const char *words,
                       const char *call)
{
    const char *message = boft_last_error();
    if (!expect_at(file, line, status == wanted, "%s returned %d, not %d", call, (int)status, (int)wanted))
        return;
    char copy[256];
    snprintf(copy, sizeof copy, "%s", words);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " "))
        expect_at(file, line, strstr(message, word) != NULL, "%s: the message \"%s\" does not name %s", call, message,
                  word);
}

const char *next_variant(int *index)
{
    for (; boft_cpu_variant(*index); ++*index) {
        const char *name = boft_cpu_variant(*index);
        if (!boft_cpu_supported(name))
            continue;
        ++*index;
        variant = name;
        EXPECT_OK(boft_cpu_select(name));
        return name;
    }
    variant = "";
    return NULL;
}

/* ---- Random numbers -------------------------------------------------------------------------------------------- */

/* splitmix64 (Steele, Lea and Flood, 2014). */
uint64_t random_bits(void)
{
    uint64_t z = (random_state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

int64_t random_below(int64_t n)
{
    return (int64_t)(random_bits() % (uint64_t)n);
}

double random_unit(void)
{
    return (double)(random_bits() >> 11) * 0x1p-52 - 1;
}

/* ---- Memory ---------------------------------------------------------------------------------------------------- */

enum { SLACK = 0xa5, UNWRITTEN = 0xff, MAX_BUFFERS = 256 };

typedef struct buffer {
    unsigned char *data, *pages; /* pages: without the two guard pages */
    size_t bytes, pages_bytes;
    int is_far; /* far_rows: no slack to look at */
} buffer;

static buffer buffers[MAX_BUFFERS];
static int buffer_count;
static double *double_arrays[MAX_BUFFERS];
static int double_array_count;

static size_t page_bytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

static void give_up(const char *what)
{
    perror(what);
    exit(2);
}

/* Inaccessible pages for `bytes` bytes, at least one, between two more. */
static buffer *reserve(size_t bytes)
{
    const size_t page = page_bytes();
    if (buffer_count == MAX_BUFFERS)
        give_up("too many guarded buffers");
    buffer *made = &buffers[buffer_count++];
    *made = (buffer){.bytes = bytes, .pages_bytes = bytes ? (bytes + page - 1) / page * page : page};
    unsigned char *map = mmap(NULL, made->pages_bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (map == MAP_FAILED)
        give_up("mmap");
    made->pages = map + page;
    return made;
}

void *guarded(size_t bytes, size_t align, guard side)
{
    buffer *made = reserve(bytes);
    if (mprotect(made->pages, made->pages_bytes, PROT_READ | PROT_WRITE))
        give_up("mprotect");
    made->data = made->pages + (side == GUARD_START ? 0 : (made->pages_bytes - bytes) / align * align);
    memset(made->pages, SLACK, made->pages_bytes);
    memset(made->data, UNWRITTEN, bytes);
    return made->data;
}

void *far_rows(int64_t rows, size_t row_bytes, size_t stride)
{
    const size_t page = page_bytes();
    buffer *made = reserve((size_t)(rows - 1) * stride + row_bytes);
    made->is_far = 1;
    made->data = made->pages;
    for (int64_t t = 0; t < rows; t++) {
        unsigned char *row = made->data + (size_t)t * stride;
        const size_t before = (size_t)(row - made->pages) % page;
        if (mprotect(row - before, before + row_bytes, PROT_READ | PROT_WRITE))
            give_up("mprotect");
        memset(row, UNWRITTEN, row_bytes);
    }
    return made->data;
}

static buffer *find_buffer(const void *data)
{
    for (int i = buffer_count - 1; i >= 0; i--)
        if (buffers[i].data == data)
            return &buffers[i];
    give_up("not a guarded buffer");
    return NULL;
}

void *guarded_copy(const void *data, size_t bytes, size_t align, guard side)
{
    void *made = guarded(bytes, align, side);
    if (bytes)
        memcpy(made, data, bytes);
    buffer *b = find_buffer(made);
    if (mprotect(b->pages, b->pages_bytes, PROT_READ))
        give_up("mprotect");
    return made;
}

void scrub(void *data)
{
    memset(data, UNWRITTEN, find_buffer(data)->bytes);
}

double *doubles(int64_t n)
{
    if (double_array_count == MAX_BUFFERS)
        give_up("too many arrays");
    double *made = calloc(n ? (size_t)n : 1, sizeof *made);
    if (!made)
        give_up("calloc");
    double_arrays[double_array_count++] = made;
    return made;
}

static int all_bytes(const unsigned char *data, size_t bytes, unsigned char value)
{
    return bytes == 0 || (data[0] == value && memcmp(data, data + 1, bytes - 1) == 0);
}

void release_memory(void)
{
    const size_t page = page_bytes();
    for (int i = 0; i < buffer_count; i++) {
        const buffer *b = &buffers[i];
        const unsigned char *end = b->data + b->bytes;
        if (!b->is_far) {
            EXPECT(all_bytes(b->pages, (size_t)(b->data - b->pages), SLACK), "wrote before a buffer of %zu bytes",
                   b->bytes);
            EXPECT(all_bytes(end, (size_t)(b->pages + b->pages_bytes - end), SLACK),
                   "wrote past a buffer of %zu bytes", b->bytes);
        }
        munmap(b->pages - page, b->pages_bytes + 2 * page);
    }
    buffer_count = 0;
    for (int i = 0; i < double_array_count; i++)
        free(double_arrays[i]);
    double_array_count = 0;
}

int untouched(const void *data, size_t bytes)
{
    return all_bytes(data, bytes, UNWRITTEN);
}

/* ---- Types ----------------------------------------------------------------------------------------------------- */

const char *dtype_name(boft_dtype dtype)
{
    const char *const names[] = {"f32", "f64", "bf16", "f16"};
    return names[dtype];
}

size_t dtype_size(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? 8 : dtype == BOFT_F32 ? 4 : 2;
}

boft_dtype real_of(boft_dtype dtype)
{
    return dtype == BOFT_F64 ? BOFT_F64 : BOFT_F32;
}

/* Bits of the fraction that are stored. */
static int fraction_bits(boft_dtype dtype)
{
    const int bits[] = {23, 52, 7, 10};
    return bits[dtype];
}

/* Exponent of the smallest normal number. */
static int smallest_exponent(boft_dtype dtype)
{
    const int exponents[] = {-126, -1022, -126, -14};
    return exponents[dtype];
}

double unit_roundoff(boft_dtype dtype)
{
    return ldexp(1, -fraction_bits(dtype) - 1);
}

double smallest_step(boft_dtype dtype)
{
    return ldexp(1, smallest_exponent(dtype) - fraction_bits(dtype));
}

double half_value(boft_dtype dtype, uint16_t pattern)
{
    const int bits = fraction_bits(dtype);
    const double fraction = ldexp(pattern % (1 << bits), -bits);
    const int exponent = (pattern & 0x7fff) >> bits, all_ones = 0x7fff >> bits;
    const double sign = pattern & 0x8000 ? -1 : 1;
    if (exponent == all_ones)
        return fraction != 0 ? NAN : sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(fraction, smallest_exponent(dtype));
    return sign * ldexp(1 + fraction, exponent - 1 + smallest_exponent(dtype));
}

uint16_t half_pattern(boft_dtype dtype, double value)
{
    const int bits = fraction_bits(dtype), all_ones = 0x7fff >> bits;
    const unsigned sign = signbit(value) ? 0x8000 : 0;
    if (isnan(value))
        return (uint16_t)(sign | 0x7fff);
    int exponent = smallest_exponent(dtype);
    if (value != 0 && !isinf(value)) {
        frexp(value, &exponent);
        exponent--; /* to a significand in [1, 2) */
    }
    if (exponent < smallest_exponent(dtype))
        exponent = smallest_exponent(dtype);
    /* In units of the last place of that binade; a carry into the next one is an ordinary increment. */
    const double units = isinf(value) ? INFINITY : nearbyint(ldexp(fabs(value), bits - exponent));
    const double pattern = units + ldexp(exponent - smallest_exponent(dtype), bits);
    const double infinity = ldexp(all_ones, bits);
    return (uint16_t)(sign | (unsigned)(pattern > infinity ? infinity : pattern));
}

/* half_value of all patterns, by table. */
static double half_value_looked_up(boft_dtype dtype, uint16_t pattern)
{
    static double values[2][1 << 16];
    static int filled[2];
    const int format = dtype == BOFT_F16;
    for (unsigned i = 0; !filled[format] && i < 1 << 16; i++)
        values[format][i] = half_value(dtype, (uint16_t)i);
    filled[format] = 1;
    return values[format][pattern];
}

double get(boft_dtype dtype, const void *data, int64_t i)
{
    switch (dtype) {
    case BOFT_F32:
        return (double)((const float *)data)[i];
    case BOFT_F64:
        return ((const double *)data)[i];
    default:
        return half_value_looked_up(dtype, ((const uint16_t *)data)[i]);
    }
}

void put(boft_dtype dtype, void *data, int64_t i, double value)
{
    switch (dtype) {
    case BOFT_F32:
        ((float *)data)[i] = (float)value;
        break;
    case BOFT_F64:
        ((double *)data)[i] = value;
        break;
    default:
        ((uint16_t *)data)[i] = half_pattern(dtype, value);
    }
}

double rounded(boft_dtype dtype, double value)
{
    double storage;
    put(dtype, &storage, 0, value);
    return get(dtype, &storage, 0);
}

/* ---- Rows ------------------------------------------------------------------------------------------------------ */

void *room(boft_dtype dtype, int64_t n, guard side)
{
    return guarded((size_t)n * dtype_size(dtype), dtype_size(dtype), side);
}

const void *stored_rows(boft_dtype dtype, int64_t rows, int64_t cols, int64_t stride, const double *values, guard side)
{
    const int64_t count = extent(rows, cols, stride);
    void *all = doubles(count);
    memset(all, 0xff, (size_t)count * sizeof(double));
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < cols; j++)
            put(dtype, all, t * stride + j, values[t * cols + j]);
    return guarded_copy(all, (size_t)count * dtype_size(dtype), dtype_size(dtype), side);
}

void *far_values(boft_dtype dtype, int64_t rows, int64_t cols, int64_t stride, const double *values)
{
    void *made = far_rows(rows, (size_t)cols * dtype_size(dtype), (size_t)stride * dtype_size(dtype));
    for (int64_t i = 0; values && i < rows * cols; i++)
        put(dtype, made, i / cols * stride + i % cols, values[i]);
    return made;
}

/* ---- Comparison ------------------------------------------------------------------------------------------------ */

int64_t extent(int64_t rows, int64_t cols, int64_t stride)
{
    return rows > 0 ? (rows - 1) * stride + cols : 0;
}

void expect_close_at(const char *file, int line, const char *what, boft_dtype dtype, const void *got, int64_t stride,
                     int64_t rows, int64_t cols, const double *truth, const double *bound)
{
    const int is_half = dtype_size(dtype) == 2;
    const double u = is_half ? unit_roundoff(dtype) : 0, least = smallest_step(dtype) / 2;
    int64_t wrong = 0, worst_row = 0, worst_col = 0;
    double worst = 0, worst_limit = 0;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < cols; j++) {
            const double wanted = bound ? truth[t * cols + j] : rounded(dtype, truth[t * cols + j]);
            const double value = get(dtype, got, t * stride + j), error = fabs(value - wanted);
            const double width = bound ? bound[t * cols + j] : 0;
            const double limit = bound ? width + u * (fabs(wanted) + width) + least : 0;
            if (value == wanted || (isnan(value) && isnan(wanted)) || error <= limit)
                continue;
            if (wrong++ == 0 || error / limit > worst / worst_limit) {
                worst = error;
                worst_limit = limit;
                worst_row = t;
                worst_col = j;
            }
        }
    if (wrong)
        expect_at(file, line, 0, "%s: %lld of %lld x %lld entries are wrong; at (%lld, %lld): %.9g, not %.9g +- %.3g",
                  what, (long long)wrong, (long long)rows, (long long)cols, (long long)worst_row, (long long)worst_col,
                  get(dtype, got, worst_row * stride + worst_col), truth[worst_row * cols + worst_col], worst_limit);
}

void expect_same_at(const char *file, int line, const char *what, boft_dtype dtype, const void *a, const void *b,
                    int64_t stride, int64_t rows, int64_t cols)
{
    const int64_t n = extent(rows, cols, stride);
    const size_t size = dtype_size(dtype);
    if (n == 0 || memcmp(a, b, (size_t)n * size) == 0)
        return;
    int64_t i = 0;
    while (memcmp((const char *)a + (size_t)i * size, (const char *)b + (size_t)i * size, size) == 0)
        i++;
    expect_at(file, line, 0, "%s: not the same bits; first at (%lld, %lld): %.9g and %.9g", what,
              (long long)(i / stride), (long long)(i % stride), get(dtype, a, i), get(dtype, b, i));
}

void expect_gaps_at(const char *file, int line, const char *what, boft_dtype dtype, const void *data, int64_t stride,
                    int64_t rows, int64_t cols)
{
    const size_t size = dtype_size(dtype);
    for (int64_t t = 0; t + 1 < rows; t++)
        if (!untouched((const char *)data + (size_t)(t * stride + cols) * size, (size_t)(stride - cols) * size)) {
            expect_at(file, line, 0, "%s: wrote between rows %lld and %lld", what, (long long)t, (long long)t + 1);
            return;
        }
}

/* ---- Shapes ---------------------------------------------------------------------------------------------------- */

int all_shapes(int64_t largest_super, shape out[MAX_SHAPES])
{
    const int64_t sizes[] = {1,  2,  3,  4,  5,  7,  8,  10, 12, 16,  20,  31,  32,
                             33, 40, 50, 63, 64, 80, 96, 97, 99, 129, 160, 257, 320};
    const int64_t multiples[] = {1, 2, 3, 5, 7, 17};
    int n = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int64_t b = sizes[i], m = 1; b << (m - 1) <= largest_super && (m == 1 || b % 2 == 0); m++)
            for (size_t k = 0; k < sizeof multiples / sizeof *multiples; k++) {
                const int64_t d = (b << (m - 1)) * multiples[k];
                if (d <= 640 && n < MAX_SHAPES)
                    out[n++] = (shape){d, b, m};
            }
    const shape wide[] = {{768, 8, 2},  {1029, 1, 1},  {2304, 8, 3}, {3072, 4, 1},
                          {4096, 8, 2}, {8192, 2, 13}, {4096, 32, 8}};
    for (size_t i = 0; i < sizeof wide / sizeof *wide && n < MAX_SHAPES; i++)
        out[n++] = wide[i];
    return n;
}

int64_t level_channel(const boft_level *level, int64_t g, int64_t j)
{
    const int64_t outer = g / level->inner, lane = g % level->inner, run = j / level->chunk;
    return ((outer * level->runs + run) * level->inner + lane) * level->chunk + j % level->chunk;
}

/* ---- Ranges ---------------------------------------------------------------------------------------------------- */

ranges divide(int64_t count, division how)
{
    ranges r = {.count = count, .how = how, .pieces = how == WHOLE ? 1 : how == PIECES ? MAX_PIECES : count};
    for (int i = 1; how == PIECES && i < MAX_PIECES; i++) {
        int64_t cut = random_below(count + 1);
        int at = i;
        for (; r.cut[at - 1] > cut; at--)
            r.cut[at] = r.cut[at - 1];
        r.cut[at] = cut;
    }
    r.cut[MAX_PIECES] = count;
    return r;
}

int range_at(const ranges *r, int64_t i, int64_t *begin, int64_t *end)
{
    if (i >= r->pieces)
        return 0;
    const int64_t piece = r->pieces - 1 - i;
    *begin = r->how == WHOLE ? 0 : r->how == PIECES ? r->cut[piece] : piece;
    *end = r->how == WHOLE ? r->count : r->how == PIECES ? r->cut[piece + 1] : piece + 1;
    return 1;
}
