"""A training script as PEFT's users write them: plain torch and PEFT, nothing of boft_ext. Run by test_runner.py.

Usage: stock_train.py FILE M... For each number of factors m it trains a small model and writes what happened to FILE.
Under torchrun or accelerate every process trains on its share of the rows and the first one writes.
"""

import json
import os
import sys

import torch
from peft import BOFTConfig, get_peft_model
from torch import nn

STEPS, ROWS = 8, 12


def train(m):
    """Losses of `STEPS` steps, and the m that a layer came to have."""
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Unflatten(1, (4, 3, 2)), nn.Conv2d(4, 8, 2, bias=False), nn.Flatten(), nn.Tanh(), nn.Linear(16, 24),
        nn.Tanh(), nn.Linear(24, 4)
    )  # fmt: skip
    config = BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=m, boft_dropout=0.3, target_modules=["1", "4", "6"], bias="boft_only"
    )
    model = get_peft_model(base, config)
    x, target = torch.randn(ROWS, 24), torch.randn(ROWS, 4)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        x, target = x[rank::world], target[rank::world]
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        if world > 1:
            loss = loss.detach() / world
            torch.distributed.all_reduce(loss)
        losses.append(loss.item())
    return {"losses": losses, "m": base[4].boft_R["default"].shape[0]}


def main(file, *factors):
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if distributed:
        torch.distributed.init_process_group("gloo")
    runs = {m: train(int(m)) for m in factors}
    if os.environ.get("RANK", "0") == "0":
        with open(file, "w") as stream:
            json.dump(runs, stream)
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
