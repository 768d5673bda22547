"""How work reaches the GPU: streams, graphs, torch.compile, synchronisation, launches, several devices."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from boft_ext import BOFTConfig, BOFTLinear, functional

DELAY_CYCLES = 50_000_000  # about 30 ms


def make(device, dtype=torch.float32, d=256, out=192, rows=300, m=2):
    adapter = BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=m, init_weights=False)
    layer = BOFTLinear.from_linear(nn.Linear(d, out).to(device, dtype), adapter)
    x, dy = torch.randn(rows, d).to(device, dtype).requires_grad_(), torch.randn(rows, out).to(device, dtype)
    return layer, x, dy


def step(layer, x, dy):
    """Output and the gradients of the input and of both parameters."""
    out = layer(x)
    return out, *torch.autograd.grad(out, [x, layer.boft_R, layer.boft_s], dy)


def assert_equal(ours, expected):
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_work_of_a_side_stream_waits_for_its_producer_and_for_nothing_else(dtype, cuda):
    layer, x, dy = make(cuda, dtype)
    values = torch.randn_like(x)
    expected = step(layer, values.requires_grad_(), dy)
    stream = torch.cuda.Stream(cuda)
    with torch.cuda.stream(stream):
        step(layer, x, dy)  # its memory and cuBLAS's are allocated now, which may wait
    torch.cuda.synchronize(cuda)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY_CYCLES)
        late = torch.full_like(x, torch.nan).copy_(values.detach()).requires_grad_()
        results = step(layer, late, dy)
        # Nothing waited, and nothing was queued on the default stream.
        assert not stream.query()
        assert torch.cuda.default_stream(cuda).query()
    stream.synchronize()
    assert_equal(results, expected)


def test_streams_side_by_side(cuda):
    layer, x, dy = make(cuda, torch.bfloat16, rows=2000)
    expected = step(layer, x, dy)
    torch.cuda.synchronize(cuda)
    streams = [torch.cuda.Stream(cuda) for _ in range(4)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(layer, x, dy))
    torch.cuda.synchronize(cuda)
    for result in results:
        assert_equal(result, expected)


@pytest.mark.parametrize("m", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_capture_and_replay(dtype, m, cuda):
    """With 6 factors a rotation has phases that wait for each other."""
    layer, x, dy = make(cuda, dtype, m=m)
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x, dy)
    torch.cuda.current_stream(cuda).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x, dy)
    for _ in range(2):
        new = torch.randn_like(x)
        with torch.no_grad():
            x.copy_(new)
            layer.boft_R.copy_(torch.randn_like(layer.boft_R))
            layer.boft_s.add_(0.25)
        graph.replay()
        first = [tensor.clone() for tensor in captured]
        graph.replay()
        assert_equal(captured, first)
        assert_equal(step(layer, new.requires_grad_(), dy), first)


def test_inference_is_captured_too(cuda):
    """Blocks are kept between calls without gradients: a graph must rebuild them, not read what was kept."""
    layer, x, _ = make(cuda, torch.bfloat16)
    with torch.no_grad():
        layer(x)
        stream = torch.cuda.Stream(cuda)
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.synchronize(cuda)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        layer.boft_R.copy_(torch.randn_like(layer.boft_R))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, layer(x))


def test_nothing_synchronises(cuda):
    layer, x, dy = make(cuda, torch.bfloat16)
    step(layer, x, dy)
    with torch.no_grad():
        layer(x)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, dy)
        with torch.no_grad():
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def launches(call):
    """The names of the kernels, copies and fills that the GPU runs for a call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    return [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


def test_launches_of_the_operators(cuda):
    _, x, dy = make(cuda, torch.bfloat16, out=256)
    boft_R, s, bias = (torch.rand(shape, device=cuda) for shape in ((2, 32, 8, 8), 256, 256))
    factors = torch.rand(len(x), device=cuda)
    blocks, q = torch.ops.boft.blocks(boft_R, None)
    ops, x, dblocks = torch.ops.boft, x.detach(), torch.rand_like(blocks)
    for call in (
        lambda: ops.blocks(boft_R, None),
        lambda: ops.rotate(x, blocks, 8, 2, False),
        lambda: ops.merge(x, blocks, 8, 2, factors, True),
        lambda: ops.scale(x, s, bias, False),
        lambda: ops.scale_backward(dy, x, s, bias, False, True, True, False),
        lambda: ops.rotate_backward(dy, x, blocks, 8, 2, False, True, True),
        lambda: ops.blocks_backward(dblocks, q, None),
    ):
        ran = launches(call)
        assert len(ran) == 1, ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("d, b, m", [(256, 64, 1), (320, 80, 1), (320, 160, 1), (256, 8, 6), (1280, 80, 5)])
def test_a_rotation_of_any_shape_is_one_launch_each_way(d, b, m, dtype, cuda):
    """Small and large blocks, one level and several."""
    ops, real = torch.ops.boft, torch.promote_types(dtype, torch.float32)
    blocks, _ = ops.blocks(torch.randn(m, d // b, b, b, device=cuda, dtype=real), None)
    x, dy = (torch.randn(300, d, device=cuda).to(dtype) for _ in range(2))
    s = torch.rand(300, device=cuda, dtype=real)
    for call in (
        lambda: ops.rotate(x, blocks, b, m, False),
        lambda: ops.merge(x, blocks, b, m, s, True),
        lambda: ops.merge(x, blocks, b, m, None, True),
        lambda: ops.rotate_backward(dy, x, blocks, b, m, False, True, True),
        lambda: ops.rotate_backward(dy, x, blocks, b, m, False, True, False),
        lambda: ops.rotate_backward(dy, x, blocks, b, m, False, False, True),
    ):
        ran = launches(call)
        assert len(ran) == 1, ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_a_layer(dtype, cuda):
    layer, x, dy = make(cuda, dtype)

    def base():
        return torch.autograd.grad(layer.base_layer(x), x, dy)

    forward, base_forward = launches(lambda: layer(x)), launches(lambda: layer.base_layer(x))
    whole, base_whole = launches(lambda: step(layer, x, dy)), launches(base)
    assert len(forward) - len(base_forward) <= 3, forward
    assert len(whole) - len(base_whole) <= 3 + 4, whole


def test_a_tensor_of_another_device_than_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer, x, dy = make(torch.device("cuda", 0))
    expected = step(layer, x, dy)
    with torch.cuda.device(1):
        assert_equal(step(layer, x, dy), expected)
        assert torch.cuda.current_device() == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(dtype, backend, device):
    layer, x, dy = make(device, dtype, rows=64)
    expected = step(layer, x, dy)
    results = step(torch.compile(layer, fullgraph=True, backend=backend), x, dy)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for ours, wanted in zip(results, expected, strict=True):
        assert (ours - wanted).norm() <= tolerance * wanted.norm()


def test_compile_of_any_number_of_rows(device):
    boft_R = torch.randn(2, 8, 8, 8, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: functional.rotate(x.sin(), boft_R).square().sum(), fullgraph=True, dynamic=True)
    for rows in (3, 17, 64):
        x = torch.randn(rows, 64, device=device)
        torch.testing.assert_close(compiled(x), functional.rotate(x.sin(), boft_R).square().sum())
