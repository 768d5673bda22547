/* Choice of the variant: names, selection, the environment variable BOFT_CPU, and what the first kernel chooses. */
#define _DEFAULT_SOURCE
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__x86_64__) && !defined(BOFT_PORTABLE) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define WITH_AMX

/* Whether the system says that this processor has the feature. */
static int system_has(const char *feature)
{
    char line[8192], wanted[64];
    int has = 0;
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(wanted, sizeof wanted, " %s ", feature);
    while (file && !has && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = ' ';
        has = strncmp(line, "flags", 5) == 0 && strstr(line, wanted) != NULL;
    }
    if (file)
        fclose(file);
    return has;
}
#endif

/* Where nothing is asked for: the first that is supported, but not the slow bfloat16 instructions of Intel's processors. */
static const char *by_itself(void)
{
    int i = 0, slow = 0;
#if defined(__x86_64__) && !defined(BOFT_PORTABLE)
    __builtin_cpu_init();
    slow = __builtin_cpu_is("intel");
#endif
    while (!boft_cpu_supported(boft_cpu_variant(i)) || (slow && strcmp(boft_cpu_variant(i), "avx512bf16") == 0))
        i++;
    return boft_cpu_variant(i);
}

static void test_names(void)
{
#if defined(WITH_AMX)
    const char *const wanted[] = {"amx", "avx512bf16", "avx512", "avx2", "portable", "scalar"};
#elif defined(__x86_64__) && !defined(BOFT_PORTABLE)
    const char *const wanted[] = {"avx512bf16", "avx512", "avx2", "portable", "scalar"};
#else
    const char *const wanted[] = {"portable", "scalar"};
#endif
    const int n = (int)(sizeof wanted / sizeof *wanted);
    test_case("the variants of this build, best first");
    for (int i = 0; i < n; i++)
        EXPECT(boft_cpu_variant(i) && strcmp(boft_cpu_variant(i), wanted[i]) == 0, "variant %d is %s, not %s", i,
               boft_cpu_variant(i) ? boft_cpu_variant(i) : "NULL", wanted[i]);
    EXPECT(!boft_cpu_variant(n) && !boft_cpu_variant(n + 100) && !boft_cpu_variant(-1), "there are others");
}

static void test_support(void)
{
    test_case("what this machine supports");
    EXPECT(boft_cpu_supported("scalar") == 1, "scalar is not supported");
    EXPECT(boft_cpu_supported("portable") == 1, "portable is not supported");
    const char *const unknown[] = {"", "AVX2", "avx", "avx512 ", "scalars", "neon?"};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        EXPECT(boft_cpu_supported(unknown[i]) == 0, "\"%s\" is supported", unknown[i]);
#if defined(__x86_64__) && !defined(BOFT_PORTABLE)
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    EXPECT(boft_cpu_supported("avx2") == (avx2 != 0), "avx2: %d", boft_cpu_supported("avx2"));
    const int avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    EXPECT(boft_cpu_supported("avx512bf16") == (avx512bf16 != 0), "avx512bf16: %d", boft_cpu_supported("avx512bf16"));
    EXPECT(boft_cpu_supported("avx512") == (avx512 != 0), "avx512: %d", boft_cpu_supported("avx512"));
#ifdef WITH_AMX
    const int amx = avx512bf16 && system_has("amx_tile") && system_has("amx_bf16") && system_has("avx512vbmi");
    EXPECT(boft_cpu_supported("amx") == amx, "amx: %d", boft_cpu_supported("amx"));
#else
    EXPECT(boft_cpu_supported("amx") == 0, "a build without it has amx");
#endif
#else
    EXPECT(boft_cpu_supported("avx2") == 0, "a portable build has avx2");
#endif
}

/* A kernel of the variant in use works: a rotation by the identity. */
static int kernel_works(void)
{
    const float a[4] = {0};
    float q[4];
    unsigned char *workspace = guarded(boft_cayley_workspace(2), 64, GUARD_END);
    const int works = boft_cayley(BOFT_F32, 2, 0, 1, a, NULL, q, workspace) == BOFT_OK && q[0] == 1 && q[1] == 0 &&
                      q[2] == 0 && q[3] == 1;
    release_memory();
    return works;
}

