/* What products with packed matrices share: all rows stream by panels of the matrix that stay in a cache. */

enum {
    /* Bytes of panels that stay in the second-level cache while all rows stream by. */
    PRODUCT_SPAN_BYTES = 1 << 19,
    /* Rows whose sums with a panel are in registers together, at most. */
    PRODUCT_ROWS = 8,
};

/* Columns of the panels, of `width` columns of so many bytes a number, that stay in cache together. */
static inline int64_t product_span(int64_t depth, int64_t width, int64_t bytes)
{
    return boft_max(1, PRODUCT_SPAN_BYTES / (depth * width * bytes)) * width;
}

/* Rows, of the `left` ones, that go by a panel next: at most `tallest`. Very few wait for their sums, so the last two
 * blocks share theirs. */
static inline int64_t product_block_rows(int64_t left, int64_t tallest)
{
    const int last_two = left > tallest && left < 2 * tallest;
    return last_two ? boft_quotient_up(left, 2) : boft_min(left, tallest);
}

/* Multiplies `rows` rows, at most PRODUCT_ROWS, from `row` on, with the panel whose first column is `column`. */
typedef void product_panel(const boft_product_args *args, int64_t rows, int64_t row, int64_t column);

/* All rows begin ... end-1 with all panels of `width` columns of so many bytes a number. */
VEC_FN void product_by_panels(const boft_product_args *args, int64_t begin, int64_t end, int64_t width, int64_t bytes,
                              product_panel *panel)
{
    const int64_t span = product_span(args->depth, width, bytes);
    for (int64_t first = 0; first < args->columns; first += span)
        for (int64_t row = begin, rows; row < end; row += rows) {
            rows = product_block_rows(end - row, PRODUCT_ROWS);
            for (int64_t column = first; column < boft_min(first + span, args->columns); column += width)
                panel(args, rows, row, column);
        }
}
