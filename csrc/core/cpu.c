/* Choice of the kernel table at run time. */
#define _DEFAULT_SOURCE /* syscall */
#include "kernels.h"
#include "status.h"

#ifdef BOFT_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Best first. */
static const boft_kernels *const variants[] = {
#ifdef BOFT_AMX
    &boft_kernels_amx,
#endif
#ifdef BOFT_X86
    &boft_kernels_avx512bf16,
    &boft_kernels_avx512,
    &boft_kernels_avx2,
#endif
    &boft_kernels_portable,
    &boft_kernels_scalar,
};

enum { VARIANTS = sizeof variants / sizeof *variants };

static _Atomic(const boft_kernels *) current;

#ifdef BOFT_AMX
/* amx-tile and amx-bf16, which __builtin_cpu_supports does not know in every compiler. */
static int has_tiles(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
}

/* Linux gives a process the tile registers when it asks for them, where the system saves them at all. */
static int tiles_are_allowed(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

/* __builtin_cpu_supports looks at CPUID and at what the operating system saves (XCR0). */
static int supported(const boft_kernels *kernels)
{
#ifdef BOFT_X86
    __builtin_cpu_init();
#ifdef BOFT_AMX
    if (kernels == &boft_kernels_amx)
        return supported(&boft_kernels_avx512bf16) && __builtin_cpu_supports("avx512vbmi") && has_tiles() &&
               tiles_are_allowed();
#endif
    if (kernels == &boft_kernels_avx512bf16)
        return supported(&boft_kernels_avx512) && __builtin_cpu_supports("avx512bf16");
    if (kernels == &boft_kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (kernels == &boft_kernels_avx2) /* every processor with AVX2 and FMA has F16C */
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    (void)kernels;
    return 1;
}

static const boft_kernels *find(const char *name)
{
    for (int i = 0; i < VARIANTS; i++)
        if (strcmp(variants[i]->name, name) == 0)
            return variants[i];
    return NULL;
}

/*
 * Whether a variant that is supported is slower than the next one. Intel's cores start a VDPBF16PS every other cycle
 * only, and rotate needs two for what one fp32 multiply-add per value does: Emerald Rapids, bfloat16, 1024 x 768 in groups
 * of 16 took 0.70 ms by pairs and 0.34 by fp32, 1024 x 1280 in groups of 160 10.1 and 3.1 ms. AMD's Zen 4 gains by pairs.
 */
static int outrun(const boft_kernels *kernels)
{
#ifdef BOFT_X86
    return kernels == &boft_kernels_avx512bf16 && __builtin_cpu_is("intel");
#else
    (void)kernels;
    return 0;
#endif
}

static const boft_kernels *best(void)
{
    int i = 0;
    while (!supported(variants[i]) || outrun(variants[i]))
        i++;
    return variants[i];
}

const char *boft_cpu_variant(int index)
{
    return index >= 0 && index < VARIANTS ? variants[index]->name : NULL;
}

int boft_cpu_supported(const char *name)
{
    const boft_kernels *kernels = name ? find(name) : NULL;
    return kernels && supported(kernels);
}

boft_status boft_cpu_select(const char *name)
{
    const char *asked = name ? name : getenv("BOFT_CPU");
    const char *source = name ? "CPU variant" : "BOFT_CPU =";
    if (!asked || (!name && !*asked)) { /* an empty BOFT_CPU counts as unset */
        atomic_store(&current, best());
        return BOFT_OK;
    }
    const boft_kernels *kernels = find(asked);
    if (!kernels)
        return boft_refuse(BOFT_BAD_ARGUMENT, "%s %s is unknown; this build has %s%s", source, asked,
#ifdef BOFT_AMX
                           "amx, "
#endif
#ifdef BOFT_X86
                           "avx512bf16, avx512, avx2, ",
#else
                           "",
#endif
                           "portable and scalar");
    if (!supported(kernels))
        return boft_refuse(BOFT_BAD_ARGUMENT, "%s %s is not supported by this processor", source, asked);
    atomic_store(&current, kernels);
    return BOFT_OK;
}

const boft_kernels *boft_kernels_current(void)
{
    const boft_kernels *kernels = atomic_load_explicit(&current, memory_order_acquire);
    if (!kernels) {
        if (boft_cpu_select(NULL) != BOFT_OK)
            atomic_store(&current, best());
        kernels = atomic_load(&current);
    }
    return kernels;
}

const char *boft_cpu_name(void)
{
    return boft_kernels_current()->name;
}
