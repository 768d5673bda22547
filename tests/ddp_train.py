"""Trains a small PEFT model, through accelerate when run as a script by test_peft_training.py in several processes.

Usage: ddp_train.py FOLDER. Each process writes the trained part of its replica to FOLDER/<rank>.pt.
"""

import sys

import torch
from peft import BOFTConfig, get_peft_model
from torch import nn

import boft_ext

ROWS, STEPS = 16, 4


def train(accelerator=None):
    """The trained parameters by name; with an accelerator each process sees its share of the rows."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0", "2"], bias="boft_only")
    model = get_peft_model(base, config)
    x, target = torch.randn(ROWS, 24), torch.randn(ROWS, 4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    backward = torch.Tensor.backward
    if accelerator is not None:
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        x, target, backward = x[share], target[share], accelerator.backward
        model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(nn.functional.mse_loss(model(x), target))
        optimizer.step()
    return {name: p.detach() for name, p in trained.items()}


def main(folder):
    from accelerate import Accelerator

    boft_ext.patch_peft(strict=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes > 1
    torch.save(train(accelerator), f"{folder}/{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
