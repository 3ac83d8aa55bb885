"""The diffusion families: real diffusers classes of tiny random configurations, built offline."""

import contextlib
import copy
import functools
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import diffusers
import pytest
import torch
import transformers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from op_examples import TRITON
from oracle import AttentionOracle, assert_read_from_the_call
from tiny import FAMILIES, SIZE, language, pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from trace_fast import Tracer, ops, reference
from trace_fast.attention import MeanAttention
from trace_fast.backbones import wrap_pipeline
from trace_fast.backbones.base import default_dtype
from trace_fast.backbones.schedule import RectifiedFlow, VariancePreserving


def make(family, size=SIZE):
    torch.manual_seed(0)
    parts, empty_prompt = FAMILIES[family].parts()
    for name in ("unet", "transformer", "vae"):
        if name in parts:
            for parameter in parts[name].eval().parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    pipe = SimpleNamespace(**parts)
    return pipe, wrap_pipeline(pipe, empty_prompt, size)


# two UNets differ in little, and so on: `make test-fast` takes a network of each kind of attention
QUICK = ("sd15", "pixart", "sd3.5-medium", "flux.2")


@pytest.fixture(params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES])
def family(request):
    return request.param


@torch.no_grad()
def run(backbone, oracle=None):
    """Call the network once, with an oracle that records its attention."""
    images = torch.rand(2, 3, *backbone.settings.size, generator=torch.Generator().manual_seed(1))
    latent = backbone.encode(images)
    level = torch.tensor([99, 700])
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    sample = backbone.schedule.noise(latent, noise, level)
    with oracle or contextlib.nullcontext():
        return backbone.predict(sample, level)


def captured(backbone, forward=run):
    """Return the prediction, and (index, query, key) in the order in which blocks were read."""
    inputs = []
    with backbone.capture(lambda *block: inputs.append(block[:3])):
        prediction = forward(backbone)
    return prediction, inputs


