"""The readout and its gradients, on every implementation, against the reference in float64."""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from op_examples import EACH_BACKEND, INSTRUCTION_SETS
from torch.testing import assert_close

from trace_fast import _C, ops, reference
from trace_fast.testing import assert_no_worse, random_features

SHAPES = [
    *itertools.product((1, 3), (1, 5), [(1, 1), (2, 3), (3, 7)]),
    *[(3, 1, (16, 24)), (1, 5, (31, 17))],
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps
NAMES = ("query", "key", "values")


def random_inputs(batch, heads, tokens, channels, columns, peak=3.0):
    """Return features whose logits are `peak` times standard normal, values, and a gradient of the readout."""
    query, key = random_features(batch, heads, tokens, channels)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(tokens, columns, generator=generator)
    grad = torch.randn(batch, tokens, columns, generator=generator)
    return [query / 20 * peak, key, values, grad]


def differentiate(module, query, key, values, grad, scale=None):
    """Return the readout, from `ops` or from `reference`, and the gradients of its inputs."""
    inputs = [x.detach().requires_grad_() for x in (query, key, values)]
    out = module.readout(*inputs, scale)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def summed_sizes(query, key, values, grad, scale=None):
    """Return the largest sum of absolute values among the sums of the readout, and among those of each gradient.

    The terms of these sums cancel, so that their errors are relative to the terms and not to the sum: the gradient of a
    logit is p (dp - mean of dp), where the means of dp over a row cancel, as do the rows in the gradient of a key.
    """
    query, key, values, grad = (x.double() for x in (query, key, values, grad))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    p = (scale * query @ key.mT).softmax(-1)
    slopes = (grad.abs() / query.shape[1] @ values.abs().mT)[:, None]
    slopes = abs(scale) * p * (slopes + (p * slopes).sum(-1, keepdim=True))
    sums = p.mean(1) @ values.abs(), slopes @ key.abs(), slopes.mT @ query.abs(), (p.mean(1).mT @ grad.abs()).sum(0)
    return [float(x.max()) for x in sums]


def expectation(query, key, values, grad, scale=None):
    """Return the readout and its gradients in float64 and by plain torch, and the sizes of the terms of their sums."""
    inputs = query, key, values, grad
    exact = differentiate(reference, *(x.double() for x in inputs), scale)
    eager = differentiate(reference, *inputs, scale)
    # a logit of size L has an error of L eps / 2 as a float32, and so have the shares of two keys in a row. The
    # backward pass reads the logarithm of the sum of the row, which has the same error again
    logit = EPS * largest_logit(query, key, scale)
    shares = logit / 2, logit, logit, logit
    sizes = [
        size * max(1.0, share / torch.finfo(x.dtype).eps)
        for x, size, share in zip(eager, summed_sizes(*inputs, scale), shares, strict=True)
    ]
    return exact, eager, sizes


def assert_readout_no_worse(device, query, key, values, grad, scale=None, expected=None):
    inputs = query, key, values, grad
    out = differentiate(ops, *(x.to(device) for x in inputs), scale)
    for result, exact, eager, size in zip(out, *(expected or expectation(*inputs, scale)), strict=True):
        assert result.device == device
        assert_no_worse(result, exact, eager, magnitude=size)


def largest_logit(query, key, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    return scale * float((query.double() @ key.double().mT).abs().max())


@pytest.mark.parametrize(("batch", "heads", "grid"), SHAPES, ids=str)
def test_no_worse_than_eager(batch, heads, grid, device, tiles):
    tokens = grid[0] * grid[1]
    if tokens > 100:
        tiles(256, 1024, interpreted_only=True)
    assert_readout_no_worse(device, *random_inputs(batch, heads, tokens, 13, 9))


@pytest.fixture(scope="module")
def large_grid():
    """Return inputs of 64 x 96 tokens and their expectation."""
    inputs = random_inputs(1, 1, 64 * 96, 16, 9)
    return inputs, expectation(*inputs)


@pytest.mark.slow
def test_no_worse_than_eager_on_a_large_grid(device, tiles, large_grid):
    tiles(1024, 1024, interpreted_only=True)
    inputs, expected = large_grid
    assert_readout_no_worse(device, *inputs, expected=expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 9, 16, 64])
def test_columns(columns, dtype, device):
    assert_readout_no_worse(device, *(x.to(dtype) for x in random_inputs(2, 2, 35, 24, columns)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 13, 40, 64, 72, 80, 128, 160, 256])
def test_channels(channels, dtype, device):
    query, key, values, grad = random_inputs(1, 2, 35, channels, 9)
    assert_readout_no_worse(device, query.to(dtype), key.to(dtype), values, grad)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_values_of_another_dtype(dtype, device):
    query, key, values, grad = random_inputs(2, 2, 35, 24, 9)
    assert_readout_no_worse(device, query, key, values.to(dtype), grad)
    assert_readout_no_worse(device, query.to(dtype), key.to(dtype), values.half(), grad)


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 64)], ids=str)
def test_tokens_that_no_tile_divides(tile, device, tiles):
    tiles(*tile)
    assert_readout_no_worse(device, *random_inputs(1, 2, 51, 24, 9))
    # and a number that every tile divides, so that loads are not masked
    assert_readout_no_worse(device, *random_inputs(1, 2, 64, 24, 9))


