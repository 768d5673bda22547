/* What products with packed matrices share: all rows stream by panels of the matrix that stay in a cache. */

enum {
    /* Columns of a panel of float32, whose sums are two vectors a row. */
    PRODUCT_WIDTH = 2 * VEC_LANES_float,
    /* Bytes of panels that stay in the second-level cache while all rows stream by. */
    PRODUCT_SPAN_BYTES = 1 << 19,
};

/* How many panels of so many bytes stay in cache together. */
static inline int64_t product_span(int64_t panel_bytes)
{
    return boft_max(1, PRODUCT_SPAN_BYTES / panel_bytes);
}

/* Rows, of the `left` ones, that go by a panel next: at most `tallest`. Very few wait for their sums, so the last two
 * blocks share theirs. */
static inline int64_t product_block_rows(int64_t left, int64_t tallest)
{
    const int last_two = left > tallest && left < 2 * tallest;
    return last_two ? boft_quotient_up(left, 2) : boft_min(left, tallest);
}
