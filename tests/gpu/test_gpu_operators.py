"""Every operator on the GPU against the mathematics in float64 on the CPU, for every dtype, shape and layout."""

import pytest
import torch
from torch import library
from conftest import use_form
from shapes import DENSE, PAPER, SMALL, layouts
from tolerance import FLOORS, assert_as_exact_as_torch, assert_exact, relative_error

from boft_ext import _C, functional, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Groups of 6, 20, 40 and 80 channels; one group of all channels; the shapes that speed is promised for.
MORE = [(6, 2, 1), (6, 6, 1), (20, 10, 2), (60, 20, 1), (320, 20, 3), (640, 40, 2), (64, 16, 3)]
MORE += [(1024, 8, 2), (1024, 16, 2)]
SHAPES = [*SMALL, *PAPER, *DENSE, *MORE]


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills fresh memory with NaN, so that nothing is right by chance."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def real(dtype):
    return reference.accumulate_dtype(dtype)


def assert_right(what, ours, exact):
    """`ours`, on the device, is the exact result up to the rounding of sums, or rounded once to 16 bits."""
    ours, exact = ours.detach().cpu(), exact.detach()
    if ours.dtype in (torch.float32, torch.float64):
        assert_exact(what, ours, exact)
    else:
        assert_as_exact_as_torch(what, ours, exact.to(ours.dtype), exact)


def exact_rotation(x, boft_R, dy, keep=None, transpose=False):
    """y, dx and dboft_R in float64 on the CPU with the dense matrix."""
    x, boft_R = (tensor.detach().cpu().double().requires_grad_() for tensor in (x, boft_R))
    keep = None if keep is None else keep.cpu()
    rotation = reference.rotate_factors(torch.eye(x.shape[-1], dtype=torch.float64), reference.cayley(boft_R, keep))
    y = x @ (rotation.T if transpose else rotation)
    return y.detach(), *torch.autograd.grad(y, [x, boft_R], dy.detach().cpu().double())


def check_rotation(x, boft_R, dy, keep=None, transpose=False):
    x, boft_R = x.detach().requires_grad_(), boft_R.detach().requires_grad_()
    y = functional.rotate(x, boft_R, keep=keep, transpose=transpose)
    dx, dR = torch.autograd.grad(y, [x, boft_R], dy)
    assert (y.device, y.dtype, dx.dtype, dR.dtype) == (x.device, x.dtype, x.dtype, boft_R.dtype)
    for what, ours, exact in zip(("y", "dx", "dR"), (y, dx, dR), exact_rotation(x, boft_R, dy, keep, transpose)):
        assert_right(what, ours, exact)


def random(device, *shape, dtype=torch.float32):
    """Drawn on the CPU, so that a seed gives the same numbers on every device."""
    return torch.randn(*shape).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, b, m", SHAPES)
