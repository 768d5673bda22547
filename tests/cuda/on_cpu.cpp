/* Fibers, their order, and what the threads of a warp and a block do together. See on_cpu.h. */
#include "on_cpu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

enum { MAX_THREADS = 1024, MAX_RESIDENT = 32, STACK_BYTES = 256 * 1024 };
enum { PLAIN_SHARED_BYTES = 48 * 1024, MOST_SHARED_BYTES = 99 * 1024 };

dim3 threadIdx, blockIdx, blockDim, gridDim;
int on_cpu_resident = 4, on_cpu_launches;

/* ---- Fibers ------------------------------------------------------------------------------------------------------ */

typedef struct context {
#if defined(__x86_64__)
    void *stack_pointer;
#else
    ucontext_t registers;
#endif
    const void *stack; /* its lowest address */
    size_t stack_bytes;
} context;

#if defined(__x86_64__)
/* Saves the registers that a callee keeps, and continues where `to` did so. */
extern "C" void on_cpu_switch_stack(void **from, void *to);
__asm__(".text\n"
        ".globl on_cpu_switch_stack\n"
        ".type on_cpu_switch_stack, @function\n"
        "on_cpu_switch_stack:\n"
        "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
        "    ret\n"
        ".size on_cpu_switch_stack, .-on_cpu_switch_stack\n");
#endif

static void switch_context(context *from, context *to)
{
#if defined(__SANITIZE_ADDRESS__)
    void *fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, to->stack, to->stack_bytes);
#endif
#if defined(__x86_64__)
    on_cpu_switch_stack(&from->stack_pointer, to->stack_pointer);
#else
    swapcontext(&from->registers, &to->registers);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, NULL, NULL);
#endif
}

typedef enum state { READY, IN_COLLECTIVE, AT_BARRIER, AT_GRID_BARRIER, RETURNED } state;

typedef struct thread {
    context fiber;
    state now;
    const char *kind; /* of the collective it waits in */
    void *own;
} thread;

typedef struct shared_array {
    const void *site;
    void *data;
} shared_array;

enum { MAX_SHARED_ARRAYS = 64, MAX_KERNELS = 1024 };

typedef struct cuda_block {
    thread threads[MAX_THREADS];
    int made; /* fibers made so far */
    dim3 index;
    void *dynamic;
    shared_array arrays[MAX_SHARED_ARRAYS];
    int array_count;
    size_t static_bytes;
} cuda_block;

static struct {
    context scheduler;
    cuda_block blocks[MAX_RESIDENT], *block; /* the one that runs */
    int count, current;                      /* threads of a block; the one that runs */
    int reverse, cooperative;
    const char *name;
    void (*body)(const void *);
    const void *argument;
    size_t dynamic_bytes, shared_limit;
    cudaError_t error;
    struct {
        const void *kernel;
        size_t bytes;
    } allowed[MAX_KERNELS];
    int allowed_count;
} gpu;

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...)
{
    fprintf(stderr, "on_cpu: %s, block (%u, %u, %u), thread %d: ", gpu.name, blockIdx.x, blockIdx.y, blockIdx.z,
            gpu.current);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    abort();
}

/* A fiber outlives a block and runs its thread in all of them, so that no frame is ever left behind on its stack. */
static void fiber_main(void)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(NULL, &gpu.scheduler.stack, &gpu.scheduler.stack_bytes);
#endif
    for (;;) {
        gpu.body(gpu.argument);
        thread *own = &gpu.block->threads[gpu.current];
        own->now = RETURNED;
        switch_context(&own->fiber, &gpu.scheduler);
    }
}

static void make_fiber(context *fiber)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *pages = (char *)mmap(NULL, STACK_BYTES + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, page, PROT_NONE)) {
        perror("on_cpu: a stack");
        abort();
    }
    fiber->stack = pages + page;
    fiber->stack_bytes = STACK_BYTES;
#if defined(__x86_64__)
    /* As if fiber_main had been called: 16-byte alignment holds before the return address that `ret` takes. */
    void **top = (void **)(pages + page + STACK_BYTES) - 2;
    *top = (void *)fiber_main;
    fiber->stack_pointer = memset(top - 6, 0, 6 * sizeof *top);