static void test_selection(void)
{
    int v = 0;
    for (const char *name; (name = next_variant(&v));) {
        test_case("select %s", name);
        EXPECT(strcmp(boft_cpu_name(), name) == 0, "the name is %s", boft_cpu_name());
        EXPECT(kernel_works(), "a kernel does not work");
        EXPECT_REFUSED(boft_cpu_select("quantum"), BOFT_BAD_ARGUMENT, "quantum");
        EXPECT_REFUSED(boft_cpu_select(""), BOFT_BAD_ARGUMENT, "");
        EXPECT(strcmp(boft_cpu_name(), name) == 0, "a refusal changed the choice to %s", boft_cpu_name());
    }
    for (int i = 0; boft_cpu_variant(i); i++) {
        if (boft_cpu_supported(boft_cpu_variant(i)))
            continue;
        test_case("select %s, which this machine does not support", boft_cpu_variant(i));
        EXPECT_REFUSED(boft_cpu_select(boft_cpu_variant(i)), BOFT_BAD_ARGUMENT, boft_cpu_variant(i));
        EXPECT(strcmp(boft_cpu_name(), "scalar") == 0, "a refusal changed the choice to %s", boft_cpu_name());
    }
}

static void test_environment(void)
{
    for (int i = 0; boft_cpu_variant(i); i++) {
        const char *name = boft_cpu_variant(i);
        if (!boft_cpu_supported(name))
            continue;
        test_case("select NULL with BOFT_CPU=%s", name);
        setenv("BOFT_CPU", name, 1);
        EXPECT_OK(boft_cpu_select(NULL));
        EXPECT(strcmp(boft_cpu_name(), name) == 0, "the name is %s", boft_cpu_name());
    }
    test_case("select NULL with a bad BOFT_CPU");
    EXPECT_OK(boft_cpu_select("portable"));
    setenv("BOFT_CPU", "quantum", 1);
    EXPECT_REFUSED(boft_cpu_select(NULL), BOFT_BAD_ARGUMENT, "BOFT_CPU quantum");
    EXPECT(strcmp(boft_cpu_name(), "portable") == 0, "a refusal changed the choice to %s", boft_cpu_name());
    test_case("select NULL without BOFT_CPU");
    unsetenv("BOFT_CPU");
    EXPECT_OK(boft_cpu_select(NULL));
    EXPECT(strcmp(boft_cpu_name(), by_itself()) == 0, "the name is %s", boft_cpu_name());
}

/* In a child, in which nothing was chosen yet: the first kernel chooses. value NULL: BOFT_CPU is not set. */
static void first_kernel(const char *value, const char *wanted)
{
    test_case("first kernel with BOFT_CPU=%s", value ? value : "(unset)");
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (value)
            setenv("BOFT_CPU", value, 1);
        else
            unsetenv("BOFT_CPU");
        const int works = kernel_works();
        _exit(works && strcmp(boft_cpu_name(), wanted) == 0 ? 0 : 1);
    }
    int status = 0;
    EXPECT(child > 0 && waitpid(child, &status, 0) == child, "no child process");
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "it did not choose %s, or does not work", wanted);
}

/* Must run first: in this process nothing may have been chosen yet. */
static void test_first_choice(void)
{
    for (int i = 0; boft_cpu_variant(i); i++)
        if (boft_cpu_supported(boft_cpu_variant(i)))
            first_kernel(boft_cpu_variant(i), boft_cpu_variant(i));
    first_kernel(NULL, by_itself());
    first_kernel("quantum", by_itself());
}

int main(int argc, char **argv)
{
    test_start("test_cpu", argc, argv);
    test_first_choice();
    test_names();
    test_support();
    test_selection();
    test_environment();
    return test_finish();
}