def test_peaked_attention(device):
    assert_readout_no_worse(device, *random_inputs(2, 2, 51, 40, 9, peak=20.0))


@pytest.mark.parametrize("scale", [0.1, -0.3, 0.0])
def test_scale(scale, device):
    assert_readout_no_worse(device, *random_inputs(2, 2, 35, 16, 9), scale=scale)


@pytest.mark.parametrize("polynomial", [2, 4])
def test_polynomial_exponentials(polynomial, device, tiles):
    tiles(16, 32, polynomial)
    assert_readout_no_worse(device, *random_inputs(2, 2, 51, 24, 9))


def test_by_hand(device):
    query = torch.tensor([[[[math.log(3)], [0]], [[0], [0]]]], device=device, requires_grad=True)
    key = torch.tensor([[[[1.0], [0]], [[5], [7]]]], device=device, requires_grad=True)
    values = torch.tensor([[8.0, 0.0], [0.0, 16.0]], device=device, requires_grad=True)
    # the map is (5/8, 3/8), (1/2, 1/2); that of the first head alone (3/4, 1/4), (1/2, 1/2)
    out = ops.readout(query, key, values, scale=1.0)
    assert_close(out, torch.tensor([[[5.0, 6.0], [4.0, 8.0]]], device=device))
    out[0, 0, 0].backward()
    assert_close(values.grad, torch.tensor([[5 / 8, 0], [3 / 8, 0]], device=device))
    # d/d logits of half of 8 p: 4 p (1 - p) = 3/4 for the first key, and -3/4 for the second
    assert_close(query.grad[0, :, :, 0], torch.tensor([[3 / 4, 0], [1 * (5 - 7), 0]], device=device))
    slope = math.log(3) * 3 / 4
    assert_close(key.grad[0, :, :, 0], torch.tensor([[slope, -slope], [0, 0]], device=device))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_one_input_alone(name, device):
    *inputs, grad = (x.to(device) for x in random_inputs(2, 2, 21, 8, 9))
    together = differentiate(ops, *inputs, grad)[1:][NAMES.index(name)]
    inputs = {key: x.requires_grad_(key == name) for key, x in zip(NAMES, inputs, strict=True)}
    ops.readout(**inputs).backward(grad)
    assert torch.equal(inputs[name].grad, together)
    assert all(x.grad is None for key, x in inputs.items() if key != name)


def test_strided_inputs_give_the_same_bits(device):
    query, key, values, grad = (x.to(device) for x in random_inputs(2, 3, 51, 8, 9))
    expected = differentiate(ops, query, key, values, grad)
    projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    apart = [x.mT.contiguous().mT for x in (query, key, values, grad)]
    assert not any(x.is_contiguous() for x in (*projected, *apart))
    for inputs in ((*projected, values, grad), apart):
        for result, value in zip(differentiate(ops, *inputs), expected, strict=True):
            assert torch.equal(result, value)


def test_inputs_shared_by_heads_images_and_tokens(device):
    query, key, values, grad = (x.to(device) for x in random_inputs(2, 3, 21, 8, 9))
    inputs = query, key[:1, :1].expand_as(key), values[:, :1].expand_as(values), grad[:, :1].expand_as(grad)
    expected = differentiate(ops, *(x.contiguous() for x in inputs))
    for result, value in zip(differentiate(ops, *inputs), expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 15])
