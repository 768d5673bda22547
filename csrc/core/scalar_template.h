/* Included by scalar.c for REAL = float and double; FN(name) names the function of that type. */

static REAL FN(load)(boft_dtype dtype, const void *data, int64_t i)
{
    switch (dtype) {
    case BOFT_F64:
        return (REAL)((const double *)data)[i];
    case BOFT_BF16:
        return (REAL)boft_from_bf16(((const uint16_t *)data)[i]);
    case BOFT_F16:
        return (REAL)boft_from_f16(((const uint16_t *)data)[i]);
    default:
        return (REAL)((const float *)data)[i];
    }
}

static void FN(store)(boft_dtype dtype, void *data, int64_t i, REAL value)
{
    switch (dtype) {
    case BOFT_F64:
        ((double *)data)[i] = value;
        break;
    case BOFT_BF16:
        ((uint16_t *)data)[i] = boft_to_bf16((float)value);
        break;
    case BOFT_F16:
        ((uint16_t *)data)[i] = boft_to_f16((float)value);
        break;
    default:
        ((float *)data)[i] = (float)value;
    }
}

static void FN(cayley)(int64_t b, int64_t begin, int64_t end, const void *a_all, const unsigned char *keep, void *q_all,
                       void *workspace)
{
    const int64_t ld = boft_padded(b);
    double *s = workspace;
    int64_t *pivots = (int64_t *)(s + b * ld);
    for (int64_t n = begin; n < end; n++) {
        const REAL *a = (const REAL *)a_all + n * b * b;
        REAL *q = (REAL *)q_all + n * b * b;
        const int kept = !keep || keep[n];
        for (int64_t i = 0; i < b; i++)
            for (int64_t j = 0; j < b; j++)
                s[i * ld + j] = kept ? (double)a[i * b + j] / 2 - (double)a[j * b + i] / 2 : 0;
        const double largest = boft_largest(b, s);
        const int pivoted = largest > BOFT_UNPIVOTED_MAX;
        const double one = pivoted ? boft_scaled_one(largest) : 1;
        for (int64_t i = 0; i < b; i++)
            for (int64_t j = 0; j < b; j++)
                s[i * ld + j] = i == j ? one : s[i * ld + j] / (pivoted ? largest : 1);
        for (int64_t k = 0; k < b; k++) {
            pivots[k] = pivoted ? boft_pivot_row(b, s, k) : k;
            boft_swap_rows(b, s, k, pivots[k]);
            const double pivot = s[k * ld + k] == 0 ? BOFT_LEAST_PIVOT : s[k * ld + k];
            s[k * ld + k] = 1;
            for (int64_t j = 0; j < b; j++)
                s[k * ld + j] /= pivot;
            for (int64_t i = 0; i < b; i++) {
                if (i == k)
                    continue;
                const double factor = s[i * ld + k];
                s[i * ld + k] = 0;
                for (int64_t j = 0; j < b; j++)
                    s[i * ld + j] -= factor * s[k * ld + j];
            }
        }
        boft_unswap_columns(b, s, pivots);
        for (int64_t i = 0; i < b; i++)
            for (int64_t j = 0; j < b; j++)
                q[i * b + j] = isnan(largest) ? (REAL)NAN : (REAL)(2 * one * s[i * ld + j] - (i == j));
    }
}

static void FN(cayley_backward)(int64_t b, int64_t begin, int64_t end, const void *dq_all, const void *q_all,
                                const unsigned char *keep, void *da_all, void *workspace)
{
    REAL *half = workspace, *ds = half + b * b;
    for (int64_t n = begin; n < end; n++) {
        const REAL *dq = (const REAL *)dq_all + n * b * b, *q = (const REAL *)q_all + n * b * b;
        REAL *da = (REAL *)da_all + n * b * b;
        for (int64_t i = 0; i < b; i++)
            for (int64_t j = 0; j < b; j++) {
                REAL sum = 0;
                for (int64_t k = 0; k < b; k++)
                    sum += (q[k * b + i] + (k == i)) * dq[k * b + j];
                half[i * b + j] = sum;
            }
        for (int64_t i = 0; i < b; i++)
            for (int64_t j = 0; j < b; j++) {
                REAL sum = 0;
                for (int64_t k = 0; k < b; k++)
                    sum += half[i * b + k] * (q[j * b + k] + (j == k));
                ds[i * b + j] = sum;
            }
        for (int64_t i = 0; i < b; i++)
            for (int64_t j = 0; j < b; j++)
                da[i * b + j] = keep && !keep[n] ? 0 : (ds[j * b + i] - ds[i * b + j]) / 4;
    }
}