def assert_alike(first, second):
    """Compare queries and keys that were captured twice, in ways that round differently."""
    for (_, *expected), (_, *read) in zip(first, second, strict=True):
        for one, other in zip(expected, read, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_query_and_key_are_what_the_product_receives(family):
    _, backbone = make(family)
    count, image = FAMILIES[family].blocks, FAMILIES[family].image
    oracle = AttentionOracle()
    _, outputs = captured(backbone, lambda backbone: run(backbone, oracle))
    assert len(outputs) == len(backbone.attentions()) == count
    assert [index for index, *_ in outputs] == list(range(count))  # in the order in which they run
    grids = backbone.grids(SIZE)
    calls = FAMILIES[family].calls(oracle)
    assert len(calls) == count
    for (index, query, key), (expected_query, expected_key) in zip(outputs, calls, strict=True):
        tokens = grids[index][0] * grids[index][1]
        assert torch.equal(query, expected_query[:, :, image(tokens)])
        assert torch.equal(key, expected_key[:, :, image(tokens)])


def read_from_calls(family, backbone):
    """Return (index, query, key) of every block, after comparing them, and log-sum-exps, with the attention calls."""
    oracle, blocks = AttentionOracle(), []
    replays = mock.patch.object(backbone, "attention_inputs", side_effect=AssertionError("layers are replayed"))
    with replays, backbone.capture(lambda *block: blocks.append(block)) as capture:
        run(backbone, oracle)
    assert capture.obstacles == [None] * FAMILIES[family].blocks
    for block, call in zip(blocks, FAMILIES[family].calls(oracle), strict=True):
        assert_read_from_the_call(block, call, FAMILIES[family].image(block[1].shape[2]))
    return [block[:3] for block in blocks]


def test_log_sum_exp_is_that_of_the_attention_call(family):
    _, backbone = make(family)
    read_from_calls(family, backbone)


def test_projections_are_read_where_the_call_is_not(family):
    """Compare both ways: the layers that a family declares must give what the call receives, exactly."""
    _, backbone = make(family)
    oracle, blocks = AttentionOracle(), []
    with sdpa_kernel(SDPBackend.MATH), backbone.capture(lambda *block: blocks.append(block)) as capture:
        run(backbone, oracle)
    assert set(capture.obstacles) == {"runs on cpu, where torch chooses MATH for its attention"}
    for (_, query, key, *more), call in zip(blocks, FAMILIES[family].calls(oracle), strict=True):
        image = FAMILIES[family].image(query.shape[2])
        assert torch.equal(query, call[0][:, :, image]) and torch.equal(key, call[1][:, :, image])
        assert more == [None, None]


def test_capture_changes_no_bit_of_the_output(family):
    _, backbone = make(family)
    plain = run(backbone)
    prediction, _ = captured(backbone)
    assert torch.equal(plain, prediction)
    assert plain.shape == backbone.encode(torch.rand(2, 3, *SIZE)).shape and plain.isfinite().all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.network.modules())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_under_autocast_they_have_its_dtype(family):
    _, backbone = make(family)
    with torch.autocast("cpu", torch.bfloat16):
        _, outputs = captured(backbone)
    assert {x.dtype for _, *inputs in outputs for x in inputs} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("cuda", (9, 0), "bfloat16"),
        ("cuda", (8, 0), "bfloat16"),
        ("cuda", (7, 5), "float16"),
        ("cpu", (9, 0), "float32"),
    ],
)
def test_weights_are_in_half_precision_that_the_gpu_computes_in(device, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert default_dtype(torch.device(device)) == getattr(torch, dtype)


def test_aggregated_map_is_the_definition(family):
    pipe, backbone = make(family)
    tracer = Tracer.from_pipeline(pipe, size=SIZE, empty_prompt=backbone.empty_prompt)
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    kl, abdiv = tracer.scan(images, timesteps=(0, 499), noising="gaussian")
    grids = backbone.grids(SIZE)
    finest = max(grids, key=lambda grid: grid[0] * grid[1])
    latent = backbone.encode(images)
    noise = torch.randn((1, *latent.shape[1:]), generator=torch.Generator().manual_seed(0))
    maps = []
    for level in (0, 499):
        timestep = torch.full((2,), level)
        _, blocks = captured(
            backbone, torch.no_grad()(lambda b, t=timestep: b.predict(b.schedule.noise(latent, noise, t), t))
        )
        read = [
            reference.resize_attention(reference.attention_map(q.double(), k.double()), grids[index], finest)
            for index, q, k in blocks
        ]
        maps.append(torch.stack(read).mean(0))
    rows = maps[0].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-12)
    # two runs of a float32 network in batches of other sizes
    torch.testing.assert_close(kl[:, 0].double(), reference.step_kl(*maps), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(abdiv[:, 1].double(), reference.abdiv(maps[1], *finest), rtol=1e-3, atol=1e-6)


def test_joint_softmax_renormalized_is_the_softmax_over_image_keys():
    _, backbone = make("flux.1-dev")
    oracle = AttentionOracle()
    _, blocks = captured(backbone, lambda backbone: run(backbone, oracle))
    for (_, query, key), (joint_query, joint_key) in zip(blocks, oracle.calls, strict=True):
        scale = query.shape[-1] ** -0.5
        tokens = query.shape[2]
        joint = (joint_query.double() @ joint_key.double().mT * scale).softmax(-1)[:, :, -tokens:, -tokens:]
        expected = (joint / joint.sum(-1, keepdim=True)).mean(1)
        torch.testing.assert_close(reference.attention_map(query.double(), key.double()), expected)


def test_edges_of_a_pipeline(family):
    pipe, backbone = make(family)
    modules = {name: copy.deepcopy(module.state_dict()) for name, module in vars(pipe).items() if name in NETWORKS}
    flags = [p.requires_grad for p in backbone.network.parameters()]
    tracer = Tracer.from_pipeline(pipe, size=SIZE, empty_prompt=backbone.empty_prompt)
    output = tracer(torch.rand(3, 20, 36), return_abdiv=True, timesteps=(0, 99, 499))
    assert output.edges.shape == (1, 1, 20, 36) and output.edges.isfinite().all()
    assert output.size == SIZE and output.timestep[0] in (99, 499)
    # the pipeline is as it was
    assert flags == [p.requires_grad for p in backbone.network.parameters()]
    for name, state in modules.items():
        for key, value in getattr(pipe, name).state_dict().items():
            assert torch.equal(value, state[key])


NETWORKS = ("unet", "transformer", "vae")


@pytest.mark.slow
def test_a_pipeline_that_is_offloaded_runs_where_it_is_brought():
    from accelerate import cpu_offload_with_hook

    pipe, backbone = make("sd15")
    images = torch.rand(1, 3, *SIZE)
    expected = Tracer(backbone).scan(images, timesteps=(0, 499))
    _, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    cpu_offload_with_hook(pipe.vae, torch.device("cpu"), prev_module_hook=hook)
    outputs = Tracer.from_pipeline(pipe, size=SIZE, empty_prompt=backbone.empty_prompt).scan(images, timesteps=(0, 499))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    # weights wait on the CPU, tensors are made where the network will run
    pipe.unet._hf_hook.execution_device = "meta"
    assert Tracer(backbone).device == torch.device("meta")


@pytest.mark.slow
def test_a_pipeline_that_is_offloaded_in_groups_runs_where_it_is_brought():
    pipe, backbone = make("sd15")
    if not hasattr(pipe.unet, "enable_group_offload"):
        pytest.skip("of a later diffusers")
    images = torch.rand(1, 3, *SIZE)
    expected = Tracer(backbone).scan(images, timesteps=(0, 499))
    try:
        pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    except AttributeError:
        pytest.skip("diffusers 0.35 asks torch for an accelerator here")
    outputs = Tracer.from_pipeline(pipe, size=SIZE, empty_prompt=backbone.empty_prompt).scan(images, timesteps=(0, 499))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    registries = [module._diffusers_hook for module in pipe.unet.modules() if hasattr(module, "_diffusers_hook")]
    hooks = [hook for registry in registries if (hook := registry.get_hook("group_offloading")) is not None]
    for hook in hooks:
        hook.group.onload_device = torch.device("meta")
    assert hooks and Tracer(backbone).device == torch.device("meta")


def test_weights_kept_in_fewer_bits_than_are_computed_in(family):
    _, backbone = make(family)
    if not hasattr(backbone.network, "enable_layerwise_casting"):
        pytest.skip("of a later diffusers")
    backbone.network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {p.dtype for p in backbone.network.parameters()}
    read_from_calls(family, backbone)


def test_hooks_are_gone_after_an_error():
    pipe, backbone = make("sd15")
    tracer = Tracer.from_pipeline(pipe, size=SIZE, empty_prompt=backbone.empty_prompt)
    breaks = pipe.unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tracer.scan(torch.rand(1, 3, *SIZE))
    breaks.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "flux.1-dev", "flux.1-schnell"])
