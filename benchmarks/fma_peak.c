/* Multiply-adds of one core at full rate: as many independent chains as hide the latency, nothing touches memory. */
#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif

typedef float vector __attribute__((vector_size(BYTES)));

/* Two fused multiply-adds a cycle of four to five cycles' latency need ten chains; twelve fit the 16 registers of AVX2. */
enum { CHAINS = 12 };

/* Does `rounds` rounds, each of the returned number of float32 operations, and leaves a result in *out. */
long fma_rounds(long rounds, float *out)
{
    vector sum[CHAINS], factor = (vector){0} + 0.5f, term = (vector){0} + 0.25f;
    for (int i = 0; i < CHAINS; i++)
        sum[i] = (vector){0} + (float)i;
    for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sum[i] = sum[i] * factor + term;
    }
    vector total = sum[0];
    for (int i = 1; i < CHAINS; i++)
        total += sum[i];
    *out = total[0];
    return 2 * CHAINS * (long)(sizeof(vector) / sizeof(float));
}
