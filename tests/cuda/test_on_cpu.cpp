/* The emulation itself: what warps and blocks do together, against plain loops; and errors, which it must catch. */
#include "phases.cuh"

extern "C" {
#include "support.h"
}

#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Collectives ------------------------------------------------------------------------------------------------- */

template <class T> __global__ void shuffles(const T *in, T *rotated, T *swapped)
{
    const int lane = (int)threadIdx.x % 32;
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    rotated[i] = shuffle(in[i], (lane + 5) % 32);
    swapped[i] = shuffle_xor(in[i], 12);
}

template <class T> static void check_shuffles(const char *type)
{
    enum { N = 3 * 64 };
    test_case("shuffles of %s", type);
    T in[N], rotated[N], swapped[N];
    for (int i = 0; i < N; i++)
        in[i] = (T)(i * i + 1);
    LAUNCH((shuffles<T>), 3, 64, 0, NULL, in, rotated, swapped);
    EXPECT_OK(launched("shuffles"));
    for (int i = 0; i < N; i++) {
        EXPECT(rotated[i] == in[i / 32 * 32 + (i + 5) % 32], "shuffle, thread %d", i);
        EXPECT(swapped[i] == in[i ^ 12], "shuffle_xor, thread %d", i);
    }
}

__global__ void transposes(const uint16_t *matrix, uint32_t *moved)
{
    const int lane = (int)threadIdx.x;
    moved[lane] = movmatrix(matrix[2 * lane] | (uint32_t)matrix[2 * lane + 1] << 16);
}

static void check_transposes(void)
{
    test_case("movmatrix");
    uint16_t matrix[8][8];
    uint32_t moved[32];
    for (int i = 0; i < 64; i++)
        matrix[i / 8][i % 8] = (uint16_t)random_bits();
    LAUNCH((transposes), 1, 32, 0, NULL, matrix[0], moved);
    EXPECT_OK(launched("transposes"));
    for (int row = 0; row < 8; row++)
        for (int column = 0; column < 8; column++) {
            const uint16_t got = (uint16_t)(moved[4 * row + column / 2] >> 16 * (column % 2));
            EXPECT(got == matrix[column][row], "(%d, %d)", row, column);
        }
}

/* c += a b with a (16, 16), b (16, 8), c (16, 8), as the layouts of launch.cuh have it. */
template <class D> __global__ void multiply(const uint16_t *a, const uint16_t *b, float *c)
{
    const int g = (int)threadIdx.x / 4, q = (int)threadIdx.x % 4;
    uint32_t left[4], right[2];
    float acc[4];
    for (int i = 0; i < 4; i++) {
        const uint16_t *at = a + (g + i % 2 * 8) * 16 + 2 * q + i / 2 * 8;
        left[i] = at[0] | (uint32_t)at[1] << 16;
        acc[i] = c[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
    }
    for (int i = 0; i < 2; i++)
        right[i] = b[(2 * q + 8 * i) * 8 + g] | (uint32_t)b[(2 * q + 8 * i + 1) * 8 + g] << 16;
    D::mma(acc, left, right);
    for (int i = 0; i < 4; i++)
        c[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = acc[i];
}

template <class D> static void check_multiply(boft_dtype dtype)
{
    test_case("mma of %s", dtype_name(dtype));
    uint16_t a[16][16], b[16][8];
    float c[16][8], before[16][8];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            a[i][j] = half_pattern(dtype, random_unit());
            b[i][j / 2] = half_pattern(dtype, random_unit());
            c[i][j / 2] = before[i][j / 2] = (float)random_unit();
        }
    LAUNCH((multiply<D>), 1, 32, 0, NULL, a[0], b[0], c[0]);
    EXPECT_OK(launched("multiply"));
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            double sum = before[i][j];
            for (int k = 0; k < 16; k++)
                sum += half_value(dtype, a[i][k]) * half_value(dtype, b[k][j]);
            EXPECT(fabs(c[i][j] - sum) < 1e-6, "(%d, %d): %g, not %g", i, j, c[i][j], sum);
        }
}

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