/* Columns of chunk (high, bit, low) of a group: the first of them; each chunk has c columns. */
static int64_t FN(chunk_column)(int64_t f, int64_t high, int64_t bit, int64_t low, int64_t c)
{
    return ((high << (f + 1)) + (bit << f) + low) * c;
}

/* product = product * (factor first + f), in place, column pair by column pair. `pair` holds b reals. */
static void FN(multiply_factor)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t f, const REAL *q,
                                REAL *product, REAL *pair)
{
    const int64_t b = plan->b, c = b / 2, group = level->group;
    for (int64_t high = 0; high < (int64_t)1 << (level->factors - 1 - f); high++)
        for (int64_t low = 0; low < (int64_t)1 << f; low++) {
            const int64_t n = boft_factor_block(level, g, f, high, low);
            const REAL *block = q + ((level->first + f) * plan->blocks + n) * b * b;
            for (int64_t row = 0; row < group; row++) {
                for (int64_t j = 0; j < b; j++) {
                    REAL sum = 0;
                    for (int64_t k = 0; k < b; k++)
                        sum += product[row * group + FN(chunk_column)(f, high, k / c, low, c) + k % c] * block[k * b + j];
                    pair[j] = sum;
                }
                for (int64_t j = 0; j < b; j++)
                    product[row * group + FN(chunk_column)(f, high, j / c, low, c) + j % c] = pair[j];
            }
        }
}

static void FN(identity)(int64_t n, REAL *matrix)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            matrix[i * n + j] = i == j;
}

static void FN(collapse)(const boft_plan *plan, const boft_level *level, int64_t begin, int64_t end, const void *q,
                         void *blocks, void *workspace)
{
    const int64_t size = level->group * level->group;
    for (int64_t g = begin; g < end; g++) {
        REAL *product = (REAL *)blocks + level->offset + g * size;
        if (level->factors == 1) {
            memcpy(product, (const REAL *)q + level->first * plan->d * plan->b + g * size, (size_t)size * sizeof(REAL));
            continue;
        }
        FN(identity)(level->group, product);
        for (int64_t f = level->factors - 1; f >= 0; f--)
            FN(multiply_factor)(plan, level, g, f, q, product, workspace);
    }
}

/* Entry (i, j) of matrix^T grad restricted to the columns of one block of factor f, and grad = grad * block^T. */
static void FN(factor_backward)(const boft_plan *plan, const boft_level *level, int64_t g, int64_t f, const REAL *q,
                                const REAL *product, REAL *grad, REAL *dq, REAL *pair)
{
    const int64_t b = plan->b, c = b / 2, group = level->group;
    for (int64_t high = 0; high < (int64_t)1 << (level->factors - 1 - f); high++)
        for (int64_t low = 0; low < (int64_t)1 << f; low++) {
            const int64_t n = boft_factor_block(level, g, f, high, low);
            const int64_t at = ((level->first + f) * plan->blocks + n) * b * b;
            for (int64_t i = 0; i < b; i++)
                for (int64_t j = 0; j < b; j++) {
                    REAL sum = 0;
                    for (int64_t row = 0; row < group; row++)
                        sum += product[row * group + FN(chunk_column)(f, high, i / c, low, c) + i % c] *
                               grad[row * group + FN(chunk_column)(f, high, j / c, low, c) + j % c];
                    dq[at + i * b + j] = sum;
                }
            for (int64_t row = 0; row < group; row++) {
                for (int64_t i = 0; i < b; i++) {
                    REAL sum = 0;
                    for (int64_t j = 0; j < b; j++)
                        sum += grad[row * group + FN(chunk_column)(f, high, j / c, low, c) + j % c] * q[at + i * b + j];
                    pair[i] = sum;
                }
                for (int64_t i = 0; i < b; i++)
                    grad[row * group + FN(chunk_column)(f, high, i / c, low, c) + i % c] = pair[i];
            }
        }
}

static void FN(collapse_backward)(const boft_plan *plan, const boft_level *level, int64_t begin, int64_t end,
                                  const void *dblocks, const void *q, void *dq, void *workspace)
{
    const int64_t size = level->group * level->group;
    REAL *grad = workspace, *product = grad + size, *pair = product + size;
    for (int64_t g = begin; g < end; g++) {
        const REAL *from = (const REAL *)dblocks + level->offset + g * size;
        if (level->factors == 1) {
            memcpy((REAL *)dq + level->first * plan->d * plan->b + g * size, from, (size_t)size * sizeof(REAL));
            continue;
        }
        memcpy(grad, from, (size_t)size * sizeof(REAL));
        for (int64_t f = 0; f < level->factors; f++) {
            FN(identity)(level->group, product);
            for (int64_t above = level->factors - 1; above > f; above--)
                FN(multiply_factor)(plan, level, g, above, q, product, pair);
            FN(factor_backward)(plan, level, g, f, q, product, grad, dq, pair);
        }
    }
}

