"""Reading the attention call of a module: the result stays the same, and what cannot be read says why."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from trace_fast import ops
from trace_fast.backbones import Settings, attention_call
from trace_fast.backbones.attention_call import AttentionCall
from trace_fast.backbones.mini import Mini, MiniBackbone, MiniConfig


def features(*shape, dtype=torch.float32):
    """Return query, key and value whose attention is peaked."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, *(shape or (2, 3, 7, 12)))
    return [x.to(dtype) for x in (3 * query, key, value)]


def attend(*arguments, **options):
    """Return the result of a call without and with an `AttentionCall`, and the latter."""
    plain = functional.scaled_dot_product_attention(*arguments, **options)
    with AttentionCall() as call:
        result = functional.scaled_dot_product_attention(*arguments, **options)
    return plain, result, call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_plain_call_is_read_and_its_result_is_the_same(dtype):
    query, key, value = features(dtype=dtype)
    for options in ({}, {"scale": 12**-0.5}):
        plain, result, call = attend(query, key, value, **options)
        assert torch.equal(plain, result) and call.obstacle is None
        assert torch.equal(call.inputs.query, query) and torch.equal(call.inputs.key, key)
        exact = (query.double() @ key.double().mT * 12**-0.5).logsumexp(-1)
        assert call.inputs.lse.dtype == torch.float32 and call.inputs.lse.shape == exact.shape
        # in half precision torch sums up probabilities that it has rounded
        tolerance = 2e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(call.inputs.lse.double(), exact, rtol=0, atol=tolerance)


def test_the_dtype_is_that_of_autocast():
    query, key, value = features()
    with torch.autocast("cpu", torch.bfloat16):
        plain, result, call = attend(query, key, value)
    assert plain.dtype == torch.bfloat16 and torch.equal(plain, result)
    assert torch.equal(call.inputs.query, query.bfloat16()) and torch.equal(call.inputs.key, key.bfloat16())


