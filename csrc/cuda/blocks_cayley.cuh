/*
 * Cayley of one block of at most 32 x 32 by B lanes of a warp, B = 4, 8, 16 or 32: each has a row in registers.
 *
 * float32 is eliminated in float64 too. That costs b^3 FMAs a block: for d = 4096 and m = 2 half a million with b = 8
 * and 8 million with b = 32, or 1 and 13 microseconds where float64 runs at a 64th of float32 (0.65 T FMAs a second).
 * In return results are those of the CPU, and parameters of any size are safe.
 */
#ifndef BOFT_BLOCKS_CAYLEY_CUH
#define BOFT_BLOCKS_CAYLEY_CUH

#include "blocks_eliminate.cuh"

/* The lane of the largest |entry| among the B lanes of the caller's team; the first if several have it. */
template <int B> DEVICE int lane_of_largest(double size, int lane)
{
#pragma unroll
    for (int off = 1; off < B; off *= 2) {
        const double other = shuffle_xor(size, off);
        const int at = shuffle_xor(lane, off);
        if (other > size || (other == size && at < lane)) {
            size = other;
            lane = at;
        }
    }
    return lane;
}

/*
 * tile, b x b with rows b | 1 apart in shared memory: A, of which the result is Q. All teams of a warp together. rows:
 * 2 B doubles in shared memory, aligned to 16.
 *
 * Gauss-Jordan in place. The current column is in x[0] at every step and moves to the end after it, so that registers
 * are indexed by constants though the loop over steps is not unrolled. Rows stay where they are: pivoting gives the
 * team's lane `p` to step k, which then holds row k of the inverse, whose column p belongs to step k.
 */
template <class T, int B> DEVICE void cayley_in_lanes(int b, int kept, T *tile, double *rows)
{
    const int lane = threadIdx.x % B, team = threadIdx.x % 32 - lane, ld = b | 1;
    double x[B], largest = 0;
#pragma unroll
    for (int j = 0; j < B; j++) {
        x[j] = 0;
        if (kept && lane < b && j < b)
            x[j] = (double)tile[lane * ld + j] / 2 - (double)tile[j * ld + lane] / 2;
        largest = max(largest, size_of_entry(x[j]));
    }
#pragma unroll
    for (int off = 1; off < B; off *= 2)
        largest = max(largest, shuffle_xor(largest, off));
    const elimination how = how_to_eliminate(largest);
    int any_pivoted = how.pivoted;
#pragma unroll
    for (int off = B; off < 32; off *= 2)
        any_pivoted |= shuffle_xor(any_pivoted, off);
#pragma unroll
    for (int j = 0; j < B; j++)
        x[j] = j == lane ? how.one : how.sick ? 0 : x[j] * how.scale;

    int row = lane, column = lane; /* of the inverse: the row that is here, the column that step `lane` makes */
    int taken = lane >= b;
    for (int k = 0; k < b; k++) {
        int p = k;
        if (any_pivoted) {
            const int largest_lane = lane_of_largest<B>(taken ? -1 : fabs(x[0]), lane);
            p = how.pivoted ? largest_lane : k;
        }
        const double pivot = shuffle(x[0], team + p), inverse = 1 / (pivot == 0 ? LEAST_PIVOT : pivot);
        double *pivot_row = rows + (k & 1) * B, factor = x[0];
        if (lane == p) {
#pragma unroll
            for (int j = 1; j < B; j++) {
                pivot_row[j] = x[j] * inverse;
                x[j] = 0;
            }
            factor = -1;
            row = k;
            taken = 1;
        }
        if (lane == k)
            column = p;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < B; j += 2) {
            const double2 two = *(const double2 *)(pivot_row + j);
            if (j > 0)
                x[j - 1] = x[j] - factor * two.x;
            x[j] = x[j + 1] - factor * two.y;
        }
        x[B - 1] = -factor * inverse;
    }
#pragma unroll
    for (int i = 0; i < B; i++) {
        const int k = i - (B - b);
        const int at = any_pivoted ? shuffle(column, team + (k & (B - 1))) : k;
        if (k >= 0 && lane < b)
            tile[row * ld + at] = entry_of_q<T>(how, x[i], row == at);
    }
    __syncwarp();
}

#endif