static void FN(transpose)(const boft_level *level, int64_t begin, int64_t end, const void *blocks, void *transposed)
{
    const int64_t group = level->group, size = group * group;
    for (int64_t g = begin; g < end; g++) {
        const REAL *from = (const REAL *)blocks + level->offset + g * size;
        REAL *to = (REAL *)transposed + level->offset + g * size;
        for (int64_t i = 0; i < group; i++)
            for (int64_t j = 0; j < group; j++)
                to[j * group + i] = from[i * group + j];
    }
}

/* out = in with each group multiplied by its block. in, out: the channels of a tile; blocks: from its first group on. */
static void FN(apply_level)(const boft_level *level, const REAL *blocks, int64_t channels, const REAL *in, REAL *out)
{
    const int64_t group = level->group;
    for (int64_t g = 0; g < channels / group; g++) {
        const REAL *block = blocks + g * group * group;
        const int64_t start = boft_group_start(level, g), stride = boft_run_stride(level);
        for (int64_t j = 0; j < group; j++) {
            REAL sum = 0;
            for (int64_t k = 0; k < group; k++)
                sum += in[start + k / level->chunk * stride + k % level->chunk] * block[k * group + j];
            out[start + j / level->chunk * stride + j % level->chunk] = sum;
        }
    }
}

static void FN(rotate)(const boft_rotate_args *args, const void *factors, int64_t begin, int64_t end, void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan);
    for (int64_t t = begin; t < end; t++) {
        const REAL factor = factors ? ((const REAL *)factors)[t] : 1;
        for (int64_t channel = 0; channel < plan->d; channel += tile) {
            const int64_t channels = boft_min(tile, plan->d - channel);
            REAL *in = (REAL *)workspace, *out = in + tile;
            for (int64_t j = 0; j < channels; j++)
                in[j] = FN(load)(args->dtype, args->x, t * args->x_stride + channel + j);
            for (int64_t step = 0; step < plan->levels; step++) {
                const int64_t i = args->transpose ? step : plan->levels - 1 - step;
                const boft_level *level = &plan->level[i];
                FN(apply_level)(level, (const REAL *)args->blocks + boft_tile_blocks(level, channel), channels, in, out);
                REAL *swap = in;
                in = out;
                out = swap;
            }
            for (int64_t j = 0; j < channels; j++)
                FN(store)(args->dtype, args->y, t * args->y_stride + channel + j, in[j] * factor);
        }
    }
}

/* dblocks += x_g^T dy_g for each group of a tile and one row. */
static void FN(add_outer)(const boft_level *level, int64_t channels, const REAL *x, const REAL *dy, REAL *dblocks)
{
    const int64_t group = level->group;
    for (int64_t g = 0; g < channels / group; g++) {
        REAL *block = dblocks + g * group * group;
        const int64_t start = boft_group_start(level, g), stride = boft_run_stride(level);
        for (int64_t k = 0; k < group; k++)
            for (int64_t j = 0; j < group; j++)
                block[k * group + j] += x[start + k / level->chunk * stride + k % level->chunk] *
                                        dy[start + j / level->chunk * stride + j % level->chunk];
    }
}

/* Backward of rows first ... past-1 of a tile; dblocks (of the split, or NULL) is added to. */
static void FN(rotate_backward_tile)(const boft_rotate_backward_args *args, int64_t first, int64_t past, int64_t channel,
                                     int64_t channels, REAL *dblocks, REAL *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan), last = plan->levels - 1;
    for (int64_t t = first; t < past; t++) {
        REAL *inputs = workspace, *dy = inputs + plan->levels * tile, *dx = dy + tile;
        for (int64_t j = 0; j < channels; j++) {
            dy[j] = FN(load)(args->dtype, args->dy, t * args->dy_stride + channel + j);
            if (dblocks)
                inputs[j] = FN(load)(args->dtype, args->x, t * args->x_stride + channel + j);
        }
        for (int64_t step = 0; dblocks && step < last; step++) {
            const boft_level *level = &plan->level[args->transpose ? step : last - step];
            FN(apply_level)(level, (const REAL *)args->blocks + boft_tile_blocks(level, channel), channels,
                            inputs + step * tile, inputs + (step + 1) * tile);
        }
        for (int64_t step = last; step >= 0; step--) {
            const boft_level *level = &plan->level[args->transpose ? step : last - step];
            const int64_t at = boft_tile_blocks(level, channel);
            const REAL *x = inputs + step * tile;
            if (dblocks) /* for x R^T the gradient is of the untransposed blocks */
                FN(add_outer)(level, channels, args->transpose ? dy : x, args->transpose ? x : dy, dblocks + at);
            if (step == 0 && !args->dx)
                break;
            FN(apply_level)(level, (const REAL *)args->blocks_back + at, channels, dy, dx);
            REAL *swap = dy;
            dy = dx;
            dx = swap;
        }
        for (int64_t j = 0; args->dx && j < channels; j++)
            FN(store)(args->dtype, args->dx, t * args->dx_stride + channel + j, dy[j]);
    }
}

