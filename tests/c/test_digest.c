/* The digest: the same for every variant, and another one for other bytes, above all for changes that nearly cancel. */
#include "support.h"

#include <string.h>

enum { MOST = 5000 };

static int same(const uint64_t a[BOFT_DIGEST_WORDS], const uint64_t b[BOFT_DIGEST_WORDS])
{
    return memcmp(a, b, BOFT_DIGEST_WORDS * sizeof *a) == 0;
}

static void digest(const void *data, size_t bytes, uint64_t out[BOFT_DIGEST_WORDS])
{
    EXPECT_OK(boft_digest(data, bytes, out));
}

static void fill(unsigned char *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        data[i] = (unsigned char)random_bits();
}

/* All variants read exactly the bytes they are given and agree. */
static void test_variants(void)
{
    const size_t sizes[] = {0, 1, 7, 8, 63, 64, 65, 128, 200, 4096, MOST};
    unsigned char data[MOST];
    fill(data, sizeof data);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint64_t first[BOFT_DIGEST_WORDS] = {0};
        const char *name;
        for (int index = 0, turn = 0; (name = next_variant(&index)); turn++) {
            test_case("%zu bytes, %s", sizes[i], name);
            for (int side = GUARD_END; side <= GUARD_START; side++) {
                uint64_t found[BOFT_DIGEST_WORDS];
                digest(guarded_copy(data, sizes[i], 1, (guard)side), sizes[i], found);
                if (turn == 0 && side == GUARD_END)
                    memcpy(first, found, sizeof first);
                EXPECT(same(first, found), "differs");
            }
        }
        release_memory();
    }
}

/* Any one byte changed, bytes cut off or zeros added, and two numbers that change places or signs. */
static void test_changes(void)
{
    float data[MOST / sizeof(float)];
    enum { COUNT = sizeof data / sizeof *data };
    for (int i = 0; i < COUNT; i++)
        data[i] = (float)random_unit();
    uint64_t before[BOFT_DIGEST_WORDS], after[BOFT_DIGEST_WORDS];
    digest(data, sizeof data, before);
    test_case("one byte changed");
    unsigned char *bytes = (unsigned char *)data;
    for (size_t i = 0; i < sizeof data; i++) {
        bytes[i] ^= (unsigned char)(1 << random_below(8));
        digest(data, sizeof data, after);
        EXPECT(!same(before, after), "byte %zu", i);
        digest(data, sizeof data, before);
    }
    test_case("another length");
    unsigned char zeros[200] = {0};
    digest(zeros, 100, before);
    digest(zeros, 101, after);
    EXPECT(!same(before, after), "100 and 101 zeros");
    test_case("two numbers exchanged");
    digest(data, sizeof data, before);
    for (int turn = 0; turn < 1000; turn++) {
        const int64_t i = random_below(COUNT), j = random_below(COUNT);
        const float kept = data[i];
        data[i] = data[j];
        data[j] = kept;
        digest(data, sizeof data, after);
        EXPECT(data[i] == data[j] || !same(before, after), "%d and %d", (int)i, (int)j);
        memcpy(before, after, sizeof before);
    }
    test_case("all signs changed, as for the inverse rotation");
    for (int i = 0; i < COUNT; i++)
        data[i] = -data[i];
    digest(data, sizeof data, after);
    EXPECT(!same(before, after), "the same digest");
    test_case("all numbers the same, then all another");
    for (int i = 0; i < COUNT; i++)
        data[i] = 0;
    digest(data, sizeof data, before);
    for (int i = 0; i < COUNT; i++)
        data[i] = 1;
    digest(data, sizeof data, after);
    EXPECT(!same(before, after), "the same digest");
}

static void test_refusals(void)
{
    uint64_t out[BOFT_DIGEST_WORDS];
    test_case("refusals");
    EXPECT_REFUSED(boft_digest(NULL, 1, out), BOFT_BAD_ARGUMENT, "digest: data");
    EXPECT_REFUSED(boft_digest("a", 1, NULL), BOFT_BAD_ARGUMENT, "digest: digest");
}

int main(int argc, char **argv)
{
    test_start("test_digest", argc, argv);
    test_variants();
    test_changes();
    test_refusals();
    return test_finish();
}