#else
    getcontext(&fiber->registers);
    fiber->registers.uc_stack.ss_sp = pages + page;
    fiber->registers.uc_stack.ss_size = STACK_BYTES;
    fiber->registers.uc_link = NULL;
    makecontext(&fiber->registers, fiber_main, 0);
#endif
}

static void wait_as(state waiting)
{
    thread *own = &gpu.block->threads[gpu.current];
    own->now = waiting;
    switch_context(&own->fiber, &gpu.scheduler);
}

/* ---- Order ------------------------------------------------------------------------------------------------------- */

static int64_t in_order(int64_t i, int64_t n)
{
    return gpu.reverse ? n - 1 - i : i;
}

static const char *state_name(const thread *t)
{
    return t->now == IN_COLLECTIVE     ? t->kind
           : t->now == AT_BARRIER      ? "__syncthreads"
           : t->now == AT_GRID_BARRIER ? "grid_barrier"
                                       : "its end";
}

/* Runs the lanes of a warp until each waits for other warps or has returned. */
static void run_warp(int warp)
{
    thread *lanes = gpu.block->threads + 32 * warp;
    for (int ran = 1; ran;) {
        ran = 0;
        for (int i = 0; i < 32; i++) {
            const int lane = (int)in_order(i, 32);
            if (lanes[lane].now != READY)
                continue;
            ran = 1;
            gpu.current = 32 * warp + lane;
            threadIdx.x = (unsigned)gpu.current;
            switch_context(&gpu.scheduler, &lanes[lane].fiber);
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int other = 0; lanes[lane].now == IN_COLLECTIVE && other < 32; other++)
            if (lanes[other].now != IN_COLLECTIVE) {
                gpu.current = 32 * warp + lane;
                die("waits in %s, while lane %d of its warp has come to %s", lanes[lane].kind, other,
                    state_name(&lanes[other]));
            }
}

/* Threads of the block that runs that are in a state; one of them becomes the current. */
static int count_threads(state now)
{
    int count = 0;
    for (int t = 0; t < gpu.count; t++)
        if (gpu.block->threads[t].now == now) {
            count++;
            gpu.current = t;
        }
    return count;
}

/* Runs a block until all its threads have returned or wait in grid_barrier; whether they have returned. */
static int run_block(cuda_block *block)
{
    gpu.block = block;
    blockIdx = block->index;
    for (;;) {
        for (int warp = 0; warp < gpu.count / 32; warp++)
            run_warp((int)in_order(warp, gpu.count / 32));
        const int returned = count_threads(RETURNED), at_grid = count_threads(AT_GRID_BARRIER);
        if (returned == gpu.count || at_grid == gpu.count)
            return returned == gpu.count;
        const int waiting = count_threads(AT_BARRIER);
        if (returned)
            die("waits in %s, while %d threads have returned", state_name(&block->threads[gpu.current]), returned);
        if (at_grid)
            die("waits in __syncthreads, while %d threads wait in grid_barrier", at_grid);
        for (int t = 0; waiting == gpu.count && t < gpu.count; t++)
            block->threads[t].now = READY;
    }
}

/* Runs the first `count` blocks, all of them to a grid barrier before any goes on. */
static void run_together(int count)
{
    for (;;) {
        int returned = 0;
        for (int i = 0; i < count; i++) {
            cuda_block *const block = &gpu.blocks[in_order(i, count)];
            for (int t = 0; t < gpu.count; t++)
                block->threads[t].now = READY;
            returned += run_block(block);
        }
        if (returned == count)
            return;
        if (returned)
            die("in a grid of which %d blocks have returned, while others wait in grid_barrier", returned);
    }
}

/* ---- Launches ---------------------------------------------------------------------------------------------------- */

cudaError_t cudaGetLastError(void)
{
    const cudaError_t error = gpu.error;
    gpu.error = cudaSuccess;
    return error;
}

const char *cudaGetErrorName(cudaError_t error)
{
    return error == cudaSuccess ? "cudaSuccess"
           : error == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                            : "cudaErrorInvalidConfiguration";
}

const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaSuccess ? "no error"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration argument";
}