def test_inputs_at_any_offset(offset, channels, dtype, device):
    inputs = [x.to(device, dtype) for x in random_inputs(2, 3, 21, channels, 9)]
    expected = differentiate(ops, *inputs)
    shifted = []
    for x in inputs:
        buffer = torch.full((x.numel() + 64,), math.nan, dtype=dtype, device=device)
        shifted.append(buffer[offset : offset + x.numel()].view_as(x).copy_(x))
    for result, value in zip(differentiate(ops, *shifted), expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "channels", "columns"), [(21, 5, 9), (51, 24, 16)])
def test_nothing_else_is_written(tokens, channels, columns, dtype, device, tiles, guards):
    tiles(16, 32)
    inputs = [x.to(device, dtype) for x in random_inputs(2, 1, tokens, channels, columns)]
    before = [x.clone() for x in inputs]
    assert all(x.isfinite().all() for x in differentiate(ops, *inputs, scale=-0.3))
    for x, value in zip(inputs, before, strict=True):
        assert torch.equal(x, value)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum; that of a device ignores NaN too
@pytest.mark.parametrize("poisoned", NAMES)
def test_nan_is_propagated(poisoned, device):
    inputs = dict(zip(NAMES, random_inputs(2, 3, 51, 8, 9), strict=False))
    x = inputs[poisoned]
    x[(1, 2, 20, 4)[-x.ndim :]] = math.nan
    expected = reference.readout(**inputs).isnan()
    assert expected.any() and not expected.all()
    out = ops.readout(**{name: x.to(device) for name, x in inputs.items()})
    assert torch.equal(out.isnan().cpu(), expected)


def test_bits_are_the_same_in_every_run(device):
    inputs = [x.to(device) for x in random_inputs(1, 2, 51, 40, 9)]
    first = differentiate(ops, *inputs)
    for _ in range(2):
        for result, value in zip(differentiate(ops, *inputs), first, strict=True):
            assert torch.equal(result, value)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_bits_do_not_depend_on_threads(instructions, monkeypatch):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "native")
    inputs, before = random_inputs(2, 3, 131, 40, 9), torch.get_num_threads()
    _C.set_instruction_set(instructions)
    try:
        torch.set_num_threads(1)
        first = differentiate(ops, *inputs)
        torch.set_num_threads(2)
        again = differentiate(ops, *inputs)
    finally:
        torch.set_num_threads(before)
        _C.set_instruction_set(_C.instruction_sets()[-1])
    assert all(map(torch.equal, again, first))


def test_is_the_map_times_the_values():
    query, key, values, _ = (x.double() for x in random_inputs(3, 5, 21, 13, 9))
    expected = reference.attention_map(query, key, -0.3) @ values
    assert_close(reference.readout(query, key, values, -0.3), expected, rtol=1e-13, atol=1e-13)


def test_convolution_over_the_map_is_nine_shifted_columns():
    # the paper's decoder: a 3 x 3 convolution for which the attention of token i is N channels at the position of i
    height, width = 3, 7
    query, key, values, _ = (x.double() for x in random_inputs(2, 2, 21, 8, 9))
    attention = reference.attention_map(query, key)
    channels = attention.mT.unflatten(2, (height, width))  # (B, N, h, w)
    expected = F.conv2d(channels, values.view(1, 21, 3, 3), padding=1)[:, 0]
    columns = reference.readout(query, key, values).mT.unflatten(2, (height, width))  # (B, 9, h, w)
    padded = F.pad(columns, (1, 1, 1, 1))
    shifts = itertools.product(range(3), range(3))
    total = sum(padded[:, 3 * y + x, y : y + height, x : x + width] for y, x in shifts)
    assert_close(total, expected, rtol=1e-13, atol=1e-13)


