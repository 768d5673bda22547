"""What each kernel of csrc/cuda may use, and what its machine code must show: read by check_cuda.py."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Kernels with one plan.

    Attributes:
        pattern: a regular expression for the whole name, template arguments included: "rotate_tile<4,.*>".
        registers, shared: the most a thread may take, and the most bytes of static shared memory of a block.
        why: where the numbers come from.
        wide: global memory is read and written 16 bytes at a time, somewhere in the kernel.
        hmma: the products run on tensor cores.
        prefetch: in the hottest loop, loads of the next tile are issued before at least half of the products.
    """

    pattern: str
    registers: int
    shared: int
    why: str
    wide: bool = False
    hmma: bool = False
    prefetch: bool = False


# Threads of an SM share 65536 registers, which a warp takes in units of 8 a thread. So blocks of 128 threads fit 6 times
# at 80, 4 times at 128, 3 times at 168 and twice at 255.
FAMILIES: tuple[Family, ...] = (
    Family(
        "rotate_tensor<b?f16,1>", 80, 0, "6 blocks an SM, each with a tile of rows loaded ahead: 24 KB of reads in "
        "flight, where an H100 needs about 13", wide=True, hmma=True, prefetch=True
    ),
    Family(
        "rotate_tensor<b?f16,2>", 128, 0, "4 blocks an SM take turns to load and to multiply; nothing is loaded ahead",
        wide=True, hmma=True
    ),
    Family(
        "rotate_tensor<b?f16,[34]>", 168, 0, "3 blocks an SM, as many as their shared memory allows, take turns",
        wide=True, hmma=True
    ),
    Family(
        "rotate_backward_tensor<b?f16,1>", 128, 16, "4 blocks an SM, with x and dy loaded ahead: 32 KB in flight",
        wide=True, hmma=True, prefetch=True
    ),
    Family(
        "rotate_backward_tensor<b?f16,2>", 200, 16, "5 blocks of 64 threads an SM, with x and dy loaded ahead: 30 KB in "
        "flight",
        wide=True, hmma=True, prefetch=True
    ),
    Family(
        "rotate_backward_tensor<b?f16,[34]>", 255, 16, "the gradient of 96 or 128 channels stays in registers; 2 "
        "blocks an SM take turns", wide=True, hmma=True
    ),
    Family(
        "rotate_wide<b?f16>", 168, 0, "3 blocks an SM, as many as their shared memory allows; the next chunk of x is "
        "loaded ahead", wide=True, hmma=True, prefetch=True
    ),
    Family(
        "rotate_backward_wide<b?f16>", 255, 16, "2 blocks an SM, one of them with a gradient of 64 by 64 in the "
        "registers of each warp", wide=True, hmma=True, prefetch=True
    ),
    Family("rotate_general<float,true>", 168, 0, "3 blocks an SM; bound by multiply-adds above G = 62", wide=True),
    Family("rotate_general<(float|double),false>", 168, 0, "float64 and misaligned data: correct rather than fast"),
    Family(
        "rotate_backward_groups<float,true>", 168, 16, "3 blocks an SM, each with x and dy loaded ahead: 48 KB in "
        "flight", wide=True
    ),
    Family("rotate_backward_groups<(float|double),false>", 168, 16, "float64 and misaligned data"),
    Family("rotate_levels<.*>", 168, 128, "3 blocks an SM, as those of one level; what a phase does lies in shared"),
    Family("rotate_backward_levels<float,true>", 168, 304, "3 blocks an SM; bound by multiply-adds", wide=True),
    Family("rotate_backward_levels<(float|double),false>", 168, 304, "3 blocks an SM, as those of one level"),
    Family("scale_kernel<.*,true>", 64, 0, "4 blocks of 256 threads an SM", wide=True),
    Family("scale_kernel<.*,false>", 168, 0, "misaligned data, a value at a time"),
    Family("scale_backward_kernel<.*,true,[12]>", 128, 16388, "2 blocks of 256 threads an SM, their sums", wide=True),
    Family("scale_backward_kernel<.*,false,[12]>", 128, 16388, "misaligned data, a value at a time"),
    Family("blocks_of_groups<(float|double),(4|8|16)>", 128, 0, "a row of a block and what eliminates it"),
    Family("blocks_of_groups<(float|double),32>", 255, 0, "rows of 32; few CUDA blocks, so latency counts"),
    Family("blocks_of_groups_backward<.*>", 128, 0, "the same backward"),
    Family("large_blocks<.*>", 128, 512, "2 blocks of 256 threads an SM, each with a matrix in dynamic shared memory"),
    Family("wide_blocks<.*>", 128, 1024, "a block of 512 threads an SM, with a panel in dynamic shared memory"),
    Family("large_blocks_backward<.*>", 128, 0, "2 blocks of 256 threads an SM"),
)