def test_fused_projections_are_read_too(family):
    _, backbone = make(family)
    _, blocks = captured(backbone)
    backbone.network.fuse_qkv_projections()
    assert_alike(blocks, read_from_calls(family, backbone))
    with sdpa_kernel(SDPBackend.MATH):  # the layers are called themselves
        _, fused = captured(backbone)
    assert_alike(blocks, fused)


def test_a_sliced_attention_processor_is_left_in_place():
    _, backbone = make("sd15")
    _, blocks = captured(backbone)
    backbone.network.set_attention_slice(1)
    processors = dict(backbone.network.attn_processors)
    sliced = []
    with backbone.capture(lambda *block: sliced.append(block[:3])) as capture:
        run(backbone)
    assert set(capture.obstacles) == {"calls no scaled_dot_product_attention of torch"}
    assert {type(p).__name__ for p in processors.values()} == {"SlicedAttnProcessor"}
    assert backbone.network.attn_processors == processors
    assert_alike(blocks, sliced)


def test_a_processor_that_folds_heads_into_the_batch(monkeypatch):
    from diffusers.models import attention_processor

    def attend(query, key, value, attn_bias=None, **_):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias)

    xformers = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attend))
    monkeypatch.setattr(attention_processor, "xformers", xformers, raising=False)
    if not hasattr(attention_processor, "XFormersJointAttnProcessor"):
        pytest.skip("of a later diffusers")
    _, backbone = make("sd3.5-medium")
    _, blocks = captured(backbone)
    backbone.network.set_attn_processor(attention_processor.XFormersJointAttnProcessor())
    _, folded = captured(backbone)
    assert_alike(blocks, folded)


def test_merged_tokens_are_reported():
    _, backbone = make("sd15")
    attention = backbone.attentions()[0]
    forward = attention.forward
    attention.forward = lambda hidden_states, **options: forward(hidden_states[:, ::2], **options).repeat(1, 2, 1)
    with pytest.raises(RuntimeError, match=r"must receive all 96 tokens of the image, got 48; undo what merges tokens"):
        captured(backbone)


def test_lora_on_the_attention_is_part_of_what_is_read(family):
    import peft

    _, backbone = make(family)
    _, before = captured(backbone)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, backbone.network)
    blocks = read_from_calls(family, backbone)
    assert not torch.equal(before[0][1], blocks[0][1])


