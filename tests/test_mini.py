"""The embedded network, its noise levels, and the capture of its attention."""

import math
from unittest import mock

import pytest
import torch
from oracle import AttentionOracle

from trace_fast import ops, reference
from trace_fast.attention import MeanAttention
from trace_fast.backbones import Settings
from trace_fast.backbones.capture import CaptureError
from trace_fast.backbones.mini import Mini, MiniBackbone, MiniConfig
from trace_fast.backbones.rotary import apply_rotary, rotary_embedding
from trace_fast.backbones.schedule import VariancePreserving


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Mini(MiniConfig(dim=48, depth=3, heads=4)).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.fixture
def sample():
    return torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def backbone(network):
    return MiniBackbone(network, Settings(size=(20, 28)))


TIMESTEPS = torch.tensor([99, 700])


def test_output_has_the_shape_of_its_input(network, sample):
    assert network(sample, TIMESTEPS).shape == (2, 3, 20, 28)


def test_output_depends_on_the_level_and_on_every_pixel(network, sample):
    base = network(sample, TIMESTEPS)
    assert not torch.equal(base, network(sample, TIMESTEPS.flip(0)))
    touched = sample.clone()
    touched[:, :, -1, -1] += 1
    assert (network(touched, TIMESTEPS) - base)[:, :, :4, :4].abs().max() > 0  # attention reaches the far corner


def test_config_rejects_heads_that_do_not_fit():
    with pytest.raises(ValueError, match=r"dim / heads must be a multiple of 4, got dim 48 and heads 5"):
        Mini(MiniConfig(dim=48, heads=5))


@pytest.mark.parametrize("size", [(21, 28), (0, 28), (20, 26)])
def test_grid_rejects_sizes_that_are_no_multiples_of_the_patch(network, size):
    with pytest.raises(ValueError, match="size must be positive multiples of 4 pixels"):
        MiniBackbone(network, Settings(size=(20, 28))).grid(size)


def test_rotary_keeps_lengths_and_sees_only_relative_positions():
    height, width, dim = 3, 5, 8
    rotary = rotary_embedding(height, width, dim)
    query, key = torch.randn(2, dim)
    turned = apply_rotary(torch.stack([query, key])[None, :, None].expand(1, 2, 15, dim).reshape(2, 15, 1, dim), rotary)
    lengths = torch.stack([query, key]).norm(dim=-1)[:, None, None].expand(2, 15, 1)
    torch.testing.assert_close(turned.norm(dim=-1), lengths)
    scores = (turned[0, :, 0] @ turned[1, :, 0].T).view(height, width, height, width)
    # (0,1) -> (1,3) and (1,2) -> (2,4) are the same move
    torch.testing.assert_close(scores[0, 1, 1, 3], scores[1, 2, 2, 4])
    assert (scores[0, 1, 1, 3] - scores[0, 1, 1, 2]).abs() > 1e-4


def test_capture_passes_on_exactly_what_attention_receives(network, backbone, sample):
    inputs = {}
    with AttentionOracle() as oracle, backbone.capture(lambda i, q, k, *_: inputs.update({i: (q.clone(), k.clone())})):
        network(sample, TIMESTEPS)
    assert sorted(inputs) == [0, 1, 2] and len(oracle.calls) == 3
    for index, (query, key) in enumerate(oracle.calls):
        assert query.shape == (2, 4, 35, 12)
        assert torch.equal(inputs[index][0], query) and torch.equal(inputs[index][1], key)


def test_capture_leaves_the_output_bit_equal_and_no_hook_behind(network, backbone, sample):
    plain = network(sample, TIMESTEPS)
    with backbone.capture(lambda *_: None) as capture:
        captured = network(sample, TIMESTEPS)
    assert capture.captured == [True] * 3
    assert torch.equal(plain, captured)
    for module in network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


