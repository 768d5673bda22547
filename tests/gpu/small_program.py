"""All CUDA kernels on small odd shapes: ``compute-sanitizer python tests/gpu/small_program.py``.

Results are not compared here. BOFT_TEST_DEVICE=cpu runs it on the CPU.
"""

import os

import torch

from boft_ext import functional

DEVICE = os.environ.get("BOFT_TEST_DEVICE", "cuda")
SHAPES = [(6, 6, 1), (15, 5, 1), (60, 10, 2), (64, 8, 2), (128, 8, 3), (320, 20, 3), (128, 16, 4), (256, 8, 6)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> None:
    torch.manual_seed(0)
    for d, b, m in SHAPES:
        for dtype in DTYPES:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            boft_R = torch.randn(m, d // b, b, b, dtype=wide).to(DEVICE).requires_grad_()
            s = torch.rand(d, dtype=wide).to(DEVICE).requires_grad_()
            bias = torch.rand(d, dtype=wide).to(DEVICE).requires_grad_()
            keep = (torch.rand(m, d // b) > 0.3).to(DEVICE)
            for rows, offset in ((77, 0), (33, 1)):
                x = torch.randn(rows * d + offset).to(DEVICE, dtype)[offset:].view(rows, d).requires_grad_()
                for transpose in (False, True):
                    rotated = functional.rotate(x, boft_R, keep=keep, transpose=transpose)
                    functional.scale(rotated, s, bias).sum().backward()
                with torch.no_grad():
                    functional.rotate_weight(x, boft_R, torch.rand(rows, dtype=wide).to(DEVICE))
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