# one of each class of network: compiling another configuration of it traces the same code
# of a cache in Qwen-Image of diffusers 0.35
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "pixart", "sd3.5-medium", "flux.1-dev", "flux.2", "qwen-image", "z-image"])
def test_compiled_with_capture_on(family):
    _, backbone = make(family)
    plain, blocks = captured(backbone)
    torch._dynamo.reset()
    network = backbone.network

    def forward(backbone):
        backbone.network = torch.compile(network, fullgraph=True, backend="aot_eager")
        try:
            return run(backbone)
        finally:
            backbone.network = network

    again = []
    with backbone.capture(lambda *block: again.append(block[:3])) as capture:
        compiled = forward(backbone)
    assert set(capture.obstacles) == {"is compiled"}
    torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-5)
    assert [index for index, *_ in again] == [index for index, *_ in blocks]
    assert_alike(blocks, again)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "wrapped", "ran"),
    [
        *(("sd15", wrapped, ran) for wrapped in (False, True) for ran in (False, True)),
        ("sd3.5-medium", False, True),
        ("flux.1-dev", True, False),
    ],
)
def test_a_pipeline_that_was_compiled(family, wrapped, ran):
    pipe, backbone = make(family)
    images = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    expected = Tracer(backbone).scan(images, timesteps=(0, 499))
    torch._dynamo.reset()
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    if wrapped:
        setattr(pipe, part, torch.compile(backbone.network, backend="eager"))
    else:
        backbone.network.compile(backend="eager")
    traced = Tracer.from_pipeline(pipe, size=SIZE, empty_prompt=backbone.empty_prompt)
    if ran:  # as when the user has made a picture before: what was compiled then has no hooks
        with torch.no_grad():
            traced.backbone.predict(backbone.encode(images), torch.tensor([0]))
    message = "compiled and has run without being traced, so it is traced uncompiled"
    with pytest.warns(UserWarning, match=message) if ran else contextlib.nullcontext():
        outputs = traced.scan(images, timesteps=(0, 499))
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_search_never_waits_for_the_device(family):
    _, backbone = make(family)
    backbone.network.to("meta"), backbone.vae.to("meta")
    kl, abdiv = Tracer(backbone).scan(torch.empty(2, 3, *SIZE, device="meta"), timesteps=(0, 99, 499))
    assert kl.is_meta and kl.shape == (2, 2) and abdiv.shape[:2] == (2, 3)


def test_logits_are_computed_once_on_a_cpu(family):
    """Let every block attend and make its map at once, also one that attends to text."""
    _, backbone = make(family)
    grids, blocks = backbone.grids(SIZE), []
    mean, expected = (MeanAttention(torch.empty(2, *[max(map(math.prod, grids))] * 2), grids) for _ in range(2))

    def attend(*inputs):
        blocks.append(inputs[0])
        return mean.attend(*inputs)

    mean.clear(), expected.clear()
    with backbone.capture(expected.on_attention):
        plain = run(backbone)
    with backbone.capture(lambda *_: pytest.fail("logits are computed again"), attend=attend) as capture:
        prediction = run(backbone)
    assert blocks == list(range(FAMILIES[family].blocks))
    assert capture.obstacles == [None] * len(blocks)
    # attention of another op rounds in another order
    torch.testing.assert_close(prediction, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mean.finish(), expected.finish(), rtol=1e-3, atol=1e-6)


def test_a_part_of_the_heads_is_no_map():
    """Call attention twice, each time for half the heads: the projections are read."""
    _, backbone = make("sd15")

    class Halves:
        """An attention processor."""

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = (
                layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for layer, x in ((attn.to_q, hidden_states), (attn.to_k, other), (attn.to_v, other))
            )
            halves = [
                torch.nn.functional.scaled_dot_product_attention(*part)
                for part in zip(*(x.chunk(2, 1) for x in (query, key, value)), strict=True)
            ]
            return attn.to_out[0](torch.cat(halves, 1).transpose(1, 2).flatten(2))

    images = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    expected = Tracer(backbone).attention(images)
    for module in backbone.attentions():
        module.set_processor(Halves())
    with mock.patch.object(ops, "attend") as attend:
        torch.testing.assert_close(Tracer(backbone).attention(images), expected, rtol=1e-3, atol=1e-6)
    assert not attend.called