static void FN(rotate_backward)(const boft_rotate_backward_args *args, int64_t begin, int64_t end, void *workspace)
{
    const boft_plan *plan = args->plan;
    const int64_t tile = boft_tile_channels(plan), span = boft_span_channels(plan), across = boft_spans(plan);
    const int64_t splits = boft_rotate_backward_splits(plan, args->rows);
    for (int64_t task = begin; task < end; task++) {
        const int64_t split = task / across, channel = task % across * span;
        const int64_t past = boft_min(channel + span, plan->d);
        REAL *dblocks = args->dblocks ? (REAL *)args->dblocks + split * plan->count : NULL;
        for (int64_t i = 0; dblocks && i < plan->levels; i++)
            memset(dblocks + boft_tile_blocks(&plan->level[i], channel), 0,
                   (size_t)((past - channel) * plan->level[i].group) * sizeof(REAL));
        for (int64_t from = channel; from < past; from += tile)
            FN(rotate_backward_tile)(args, boft_split_begin(args->rows, split, splits),
                                     boft_split_begin(args->rows, split + 1, splits), from,
                                     boft_min(tile, past - from), dblocks, workspace);
    }
}

static void FN(scale)(const boft_scale_args *args, int64_t begin, int64_t end)
{
    const REAL *s = args->s, *bias = args->bias;
    for (int64_t t = begin; t < end; t++)
        for (int64_t j = 0; j < args->n; j++) {
            const REAL z = FN(load)(args->dtype, args->z, t * args->z_stride + j);
            FN(store)(args->dtype, args->out, t * args->out_stride + j, z * s[j] + (bias ? bias[j] * (1 - s[j]) : 0));
        }
}

static void FN(scale_backward)(const boft_scale_backward_args *args, int64_t begin, int64_t end)
{
    const REAL *s = args->s, *bias = args->bias;
    const int64_t splits = boft_scale_backward_splits(args->rows);
    for (int64_t split = begin; split < end; split++) {
        REAL *ds = args->ds ? (REAL *)args->ds + split * args->n : NULL;
        REAL *dbias = args->dbias ? (REAL *)args->dbias + split * args->n : NULL;
        const int64_t first = boft_split_begin(args->rows, split, splits);
        const int64_t past = boft_split_begin(args->rows, split + 1, splits);
        for (int64_t j = 0; j < args->n; j++) {
            REAL ds_sum = 0, dbias_sum = 0;
            for (int64_t t = first; t < past; t++) {
                const REAL dy = FN(load)(args->dtype, args->dy, t * args->dy_stride + j);
                if (ds)
                    ds_sum += dy * (FN(load)(args->dtype, args->z, t * args->z_stride + j) - (bias ? bias[j] : 0));
                if (dbias)
                    dbias_sum += dy * (args->bias_detached ? 1 : 1 - s[j]);
                if (args->dz)
                    FN(store)(args->dtype, args->dz, t * args->dz_stride + j, dy * s[j]);
            }
            if (ds)
                ds[j] = ds_sum;
            if (dbias)
                dbias[j] = dbias_sum;
        }
    }
}

static void FN(linear)(const boft_linear_args *args, int64_t begin, int64_t end)
{
    const REAL *s = args->s, *bias = args->bias;
    for (int64_t t = 0; t < args->rows; t++)
        for (int64_t j = begin; j < end; j++) {
            REAL sum = 0;
            for (int64_t k = 0; k < args->d; k++)
                sum += FN(load)(args->dtype, args->x, t * args->x_stride + k) *
                       FN(load)(args->dtype, args->weight, j * args->weight_stride + k);
            FN(store)(args->dtype, args->out, t * args->out_stride + j, sum * s[j] + (bias ? bias[j] : 0));
        }
}
