"""Encoders without noise levels: real classes of tiny random configurations, built and loaded offline."""

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from oracle import AttentionOracle, assert_read_from_the_call, log_sum_exps
from safetensors.torch import load_file, save_file
from tiny import dinov2, dinov3, eva, llava, qwen, timm
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

import trace_fast
from trace_fast import Tracer, reference
from trace_fast.attention import MeanAttention
from trace_fast.backbones import wrap_encoder
from trace_fast.backbones.loading import memory
from trace_fast.backbones.registry import MODELS

SIZE = (24, 40)  # pixels: 6 x 10 patches, and of Qwen's windows of 4 x 4 patches some are smaller
GRID = (6, 10)
BATCH = 2
TEXT = {"num_hidden_layers": 3, "hidden_size": 16, "num_key_value_heads": 1}  # a key for two heads
FAMILIES = {  # what makes the model, and how many blocks are read
    "dinov2": (dinov2, 3),
    "dinov2-registers": (lambda: dinov2(4), 3),
    "dinov3": (dinov3, 3),
    "llava": (llava, 3),
    "qwen2.5-vl": (qwen, 2),
    "eva02-l": (eva, 3),
    "eva02-e": (lambda: eva("eva02_enormous_patch14_clip_224"), 3),
    "eva-rope": (
        lambda: eva(attn_type="rope", num_kv_heads=1, qk_norm=True, num_reg_tokens=2, rope_rotate_half=True),
        3,
    ),
}
LANGUAGE = {
    "llava-language": (lambda: llava(**TEXT), 3),
    "qwen2.5-vl-language": (lambda: qwen(2, (1, 1, 2), **TEXT), 3),  # two patches of two pixels: the grid of all others
}
VISION, FAMILIES = FAMILIES, FAMILIES | LANGUAGE
PREFIX = {"dinov2-registers": 5, "dinov3": 5, "eva-rope": 3}  # class and register tokens, else 1
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")


def params(*families):
    return [pytest.param(name, marks=needs_timm) if name.startswith("eva") else name for name in families]


def all_but(*families):
    return params(*(name for name in FAMILIES if name not in families))


@pytest.fixture(params=params(*FAMILIES))
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: a network of sixteen channels would wait for a second longer than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, no progress bars."""
    import socket

    def refuse(*_, **__):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def make(family, **options):
    """Make a model with weights that matter, peaked attention among them, and its backbone."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model, traced(family, model, **options).backbone


def traced(family, model, **options):
    return Tracer.from_encoder(
        model, **{"size": SIZE, "read": "language" if family in LANGUAGE else "vision", **options}
    )