@pytest.mark.slow
@pytest.mark.parametrize("device", [TRITON], indirect=True)
@pytest.mark.parametrize("family", ["sd15", "pixart", "sd3.5-medium", "flux.1-dev", "z-image"])
def test_logits_are_computed_twice_on_a_gpu(family, device, monkeypatch):
    """Count the logits between tokens of the image: the network's own, and those of one pass for the map."""
    from trace_fast.kernels import attention as kernels

    _, backbone = make(family)
    backbone.network.to(device), backbone.vae.to(device)
    counts = {"network": 0, "row_statistics": 0, "add_probabilities": 0}
    launchers = {name: getattr(kernels, name) for name in ("row_statistics", "add_probabilities")}

    def count(name, *arguments):
        (features,) = (x for x in arguments if isinstance(x, kernels.Features))
        counts[name] += math.prod(features.query.shape[:3]) * features.tokens
        return launchers[name](*arguments)

    for name in launchers:
        monkeypatch.setattr(kernels, name, functools.partial(count, name))

    def record(index, query, *_):
        counts["network"] += math.prod(query.shape[:3]) * query.shape[2]

    images = torch.rand(1, 3, *SIZE, device=device)
    with torch.no_grad(), backbone.capture(record):
        backbone.predict(backbone.encode(images), torch.tensor([0], device=device))
    assert not counts["row_statistics"]
    attention = Tracer(backbone).attention(images)
    assert counts["add_probabilities"] == counts["network"] > 0 == counts["row_statistics"]
    expected = []
    grids = backbone.grids(SIZE)
    with torch.no_grad(), backbone.capture(lambda *block: expected.append(block[:3])):
        backbone.predict(backbone.encode(images), torch.tensor([0], device=device))
    maps = [
        reference.resize_attention(reference.attention_map(q.double(), k.double()), grids[i], max(grids, key=math.prod))
        for i, q, k in expected
    ]
    torch.testing.assert_close(attention.double(), torch.stack(maps).mean(0), rtol=1e-4, atol=1e-6)
    # without the log-sum-exp there is a pass more
    counts.update(row_statistics=0, add_probabilities=0)
    with sdpa_kernel(SDPBackend.MATH):
        Tracer(backbone).attention(images)
    assert counts["add_probabilities"] == counts["row_statistics"] == counts["network"]


