"""set_saved_activations: what the modes compact and recompute save, and what their gradients are."""

import pytest
import torch
import torch.utils.checkpoint
from torch import library

import boft_ext
from boft_ext import _C, functional, ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def exact_afterwards():
    yield
    boft_ext.set_saved_activations("exact")


def gradients(mode, output, inputs, dy):
    boft_ext.set_saved_activations(mode)
    return torch.autograd.grad(output(), inputs, dy)


def off_by(ours, wanted):
    return float((ours - wanted).double().norm() / wanted.double().norm())


def parameters(d, b, m, dtype=torch.float32):
    return (0.1 * torch.randn(m, d // b, b, b, dtype=dtype)).requires_grad_()


def saved_bytes(run):
    """Bytes of all tensors saved for backward, and of the different ones among them."""
    seen, total = {}, 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        seen[tensor.untyped_storage().data_ptr()] = (tensor.nbytes, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return total, sum(size for size, _ in seen.values())


def test_modes():
    assert boft_ext.saved_activations() == "exact"
    boft_ext.set_saved_activations("compact")
    assert boft_ext.saved_activations() == "compact"
    with pytest.raises(ValueError, match="tiny"):
        boft_ext.set_saved_activations("tiny")
    assert boft_ext.saved_activations() == "compact"


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, d, b, m", [(1, 8, 4, 1), (70, 15, 5, 1), (333, 192, 8, 2), (1024, 768, 8, 1), (2500, 256, 8, 6)]
)
def test_rotate(rows, d, b, m, dtype, transpose):
    x = torch.randn(rows, d).to(dtype).requires_grad_()
    boft_R = parameters(d, b, m)
    dy = torch.randn(rows, d).to(dtype)

    def run():
        return functional.rotate(x, boft_R, transpose=transpose)

    dx, dR = gradients("exact", run, [x, boft_R], dy)
    compact_dx, compact_dR = gradients("compact", run, [x, boft_R], dy)
    assert torch.equal(dx, compact_dx)
    assert compact_dR.dtype == dR.dtype and off_by(compact_dR, dR) < 0.01


@pytest.mark.parametrize("bias_is", ["absent", "in z", "detached"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, n", [(7, 16), (64, 77), (600, 77), (1030, 768)])
def test_scale(rows, n, dtype, bias_is):
    z, s = torch.randn(rows, n).to(dtype).requires_grad_(), torch.randn(n, 1).requires_grad_()
    bias = None if bias_is == "absent" else torch.randn(n).requires_grad_()
    inputs = [z, s] if bias is None else [z, s, bias]
    dy = torch.randn(rows, n).to(dtype)

    def run():
        return functional.scale(z, s, bias, bias_detached=bias_is == "detached")

    dz, ds, *dbias = gradients("exact", run, inputs, dy)
    compact_dz, compact_ds, *compact_dbias = gradients("compact", run, inputs, dy)
    assert torch.equal(dz, compact_dz)
    assert compact_ds.shape == ds.shape and off_by(compact_ds, ds) < 0.15
    for ours, wanted in zip(compact_dbias, dbias, strict=True):
        assert off_by(ours, wanted) < 1e-5  # the same terms in another order


def test_layers_that_share_an_input_share_its_copy():
    boft_ext.set_saved_activations("compact")
    x, R = torch.randn(128, 256), [parameters(256, 8, 2) for _ in range(3)]
    total, different = saved_bytes(lambda: [functional.rotate(x, r) for r in R])
    packed = 128 * 4 * 66
    assert total - different == 2 * packed


def test_an_input_changed_between_layers_is_seen():
    x, first, second = torch.randn(64, 32), parameters(32, 8, 1), parameters(32, 8, 1)
    dy = torch.randn(64, 32)
    boft_ext.set_saved_activations("compact")
    a = functional.rotate(x, first)
    x.add_(torch.randn_like(x))
    b = functional.rotate(x, second)
    ours = torch.autograd.grad([a, b], [first, second], [dy, dy])[1]
    wanted = gradients("exact", lambda: functional.rotate(x, second), [second], dy)[0]
    assert off_by(ours, wanted) < 0.01


def test_nothing_is_packed_or_kept_without_need():
    boft_ext.set_saved_activations("compact")
    x, boft_R = torch.randn(8, 32, requires_grad=True), parameters(32, 8, 1).detach()
    assert saved_bytes(lambda: functional.rotate(x, boft_R))[0] == torch.ops.boft.blocks(boft_R, None)[0].nbytes
    with torch.no_grad():
        assert not functional.rotate(x, parameters(32, 8, 1)).requires_grad


def test_a_value_that_is_not_finite_is_not_lost():
    boft_ext.set_saved_activations("compact")
    for value in (float("nan"), float("inf")):
        z = torch.randn(4, 128)
        z[2, 70] = value
        s = torch.ones(128, requires_grad=True)
        (ds,) = torch.autograd.grad(functional.scale(z, s), s, torch.ones(4, 128))
        assert ds[64:].isnan().all() and ds[:64].isfinite().all()


def test_threads_do_not_change_the_result():
    x, boft_R, s = torch.randn(1500, 512), parameters(512, 8, 2), torch.randn(512, requires_grad=True)
    dy, before, results = torch.randn(1500, 512), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                gradients("compact", lambda: functional.scale(functional.rotate(x, boft_R), s), [boft_R, s], dy)
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_rows():
    boft_ext.set_saved_activations("compact")
    x, boft_R, s = torch.randn(0, 32), parameters(32, 8, 1), torch.ones(32, requires_grad=True)
    functional.scale(functional.rotate(x, boft_R), s).sum().backward()
    assert not boft_R.grad.any() and not s.grad.any()


def test_without_kernels_everything_is_saved_exactly():
    x, boft_R, dy = torch.randn(20, 32), parameters(32, 8, 1), torch.randn(20, 32)
    with ops.without_kernels():
        exact, compact = (
            gradients(mode, lambda: functional.rotate(x, boft_R), [boft_R], dy)[0] for mode in ("exact", "compact")
        )
    assert torch.equal(exact, compact)


def test_backward_after_the_kernels_were_switched_off():
    x, boft_R = torch.randn(20, 32), parameters(32, 8, 1)
    boft_ext.set_saved_activations("compact")
    y = functional.rotate(x, boft_R)
    with ops.without_kernels():
        y.sum().backward()
    assert boft_R.grad.any()


def make_layer(inputs=96, outputs=64, bias=True, dtype=torch.float32):
    config = boft_ext.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, init_weights=False)
    return boft_ext.BOFTLinear.from_linear(torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype), config)


@pytest.mark.parametrize("frozen", [None, "boft_R", "boft_s"])
@pytest.mark.parametrize("rows", [(3,), (2, 400), (1, 1037)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputed_outputs(dtype, rows, frozen):
    layer = make_layer(dtype=dtype)
    if frozen:
        getattr(layer, frozen).requires_grad_(False)
    x, dy = torch.randn(*rows, 96, dtype=dtype, requires_grad=True), torch.randn(*rows, 64, dtype=dtype)
    inputs = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    boft_ext.set_saved_activations("recompute")
    out = layer(x)
    ours = dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), dy), strict=True))
    boft_ext.set_saved_activations("exact")
    exact = layer(x)
    # Where a frozen rotation leaves no input to compute the output again, "exact" keeps that before the scale.
    assert torch.equal(out, exact) or frozen == "boft_R" and off_by(out, exact) < 4 * torch.finfo(dtype).eps
    wanted = dict(zip(inputs, torch.autograd.grad(exact, list(inputs.values()), dy), strict=True))
    assert list(ours) == ["x", *(name for name in ("boft_R", "boft_s") if name != frozen)]
    # The matrix product may sum in another order for other numbers of rows.
    assert off_by(ours.pop("x"), wanted["x"]) < 4 * torch.finfo(dtype).eps
    assert all(off_by(gradient, wanted[name]) < 0.015 for name, gradient in ours.items())