template <class D> __global__ void round_trip(const typename D::stored *in, typename D::stored *out)
{
    typename D::real values[16 / sizeof(typename D::stored)];
    const unsigned at = threadIdx.x * (unsigned)(16 / sizeof(typename D::stored));
    widen16<D>(values, load16(in + at));
    store16(out + at, round16<D>(values));
}

template <class D> static void check_round_trip(boft_dtype dtype)
{
    enum { N = 512 / sizeof(typename D::stored) };
    test_case("16 bytes of %s", dtype_name(dtype));
    alignas(16) typename D::stored in[N], out[N];
    for (int i = 0; i < N; i++)
        put(dtype, in, i, random_unit());
    LAUNCH((round_trip<D>), 1, 32, 0, NULL, in, out);
    EXPECT_OK(launched("round_trip"));
    EXPECT(memcmp(in, out, sizeof in) == 0, "not the same bytes");
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------ */

__global__ void sum_of_blocks(int n, const double *in, double *parts, double *sum, unsigned *counter)
{
    SHARED(double, warps, 4);
    double own = 0;
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
        own += in[i];
    for (int step = 16; step; step /= 2)
        own += shuffle_xor(own, step);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x == 0)
        parts[blockIdx.x] = warps[0] + warps[1] + warps[2] + warps[3];
    if (last_block(counter, gridDim.x) && threadIdx.x == 0) {
        double all = 0;
        for (unsigned i = 0; i < gridDim.x; i++)
            all += parts[i];
        *sum = all;
    }
}

static void check_sum(void)
{
    enum { N = 1000, BLOCKS = 7 };
    test_case("a sum over blocks");
    double in[N], parts[BLOCKS], sum = NAN, truth = 0;
    unsigned counter = 0;
    for (int i = 0; i < N; i++)
        truth += in[i] = random_unit();
    for (int again = 0; again < 2; again++) {
        LAUNCH((sum_of_blocks), BLOCKS, 128, 0, NULL, N, in, parts, &sum, &counter);
        EXPECT_OK(launched("sum_of_blocks"));
        EXPECT(fabs(sum - truth) < 1e-12, "%g, not %g", sum, truth);
        EXPECT(counter == 0, "the counter is left at %u", counter);
        sum = NAN;
    }
}

__global__ void where(int64_t *seen)
{
    if (threadIdx.x == 33)
        seen[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] = blockDim.x;
}

static void check_grid(void)
{
    test_case("grids");
    int64_t seen[2 * 3 * 5];
    memset(seen, 0xff, sizeof seen);
    LAUNCH((where), dim3(2, 3, 5), 64, 0, NULL, seen);
    EXPECT_OK(launched("where"));
    for (int i = 0; i < 2 * 3 * 5; i++)
        EXPECT(seen[i] == 64, "block %d", i);
    const dim3 refused[] = {dim3(0), dim3(1, 65536), dim3(1, 1, 65536)};
    for (const dim3 &grid : refused) {
        LAUNCH((where), grid, 64, 0, NULL, seen);
        EXPECT_REFUSED(launched("where"), BOFT_CUDA_FAILED, "where: configuration cudaErrorInvalidConfiguration");
        EXPECT_OK(launched("where"));
    }
    LAUNCH((where), 1, 64, 49 * 1024, NULL, seen);
    EXPECT_REFUSED(launched("where"), BOFT_CUDA_FAILED, "where: argument cudaErrorInvalidValue");
    EXPECT_OK(allow_shared(where, MAX_SHARED_BYTES, "where"));
    LAUNCH((where), 1, 64, 49 * 1024, NULL, seen);
    EXPECT_OK(launched("where"));
    EXPECT_REFUSED(allow_shared(where, MAX_SHARED_BYTES + 1, "where"), BOFT_CUDA_FAILED, "where: argument");
}

/* Rounds of next[i] = here[i] + here[i + 1 modulo n] in a grid of any size, between which `barrier` tells to wait. */
__global__ void phases(int n, int rounds, int barrier, double *here, double *next, unsigned *blocks)
{
    for (int round = 0; round < rounds; round++) {
        for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
            next[i] = here[i] + here[(i + 1) % n];
        if (barrier)
            grid_barrier();
        double *const swapped = here;
        here = next;
        next = swapped;
    }
    if (threadIdx.x == 0)
        blocks[blockIdx.x] = gridDim.x;
}