class TestNoising:
    TIMESTEPS = torch.tensor([0, 99, 500, 999])

    @pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.flow])
    def test_variance_preserving_is_ddpm(self, family):
        pipe, backbone = make(family)
        betas = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).betas.double()
        latent, noise = torch.randn(2, 4, 4, 3, 5, dtype=torch.float64)
        abar = (1 - betas).cumprod(0)[self.TIMESTEPS][:, None, None, None]
        expected = abar.sqrt() * latent + (1 - abar).sqrt() * noise
        outputs = backbone.schedule.noise(latent, noise, self.TIMESTEPS)
        # the scheduler's betas are float32
        torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.flow])
    def test_flow_is_the_straight_line(self, family):
        _, backbone = make(family)
        latent, noise = torch.randn(2, 4, 16, 3, 5, dtype=torch.float64)
        sigma = (self.TIMESTEPS.double() / 1000)[:, None, None, None]
        outputs = backbone.schedule.noise(latent, noise, self.TIMESTEPS)
        torch.testing.assert_close(outputs, (1 - sigma) * latent + sigma * noise, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
    def test_inversion_with_the_true_noise_lands_on_the_noised_latent(self, prediction):
        schedule = VariancePreserving(prediction=prediction)
        latent, noise = torch.randn(2, 3, 4, 3, 5)
        here, there = torch.tensor([99, 300, 700]), torch.tensor([199, 400, 999])
        sample = schedule.noise(latent, noise, here)
        target = noise if prediction == "epsilon" else schedule.velocity(latent, noise, here)
        outputs = schedule.invert(sample, target, here, there)
        torch.testing.assert_close(outputs, schedule.noise(latent, noise, there), rtol=1e-4, atol=1e-5)

    def test_flow_inversion_with_the_true_velocity_lands_on_the_noised_latent(self):
        schedule = RectifiedFlow()
        latent, noise = torch.randn(2, 3, 4, 3, 5)
        here, there = torch.tensor([0, 300, 700]), torch.tensor([99, 400, 999])
        outputs = schedule.invert(schedule.noise(latent, noise, here), noise - latent, here, there)
        torch.testing.assert_close(outputs, schedule.noise(latent, noise, there), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["sd15", "sd3.5-medium"])  # a network of each schedule
    def test_inversion_forward_and_back_returns_the_latent(self, family):
        # the network's slope changes from level to level, so the way back differs a little: small steps, small error
        _, backbone = make(family)
        schedule = backbone.schedule
        latent = backbone.encode(torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(1)))
        levels = torch.arange(100, 400, 2)[:, None]
        sample = start = schedule.noise(latent, torch.randn_like(latent), levels[0])
        with torch.no_grad():
            for here, there in itertools.chain(itertools.pairwise(levels), itertools.pairwise(levels.flip(0))):
                sample = schedule.invert(sample, 0.1 * backbone.predict(sample, here), here, there)
        error = ((sample - start).norm() / start.norm()).item()
        assert error < 0.02

    def test_a_schedule_that_ends_in_pure_noise(self):
        pipe, backbone = make("sd15")
        options = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        pipe.scheduler = diffusers.DDIMScheduler(**options)
        schedule = wrap_pipeline(pipe, backbone.empty_prompt, SIZE).schedule
        assert schedule.zero_terminal
        signal, sigma = schedule.coefficients(torch.arange(1000))
        # the scheduler's betas are float32
        expected = pipe.scheduler.alphas_cumprod
        torch.testing.assert_close(signal.flatten().square(), expected, rtol=0, atol=2e-5)
        # the last sigma rounds to 1 or to the number below it, as the last bit of abar falls
        assert 0 < signal[-1] < 1e-3
        assert 1 - torch.finfo(torch.float32).eps <= sigma[-1] <= 1
        sample = schedule.noise(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([999]))
        assert schedule.denoise(sample, torch.ones(1, 1, 1, 1), torch.tensor([999])).isfinite().all()

    @pytest.mark.parametrize(
        ("scheduler", "message"),
        [
            (
                lambda: diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
                r"linear or scaled_linear betas .* squaredcos_cap_v2",
            ),
            (diffusers.FlowMatchEulerDiscreteScheduler, r"beta_start and beta_end, got FlowMatchEulerDiscreteSch"),
            (diffusers.EDMEulerScheduler, "beta_start and beta_end, got EDMEulerScheduler without, of another kind"),
            (lambda: diffusers.DDIMScheduler(num_train_timesteps=500), "1000 timesteps, got 500"),
        ],
    )
    def test_an_unknown_schedule_is_refused(self, scheduler, message):
        pipe, backbone = make("sd15")
        pipe.scheduler = scheduler()
        with pytest.raises(ValueError, match=f"scheduler must have {message}"):
            wrap_pipeline(pipe, backbone.empty_prompt, SIZE)


def test_encoding_is_the_mode_shifted_and_scaled(family):
    pipe, backbone = make(family)
    if type(pipe.vae).__name__ != "AutoencoderKL":
        pytest.skip("its autoencoder encodes in another way")
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        mode = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
        expected = (mode - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
        assert torch.equal(backbone.encode(images), expected)


@pytest.mark.parametrize(
    ("family", "encode"),
    [
        ("flux.2", lambda pipe, images: pipe._encode_vae_image(images, None)),
        (
            "qwen-image",
            lambda pipe, images: diffusers.QwenImageImg2ImgPipeline(**pipe.components)._encode_vae_image(
                images[:, :, None], None
            )[:, :, 0],
        ),
    ],
)
def test_encoding_is_that_of_a_pipeline_that_takes_images(family, encode, tmp_path, monkeypatch):
    pipe = pipeline(family, tmp_path)
    # its mode, where the pipeline draws a sample
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda latents, generator=None: latents.mode())
    backbone = wrap_pipeline(pipe, size=SIZE)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        expected = encode(pipe, images * 2 - 1)
        torch.testing.assert_close(backbone.encode(images), expected, rtol=1e-5, atol=1e-5)


def test_latents_of_an_autoencoder_that_knows_their_mean():
    pipe, backbone = make("sdxl")
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 4.0]
    images = torch.rand(1, 3, *SIZE)
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    with torch.no_grad():
        mode = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    expected = (mode - mean) * pipe.vae.config.scaling_factor / std
    torch.testing.assert_close(backbone.encode(images), expected)


def test_a_tiny_autoencoder_serves_too():
    pipe, backbone = make("sd15")
    widths = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    pipe.vae = diffusers.AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    backbone = wrap_pipeline(pipe, backbone.empty_prompt, SIZE)
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(backbone.encode(images), pipe.vae.encode(images * 2 - 1).latents)
    assert Tracer(backbone)(images, timesteps=(0, 499)).edges.isfinite().all()