def test_recompute_saves_one_packed_input_for_layers_that_share_it():
    boft_ext.set_saved_activations("recompute")
    x, shared = torch.randn(512, 256), [make_layer(256, 512) for _ in range(3)]
    own = sum(p.nbytes for layer in shared for p in layer.parameters())
    _, different = saved_bytes(lambda: [layer(x) for layer in shared])
    assert different == own + 512 * 4 * 66


@pytest.mark.parametrize("rows", [40, 1500])
def test_threads_do_not_change_what_is_recomputed(rows):
    layer, x, dy, results = make_layer(512, 256), torch.randn(rows, 512), torch.randn(rows, 256), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(gradients("recompute", lambda: layer(x), [layer.boft_R, layer.boft_s], dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recompute_with_dropout_checkpointing_and_double_use():
    layer, x, dy = make_layer(), torch.randn(20, 96, requires_grad=True), torch.randn(20, 64)
    layer.boft_dropout = 0.5

    def run(mode, checkpointed):
        boft_ext.set_saved_activations(mode)
        torch.manual_seed(7)
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        return torch.autograd.grad(out, [x, layer.boft_R, layer.boft_s], dy, retain_graph=not checkpointed)

    wanted = run("exact", False)
    for checkpointed in (False, True):
        for ours, theirs in zip(run("recompute", checkpointed), wanted, strict=True):
            assert off_by(ours, theirs) < 0.015


def test_recompute_notices_a_parameter_changed_before_backward():
    boft_ext.set_saved_activations("recompute")
    layer = make_layer()
    out = layer(torch.randn(20, 96))
    with torch.no_grad():
        layer.boft_R.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_recompute_refuses_a_second_derivative():
    boft_ext.set_saved_activations("recompute")
    layer, x = make_layer(), torch.randn(20, 96, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        dx.sum().backward()


def test_recompute_is_compact_where_the_base_does_more_than_its_product():
    boft_ext.set_saved_activations("recompute")
    layer, x = make_layer(), torch.randn(64, 96)
    layer.base_layer.bias.requires_grad_(True)
    total = saved_bytes(lambda: layer(x))[0]
    boft_ext.set_saved_activations("compact")
    assert total == saved_bytes(lambda: layer(x))[0]


def test_opcheck():
    for dtype in (torch.float64, torch.bfloat16):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        blocks = torch.ops.boft.blocks(parameters(64, 4, 2, real), None)[0]
        x, dy = torch.randn(3, 5, 64).to(dtype), torch.randn(3, 5, 64).to(dtype)
        for transpose in (False, True):
            library.opcheck(
                torch.ops.boft.rotate.default,
                (x.clone().requires_grad_(), blocks.detach().clone().requires_grad_(), 4, 2, transpose, True),
            )
            library.opcheck(
                torch.ops.boft.rotate_backward_packed.default,
                (dy, torch.ops.boft.pack(x, 8), blocks.detach(), 4, 2, transpose, True),
            )
        s, bias = torch.randn(77, requires_grad=True), torch.randn(77, requires_grad=True)
        z = torch.randn(3, 77).to(dtype).requires_grad_()
        library.opcheck(torch.ops.boft.scale.default, (z, s, bias, True, True))
        library.opcheck(torch.ops.boft.pack.default, (z.detach(), 4))
        library.opcheck(
            torch.ops.boft.scale_backward_packed.default,
            (z.detach(), torch.ops.boft.pack(z.detach(), 4), s.detach(), bias.detach(), False, True, True),
        )


def test_compiled_layer():
    boft_ext.set_saved_activations("compact")
    layer = boft_ext.BOFTLinear(torch.nn.Linear(32, 48), boft_ext.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2))
    x = torch.randn(10, 32)
    layer(x).square().sum().backward()
    eager = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    torch.compile(layer, backend="aot_eager")(x).square().sum().backward()
    for name, wanted in eager.items():
        torch.testing.assert_close(dict(layer.named_parameters())[name].grad, wanted)


def test_refusals():
    x, boft_R = torch.randn(6, 32), parameters(32, 8, 1).detach()
    blocks = torch.ops.boft.blocks(boft_R, None)[0]
    with pytest.raises(ValueError, match="5"):
        torch.ops.boft.pack(x, 5)
    with pytest.raises(ValueError, match="34"):
        torch.ops.boft.rotate_backward_packed(x, torch.ops.boft.pack(x, 4), blocks, 8, 1, False, True)
    assert _C.cpu_kernels_in_use()