static void check_phases(void)
{
    enum { N = 500, ROUNDS = 5, BLOCKS = 7 };
    const int residents[] = {1, 3, 32};
    double first[N], truth[2][N], values[2][N];
    for (int i = 0; i < N; i++)
        first[i] = random_unit();
    memcpy(truth[0], first, sizeof first);
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < N; i++)
            truth[(round + 1) % 2][i] = truth[round % 2][i] + truth[round % 2][(i + 1) % N];
    for (int resident : residents)
        for (int barrier = 0; barrier < 2; barrier++) {
            test_case("%d rounds in %d resident blocks, %d barrier", ROUNDS, resident, barrier);
            unsigned blocks[BLOCKS] = {}, launched_blocks = (unsigned)min(resident, (int)BLOCKS);
            memcpy(values[0], first, sizeof first);
            memset(values[1], 0xff, sizeof values[1]);
            on_cpu_resident = resident;
            LAUNCH_COOPERATIVE((phases), BLOCKS, 64, 0, NULL, N, ROUNDS, barrier, values[0], values[1], blocks);
            EXPECT_OK(launched("phases"));
            for (unsigned i = 0; i < BLOCKS; i++)
                EXPECT(blocks[i] == (i < launched_blocks ? launched_blocks : 0), "block %u saw %u", i, blocks[i]);
            const int same = memcmp(values[ROUNDS % 2], truth[ROUNDS % 2], sizeof first) == 0;
            EXPECT(same == barrier, "%s", same ? "the missing barrier went unnoticed" : "wrong");
        }
    on_cpu_resident = 4;
}

static void check_launches(void)
{
    test_case("launches are counted");
    int64_t seen[3];
    on_cpu_launches = 0;
    LAUNCH((where), 3, 64, 0, NULL, seen);
    LAUNCH_COOPERATIVE((where), 3, 64, 0, NULL, seen);
    EXPECT_OK(launched("where"));
    LAUNCH_COOPERATIVE((where), 0, 64, 0, NULL, seen);
    EXPECT_REFUSED(launched("where"), BOFT_CUDA_FAILED, "where: configuration cudaErrorInvalidConfiguration");
    EXPECT(on_cpu_launches == 2, "%d", on_cpu_launches);
}

/* ---- Errors ------------------------------------------------------------------------------------------------------ */

enum error {
    DIVERGENT_SHUFFLE,
    TWO_COLLECTIVES,
    PARTIAL_MASK,
    EXITED_LANE,
    EXITED_BEFORE_BARRIER,
    BARRIER_IN_ONE_WARP,
    PAST_SHARED,
    BEFORE_DYNAMIC,
    MISALIGNED,
    GRID_BARRIER_ALONE, /* what follows is in a cooperative launch of two blocks */
    TWO_BARRIERS,
    EXITED_BEFORE_GRID_BARRIER,
    EXITED_BLOCK,
    ERRORS
};

/* What standard error must hold. */
static const char *const messages[ERRORS] = {"lane 16 of its warp has",
                                             "of its warp waits in",
                                             "partial mask 0xffff",
                                             "has returned",
                                             "waits in __syncthreads, while 32 threads have returned",
                                             "waits in __syncthreads, while 32 threads have returned",
                                             "heap-buffer-overflow",
                                             "heap-buffer-overflow",
                                             "misaligned address",
                                             "in a launch that is not cooperative",
                                             "waits in __syncthreads, while 32 threads wait in grid_barrier",
                                             "waits in grid_barrier, while 32 threads have returned",
                                             "1 blocks have returned, while others wait in grid_barrier"};

