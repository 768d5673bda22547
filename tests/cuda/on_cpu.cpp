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

enum { MAX_THREADS = 1024, STACK_BYTES = 256 * 1024, PLAIN_SHARED_BYTES = 48 * 1024, MOST_SHARED_BYTES = 99 * 1024 };

dim3 threadIdx, blockIdx, blockDim, gridDim;

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

typedef struct copy { /* of cp.async */
    void *to;
    const void *from;
    int bytes, group;
} copy;

typedef enum state { READY, IN_COLLECTIVE, AT_BARRIER, RETURNED } state;

typedef struct thread {
    context fiber;
    state now;
    const char *kind; /* of the collective it waits in */
    void *own;
    copy *copies;
    int copy_count, copy_room, copy_groups;
} thread;

typedef struct shared_array {
    const void *site;
    void *data;
} shared_array;

enum { MAX_SHARED_ARRAYS = 64, MAX_KERNELS = 1024 };

static struct {
    context scheduler;
    thread threads[MAX_THREADS];
    int made, count, current; /* fibers made so far; threads of a block; the one that runs */
    int reverse;
    const char *name;
    void (*body)(const void *);
    const void *argument;
    void *dynamic;
    size_t dynamic_bytes, shared_limit;
    shared_array arrays[MAX_SHARED_ARRAYS];
    int array_count;
    size_t static_bytes;
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
        thread *own = &gpu.threads[gpu.current];
        if (own->copy_count)
            die("returned without waiting for %d copies of cp.async", own->copy_count);
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
    thread *own = &gpu.threads[gpu.current];
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
    return t->now == IN_COLLECTIVE ? t->kind : t->now == AT_BARRIER ? "__syncthreads" : "its end";
}