def test_second_derivative_raises(device):
    *inputs, grad = (x.to(device) for x in random_inputs(1, 2, 6, 4, 3))
    query, key, values = (x.requires_grad_() for x in inputs)
    first = torch.autograd.grad(ops.readout(query, key, values), query, grad, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


def test_no_graph_where_no_gradient_is_needed(device):
    query, key, values, _ = (x.to(device) for x in random_inputs(1, 2, 6, 4, 3))
    assert ops.readout(query, key, values).grad_fn is None
    with torch.no_grad():
        assert ops.readout(query.requires_grad_(), key, values).grad_fn is None
    assert ops.readout(query, key, values).requires_grad


def test_empty_batch(device):
    query, key = torch.empty(2, 0, 2, 6, 4, device=device, requires_grad=True)
    values = torch.ones(6, 3, device=device, requires_grad=True)
    out = ops.readout(query, key, values)
    assert out.shape == (0, 6, 3)
    out.sum().backward()
    assert torch.equal(values.grad, torch.zeros_like(values))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": None}, TypeError, "readout: query must be a float32 or float16 or bfloat16 tensor, got NoneType"),
        ({"key": torch.ones(1, 2, 6, 4).double()}, TypeError, "readout: key must be .*, got float64"),
        ({"key": torch.ones(1, 2, 6, 4).half()}, TypeError, "readout: key must be float32 like query, got float16"),
        ({"values": torch.ones(6, 3).double()}, TypeError, "readout: values must be .*, got float64"),
        ({"query": torch.ones(6, 4)}, ValueError, r"readout: query must be \(B, H, N, d\), got \(6, 4\)"),
        ({"key": torch.ones(1, 2, 5, 4)}, ValueError, r"key must be \(B, H, N, d\) with B = 1, .*, got \(1, 2, 5, 4\)"),
        ({"values": torch.ones(5, 3)}, ValueError, r"readout: values must be \(N, C\) with N = 6, got \(5, 3\)"),
        ({"values": torch.ones(1, 6, 3)}, ValueError, r"values must be \(N, C\) with N = 6, got \(1, 6, 3\)"),
        ({"values": torch.ones(6, 0)}, ValueError, r"values must be \(N, C\) with N = 6, got \(6, 0\)"),
        ({"values": torch.ones(6, 65)}, ValueError, "readout: values must be at most 64 columns wide, got 65"),
        (
            {"query": torch.ones(1, 2, 6, 257), "key": torch.ones(1, 2, 6, 257)},
            ValueError,
            "readout: query must be at most 256 channels per head, got 257",
        ),
        ({"key": torch.ones(1, 2, 6, 4, device="meta")}, ValueError, "key must be on {device} like query, got meta"),
        ({"values": torch.ones(6, 3, device="meta")}, ValueError, "values must be on {device} like query, got meta"),
        ({"scale": "1"}, TypeError, "readout: scale must be a number, got str"),
    ],
)
def test_errors(change, error, match, device):
    arguments = {"query": torch.ones(1, 2, 6, 4), "key": torch.ones(1, 2, 6, 4), "values": torch.ones(6, 3), **change}
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.device.type != "meta":
            arguments[name] = x.to(device)
    with pytest.raises(error, match=match.replace("{device}", str(device))):
        ops.readout(**arguments)


def samples(device):
    query, key, values, grad = (x.to(device) for x in random_inputs(2, 3, 6, 4, 3))
    query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    half = query.bfloat16(), key.bfloat16(), values
    differentiable = tuple(x.clone().requires_grad_() for x in (query, key, values))
    backend = os.environ["TRACE_FAST_BACKEND"]
    parts, lse = torch.ops.trace_fast.readout(query, key, values, 0.5, backend)[1:]
    return [
        (torch.ops.trace_fast.readout, (query, key, values, 0.5, backend)),
        (torch.ops.trace_fast.readout, (*half, -0.5, backend)),
        (torch.ops.trace_fast.readout, (*differentiable, 0.5, backend)),
        (torch.ops.trace_fast.readout_backward, (grad, query, key, values, parts, lse, 0.5, backend)),
        (torch.ops.trace_fast.readout_backward, (grad.mT.contiguous().mT, *half, parts, lse, 0.5, backend)),
    ]


@pytest.mark.slow
@EACH_BACKEND
@pytest.mark.parametrize("sample", range(5))
def test_opcheck(sample, device):
    op, arguments = samples(device)[sample]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.slow
@EACH_BACKEND
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_graph_break(backend, device):
    *inputs, grad = (x.to(device) for x in random_inputs(2, 3, 6, 4, 9))

    def loss(query, key, values):
        return (ops.readout(query, 2 * key, values) * grad).sum()

    expected, results = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    loss(*expected).backward()
    torch.compile(loss, fullgraph=True, backend=backend)(*results).backward()
    for result, value in zip(results, expected, strict=True):
        assert_close(result.grad, value.grad)