static size_t allowed_bytes(const void *kernel)
{
    for (int i = 0; i < gpu.allowed_count; i++)
        if (gpu.allowed[i].kernel == kernel)
            return gpu.allowed[i].bytes;
    return 0;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute, int value)
{
    if (value < 0 || value > MOST_SHARED_BYTES)
        return gpu.error = cudaErrorInvalidValue;
    int i = 0;
    while (i < gpu.allowed_count && gpu.allowed[i].kernel != kernel)
        i++;
    if (i == MAX_KERNELS)
        die("more than %d kernels", MAX_KERNELS);
    gpu.allowed_count += i == gpu.allowed_count;
    gpu.allowed[i].kernel = kernel;
    gpu.allowed[i].bytes = (size_t)value;
    return cudaSuccess;
}

static void *poisoned(size_t bytes)
{
    void *data = malloc(bytes);
    if (!data)
        die("%zu bytes of shared memory", bytes);
    return memset(data, 0xff, bytes);
}

static void start_block(cuda_block *block, dim3 index)
{
    for (; block->made < gpu.count; block->made++)
        make_fiber(&block->threads[block->made].fiber);
    block->index = index;
    block->dynamic = poisoned(gpu.dynamic_bytes);
    block->static_bytes = 0;
}

static void finish_block(cuda_block *block)
{
    free(block->dynamic);
    while (block->array_count)
        free(block->arrays[--block->array_count].data);
}

void on_cpu_run(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared_bytes, int cooperative,
                void (*body)(const void *context), const void *context)
{
    gpu.name = name;
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
        block.x < 1 || block.x > MAX_THREADS) {
        gpu.error = cudaErrorInvalidConfiguration;
        return;
    }
    const size_t allowed = allowed_bytes(kernel);
    if (shared_bytes > PLAIN_SHARED_BYTES && shared_bytes > allowed) {
        gpu.error = cudaErrorInvalidValue;
        return;
    }
    gpu.dynamic_bytes = shared_bytes;
    gpu.shared_limit = allowed > PLAIN_SHARED_BYTES ? MOST_SHARED_BYTES : PLAIN_SHARED_BYTES;
    if (block.x % 32 || block.y != 1 || block.z != 1)
        die("blocks of %u x %u x %u threads", block.x, block.y, block.z);
    if (on_cpu_resident < 1 || on_cpu_resident > MAX_RESIDENT)
        die("%d resident blocks", on_cpu_resident);
    if (cooperative)
        grid.x = min(grid.x, (unsigned)on_cpu_resident);
    const char *order = getenv("BOFT_CUDA_ORDER");
    gpu.reverse = order && strcmp(order, "reverse") == 0;
    gpu.cooperative = cooperative;
    gpu.count = (int)block.x;
    gpu.body = body;
    gpu.argument = context;
    gridDim = grid;
    blockDim = block;
    threadIdx = dim3(0, 0, 0);
    on_cpu_launches++;
    const int64_t blocks = (int64_t)grid.x * grid.y * grid.z, together = cooperative ? blocks : 1;
    for (int64_t i = 0; i < blocks; i += together) {
        for (int64_t j = 0; j < together; j++) {
            const int64_t n = cooperative ? j : in_order(i, blocks);
            start_block(&gpu.blocks[j], dim3((unsigned)(n % grid.x), (unsigned)(n / grid.x % grid.y),
                                             (unsigned)(n / grid.x / grid.y)));
        }
        run_together((int)together);
        for (int64_t j = 0; j < together; j++)
            finish_block(&gpu.blocks[j]);
    }
}

/* ---- Shared memory ----------------------------------------------------------------------------------------------- */

