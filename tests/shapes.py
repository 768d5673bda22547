"""Shapes (d, b, m) that tests share: the paper's, odd blocks, chunks of 5, several levels, dense; and layouts."""

import torch

SMALL = [(3, 1, 1), (15, 5, 1), (14, 7, 1), (8, 8, 1), (24, 4, 2), (60, 10, 2), (64, 4, 3), (96, 2, 4), (64, 2, 6)]
PAPER = [(768, 8, 2), (1024, 4, 4), (320, 10, 5), (640, 80, 2), (640, 160, 1), (1024, 2, 6), (320, 20, 2)]
DENSE = [(512, 2, 9), (256, 16, 5), (320, 320, 1), (640, 320, 2)]


def layouts(x):
    """The same values in other layouts, among them every misalignment of 16-byte pieces."""
    zeros = torch.zeros_like(x)
    yield "transposed", x.T.contiguous().T
    yield "every other column", torch.stack([x, zeros], -1).flatten(-2)[:, ::2]
    yield "slice of wider rows", torch.cat([zeros, x, zeros], 1)[:, x.shape[1] : 2 * x.shape[1]]
    yield "rows of odd length", torch.cat([x, zeros[:, :1]], 1)[:, :-1]
    for offset in (1, 2, 3, 4, 8):
        yield f"offset {offset}", torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