def test_rotate(d, b, m, dtype, device):
    boft_R = random(device, m, d // b, b, b, dtype=real(dtype))
    for rows in (1, 67, 600 if d <= 320 else 130):
        x, dy = (random(device, rows, d, dtype=dtype) for _ in range(2))
        check_rotation(x, boft_R, dy)
        keep = (torch.rand(m, d // b) > 0.2).to(device)
        check_rotation(x, boft_R, dy, keep, transpose=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5000, 20011])
def test_many_rows(rows, dtype, device):
    x, dy = (random(device, rows, 64, dtype=dtype) for _ in range(2))
    check_rotation(x, random(device, 2, 8, 8, 8, dtype=real(dtype)), dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d, b, m", [(4096, 8, 2), (4096, 16, 3), (4096, 128, 1), (4096, 4, 11)])
def test_large(d, b, m, dtype, cuda):
    """With float64 on the GPU as the reference: the CPU would take minutes."""
    boft_R, rows = random(cuda, m, d // b, b, b), 8192
    x, dy = (random(cuda, rows, d, dtype=dtype) for _ in range(2))
    wide_x, wide_R = (tensor.double().requires_grad_() for tensor in (x, boft_R))
    wide_y = reference.rotate_factors(wide_x, reference.cayley(wide_R))
    exact = [wide_y, *torch.autograd.grad(wide_y, [wide_x, wide_R], dy.double())]
    x.requires_grad_(), boft_R.requires_grad_()
    y = functional.rotate(x, boft_R)
    for what, ours, wanted in zip(("y", "dx", "dR"), (y, *torch.autograd.grad(y, [x, boft_R], dy)), exact):
        assert_right(what, ours, wanted.cpu())


def test_more_than_2_to_the_31_elements(cuda):
    d, rows = 4096, (1 << 19) + 77
    if torch.cuda.mem_get_info(cuda)[0] < 7 * rows * d * 2:
        pytest.skip("needs 30 GB of free device memory")
    last = random(cuda, 128, d, dtype=torch.bfloat16)
    x = torch.zeros(rows, d, dtype=torch.bfloat16, device=cuda)
    x[-128:] = last
    boft_R = random(cuda, 2, d // 8, 8, 8)
    leaf, parameter = x.requires_grad_(), boft_R.requires_grad_()
    y = functional.rotate(leaf, parameter)
    s = torch.full((d,), 2.0, device=cuda, requires_grad=True)
    out = functional.scale(y, s)
    dx, dR, ds = torch.autograd.grad(out, [leaf, parameter, s], x.detach())
    exact_y, exact_dx, exact_dR = exact_rotation(last, boft_R, 2 * last)
    for what, ours, exact in (("y", y[-128:], exact_y), ("dx", dx[-128:], exact_dx), ("dR", dR, exact_dR)):
        assert_right(what, ours, exact)
    assert not y[:-128].any() and not dx[:-128].any()
    assert relative_error(ds.cpu(), (last.cpu().double() * exact_y).sum(0)) <= 4 * FLOORS[torch.bfloat16]


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("d, b, m", [(768, 8, 2), (1024, 4, 4), (512, 2, 9), (320, 20, 2)])
def test_sixteen_bits_are_rounded_once(d, b, m, size, device):
    boft_R, x = size * torch.randn(m, d // b, b, b), torch.randn(80, d)
    for dtype in (torch.bfloat16, torch.float16):
        exact = reference.rotate(x.to(dtype).double(), boft_R.double())
        once = relative_error(exact.to(dtype), exact)
        ours = functional.rotate(x.to(device, dtype), boft_R.to(device)).cpu()
        assert relative_error(ours, exact) <= 1.1 * once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_changes_nothing(dtype, device):
    x = random(device, 9, 48, dtype=dtype)
    assert torch.equal(functional.rotate(x, torch.zeros(2, 12, 4, 4, device=device)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, b, m", [(24, 4, 2), (64, 8, 2), (128, 8, 3), (320, 20, 2)])
def test_any_layout(d, b, m, dtype, device):
    boft_R = random(device, m, d // b, b, b, dtype=real(dtype))
    x, dy = (random(device, 37, d, dtype=dtype) for _ in range(2))
    for (_, other_x), (_, other_dy) in zip(layouts(x), layouts(dy)):
        check_rotation(other_x, boft_R, other_dy)
        check_rotation(other_x, boft_R, dy)
    check_rotation(x[:1].expand(37, d), boft_R, dy[:1].expand(37, d))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (2, 3, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_axes_and_rows(shape, dtype, device):
    x, boft_R = random(device, *shape, dtype=dtype).requires_grad_(), random(device, 2, 8, 8, 8).requires_grad_()
    s = torch.ones(64, device=device, requires_grad=True)
    out = functional.scale(functional.rotate(x, boft_R), s)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    if x.numel() == 0:
        assert not boft_R.grad.any() and not s.grad.any()
    else:
        assert boft_R.grad.any() and s.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d, b, m", [*SHAPES, (160, 160, 1), (1280, 320, 1)])
def test_blocks(d, b, m, dtype, device):
    boft_R = random(device, m, d // b, b, b, dtype=dtype).requires_grad_()
    keep = torch.rand(m, d // b) > 0.2
    exact_R = boft_R.detach().cpu().double().requires_grad_()
    for mask in (None, keep):
        blocks = torch.ops.boft.blocks(boft_R, None if mask is None else mask.to(device))[0]
        exact = reference.collapse(reference.cayley(exact_R, mask), _C.levels(d, b, m))
        dblocks = torch.randn_like(exact)
        (grad,) = torch.autograd.grad(blocks, boft_R, dblocks.to(device, dtype))
        (exact_grad,) = torch.autograd.grad(exact, exact_R, dblocks)
        assert_right("blocks", blocks, exact)
        assert_right("gradient", grad, exact_grad)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e18), (torch.float32, 3e38), (torch.float64, 1e300)])
@pytest.mark.parametrize("b", [2, 5, 8, 64])
def test_extreme_parameters_stay_finite(b, size, dtype, device):
    a = (size * (2 * torch.rand(3, b, b, dtype=torch.float64) - 1)).to(device, dtype)
    assert torch.isfinite(functional.cayley(a)).all()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("b", [1, 2, 5, 8, 20, 64])
def test_parameters_of_any_size(b, size, device):
    a = size * torch.randn(6, b, b)
    ours, exact = functional.cayley(a.to(device)).cpu(), reference.cayley(a.double())
    assert relative_error(ours, exact) <= 1e-6


def test_nan_stays_in_its_block(device):
    boft_R = torch.randn(1, 8, 4, 4)
    boft_R[0, 3, 0, 1] = float("nan")
    finite = torch.isfinite(torch.ops.boft.blocks(boft_R.to(device), None)[0].view(8, 16)).all(1)
    assert finite.tolist() == [n != 3 for n in range(8)]


@pytest.mark.parametrize("bias_is", ["absent", "in z", "detached"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, n", [(1, 1), (3, 5), (7, 16), (600, 77), (64, 768), (5003, 24)])
def test_scale(rows, n, dtype, bias_is, device):
    z, dy = (random(device, rows, n, dtype=dtype) for _ in range(2))
    s, bias = (1 + 0.3 * torch.randn(n)).to(device, real(dtype)), random(device, n, dtype=real(dtype))
    inputs = [tensor.requires_grad_() for tensor in ([z, s] if bias_is == "absent" else [z, s, bias])]
    detached = bias_is == "detached"
    exact_inputs = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    exact = reference.scale(*exact_inputs, bias_detached=detached)
    exacts = [exact, *torch.autograd.grad(exact, exact_inputs, dy.cpu().double())]
    for other_z, other_dy in [(z, dy), *((a[1], b[1]) for a, b in zip(layouts(z.detach()), layouts(dy)))]:
        leaf = other_z.detach().requires_grad_()
        out = functional.scale(leaf, s, *inputs[2:], bias_detached=detached)
        results = [out, *torch.autograd.grad(out, [leaf, *inputs[1:]], other_dy)]
        for what, ours, wanted in zip(["out", "dz", "ds", "dbias"], results, exacts):
            assert_right(what, ours, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, b, m", SHAPES)
def test_merge(d, b, m, dtype, device):
    boft_R = random(device, m, d // b, b, b, dtype=real(dtype))
    for rows in (1, 67, 600 if d <= 320 else 130):
        weight, s = random(device, rows, d, dtype=dtype), (1 + 0.1 * torch.randn(rows, 1)).to(device)
        rotated, *_ = exact_rotation(weight, boft_R, weight, transpose=True)
        with torch.no_grad():
            merged = functional.rotate_weight(weight, boft_R, s)
            back = functional.unrotate_weight(merged, boft_R, s)
            assert_right("merged", merged, rotated * s.cpu().double())
            assert_right("merged without a scale", functional.rotate_weight(weight, boft_R), rotated)
        assert relative_error(back.cpu(), weight.cpu().double()) <= 10 * FLOORS[dtype]
        differentiable = functional.rotate_weight(weight, boft_R, s).cpu()
        assert relative_error(differentiable, merged.cpu().double()) <= 10 * FLOORS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, b, m", [(24, 4, 2), (320, 20, 2), (256, 8, 6)])
def test_merge_of_any_layout_and_without_rows(d, b, m, dtype, device):
    weight, boft_R = random(device, 35, d, dtype=dtype), random(device, m, d // b, b, b, dtype=real(dtype))
    s = (1 + 0.1 * torch.randn(35)).to(device)
    exact = exact_rotation(weight, boft_R, weight, transpose=True)[0] * s.cpu().double()[:, None]
    with torch.no_grad():
        for _, other in layouts(weight):
            assert_right("merged", functional.rotate_weight(other, boft_R, s), exact)
        assert functional.rotate_weight(weight[:0], boft_R, s[:0]).shape == (0, d)


@pytest.mark.parametrize("d, b, m", [(16, 4, 2), (15, 5, 1), (64, 4, 3)])
def test_gradcheck(d, b, m, device):
    x = random(device, 3, d, dtype=torch.float64).requires_grad_()
    boft_R = random(device, m, d // b, b, b, dtype=torch.float64).requires_grad_()
    keep = (torch.rand(m, d // b) > 0.3).to(device)
    fast = {"fast_mode": d > 16}
    assert torch.autograd.gradcheck(functional.rotate, (x, boft_R), **fast)
    rotate_back = lambda x, a: functional.rotate(x, a, keep=keep, transpose=True)  # noqa: E731
    assert torch.autograd.gradcheck(rotate_back, (x, boft_R), **fast)
    s, bias = (random(device, d, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(functional.scale, (x, s, bias), **fast)
    assert torch.autograd.gradcheck(functional.scale, (x, s), **fast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d, b, m", [(15, 5, 1), (64, 8, 2), (256, 8, 6)])
def test_opcheck(d, b, m, dtype, device):
    check, ops = library.opcheck, torch.ops.boft
    boft_R = random(device, m, d // b, b, b, dtype=real(dtype)).requires_grad_()
    keep = (torch.rand(m, d // b) > 0.3).to(device)
    blocks, q = ops.blocks(boft_R.detach(), None)
    q = blocks.view(boft_R.shape).clone() if m == 1 else q
    for mask in (None, keep):
        check(ops.blocks.default, (boft_R, mask))
        check(ops.blocks_backward.default, (torch.randn_like(blocks), q, mask))
    x, dy = (random(device, 3, d, dtype=dtype) for _ in range(2))
    for transpose in (False, True):
        leaves = x.clone().requires_grad_(), blocks.clone().requires_grad_()
        check(ops.rotate.default, (*leaves, b, m, transpose))
        for need in ((True, True), (True, False), (False, True)):
            check(ops.rotate_backward.default, (dy, x, blocks, b, m, transpose, *need))
    s, bias = (random(device, d, dtype=real(dtype)) for _ in range(2))
    for factors, transpose in ((s[:3], True), (None, True), (s[:3], False)):
        check(ops.merge.default, (x, blocks, b, m, factors, transpose))
    check(ops.scale.default, (x.clone().requires_grad_(), s.clone().requires_grad_(), bias, False))
    check(ops.scale_backward.default, (dy, x, s, bias, True, True, True, True))
    check(ops.scale_backward.default, (dy, None, s, bias, False, True, False, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_kernels_results_agree(dtype, device):
    """The device-independent form, which serves older GPUs and those of other makers."""
    x, dy, boft_R = (random(device, *shape, dtype=dtype) for shape in ((50, 96), (50, 96), (4, 48, 2, 2)))
    boft_R = boft_R.float()
    with use_form("composite"):
        check_rotation(x, boft_R, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_the_same_bits_in_every_run(dtype, device):
    x, dy = (random(device, 3000, 768, dtype=dtype) for _ in range(2))
    boft_R, s = random(device, 2, 96, 8, 8), torch.rand(768).to(device)

    def gradients():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, boft_R, s)]
        return torch.autograd.grad(functional.scale(functional.rotate(*leaves[:2]), leaves[2]), leaves, dy)

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(enabled, dtype, device):
    x, boft_R = random(device, 5, 24).requires_grad_(), random(device, 2, 6, 4, 4).requires_grad_()
    with torch.autocast(device.type, dtype=dtype, enabled=enabled):
        y = functional.rotate(x, boft_R)
    assert y.dtype == (dtype if enabled else torch.float32)
    y.float().square().sum().backward()
    assert x.grad.dtype == boft_R.grad.dtype == torch.float32
    exact = reference.rotate(x.detach().cpu().to(y.dtype).double(), boft_R.detach().cpu().double())
    assert relative_error(y.detach().cpu(), exact) <= 4 * FLOORS[y.dtype]


def test_bad_input_names_the_numbers(device):
    boft_R = random(device, 2, 6, 4, 4)
    with pytest.raises(ValueError, match="32"):
        functional.rotate(torch.zeros(3, 32, device=device), boft_R)
    with pytest.raises(TypeError, match="x: .*(?i:int|long)"):
        functional.rotate(torch.zeros(3, 24, dtype=torch.int64, device=device), boft_R)
    with pytest.raises(ValueError, match="5 outputs need 5 values of boft_s, got .4"):
        functional.scale(torch.zeros(2, 5, device=device), torch.ones(4, device=device))


def test_tensors_on_two_devices_are_refused(cuda):
    with pytest.raises((RuntimeError, ValueError)):
        functional.rotate(torch.zeros(3, 24, device=cuda), torch.zeros(2, 6, 4, 4))
    with pytest.raises((RuntimeError, ValueError)):
        functional.scale(torch.zeros(3, 24, device=cuda), torch.ones(24))