void *on_cpu_shared(const void *site, size_t bytes)
{
    cuda_block *const own = gpu.block;
    for (int i = 0; i < own->array_count; i++)
        if (own->arrays[i].site == site)
            return own->arrays[i].data;
    own->static_bytes += bytes;
    if (own->array_count == MAX_SHARED_ARRAYS || own->static_bytes > PLAIN_SHARED_BYTES ||
        own->static_bytes + gpu.dynamic_bytes > gpu.shared_limit)
        die("%zu bytes of shared memory in SHARED arrays and %zu in DYN_SHARED", own->static_bytes, gpu.dynamic_bytes);
    shared_array *array = &own->arrays[own->array_count++];
    *array = shared_array{site, poisoned(bytes)};
    return array->data;
}

void *on_cpu_dynamic_shared(void)
{
    return gpu.block->dynamic;
}

/* ---- Together ---------------------------------------------------------------------------------------------------- */

void __syncthreads(void)
{
    wait_as(AT_BARRIER);
}

void on_cpu_grid_barrier(void)
{
    if (!gpu.cooperative)
        die("comes to grid_barrier in a launch that is not cooperative");
    wait_as(AT_GRID_BARRIER);
}

void on_cpu_collective(const char *kind, unsigned mask, void *own, void (*compute)(void *const lanes[32]))
{
    thread *lanes = gpu.block->threads + gpu.current / 32 * 32, *self = &gpu.block->threads[gpu.current];
    void *all[32];
    int arrived = 1;
    if (mask != 0xffffffffu)
        die("%s with the partial mask %#x", kind, mask);
    for (int l = 0; l < 32; l++) {
        if (lanes[l].now == RETURNED)
            die("comes to %s, but lane %d of its warp has returned", kind, l);
        if (lanes[l].now != IN_COLLECTIVE)
            continue;
        arrived++;
        if (lanes[l].kind != kind && strcmp(lanes[l].kind, kind)) /* comparing strings takes long */
            die("comes to %s, but lane %d of its warp waits in %s", kind, l, lanes[l].kind);
    }
    self->kind = kind;
    self->own = own;
    if (arrived < 32) {
        wait_as(IN_COLLECTIVE);
        return;
    }
    for (int l = 0; l < 32; l++)
        all[l] = lanes[l].own;
    compute(all);
    for (int l = 0; l < 32; l++)
        lanes[l].now = READY;
}

static uint16_t half_of(uint32_t pair, int which)
{
    return (uint16_t)(which ? pair >> 16 : pair);
}

uint32_t on_cpu_movmatrix(uint32_t pair)
{
    struct exchange {
        uint32_t in, out;
    } own = {pair, 0};
    on_cpu_collective("movmatrix", 0xffffffffu, &own, [](void *const lanes[32]) {
        for (int l = 0; l < 32; l++) {
            uint32_t halves[2];
            for (int e = 0; e < 2; e++) { /* element (row, column) of the transpose is (column, row) of the matrix */
                const int row = 2 * (l % 4) + e, column = l / 4;
                halves[e] = half_of(((exchange *)lanes[4 * row + column / 2])->in, column % 2);
            }
            ((exchange *)lanes[l])->out = halves[0] | halves[1] << 16;
        }
    });
    return own.out;
}

void on_cpu_mma(float acc[4], const uint32_t a[4], const uint32_t b[2], float (*widen)(uint16_t))
{
    struct operand {
        float *acc;
        const uint32_t *a, *b;
        float (*widen)(uint16_t);
    } own = {acc, a, b, widen};
    on_cpu_collective("mma", 0xffffffffu, &own, [](void *const lanes[32]) {
        float left[16][16], right[16][8];
        for (int l = 0; l < 32; l++) {
            const operand *lane = (const operand *)lanes[l];
            for (int i = 0; i < 4; i++)
                for (int e = 0; e < 2; e++) {
                    const int pair = 2 * (l % 4) + e;
                    left[l / 4 + i % 2 * 8][pair + i / 2 * 8] = lane->widen(half_of(lane->a[i], e));
                    if (i < 2)
                        right[pair + i * 8][l / 4] = lane->widen(half_of(lane->b[i], e));
                }
        }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                float *to = &((const operand *)lanes[l])->acc[i];
                double sum = *to;
                for (int k = 0; k < 16; k++)
                    sum += (double)left[l / 4 + i / 2 * 8][k] * right[k][2 * (l % 4) + i % 2];
                *to = (float)sum;
            }
    });
}