class Observer(TorchFunctionMode):
    """A mode of the user, which might replace attention."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Labeled(torch.Tensor):
    """A tensor of another class."""


@pytest.mark.parametrize(
    ("arguments", "options", "obstacle"),
    [
        (features(), {"attn_mask": torch.ones(7, 7).tril().bool()}, "masks its attention"),
        (features(), {"is_causal": True}, "masks its attention"),
        (features(), {"dropout_p": 0.1}, "drops a part of its probabilities"),
        (features(), {"scale": 1.0}, "scales its logits by 1.0"),
        (features(dtype=torch.float64), {}, "calls attention in torch.float64"),
        (features(3, 7, 12), {}, "calls attention with a query (3, 7, 12) and a key (3, 7, 12)"),
        (
            [features()[0], *features(2, 1, 7, 12)[1:]],
            {"enable_gqa": True},
            "calls attention with a query (2, 3, 7, 12) and a key (2, 1, 7, 12)",
        ),
        ([x.to("meta") for x in features()], {}, "runs on meta, where torch chooses MATH for its attention"),
        ([features()[0].as_subclass(Labeled), *features()[1:]], {}, "calls attention with a Labeled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_call_is_left_alone(arguments, options, obstacle):
    results = []
    for context in (AttentionCall(), None):
        torch.manual_seed(1)
        with context or torch.no_grad():
            results.append(functional.scaled_dot_product_attention(*arguments, **options))
        if context:
            assert context.inputs is None and context.obstacle == obstacle
    one, other = results
    assert one.shape == other.shape and (one.is_meta or torch.equal(one, other))


def test_a_call_without_a_fused_op_is_left_alone():
    with sdpa_kernel(SDPBackend.MATH):
        plain, result, call = attend(*features())
    assert torch.equal(plain, result) and call.inputs is None
    assert call.obstacle == "runs on cpu, where torch chooses MATH for its attention"


def test_a_mode_of_the_user_sees_the_call():
    with Observer():
        plain, result, call = attend(*features())
    assert torch.equal(plain, result) and call.inputs is None
    assert call.obstacle == "runs in a Observer, which may replace its attention call"
    with torch.device("cpu"):  # is a mode, too, and has no part in attention
        assert attend(*features())[2].obstacle is None


def test_of_two_calls_none_is_read():
    query, key, value = features()
    with AttentionCall() as call:
        functional.scaled_dot_product_attention(query, key, value)
        again = functional.scaled_dot_product_attention(key, query, value)
    assert torch.equal(again, functional.scaled_dot_product_attention(key, query, value))
    assert call.inputs is None and call.obstacle == "calls attention 2 times"


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda q, k, v: (q, k, v), True),
        (lambda q, k, v: (q.half(), k.half(), v.half()), False),
        (lambda q, k, v: (q, k, v.requires_grad_()), False),
    ],
    ids=["float32", "half precision", "with a gradient"],
)
def test_attention_and_map_are_one_call_on_a_cpu_in_float32(change, taken):
    query, key, value = change(*features())
    with AttentionCall(lambda q, k, v: torch.zeros_like(v)) as call:
        output = functional.scaled_dot_product_attention(query, key, value)
    assert call.attended == taken == (not output.any())
    assert call.obstacle is None and (call.inputs is None) == taken


def test_a_call_that_is_not_taken_is_read():
    plain, *_ = attend(*features())
    with AttentionCall(lambda *_: None) as call:
        output = functional.scaled_dot_product_attention(*features())
    assert not call.attended and torch.equal(output, plain) and torch.equal(call.inputs.query, features()[0])


def test_the_op_that_attends_is_read_and_taken():
    query, key, value = features()
    plain = ops.attend(query, key, value)
    for attend, taken in ((None, False), (lambda *_: None, False), (lambda q, k, v: torch.zeros_like(v), True)):
        with AttentionCall(attend) as call:
            output = ops.attend(query, key, value)
        assert torch.equal(output, torch.zeros_like(value) if taken else plain)
        assert call.attended == taken and call.obstacle is None
        assert call.inputs.query is query and call.inputs.key is key and call.inputs.lse is None
    with torch.device("cpu"):  # a mode, too, which leaves the op alone
        assert torch.equal(ops.attend(query, key, value), plain)


def test_without_a_call():
    with AttentionCall() as call:
        torch.ones(2) + 1
    assert call.inputs is None and call.obstacle == "calls no scaled_dot_product_attention of torch"


def test_gradients_are_those_of_the_plain_call():
    gradients = []
    for context in (AttentionCall(), torch.enable_grad()):
        query, key, value = (x.requires_grad_() for x in features())
        with context:
            output = functional.scaled_dot_product_attention(query, key, value)
        gradients.append(torch.autograd.grad(output.square().sum(), (query, key, value)))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", attention_call.FUSED, ids=lambda backend: backend.name)
def test_ops_of_a_gpu_return_a_result_and_one_number_a_row(backend):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        query, key, value = (torch.empty(2, 3, 7, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        output, lse = attention_call.FUSED[backend](query, key, value, None)
    assert output.shape == query.shape and output.dtype == query.dtype
    assert lse.dtype == torch.float32 and lse.shape[:2] == (2, 3) and lse.shape[2] >= 7


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [40, 64, 72, 128, 160])
@pytest.mark.parametrize("backend", attention_call.FUSED, ids=lambda backend: backend.name)
def test_a_gpu_gives_the_same_result_and_our_log_sum_exp(backend, channels):
    query, key, value = (x.to("cuda") for x in features(2, 3, 259, channels, dtype=torch.bfloat16))
    with sdpa_kernel(SDPBackend(backend)):
        try:
            plain, result, call = attend(query, key, value)
        except RuntimeError as error:
            pytest.skip(f"not on this device: {error}")
    assert call.obstacle is None
    if backend != SDPBackend.CUDNN_ATTENTION:  # which may choose another plan where it returns statistics
        assert torch.equal(plain, result)
    torch.testing.assert_close(plain, result)
    exact = (query.double() @ key.double().mT * channels**-0.5).logsumexp(-1)
    torch.testing.assert_close(call.inputs.lse.double(), exact, rtol=0, atol=1e-4)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    network = Mini(MiniConfig(dim=48, depth=3, heads=4)).eval().requires_grad_(False)
    return MiniBackbone(network, Settings(size=(20, 28)))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", ["to_q", "to_out.0"])  # before and after the call
def test_no_mode_is_left_behind_after_an_error(backbone, error, layer):
    def fail(*_):
        raise error

    handle = backbone.attentions()[1].get_submodule(layer).register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(error), backbone.capture(lambda *_: None):
            backbone.predict(torch.randn(1, 3, 20, 28), torch.tensor([9]))
        assert not _get_current_function_mode_stack()
    handle.remove()
    with backbone.capture(lambda *_: None) as capture:
        backbone.predict(torch.randn(1, 3, 20, 28), torch.tensor([9]))
        assert not _get_current_function_mode_stack()
    assert capture.obstacles == [None] * 3


def test_an_error_of_one_module_does_not_show_in_the_next_forward(backbone):
    handle = backbone.attentions()[1].to_out[0].register_forward_hook(lambda *_: 1 / 0)
    blocks = []
    with backbone.capture(lambda index, *_: blocks.append(index)) as capture:
        with pytest.raises(ZeroDivisionError):
            backbone.predict(torch.randn(1, 3, 20, 28), torch.tensor([9]))
        assert blocks == [0] and capture.obstacles == [None, "has not run", "has not run"]
        handle.remove()
        backbone.predict(torch.randn(1, 3, 20, 28), torch.tensor([9]))
    assert blocks == [0, 0, 1, 2]
