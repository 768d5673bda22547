/* The digest of bytes (digest_keys.h). 48 KiB take 0.93 us with AVX2 on a Zen 3 core. */
enum { DIGEST_VECTORS = BOFT_DIGEST_WORDS / VEC_LANES_double };

typedef struct digest_sums {
    vec_words sum[DIGEST_VECTORS], key[DIGEST_VECTORS];
} digest_sums;

/* The next BOFT_DIGEST_WORDS numbers. */
VEC_FN void digest_words(digest_sums *sums, vec_words step, const void *words)
{
    for (int i = 0; i < DIGEST_VECTORS; i++) {
        const vec_words own = load_words((const uint64_t *)words + i * VEC_LANES_double);
        const vec_words product = multiply_halves(xor_words(own, sums->key[i]));
        sums->sum[i] = add_words(sums->sum[i], add_words(swap_words(own), product));
        sums->key[i] = add_words(sums->key[i], step);
    }
}

VEC_ATTR static void digest(const void *data, size_t bytes, uint64_t out[BOFT_DIGEST_WORDS])
{
    enum { BYTES = BOFT_DIGEST_WORDS * sizeof(uint64_t) };
    uint64_t key[BOFT_DIGEST_WORDS], last[BOFT_DIGEST_WORDS] = {0};
    for (int i = 0; i < BOFT_DIGEST_WORDS; i++) {
        key[i] = boft_digest_key(i, 0);
        out[i] = bytes;
    }
    digest_sums sums;
    for (int i = 0; i < DIGEST_VECTORS; i++) {
        sums.sum[i] = load_words(out + i * VEC_LANES_double);
        sums.key[i] = load_words(key + i * VEC_LANES_double);
    }
    const vec_words steps = set1_words(BOFT_DIGEST_STEP);
    const unsigned char *from = data;
    for (size_t whole = bytes / BYTES; whole > 0; whole--, from += BYTES)
        digest_words(&sums, steps, from);
    if (bytes % BYTES > 0) {
        memcpy(last, from, bytes % BYTES);
        digest_words(&sums, steps, last);
    }
    for (int i = 0; i < DIGEST_VECTORS; i++)
        store_words(out + i * VEC_LANES_double, sums.sum[i]);
}
