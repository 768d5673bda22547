/* What products with packed matrices by panels of 32 columns share. */

enum {
    /* Rows whose sums with a panel are in registers together, at most. */
    PRODUCT_ROWS = 8,
    /* Bytes of panels that stay in the second-level cache while all rows stream by. */
    PRODUCT_PANEL_BYTES = 1 << 19,
};

/* Columns of so many panels; numbers have `size` bytes. */
static inline int64_t product_span(const boft_product_args *args, int64_t size)
{
    return boft_max(1, PRODUCT_PANEL_BYTES / (args->depth * BOFT_PRODUCT_COLUMNS * size)) * BOFT_PRODUCT_COLUMNS;
}

/* `rows` rows, from `row` on, of y's columns from `column` on, a panel of them. */
typedef void product_panel(const boft_product_args *args, int64_t rows, int64_t row, int64_t column);

/* Rows begin ... end-1, all of their panels. */
VEC_FN void product_by_panels(const boft_product_args *args, int64_t size, int64_t begin, int64_t end,
                              product_panel *multiply)
{
    const int64_t span = product_span(args, size);
    for (int64_t first = 0; first < args->columns; first += span)
        for (int64_t row = begin, rows; row < end; row += rows) {
            /* Very few rows wait for their sums, so the last two blocks share theirs. */
            const int64_t left = end - row;
            const int last_two = left > PRODUCT_ROWS && left < 2 * PRODUCT_ROWS;
            rows = last_two ? boft_quotient_up(left, 2) : boft_min(left, PRODUCT_ROWS);
            for (int64_t j = first; j < boft_min(first + span, args->columns); j += BOFT_PRODUCT_COLUMNS)
                multiply(args, rows, row, j);
        }
}