def test_an_autoencoder_that_overflows_is_upcast_and_put_back():
    pipe, backbone = make("sdxl")
    pipe.vae.register_to_config(force_upcast=True)
    expected = backbone.encode(torch.full((1, 3, *SIZE), 0.3))
    pipe.vae.half()
    dtypes = []
    pipe.vae.encoder.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    outputs = backbone.encode(torch.full((1, 3, *SIZE), 0.3))
    assert dtypes == [torch.float32] and pipe.vae.dtype == torch.float16
    torch.testing.assert_close(outputs, expected, rtol=1e-2, atol=1e-2)


def test_sdxl_takes_zeros_for_the_empty_prompt():
    _, backbone = make("sdxl")
    assert backbone.empty_prompt["encoder_hidden_states"].shape == (1, 77, 8)
    assert backbone.empty_prompt["text_embeds"].shape == (1, 8)
    assert not any(x.any() for x in backbone.empty_prompt.values())


def test_a_size_that_does_not_fit_is_refused(family):
    pipe, backbone = make(family)
    for height, width in ((17, 24), (24, 17)):
        message = rf"size must be positive multiples of {FAMILIES[family].step} pixels, got \({height}, {width}\)"
        with pytest.raises(ValueError, match=message):
            wrap_pipeline(pipe, backbone.empty_prompt, (height, width))


def test_a_size_beyond_the_positions_is_refused():
    pipe, backbone = make("sd3.5-large")
    assert wrap_pipeline(pipe, backbone.empty_prompt, (64, 4)).grids((64, 4))[0] == (16, 1)
    with pytest.raises(ValueError, match=r"SD3Backbone: size must be at most 64 pixels, got \(64, 68\)"):
        wrap_pipeline(pipe, backbone.empty_prompt, (64, 68))


@pytest.mark.parametrize("steps", [(5, 7), (9, 3)])
def test_any_size_of_whole_steps(family, steps):
    # also of odd numbers, which the down-sampling of a UNet does not divide
    size = (steps[0] * FAMILIES[family].step, steps[1] * FAMILIES[family].step)
    _, backbone = make(family, size)
    oracle = AttentionOracle()
    run(backbone, oracle)
    tokens = [query.shape[2] for query, _ in FAMILIES[family].calls(oracle)]
    others = {count - h * w for (h, w), count in zip(backbone.grids(size), tokens, strict=True)}
    assert others <= set(FAMILIES[family].others)
    for shape in ((3, 3, 17, 31), (1, 3, 64, 20)):  # smaller, larger, of other aspect; several at once
        output = Tracer(backbone)(torch.rand(shape), timesteps=(0, 499))
        assert output.edges.shape == (shape[0], 1, *shape[2:]) and output.edges.isfinite().all()
        assert output.size == size


def test_consistency_models_receive_no_guidance():
    from diffusers import LatentConsistencyModelPipeline

    pipe, backbone = make("sd15")
    pipe.unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=6).eval()
    conditions = []
    pipe.unet.time_embedding.register_forward_pre_hook(lambda _, args: conditions.append(args[1]))
    run(wrap_pipeline(pipe, backbone.empty_prompt, SIZE))
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    torch.testing.assert_close(conditions[0], embed(None, torch.zeros(2), embedding_dim=6))


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("sd15", {"in_channels": 9}, "network must take the 4 channels of a latent alone, got one of 9 "),
        ("flux.1-dev", {"in_channels": 96}, "network must take the 64 channels of a latent alone, got one of 96 "),
        ("sd15", {"encoder_hid_dim_type": "ip_image_proj"}, r"unet must take text alone, .* pipe\.unload_ip_adapter"),
        (
            "sd15",
            {"num_class_embeds": 7},
            "unet must need nothing but a timestep and a prompt, got one with num_class_embeds = 7",
        ),
        ("sdxl", {"projection_class_embeddings_input_dim": 28}, r"unet must take 6 numbers for the size, got one of 5"),
    ],
)
def test_a_network_of_another_task_is_refused(family, config, message):
    pipe, backbone = make(family)
    backbone.network.register_to_config(**config)
    with pytest.raises(ValueError, match=f"from_pipeline: {message}"):
        wrap_pipeline(pipe, backbone.empty_prompt, SIZE)


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"])
def test_pipelines_of_qwen_image_that_receive_an_image_are_refused(name):
    pipe, backbone = make("qwen-image")
    pipe.config = {"_class_name": name}  # as in a folder's model_index.json
    message = f"from_pipeline: pipe must make images of text alone, got {name}, .*; take Qwen/Qwen-Image"
    with pytest.raises(ValueError, match=message):
        wrap_pipeline(pipe, backbone.empty_prompt, SIZE)
    del pipe.config
    for option in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        pipe.transformer.register_to_config(**{option: True})
        with pytest.raises(ValueError, match="from_pipeline: pipe must make images of text alone"):
            wrap_pipeline(pipe, backbone.empty_prompt, SIZE)
        pipe.transformer.register_to_config(**{option: False})