class TestAttend:
    """A pass in which every block adds its map to the total of a capture itself."""

    def trace(self, network, backbone, sample, fused):
        """Return the output and the mean map of a pass, and how often each op ran."""
        mean = MeanAttention(torch.empty(2, 35, 35), [(5, 7)] * 3)
        mean.clear()
        with (
            mock.patch.object(ops, "attend", wraps=ops.attend) as attend,
            mock.patch.object(ops, "accumulate_attention", wraps=ops.accumulate_attention) as accumulate,
            backbone.capture(mean.on_attention, attend=mean.attend if fused else None) as capture,
        ):
            output = network(sample, TIMESTEPS)
        assert capture.captured == [True] * 3
        totals = sum(len(call.args) > 3 for call in attend.call_args_list)
        return output, mean.finish(), totals, accumulate.call_count

    def test_logits_are_computed_once(self, network, backbone, sample):
        plain = network(sample, TIMESTEPS)
        output, attention, attended, accumulated = self.trace(network, backbone, sample, True)
        assert (attended, accumulated) == (3, 0)
        assert torch.equal(output, plain)
        output, expected, attended, accumulated = self.trace(network, backbone, sample, False)
        assert (attended, accumulated) == (0, 3)
        assert torch.equal(output, plain)
        assert torch.equal(attention, expected)

    def test_a_subset_of_blocks(self, network, backbone, sample):
        mean = MeanAttention(torch.empty(2, 35, 35), [(5, 7)])
        mean.clear()
        with backbone.capture(mean.on_attention, [1], mean.attend):
            network(sample, TIMESTEPS)
        inputs = []
        with backbone.capture(lambda _, query, key, *__: inputs.append((query, key)), [1]):
            network(sample, TIMESTEPS)
        assert torch.equal(mean.finish(), ops.attention_map(*inputs[0]))

    def test_with_gradients_it_is_attention_of_torch(self, network, backbone, sample):
        network.requires_grad_(True)
        with mock.patch.object(ops, "attend") as attend:
            network(sample, TIMESTEPS).sum().backward()
        assert not attend.called and network.blocks[0].attn.to_v.weight.grad is not None


def test_capture_removes_its_hooks_after_an_error(network, backbone, sample):
    with pytest.raises(ZeroDivisionError), backbone.capture(lambda *_: 1 / 0):
        network(sample, TIMESTEPS)
    for module in network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_capture_refuses_layers_that_are_not_declared_and_sets_no_hook(network, backbone):
    network.blocks[1].attn.norm_q = None
    message = r"must have the layers norm_q and norm_k, .* got Attention with norm_k, to_k, to_out, to_q, to_v;"
    with pytest.raises(CaptureError, match=message), backbone.capture(lambda *_: None):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_capture_complains_of_a_module_that_does_not_run(network, backbone, sample):
    network.blocks[1].forward = lambda x, *_: x
    with (
        pytest.raises(CaptureError, match=r"got nothing from 1 of 3 modules \(Attention\)"),
        backbone.capture(lambda *_: None),
    ):
        network(sample, TIMESTEPS)


def test_captured_map_is_the_networks_own(network, backbone, sample):
    """Compare the output of a block with its values, averaged by the captured map alone."""
    inputs, values, outputs = {}, {}, {}
    attention = network.blocks[1].attn
    handles = [
        attention.to_v.register_forward_hook(lambda _, __, out: values.update(v=out)),
        attention.to_out[0].register_forward_hook(lambda _, args, __: outputs.update(mixed=args[0])),
    ]
    with backbone.capture(lambda _, q, k, *others: inputs.update(q=q, k=k), [1]):
        network(sample, TIMESTEPS)
    for handle in handles:
        handle.remove()
    mixed = outputs["mixed"].unflatten(-1, (4, -1))  # (B, N, H, d)
    for head in range(4):
        one = (inputs["q"][:, head : head + 1].double(), inputs["k"][:, head : head + 1].double())
        attended = reference.attention_map(*one) @ values["v"].double().unflatten(-1, (4, -1))[:, :, head]
        torch.testing.assert_close(attended, mixed[:, :, head].double(), atol=1e-5, rtol=1e-5)


def test_schedule_is_that_of_stable_diffusion():
    signal, sigma = VariancePreserving().coefficients(torch.tensor([0, 1, 999]))
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2 for t in range(1000)]
    assert signal.flatten()[0].item() ** 2 == pytest.approx(1 - betas[0], rel=1e-6)
    assert signal.flatten()[1].item() == pytest.approx(math.sqrt((1 - betas[0]) * (1 - betas[1])), rel=1e-6)
    assert signal.flatten()[2].item() ** 2 == pytest.approx(math.prod(1 - b for b in betas), rel=1e-4)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones_like(signal))


def test_inversion_with_the_true_velocity_stays_on_the_noising_path():
    schedule = VariancePreserving()
    latent, noise = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64).unbind(0)
    now, following = torch.tensor([99, 500]), torch.tensor([199, 999])
    step = schedule.invert(schedule.noise(latent, noise, now), schedule.velocity(latent, noise, now), now, following)
    torch.testing.assert_close(step, schedule.noise(latent, noise, following), atol=1e-6, rtol=1e-6)