__global__ void wrong(error e, float *data)
{
    SHARED(float, array, 64);
    DYN_SHARED(float, dynamic);
    const int thread = (int)threadIdx.x, lane = thread % 32;
    float value = (float)thread;
    switch (e) {
    case DIVERGENT_SHUFFLE:
        if (lane < 16)
            value = shuffle_xor(value, 1);
        break;
    case TWO_COLLECTIVES:
        value = lane < 16 ? shuffle_xor(value, 1) : (float)movmatrix((uint32_t)lane);
        break;
    case PARTIAL_MASK:
        value = __shfl_sync(0xffffu, value, 0);
        break;
    case EXITED_LANE:
        if (lane == 7)
            return;
        value = shuffle(value, 0);
        break;
    case EXITED_BEFORE_BARRIER:
    case BARRIER_IN_ONE_WARP:
        if (thread >= 32 && e == EXITED_BEFORE_BARRIER)
            return;
        if (thread < 32 || e == EXITED_BEFORE_BARRIER)
            __syncthreads();
        break;
    case PAST_SHARED:
        array[thread + (thread == 63)] = value;
        break;
    case BEFORE_DYNAMIC:
        dynamic[thread - 1] = value;
        break;
    case MISALIGNED:
        store16(data + 1, make_uint4(0, 0, 0, 0));
        break;
    case TWO_BARRIERS:
        if (thread < 32)
            __syncthreads();
        else
            grid_barrier();
        break;
    case EXITED_BEFORE_GRID_BARRIER:
        if (thread >= 32)
            grid_barrier();
        break;
    case GRID_BARRIER_ALONE:
    case EXITED_BLOCK:
        if (blockIdx.x == 0)
            grid_barrier();
        break;
    default:
        break;
    }
    data[thread] = value;
}

static void check_errors(void)
{
    for (int e = 0; e < ERRORS; e++) {
        test_case("error %d", e);
        int ends[2];
        if (!EXPECT(pipe(ends) == 0, "no pipe"))
            return;
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            alignas(16) float data[64];
            dup2(ends[1], STDERR_FILENO);
            if (e > GRID_BARRIER_ALONE)
                LAUNCH_COOPERATIVE((wrong), 2, 64, 256, NULL, (error)e, data);
            else
                LAUNCH((wrong), 1, 64, 256, NULL, (error)e, data);
            _exit(0);
        }
        close(ends[1]);
        static char text[1 << 16];
        size_t size = 0;
        for (ssize_t n; size < sizeof text - 1 && (n = read(ends[0], text + size, sizeof text - 1 - size)) > 0;)
            size += (size_t)n;
        text[size] = 0;
        close(ends[0]);
        int status = 0;
        waitpid(child, &status, 0);
        EXPECT(!WIFEXITED(status) || WEXITSTATUS(status) != 0, "went unnoticed");
        EXPECT(strstr(text, messages[e]) != NULL, "no \"%s\" in: %s", messages[e], text);
    }
}

/* Each thread reads what its neighbour writes, without a barrier: NaN for those whose neighbour runs later. */
__global__ void race(float *data, int barrier)
{
    SHARED(float, array, 64);
    array[threadIdx.x] = 1;
    if (barrier)
        __syncthreads();
    data[threadIdx.x] = array[threadIdx.x ^ 32];
}

static void check_race(void)
{
    for (int barrier = 0; barrier < 2; barrier++) {
        test_case("a race, %d barrier", barrier);
        float data[64];
        LAUNCH((race), 1, 64, 0, NULL, data, barrier);
        EXPECT_OK(launched("race"));
        int unwritten = 0;
        for (int i = 0; i < 64; i++)
            unwritten += isnan(data[i]) != 0;
        EXPECT(unwritten == (barrier ? 0 : 32), "%d threads read too early", unwritten);
    }
}

int main(int argc, char **argv)
{
    test_start("test_on_cpu", argc, argv);
    check_shuffles<int>("int");
    check_shuffles<unsigned>("unsigned");
    check_shuffles<float>("float");
    check_shuffles<double>("double");
    check_transposes();
    check_multiply<bf16>(BOFT_BF16);
    check_multiply<f16>(BOFT_F16);
    check_round_trip<f32>(BOFT_F32);
    check_round_trip<f64>(BOFT_F64);
    check_round_trip<bf16>(BOFT_BF16);
    check_round_trip<f16>(BOFT_F16);
    check_sum();
    check_grid();
    check_phases();
    check_launches();
    check_race();
    check_errors();
    return test_finish();
}
