"""Memory of results that is used again: nothing is shared by tensors in use, and it can be given back."""

import io
import os
import threading

import pytest
import torch

import boft_ext
from boft_ext import _C, functional

D = 512
ROWS = 1024  # 2 MiB of float32


@pytest.fixture(autouse=True)
def nothing_kept():
    boft_ext.release_memory()
    yield
    boft_ext.release_memory()


def rotate(rows=ROWS, seed=0):
    torch.manual_seed(seed)
    x, boft_R = torch.randn(rows, D), torch.randn(2, D // 8, 8, 8)
    return functional.rotate(x, boft_R), x, boft_R


def test_freed_results_are_used_again_and_released():
    y, *_ = rotate()
    place = y.data_ptr()
    assert _C.idle_bytes() == 0
    del y
    assert _C.idle_bytes() == ROWS * D * 4
    y, *_ = rotate(ROWS - 100)
    assert y.data_ptr() == place and _C.idle_bytes() == 0
    del y
    assert boft_ext.release_memory() == ROWS * D * 4 and boft_ext.release_memory() == 0


def test_results_in_use_are_never_shared():
    kept = [rotate(seed=seed)[0] for seed in range(4)]
    views = [y[10:20] for y in kept]
    expected = [y.clone() for y in kept]
    del kept[1:3]  # their views keep the memory
    for seed in range(4, 8):
        rotate(seed=seed)
    assert torch.equal(kept[0], expected[0]) and torch.equal(kept[1], expected[3])
    assert all(torch.equal(view, whole[10:20]) for view, whole in zip(views, expected, strict=True))
    assert len({view.data_ptr() for view in views}) == 4


def test_blocks_of_another_size_are_left_for_others():
    y, *_ = rotate(4 * ROWS)
    place = y.data_ptr()
    del y
    assert rotate(ROWS)[0].data_ptr() != place
    assert _C.idle_bytes() >= 4 * ROWS * D * 4
    assert rotate(4 * ROWS)[0].data_ptr() == place


def test_small_results_are_not_kept():
    rotate(16)
    assert _C.idle_bytes() == 0


def test_at_most_a_gibibyte_is_kept():
    results = [torch.ops.boft.scale(torch.empty(1 << 17, D), torch.ones(D), None, False) for _ in range(5)]
    assert sum(y.nbytes for y in results) > 1 << 30
    results.clear()
    assert 3 << 28 <= _C.idle_bytes() <= 1 << 30


def test_results_are_ordinary_tensors():
    y, *_ = rotate()
    expected, file = y.clone(), io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    y.resize_(2 * ROWS, D)
    assert torch.equal(y[:ROWS], expected)
    y.set_()
    assert y.numel() == 0


def test_threads():
    wrong = []

    def work(seed):
        for _ in range(20):
            y, x, boft_R = rotate_of[seed]
            again = functional.rotate(x, boft_R)
            if not torch.equal(again, y):
                wrong.append(seed)

    rotate_of = [rotate(seed=seed) for seed in range(4)]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_goes_on():
    y, *_ = rotate()
    del y
    process = os.fork()
    if process == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            y, *_ = rotate()
            status = 0 if torch.isfinite(y).all() and boft_ext.release_memory() == 0 else 2
        finally:
            os._exit(status)
    assert os.waitpid(process, 0)[1] == 0