def test_a_z_image_of_other_images_and_one_beyond_its_positions_are_refused():
    pipe, backbone = make("z-image")
    assert wrap_pipeline(pipe, backbone.empty_prompt, (96, 128)).grids((96, 128))[0] == (24, 32)
    for size in ((100, 128), (96, 132)):
        with pytest.raises(ValueError, match=rf"ZImageBackbone: size must be at most 96 x 128 pixels, got \({size[0]}"):
            wrap_pipeline(pipe, backbone.empty_prompt, size)
    pipe.transformer.register_to_config(siglip_feat_dim=8)
    with pytest.raises(ValueError, match=r"network must make images of text alone, .* \(siglip_feat_dim\)"):
        wrap_pipeline(pipe, backbone.empty_prompt, SIZE)


def test_a_klein_is_a_flux_2(tmp_path):
    whole = pipeline("flux.2", tmp_path)
    transformer = diffusers.Flux2Transformer2DModel.from_config(whole.transformer.config, guidance_embeds=False)
    config = transformers.Qwen3Config(**language(vocab_size=16, num_hidden_layers=28, head_dim=4))
    encoder = transformers.Qwen3ForCausalLM(config).eval()
    pipe = diffusers.Flux2KleinPipeline(
        **{**whole.components, "transformer": transformer.eval(), "text_encoder": encoder}
    )
    assert Tracer.from_pipeline(pipe, size=SIZE)(torch.rand(3, 20, 36), timesteps=(0, 499)).edges.isfinite().all()


def test_linear_attention_is_refused():
    kind = type("SanaTransformer2DModel", (torch.nn.Module,), {})
    message = r"from_pipeline: pipe must hold a network with attention maps, got SanaTransformer2DModel: .*linear"
    with pytest.raises(TypeError, match=message):
        Tracer.from_pipeline(SimpleNamespace(transformer=kind(), vae=None))


def test_parts_that_are_missing_are_reported(family):
    pipe, backbone = make(family)
    if family != "sdxl":  # which takes zeros
        with pytest.raises(
            ValueError, match=r"pipe must hold text_encoder.* to embed the empty prompt, got .* without"
        ):
            wrap_pipeline(pipe, None, SIZE)
    names = " and ".join(backbone.empty_prompt)
    for wrong in ({}, {name: x.expand(2, *x.shape[1:]) for name, x in backbone.empty_prompt.items()}):
        with pytest.raises(ValueError, match=f"empty_prompt must be {names}, each with a batch of 1, got"):
            wrap_pipeline(pipe, wrong, SIZE)
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"vae must be one of Autoencoder.*, got Linear"):
        wrap_pipeline(pipe, backbone.empty_prompt, SIZE)
    pipe.vae = None
    with pytest.raises(ValueError, match="pipe must hold a vae, got SimpleNamespace without"):
        wrap_pipeline(pipe, backbone.empty_prompt, SIZE)


def test_a_refiner_is_refused():
    pipe, _ = make("sdxl")
    pipe.config = {"requires_aesthetics_score": True}
    with pytest.raises(ValueError, match="pipe must be of a base model, got a refiner"):
        wrap_pipeline(pipe, None, SIZE)


def test_a_network_that_is_not_square(family):
    pipe, backbone = make(family)
    if not hasattr(backbone.network.config, "sample_size"):
        pytest.skip("its configuration has no size")
    backbone.network.register_to_config(sample_size=[8, 12])
    assert wrap_pipeline(pipe, backbone.empty_prompt).settings.size == (16, 24)
    backbone.network.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="size must be given for a network that does not know its own"):
        wrap_pipeline(pipe, backbone.empty_prompt)


def test_another_pipeline_is_refused():
    with pytest.raises(TypeError, match=r"pipe must hold one of UNet2DConditionModel, .* got Linear"):
        Tracer.from_pipeline(SimpleNamespace(transformer=torch.nn.Linear(2, 2)))