def photos(seed=1):
    return torch.rand(BATCH, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(backbone, context=None):
    sample = backbone.encode(photos())
    with context or contextlib.nullcontext():
        return backbone.predict(sample, torch.zeros(BATCH, dtype=torch.int64))


def captured(backbone, context=None):
    """Return features, and (index, query, key) of the blocks that are read, in the order in which they ran."""
    inputs = []
    with backbone.capture(lambda *block: inputs.append(block[:3])):
        return run(backbone, context), inputs


def image_tokens(family, calls):
    """Return query and key (B, H, N, d) of every block that is read, of those of all products, by the model's means."""
    tokens = GRID[0] * GRID[1]
    if family in LANGUAGE:  # which runs after the tower, and sees one token before the image
        assert {q.shape[2] for q, _ in calls[-3:]} == {tokens + 1}
        calls = [(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) for q, k in calls[-3:]]
        return [(q[:, :, 1:], k[:, :, 1:]) for q, k in calls]
    if family != "qwen2.5-vl":
        # class and register tokens are the first
        assert {q.shape[2] - tokens for q, _ in calls} == {PREFIX.get(family, 1)}
        return [(q[:, :, -tokens:], k[:, :, -tokens:]) for q, k in calls]
    from transformers.vision_utils import get_vision_window_index

    # products over whole images, one an image, are those of full attention: the others see 16 patches or fewer
    whole = [call for call in calls if call[0].shape[2] == tokens]
    assert len(whole) == 2 * BATCH and len(calls) == 2 * BATCH + 3 * BATCH * 6
    pairs = [[torch.cat(parts) for parts in zip(*whole[i : i + BATCH], strict=True)] for i in (0, BATCH)]
    windows, _ = get_vision_window_index(
        torch.tensor([[1, *GRID]]), spatial_merge_size=2, window_size=16, patch_size=4, kwargs={}
    )
    height, width = GRID
    position_of_patch = {}  # in the sequence, by row and column
    for position, unit in enumerate(windows.tolist()):
        row, column = divmod(unit, width // 2)
        for inner in range(4):
            position_of_patch[(2 * row + inner // 2, 2 * column + inner % 2)] = 4 * position + inner
    order = [position_of_patch[(row, column)] for row in range(height) for column in range(width)]
    assert order != sorted(order)
    return [(q[:, :, order], k[:, :, order]) for q, k in pairs]


def test_query_and_key_are_what_the_product_receives(family):
    _, backbone = make(family)
    oracle = AttentionOracle()
    _, blocks = captured(backbone, oracle)
    expected = image_tokens(family, oracle.calls)
    assert [index for index, *_ in blocks] == list(range(FAMILIES[family][1])) and len(expected) == len(blocks)
    for (_, query, key), (expected_query, expected_key) in zip(blocks, expected, strict=True):
        assert torch.equal(query, expected_query)
        assert torch.equal(key, expected_key)


OBSTACLES = {
    "qwen2.5-vl": "calls attention 2 times",  # one image at a time
    "llava-language": "masks its attention",
    "qwen2.5-vl-language": "masks its attention",
}


def test_log_sum_exp_is_that_of_the_attention_call(family):
    _, backbone = make(family)
    oracle, blocks = AttentionOracle(), []
    with backbone.capture(lambda *block: blocks.append(block)) as capture:
        run(backbone, oracle)
    assert capture.obstacles == [OBSTACLES.get(family)] * len(blocks)
    if family in OBSTACLES:
        assert all(block[3:] == (None, None) for block in blocks)
        return
    for block, call in zip(blocks, oracle.calls, strict=True):
        assert_read_from_the_call(block, call, slice(-60, None))


def test_logits_are_computed_once_on_a_cpu(family):
    """Let blocks attend and make their maps at once, except behind a mask and where tokens are in another order."""
    _, backbone = make(family)
    count, attended, again = FAMILIES[family][1], [], []
    mean, expected = (MeanAttention(torch.empty(BATCH, 60, 60), [GRID] * count) for _ in range(2))
    mean.clear(), expected.clear()

    def attend(*inputs):
        attended.append(inputs[0])
        return mean.attend(*inputs)

    def accumulate(*inputs):
        again.append(inputs[0])
        mean.on_attention(*inputs)

    with backbone.capture(expected.on_attention):
        run(backbone)
    with backbone.capture(accumulate, attend=attend):
        run(backbone)
    attends = [] if family in OBSTACLES else list(range(count))
    assert attended == attends and again == [index for index in range(count) if index not in attends]
    # attention of another op rounds in another order
    torch.testing.assert_close(mean.finish(), expected.finish(), rtol=1e-3, atol=1e-6)


def test_projections_are_read_where_the_call_is_not(family):
    """Compare both ways: the layers that a family declares must give what the call receives, exactly."""
    _, backbone = make(family)
    oracle = AttentionOracle()
    with sdpa_kernel(SDPBackend.MATH):
        _, blocks = captured(backbone, oracle)
    for (_, *read), expected in zip(blocks, image_tokens(family, oracle.calls), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(read, expected, strict=True))


def test_one_image_of_qwen_is_read_from_the_attention_call():
    _, backbone = make("qwen2.5-vl")
    blocks, sample = [], backbone.encode(photos()[:1])
    with torch.no_grad(), backbone.capture(lambda *block: blocks.append(block)) as capture:
        backbone.predict(sample, torch.zeros(1))
    assert capture.obstacles == [None, None]
    # rows in the order of the raster, as queries are
    for _, query, key, lse, others in blocks:
        torch.testing.assert_close(lse.double(), log_sum_exps(query, key), rtol=1e-6, atol=1e-5)
        assert others is None


def test_eager_attention_is_read_too(family):
    model, backbone = make(family)
    _, expected = captured(backbone)
    if family.startswith("eva"):
        for block in model.blocks:
            block.attn.fused_attn = False
    else:
        model.set_attn_implementation("eager")
    oracle = AttentionOracle()
    plain, (features, outputs) = run(backbone), captured(backbone, oracle)
    assert not oracle.calls
    assert torch.equal(plain, features)
    assert len(outputs) == len(expected)
    for (_, *one), (_, *other) in zip(outputs, expected, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def hooks(model):
    """Count the hooks on a network; transformers leaves some itself when it has run."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_capture_changes_no_bit_of_the_output(family):
    model, backbone = make(family)
    plain = run(backbone)
    before = hooks(model)
    features, _ = captured(backbone)
    assert plain.isfinite().all() and torch.equal(plain, features)
    assert hooks(model) == before


def test_aggregated_map_is_the_definition(family):
    _, backbone = make(family)
    kl, abdiv = Tracer(backbone).scan(photos())
    assert kl.shape == (BATCH, 0) and abdiv.shape == (BATCH, 1, *GRID)
    oracle = AttentionOracle()
    run(backbone, oracle)
    maps = []
    for query, key in image_tokens(family, oracle.calls):
        scores = (query.double() @ key.double().mT) * query.shape[-1] ** -0.5
        maps.append(scores.softmax(-1).mean(1))
    expected = torch.stack(maps).mean(0)
    torch.testing.assert_close(expected.sum(-1), torch.ones_like(expected.sum(-1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(abdiv[:, 0].double(), reference.abdiv(expected, *GRID), rtol=1e-4, atol=1e-6)
    assert abdiv.max() > 1e-2  # the comparison is about something
    # and the map itself, as the tracer adds it up
    total = torch.empty(BATCH, 60, 60)
    blocks = backbone.settings.blocks or range(3)
    sample = backbone.encode(photos())
    with torch.no_grad():
        Tracer(backbone)._attend(total, sample, torch.zeros(BATCH), blocks, [GRID] * len(blocks))
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total.sum(-1), torch.ones(BATCH, 60), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", params("dinov2-registers", "dinov3", "llava", "eva02-l", "eva-rope"))
def test_whole_softmax_renormalized_is_the_softmax_over_patches(family):
    _, backbone = make(family)
    oracle = AttentionOracle()
    _, blocks = captured(backbone, oracle)
    for (_, query, key), (all_queries, all_keys) in zip(blocks, oracle.calls, strict=True):
        scores = (all_queries.double() @ all_keys.double().mT) * query.shape[-1] ** -0.5
        part = scores.softmax(-1)[:, :, -60:, -60:]
        expected = (part / part.sum(-1, keepdim=True)).mean(1)
        torch.testing.assert_close(reference.attention_map(query.double(), key.double()), expected)


def test_edges_of_a_model_that_stays_as_it_is(family):
    model, _ = make(family)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    tracer = traced(family, model)
    output = tracer(torch.rand(3, 20, 36), return_abdiv=True)
    assert output.edges.shape == (1, 1, 20, 36) and output.edges.isfinite().all() and output.edges.max() > 0
    assert output.timestep.tolist() == output.timesteps.tolist() == [0]
    assert output.kl is None and output.noising == "none" and output.size == SIZE
    assert output.abdiv.shape == (1, *GRID) and output.model == type(model).__name__
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_the_tower_alone_and_what_holds_it_are_the_same(family):
    model, backbone = make(family)
    tower = traced(family, backbone.network)
    whole = traced(family, model)
    assert tower.backbone.network is whole.backbone.network
    assert torch.equal(tower.scan(photos())[1], whole.scan(photos())[1])


def test_images_of_a_batch_do_not_see_one_another(family):
    _, backbone = make(family)
    together = Tracer(backbone).scan(photos())[1]
    alone = Tracer(backbone).scan(photos()[1:])[1]
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-5)


def test_bfloat16(family):
    model, _ = make(family)
    edges = traced(family, model.to(torch.bfloat16))(photos()).edges
    assert edges.dtype == torch.float32 and edges.isfinite().all()


def test_default_size_is_the_models_own(family):
    _, backbone = make(family, size=None)
    native = {"qwen2.5-vl": (256, 256), "qwen2.5-vl-language": (128, 128)}.get(family, (20, 20))
    assert backbone.settings.size == native
    assert set(backbone.grids(native)) == {(native[0] // 4, native[1] // 4)}


@pytest.mark.parametrize("family", params("dinov2", "llava", "eva02-l", "eva02-e"))
def test_native_size_is_the_network_called_plainly(family):
    _, backbone = make(family, size=None)
    images = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        expected = backbone.network(backbone.encode(images))
        expected = getattr(expected, "last_hidden_state", expected)
        assert torch.equal(backbone.predict(backbone.encode(images), torch.zeros(1)), expected)


def test_qwen_patches_are_those_of_its_image_processor():
    _, backbone = make("qwen2.5-vl")
    calls = []
    backbone.network.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run(backbone)
    ((patches,), keywords) = calls[0]
    normalized = backbone.encode(photos()).numpy()
    patchify = transformers.Qwen2VLImageProcessorPil().patchify
    expected = np.concatenate(
        [patchify(image, patch_size=4, merge_size=2, temporal_patch_size=2)[0] for image in normalized]
    )
    assert torch.equal(patches, torch.from_numpy(expected))
    assert keywords["grid_thw"].tolist() == [[1, *GRID]] * BATCH


def test_pixels_are_normalized(family):
    model, backbone = make(family)
    clip = not family.startswith("dino")
    mean = (0.48145466, 0.4578275, 0.40821073) if clip else (0.485, 0.456, 0.406)
    std = (0.26862954, 0.26130258, 0.27577711) if clip else (0.229, 0.224, 0.225)
    for one, values in (
        (backbone, (mean, std)),
        (traced(family, model, mean=(0, 0.1, 0.2), std=(1, 2, 3)).backbone, None),
    ):
        center, spread = values or ((0, 0.1, 0.2), (1, 2, 3))
        expected = torch.stack([(photos()[:, c] - center[c]) / spread[c] for c in range(3)], 1)
        torch.testing.assert_close(one.encode(photos()), expected)


@pytest.mark.parametrize("steps", [(3, 5), (7, 2), (1, 1)])
def test_any_size_of_whole_steps(family, steps):
    model, _ = make(family)
    step = 8 if family == "qwen2.5-vl" else 4
    size = (step * steps[0], step * steps[1])
    tracer = traced(family, model, size=size)
    assert set(tracer.backbone.grids(size)) == {(size[0] // 4, size[1] // 4)}
    for shape in ((3, 3, 17, 31), (1, 3, 64, 20)):  # smaller, larger, of other aspect; several at once
        output = tracer(torch.rand(shape), return_abdiv=True)
        assert output.edges.shape == (shape[0], 1, *shape[2:]) and output.edges.isfinite().all()
        assert output.size == size and output.abdiv.shape[1:] == (size[0] // 4, size[1] // 4)


def test_blocks_that_are_averaged(family):
    model, backbone = make(family)
    block = 3 if family == "qwen2.5-vl" else 2
    chosen = traced(family, model, blocks=[block]).scan(photos())[1]
    assert torch.equal(chosen, Tracer(backbone).scan(photos(), blocks=(block,))[1])
    assert not torch.allclose(chosen, Tracer(backbone).scan(photos())[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", all_but("eva02-e"))  # which never calls its projections
def test_lora_on_the_attention_is_part_of_what_is_read(family):
    import peft

    model, backbone = make(family)
    _, before = captured(backbone)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "qkv"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    oracle = AttentionOracle()
    _, blocks = captured(backbone, oracle)
    for (_, *read), expected in zip(blocks, image_tokens(family, oracle.calls), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(read, expected, strict=True))
    assert not torch.equal(before[0][1], blocks[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dinov3", "qwen2.5-vl", "qwen2.5-vl-language"])
def test_compiled_with_capture_on(family):
    _, backbone = make(family)
    expected = Tracer(backbone).scan(photos())[1]
    torch._dynamo.reset()
    compiled = traced(family, torch.compile(backbone.network, backend="aot_eager"))
    assert type(compiled.backbone.network).__name__ == "OptimizedModule"
    assert compiled.name == type(backbone.network).__name__
    torch.testing.assert_close(compiled.scan(photos())[1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", all_but("qwen2.5-vl", "qwen2.5-vl-language"))  # whose tower counts on the host
def test_compiled_without_a_break(family):
    _, backbone = make(family)
    expected = Tracer(backbone).scan(photos())[1]
    torch._dynamo.reset()
    backbone.network = torch.compile(backbone.network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(Tracer(backbone).scan(photos())[1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", all_but("qwen2.5-vl", *LANGUAGE))  # which counts on the host
def test_it_never_waits_for_the_device(family):
    _, backbone = make(family)
    backbone.network.to("meta")
    _, abdiv = Tracer(backbone).scan(torch.empty(BATCH, 3, *SIZE, device="meta"))
    assert abdiv.is_meta and abdiv.shape == (BATCH, 1, *GRID)


def test_hooks_are_gone_after_an_error(family):
    model, backbone = make(family)
    run(backbone)
    before = hooks(model)
    breaks = backbone.attentions()[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Tracer(backbone).scan(photos())
    breaks.remove()
    assert hooks(model) == before
    assert Tracer(backbone).scan(photos())[1].isfinite().all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"timestep": "iep"}, "timestep must be 0 for {}, an encoder without timesteps, got 'iep'"),
            ({"timestep": 499}, "timestep must be 0 for {}, an encoder without timesteps, got 499"),
            ({"noising": "gaussian"}, "noising must be none for {}, an encoder without timesteps, got 'gaussian'"),
            ({"noising": "inversion"}, "noising must be none for {}"),
            ({"return_kl": True}, "return_kl must be False for {}, an encoder without timesteps, got True"),
            ({"timesteps": (0, 99)}, r"timesteps must be \(0,\) for {}, an encoder .*, got \(0, 99\)"),
        ],
    )
    def test_levels_before_any_work(self, family, options, message, monkeypatch):
        model, _ = make(family)
        tracer = traced(family, model)
        monkeypatch.setattr(tracer.backbone, "encode", lambda *_: pytest.fail("it began to work"))
        monkeypatch.setattr("trace_fast.tracer.read_image", lambda *_: pytest.fail("it read the image"))
        with pytest.raises(ValueError, match="trace: " + message.format(type(model).__name__)):
            tracer(torch.rand(3, 20, 36), **options)
        options = {name: value for name, value in options.items() if name in ("timesteps", "noising")}
        if options:
            with pytest.raises(ValueError, match="trace: " + message.format(type(model).__name__)):
                tracer.scan(photos(), **options)

    @pytest.mark.slow
    def test_level_zero_is_what_there_is(self, family):
        _, backbone = make(family)
        tracer = Tracer(backbone)
        expected = tracer(photos()).edges
        assert torch.equal(tracer(photos(), timestep=0, timesteps=[0], noising="none").edges, expected)
        assert tracer.scan(photos(), timesteps=(0,))[1].shape == (BATCH, 1, *GRID)

    def test_a_size_that_patches_do_not_fill(self, family):
        model, _ = make(family)
        step = "8 x 8" if family == "qwen2.5-vl" else "4 x 4"
        with pytest.raises(ValueError, match=rf"size must be positive multiples of {step} pixels, got \(20, 42\)"):
            traced(family, model, size=(20, 42))

    def test_blocks_of_windows(self):
        model, backbone = make("qwen2.5-vl")
        message = r"blocks must be among \(1, 3\), got \(0,\): the others attend only inside windows of 16 pixels"
        with pytest.raises(ValueError, match=message):
            Tracer.from_encoder(model, blocks=[0])
        predict, backbone.predict = backbone.predict, lambda *_: pytest.fail("the network ran")
        with pytest.raises(ValueError, match=message):
            Tracer(backbone).scan(photos(), blocks=[0])
        backbone.predict = predict
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_a_block_that_is_not_there(self, family):
        _, backbone = make(family)
        backbone.settings = replace(backbone.settings, blocks=(7,))
        with pytest.raises(ValueError, match="trace: blocks must be distinct indices"):
            Tracer(backbone).scan(photos())

    def test_a_model_without_an_encoder(self):
        with pytest.raises(TypeError, match=r"from_encoder: model must be or hold one of Dinov2Model, .* got Linear"):
            Tracer.from_encoder(torch.nn.Linear(2, 2))

    def test_a_layer_that_is_not_replayed(self, family):
        _, backbone = make(family)
        backbone.attentions()[1].late_norm = torch.nn.LayerNorm(8)
        library = "timm" if family.startswith("eva") else "transformers"
        with pytest.raises(RuntimeError, match=rf"every self-attention must .* late_norm.* version of {library}"):
            Tracer(backbone).scan(photos())
        assert not any(module._forward_hooks for module in backbone.network.modules())

    def test_a_block_that_does_not_run(self):
        _, backbone = make("dinov2")
        backbone.network.encoder.layer[1].forward = lambda hidden_states, *_, **__: hidden_states
        with pytest.raises(RuntimeError, match="got nothing from 1 of 3 modules"), backbone.capture(lambda *_: None):
            run(backbone)


def save(model, folder):
    if type(model).__name__ == "Eva":
        timm().models.save_for_hf(model, folder, safe_serialization=True)
    else:
        model.save_pretrained(folder)


class TestLoading:
    """Folders as transformers and timm write them."""

    @pytest.fixture(params=params(*VISION))
    def family(self, request):
        return request.param

    @pytest.fixture
    def saved(self, family, tmp_path):
        model, _ = make(family)
        save(model, tmp_path / "model")
        return model, tmp_path / "model"

    def test_a_folder_gives_what_its_model_gives(self, saved, family):
        model, folder = saved
        expected = traced(family, model)(photos(), return_abdiv=True)
        tracer = Tracer.from_pretrained(folder, device="cpu", size=SIZE, local_files_only=True)
        outputs = tracer(photos(), return_abdiv=True)
        assert outputs.model == str(folder)
        assert torch.equal(outputs.abdiv, expected.abdiv) and torch.equal(outputs.edges, expected.edges)
        # of a vision-language model, only the tower is there
        tower = traced(family, model).backbone.network
        assert type(tracer.backbone.network) is type(tower)
        assert {n: x.shape for n, x in tracer.backbone.network.state_dict().items()} == {
            n: x.shape for n, x in tower.state_dict().items()
        }
        assert not tracer.backbone.network.training
        assert not any(p.requires_grad for p in tracer.backbone.network.parameters())

    def test_the_tower_saved_alone(self, family, tmp_path):
        model, _ = make(family)
        tracer = traced(family, model)
        save(tracer.backbone.network, tmp_path / "tower")
        outputs = Tracer.from_pretrained(tmp_path / "tower", device="cpu", size=SIZE)
        assert torch.equal(outputs.scan(photos())[1], tracer.scan(photos())[1])

    @pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
    def test_only_the_shards_of_the_tower_are_needed(self, saved):
        model, folder = saved
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shards = {}
        for index, name in enumerate(weights):
            tower = name.startswith(("vision_tower.", "visual."))
            shards[name] = f"model-{index % 2 if tower else 2}.safetensors"
        for file in ("model-0.safetensors", "model-1.safetensors"):
            part = {name: x for name, x in weights.items() if shards[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        assert "model-2.safetensors" in shards.values()
        outputs = Tracer.from_pretrained(folder, device="cpu", size=SIZE).scan(photos())[1]
        assert torch.equal(outputs, traced(family, model).scan(photos())[1])
        (folder / "model-1.safetensors").unlink()
        self.refuse(folder, "load: model must be complete .*, got .*no model-1.safetensors")

    def test_names_as_the_hub_has_them(self, tmp_path):
        # before its version 5, transformers wrote a vision model's weights under vision_model
        model, _ = make("llava")
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        old = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in weights.items()}
        assert old.keys() != weights.keys()
        save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
        outputs = Tracer.from_pretrained(tmp_path, device="cpu", size=SIZE).scan(photos())[1]
        assert torch.equal(outputs, traced(family, model).scan(photos())[1])

    def test_mean_and_std_are_those_of_the_folder(self, saved):
        model, folder = saved
        mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
        values = {"image_mean": mean, "image_std": std}
        files = {"processor_config.json": {"image_processor": values}, "preprocessor_config.json": values}
        if type(model).__name__ == "Eva":
            config = json.loads((folder / "config.json").read_text())
            config["pretrained_cfg"] |= {"mean": mean, "std": std}
            files = {"config.json": config}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
            backbone = Tracer.from_pretrained(folder, device="cpu", size=SIZE).backbone
            torch.testing.assert_close(backbone.mean.flatten(), torch.tensor(mean))
            torch.testing.assert_close(backbone.std.flatten(), torch.tensor(std))
            (folder / name).unlink()

    @pytest.mark.slow
    @pytest.mark.parametrize("offload", ["model", "sequential"])
    def test_offloaded_it_gives_the_same(self, saved, offload):
        _, folder = saved
        plain, tracer = (
            Tracer.from_pretrained(folder, device="cpu", size=SIZE, offload=way) for way in (None, offload)
        )
        assert torch.equal(tracer.scan(photos())[1], plain.scan(photos())[1])
        places = {p.device.type for p in tracer.backbone.network.parameters()}
        assert hasattr(tracer.backbone.network, "_hf_hook") and places == {"cpu" if offload == "model" else "meta"}

    def test_dtype_is_that_of_the_weights(self, saved):
        _, folder = saved
        tracer = Tracer.from_pretrained(folder, device="cpu", size=SIZE, dtype=torch.bfloat16)
        assert {p.dtype for p in tracer.backbone.network.parameters()} == {torch.bfloat16}
        assert tracer(photos()).edges.isfinite().all()

    def test_edges_takes_a_folder(self, tmp_path):
        make("dinov2")[0].save_pretrained(tmp_path / "model")
        assert trace_fast.edges(torch.rand(3, 20, 36), model=tmp_path / "model").shape == (1, 1, 20, 36)

    @pytest.mark.parametrize("name", ["dinov2-b", "qwen2.5-vl-7b", "eva02-e"])
    def test_a_hub_that_is_not_to_be_asked(self, name, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(RuntimeError, match=rf"load: {name} is not on this machine, .*HF_HUB_OFFLINE"):
            Tracer.from_pretrained(name, device="cpu", local_files_only=True)

    def refuse(self, folder, message, error=ValueError):
        with pytest.raises(error, match=message):
            Tracer.from_pretrained(folder, device="cpu", size=SIZE)

    def test_weights_that_are_not_safetensors(self, saved):
        _, folder = saved
        torch.save({}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        self.refuse(folder, "load: model must be complete .*, got .*no model.safetensors")

    def test_a_weight_that_is_missing(self, saved):
        _, folder = saved
        weights = load_file(folder / "model.safetensors")
        del weights[next(name for name in weights if "patch_embed" in name and name.endswith("weight"))]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        self.refuse(
            folder,
            "load: model must be complete and its files must fit each other, got .*: there are no .*patch_embed",
        )

    def test_a_weight_of_another_shape(self, saved):
        _, folder = saved
        config = json.loads((folder / "config.json").read_text())
        config.get("vision_config", config)["hidden_size"] = config.get("model_args", {})["embed_dim"] = 32
        (folder / "config.json").write_text(json.dumps(config))
        self.refuse(folder, "load: model must be complete and its files must fit each other, got .*model'")

    def test_damaged_weights(self, saved):
        _, folder = saved
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refuse(folder, "load: model must be complete and its files must fit each other, got .*model'")

    def test_another_kind_of_model(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}))
        self.refuse(tmp_path, r"model_type must be one of dinov2, .* got 'bert'")

    def test_a_folder_of_ours_is_recognized(self, tmp_path):
        shutil.copytree(trace_fast.__path__[0] + "/weights/mini", tmp_path / "ours")
        assert type(Tracer.from_pretrained(tmp_path / "ours", device="cpu").backbone).__name__ == "MiniBackbone"
        (tmp_path / "ours" / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="load: model must be complete and its files must fit each other"):
            Tracer.from_pretrained(tmp_path / "ours", device="cpu")

    def test_too_little_memory(self, saved, monkeypatch):
        _, folder = saved
        monkeypatch.setattr(memory, "free_bytes", lambda _: 900)
        self.refuse(folder, r"load: .* needs 0.0 GiB for its weights in float32, cpu has 0.0 GiB free", RuntimeError)


class TestLanguage:
    @pytest.fixture(params=LANGUAGE)
    def family(self, request):
        return request.param

    def test_the_model_given_tokens_and_pixels_is_the_same(self, family):
        model, backbone = make(family, size=None)
        size = backbone.settings.size
        height, width = backbone.grids(size)[0]
        images = torch.rand(1, 3, *size)
        normalized = backbone.encode(images)
        first, image = (1, 7) if family == "llava-language" else (4, 5)
        tokens = torch.tensor([[first, *[image] * height * width]])
        if family == "llava-language":
            inputs = {"pixel_values": normalized}
        else:
            processor = transformers.Qwen2VLImageProcessorPil()
            patches = processor.patchify(normalized[0].numpy(), patch_size=2, merge_size=2, temporal_patch_size=2)[0]
            grid = torch.tensor([[1, 2 * height, 2 * width]])
            inputs = {"pixel_values": torch.from_numpy(patches), "image_grid_thw": grid}
            inputs["mm_token_type_ids"] = (tokens == image).int()
        oracle = AttentionOracle()
        with torch.no_grad(), oracle:
            expected = model(input_ids=tokens, **inputs, use_cache=False, logits_to_keep=1).logits
        blocks = []
        with torch.no_grad(), backbone.capture(lambda *block: blocks.append(block[:3])):
            assert torch.equal(backbone.predict(normalized, torch.zeros(1)), expected)
        for (_, *read), (query, key) in zip(blocks, oracle.calls[-3:], strict=True):  # the image follows one token
            assert torch.equal(read[0], query[:, :, 1:])
            assert torch.equal(read[1], key.repeat_interleave(query.shape[1] // key.shape[1], 1)[:, :, 1:])

    def test_what_another_reading_needs(self, family):
        model, _ = make(family)
        with pytest.raises(ValueError, match="from_encoder: read must be 'vision' or 'language', got 'text'"):
            Tracer.from_encoder(model, read="text")
        with pytest.raises(TypeError, match=r"must be or hold one of Llava.*, got Dinov2Model"):
            Tracer.from_encoder(dinov2(), read="language")

    def test_generation_goes_on_where_it_was(self, family):
        model, backbone = make(family)
        deltas = getattr(model.model, "rope_deltas", None)
        Tracer(backbone).scan(photos())
        assert getattr(model.model, "rope_deltas", None) is deltas


@needs_timm
class TestEva:
    def test_a_model_of_one_size_takes_that_alone(self):
        model = eva(dynamic_img_size=False).eval()
        assert Tracer.from_encoder(model)(photos()).size == (20, 20)
        message = r"EvaBackbone: size must be \(20, 20\), got \(24, 40\); .*dynamic_img_size=True"
        with pytest.raises(ValueError, match=message):
            Tracer.from_encoder(model, size=SIZE)

    def test_a_folder_of_one_size_takes_any(self, tmp_path):
        model = eva(dynamic_img_size=False).eval()
        save(model, tmp_path / "model")
        tracer = Tracer.from_pretrained(tmp_path / "model", device="cpu", size=SIZE)
        dynamic = eva().eval()
        dynamic.load_state_dict(model.state_dict())
        expected = Tracer.from_encoder(dynamic, size=SIZE).scan(photos())[1]
        assert torch.equal(tracer.scan(photos())[1], expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"qkv_bias": False, "qkv_fused": True},
            {"use_rot_pos_emb": False},
            {"rope_type": "mixed", "qkv_fused": True, "use_abs_pos_emb": False},
            {"rope_type": "dinov3", "class_token": False, "global_pool": "avg"},
            {"attn_type": "rope", "qkv_fused": True},
        ],
    )
    def test_other_models_of_the_class(self, options):
        backbone = wrap_encoder(eva(**options).eval(), size=SIZE)
        oracle = AttentionOracle()
        _, blocks = captured(backbone, oracle)
        assert len(blocks) == len(oracle.calls) == 3
        for (_, *read), expected in zip(blocks, oracle.calls, strict=True):
            assert all(torch.equal(x, y[:, :, -60:]) for x, y in zip(read, expected, strict=True))

    def test_another_architecture_of_timm(self, tmp_path):
        timm()
        (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        for name in ("resnet18", "no_such"):
            (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": {}}))
            with pytest.raises(ValueError, match=f"architecture must be one of timm's module eva, got '{name}'"):
                Tracer.from_pretrained(tmp_path, device="cpu")

    def test_without_timm(self, tmp_path, monkeypatch):
        save(eva(), tmp_path / "model")
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(RuntimeError, match=r"^load: timm must be installed: pip install 'trace_fast\[encoders\]'$"):
            Tracer.from_pretrained(tmp_path / "model", device="cpu")

    def test_with_a_torchvision_of_another_torch(self, tmp_path, monkeypatch):
        save(eva(), tmp_path / "model")
        (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(RuntimeError, match=r"needs timm, .*\(operator torch.* pip install timm, .* fits torch 2"):
            Tracer.from_pretrained(tmp_path / "model", device="cpu")


def test_known_encoders_are_listed_as_such():
    from trace_fast.cli import app

    encoders = {name for name, model in MODELS.items() if model.encoder}
    assert encoders == {
        *("dinov2-b", "dinov2-g", "dinov3-l", "dinov3-7b", "eva02-l", "eva02-e", "llava-1.5-7b", "qwen2.5-vl-7b")
    }
    lines = CliRunner().invoke(app, ["models"]).output.splitlines()
    for name in ("mini", *MODELS):
        (line,) = (line for line in lines if line.split()[0] == name)
        assert ("ABDiv only" in line) == (name in encoders)