/* Runs the lanes of a warp until each waits for other warps or has returned. */
static void run_warp(int warp)
{
    thread *lanes = gpu.threads + 32 * warp;
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

static void run_block(void)
{
    for (int t = 0; t < gpu.count; t++)
        gpu.threads[t].now = READY;
    for (;;) {
        for (int warp = 0; warp < gpu.count / 32; warp++)
            run_warp((int)in_order(warp, gpu.count / 32));
        int waiting = 0, returned = 0;
        for (int t = 0; t < gpu.count; t++) {
            waiting += gpu.threads[t].now == AT_BARRIER;
            returned += gpu.threads[t].now == RETURNED;
            if (gpu.threads[t].now == AT_BARRIER)
                gpu.current = t;
        }
        if (returned == gpu.count)
            return;
        if (returned)
            die("waits in __syncthreads, while %d threads have returned", returned);
        for (int t = 0; waiting == gpu.count && t < gpu.count; t++)
            gpu.threads[t].now = READY;
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

void on_cpu_run(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared_bytes,
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
    for (; gpu.made < (int)block.x; gpu.made++)
        make_fiber(&gpu.threads[gpu.made].fiber);
    const char *order = getenv("BOFT_CUDA_ORDER");
    gpu.reverse = order && strcmp(order, "reverse") == 0;
    gpu.count = (int)block.x;
    gpu.body = body;
    gpu.argument = context;
    gridDim = grid;
    blockDim = block;
    threadIdx = dim3(0, 0, 0);
    const int64_t blocks = (int64_t)grid.x * grid.y * grid.z;
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t n = in_order(i, blocks);
        blockIdx = dim3((unsigned)(n % grid.x), (unsigned)(n / grid.x % grid.y), (unsigned)(n / grid.x / grid.y));
        gpu.dynamic = poisoned(shared_bytes);
        gpu.static_bytes = 0;
        run_block();
        free(gpu.dynamic);
        while (gpu.array_count)
            free(gpu.arrays[--gpu.array_count].data);
    }
}

/* ---- Shared memory ----------------------------------------------------------------------------------------------- */

void *on_cpu_shared(const void *site, size_t bytes)
{
    for (int i = 0; i < gpu.array_count; i++)
        if (gpu.arrays[i].site == site)
            return gpu.arrays[i].data;
    gpu.static_bytes += bytes;
    if (gpu.array_count == MAX_SHARED_ARRAYS || gpu.static_bytes > PLAIN_SHARED_BYTES ||
        gpu.static_bytes + gpu.dynamic_bytes > gpu.shared_limit)
        die("%zu bytes of shared memory in SHARED arrays and %zu in DYN_SHARED", gpu.static_bytes, gpu.dynamic_bytes);
    shared_array *array = &gpu.arrays[gpu.array_count++];
    *array = shared_array{site, poisoned(bytes)};
    return array->data;
}

void *on_cpu_dynamic_shared(void)
{
    return gpu.dynamic;
}

/* ---- Together ---------------------------------------------------------------------------------------------------- */

void __syncthreads(void)
{
    wait_as(AT_BARRIER);
}

void on_cpu_collective(const char *kind, unsigned mask, void *own, void (*compute)(void *const lanes[32]))
{
    thread *lanes = gpu.threads + gpu.current / 32 * 32, *self = &gpu.threads[gpu.current];
    void *all[32];
    int arrived = 1;
    if (mask != 0xffffffffu)
        die("%s with the partial mask %#x", kind, mask);
    self->kind = kind;
    self->own = own;
    for (int l = 0; l < 32; l++) {
        all[l] = lanes[l].own;
        if (lanes[l].now == RETURNED)
            die("comes to %s, but lane %d of its warp has returned", kind, l);
        if (lanes[l].now != IN_COLLECTIVE)
            continue;
        arrived++;
        if (strcmp(lanes[l].kind, kind))
            die("comes to %s, but lane %d of its warp waits in %s", kind, l, lanes[l].kind);
    }
    if (arrived < 32) {
        wait_as(IN_COLLECTIVE);
        return;
    }
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

void on_cpu_ldmatrix_x4(uint32_t out[4], const void *row, int transposed)
{
    struct operand {
        uint32_t *out;
        const void *row;
        int transposed;
    } own = {out, row, transposed};
    if ((uintptr_t)row % 16)
        die("ldmatrix of %p, which is not aligned to 16", row);
    on_cpu_collective(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &own, [](void *const lanes[32]) {
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                const operand *to = (const operand *)lanes[l];
                uint32_t halves[2];
                for (int e = 0; e < 2; e++) {
                    const int at = l / 4, across = 2 * (l % 4) + e;
                    const operand *from = (const operand *)lanes[8 * i + (to->transposed ? across : at)];
                    halves[e] = ((const uint16_t *)from->row)[to->transposed ? at : across];
                }
                to->out[i] = halves[0] | halves[1] << 16;
            }
    });
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

/* ---- Copies ------------------------------------------------------------------------------------------------------ */

void on_cpu_cp_async16(void *shared, const void *global, int bytes)
{
    thread *own = &gpu.threads[gpu.current];
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16 || bytes < 0 || bytes > 16)
        die("cp.async of %d bytes from %p to %p", bytes, global, shared);
    if (own->copy_count == own->copy_room) {
        own->copy_room = 2 * own->copy_room + 16;
        own->copies = (copy *)realloc(own->copies, (size_t)own->copy_room * sizeof *own->copies);
        if (!own->copies)
            die("no memory");
    }
    own->copies[own->copy_count++] = copy{shared, global, bytes, own->copy_groups};
}

void on_cpu_cp_async_commit(void)
{
    gpu.threads[gpu.current].copy_groups++;
}

void on_cpu_cp_async_wait(int groups)
{
    thread *own = &gpu.threads[gpu.current];
    int kept = 0;
    for (int i = 0; i < own->copy_count; i++) {
        const copy *c = &own->copies[i];
        if (c->group >= own->copy_groups - groups) {
            own->copies[kept++] = *c;
            continue;
        }
        memset(c->to, 0, 16);
        memcpy(c->to, c->from, (size_t)c->bytes);
    }
    own->copy_count = kept;
}
