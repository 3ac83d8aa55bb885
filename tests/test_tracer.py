"""Stage 1 as a whole: the search over noise levels against its definition, in float64."""

import itertools
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import trace_fast
from trace_fast import Tracer, reference
from trace_fast.backbones import Settings
from trace_fast.backbones.mini import Attention, Mini, MiniBackbone, MiniConfig
from trace_fast.backbones.rotary import apply_rotary, rotary_embedding
from trace_fast.backbones.schedule import VariancePreserving
from trace_fast.io import images as images_module
from trace_fast.tracer import TIMESTEPS, edge_probability

FOUR = (0, 99, 299, 899)


def make_backbone(dtype=torch.float32, device="cpu", **settings):
    torch.manual_seed(0)
    network = Mini(MiniConfig(dim=32, depth=3, heads=2))
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return MiniBackbone(network.to(device, dtype), Settings(**{"size": (24, 40), **settings}))


@pytest.fixture
def tracer():
    return Tracer(make_backbone())


@pytest.fixture
def images():
    return torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(3))


def attention_map(module, hidden_states, image_rotary_emb):
    """Head mean of one attention module's map, from its input: plain products in float64."""
    query, key = (
        apply_rotary(norm(project(hidden_states).unflatten(-1, (module.heads, -1))), image_rotary_emb)
        for norm, project in ((module.norm_q, module.to_q), (module.norm_k, module.to_k))
    )
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * query.shape[-1] ** -0.5
    return scores.softmax(-1).mean(1)


def definition(backbone, images, levels, noising, seed, blocks):
    """Return KL and ABDiv of the first stage, written from the paper with plain loops over timesteps."""
    schedule, maps = backbone.schedule, []
    sample = latent = images * 2 - 1
    noise = torch.randn((1, *latent.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(latent)
    for index, level in enumerate(levels):
        timestep = torch.full((len(images),), level)
        if noising == "gaussian":
            sample = schedule.noise(latent, noise, timestep)
        maps_of_blocks = []
        handles = [
            backbone.network.blocks[block].attn.register_forward_pre_hook(
                lambda module, args, kwargs, maps_of_blocks=maps_of_blocks: maps_of_blocks.append(
                    attention_map(module, args[0], **kwargs)
                ),
                with_kwargs=True,
            )
            for block in blocks
        ]
        prediction = backbone.network(sample, timestep)
        for handle in handles:
            handle.remove()
        maps.append(torch.stack(maps_of_blocks).mean(0))
        if noising == "inversion" and index + 1 < len(levels):
            sample = schedule.invert(sample, prediction, timestep, torch.full_like(timestep, levels[index + 1]))
    kl = [(p * (p.log() - q.log())).sum(-1).mean(-1) for p, q in itertools.pairwise(maps)]
    abdiv = [reference.abdiv(one, 6, 10) for one in maps]
    return torch.stack(kl, 1), torch.stack(abdiv, 1)


@pytest.mark.parametrize("noising", ["inversion", "gaussian"])
@pytest.mark.parametrize("blocks", [None, (2, 0)])
def test_scan_is_the_definition(tracer, images, noising, blocks):
    kl, abdiv = tracer.scan(images, timesteps=FOUR, noising=noising, seed=7, blocks=blocks)
    # the definition's network runs in float64 and the tracer's in float32, which is what the tolerance allows for
    expected = definition(make_backbone(torch.float64), images.double(), FOUR, noising, 7, blocks or (0, 1, 2))
    assert kl.shape == (2, 3) and abdiv.shape == (2, 4, 6, 10)
    assert kl.dtype == abdiv.dtype == torch.float32 and kl.is_contiguous() and abdiv.is_contiguous()
    torch.testing.assert_close(kl.double(), expected[0], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(abdiv.double(), expected[1], rtol=2e-3, atol=1e-5)
    assert expected[0].min() > 1e-3  # the comparison is about something


@pytest.mark.parametrize(("timestep", "blocks"), [(0, None), (299, (2, 0))])
def test_attention_is_the_map_that_a_scan_measures(tracer, images, timestep, blocks):
    attention = tracer.attention(images, timestep=timestep, seed=7, blocks=blocks)
    assert attention.shape == (2, 60, 60) and attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 60))
    noising = "gaussian" if timestep else "inversion"  # which begins with the image itself
    _, abdiv = tracer.scan(images, timesteps=(timestep,), noising=noising, seed=7, blocks=blocks)
    torch.testing.assert_close(reference.abdiv(attention, 6, 10), abdiv[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "message"), [({"timestep": 1000}, "timesteps"), ({"blocks": (3,)}, "blocks")])
def test_attention_refuses_what_is_not_there(tracer, images, options, message):
    with pytest.raises(ValueError, match=message):
        tracer.attention(images, **options)


def test_batches_of_levels_do_not_change_the_result(tracer, images, monkeypatch):
    whole = tracer.scan(images, timesteps=FOUR, noising="gaussian")
    sizes, predict = [], tracer.backbone.predict
    monkeypatch.setattr(tracer.backbone, "predict", lambda x, t: sizes.append(len(x)) or predict(x, t))
    maps = 2 * 4 * 60**2  # of two images
    for room, batch, expected in (
        (3 * maps, None, [4, 4]),  # two levels of two images at once, and the map before them
        (maps, None, [2] * 4),
        (maps, 3, [6, 2]),
        (maps, 10**6, [8]),
    ):
        monkeypatch.setattr("trace_fast.tracer.MAP_BYTES", room)
        sizes.clear()
        parts = tracer.scan(images, timesteps=FOUR, noising="gaussian", batch=batch)
        assert sizes == expected
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_one_level_has_no_steps(tracer, images):
    kl, abdiv = tracer.scan(images, timesteps=(0,))
    assert kl.shape == (2, 0) and abdiv.shape == (2, 1, 6, 10)


def test_images_are_squashed_to_the_processing_size(tracer):
    images = torch.rand(2, 3, 37, 61, generator=torch.Generator().manual_seed(3))
    small = torch.nn.functional.interpolate(images, (24, 40), mode="bilinear", antialias=True)
    for one, other in zip(*(tracer.scan(pixels, timesteps=FOUR) for pixels in (images, small)), strict=True):
        assert torch.equal(one, other)


def test_what_a_user_does_to_an_output_stays_there(tracer, images):
    output = tracer(images, timestep="iep", timesteps=FOUR)
    output.timesteps.zero_()
    assert tracer(images, timestep="iep", timesteps=FOUR).timesteps.tolist() == list(FOUR)


def test_maps_beyond_the_memory_are_refused(tracer, monkeypatch):
    room = 2 * 4 * 60**2  # a map and the one before
    monkeypatch.setattr("trace_fast.ops.checks.MEMORY", room)
    tracer(torch.rand(1, 3, 24, 40))
    monkeypatch.setattr("trace_fast.ops.checks.MEMORY", room - 1)
    with pytest.raises(ValueError, match=r"images must be small enough for .* GiB of memory, got \(1, 3, 24, 40\)"):
        tracer(torch.rand(1, 3, 24, 40))


def test_images_of_a_batch_do_not_see_one_another(tracer, images):
    for noising in ("inversion", "gaussian"):
        together = tracer(images, noising=noising, timesteps=FOUR, return_kl=True)
        alone = tracer(images[1:], noising=noising, timesteps=FOUR, return_kl=True)
        torch.testing.assert_close(together.edges[1:], alone.edges, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.kl[1:], alone.kl, rtol=1e-4, atol=1e-6)


def test_iep_is_the_peak_and_the_noisier_map_of_the_pair(tracer, images):
    output = tracer(images, timestep="iep", timesteps=FOUR, return_abdiv=True)
    kl, abdiv = tracer.scan(images, timesteps=FOUR)
    step = kl.argmax(1)
    assert output.timesteps.tolist() == list(FOUR)
    assert output.timestep.tolist() == [FOUR[k + 1] for k in step.tolist()]
    assert torch.equal(output.kl, kl)
    assert torch.equal(output.abdiv, torch.stack([abdiv[b, k + 1] for b, k in enumerate(step.tolist())]))


@pytest.mark.parametrize("noising", ["inversion", "gaussian"])
@pytest.mark.parametrize("timestep", ["iep", 299])
def test_the_host_never_waits_for_the_device(noising, timestep, monkeypatch):
    monkeypatch.setattr(images_module, "check_values", lambda *_: None)
    # a meta tensor has no numbers: whoever asks for one, to decide on the host, gets an error
    tracer = Tracer(make_backbone(device="meta"))
    images = torch.empty(2, 3, 24, 40, dtype=torch.uint8, device="meta")
    output = tracer(images, timestep=timestep, timesteps=FOUR, noising=noising, return_kl=True, return_abdiv=True)
    assert output.edges.shape == (2, 1, 24, 40) and output.edges.is_meta
    assert output.kl.shape == (2, 3) and output.abdiv.shape == (2, 6, 10) and output.timestep.shape == (2,)


@pytest.mark.gpu
@pytest.mark.parametrize("noising", ["inversion", "gaussian"])
def test_the_search_replays_in_a_cuda_graph(noising):
    tracer = Tracer(make_backbone(device="cuda"))
    images = torch.rand(2, 3, 24, 40, device="cuda")

    def search():
        return tracer.scan(images, timesteps=FOUR, noising=noising, batch=2)

    search()  # compiles kernels and copies constants
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = search()
    for _ in range(2):
        images.copy_(torch.rand_like(images))
        graph.replay()
        for one, other in zip(captured, search(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_the_search_makes_no_synchronizing_call():
    tracer = Tracer(make_backbone(device="cuda"))
    images = torch.randint(256, (2, 3, 24, 40), dtype=torch.uint8, device="cuda")
    tracer(images, timesteps=FOUR, timestep="iep")
    try:
        with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        tracer(images, timesteps=FOUR, timestep="iep")
    finally:
        torch.cuda.set_sync_debug_mode("default")


class TwoGrids(torch.nn.Module):
    """A network like a UNet: self-attention at two resolutions, the second of half the size, rounded up."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 4, stride=4)
        self.fine, self.coarse, self.again = Attention(16, 2), Attention(16, 2), Attention(16, 2)
        self.head = torch.nn.ConvTranspose2d(16, 3, 4, stride=4)

    def forward(self, sample, timestep):
        x = self.stem(sample) + timestep[:, None, None, None] / 1000
        small = torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)
        small = small + self.mix(self.coarse, small)
        x = x + self.mix(self.fine, x) + torch.nn.functional.interpolate(small, x.shape[-2:])
        return self.head(x + self.mix(self.again, x))

    @staticmethod
    def mix(attention, x):
        rotary = rotary_embedding(*x.shape[-2:], 8)
        return attention(x.flatten(2).mT, image_rotary_emb=rotary).mT.unflatten(2, x.shape[-2:])


class TwoGridsBackbone(MiniBackbone):
    def __init__(self, network):
        self.network, self.settings, self.schedule = network, Settings(size=(20, 28)), VariancePreserving()

    def attentions(self):
        return [self.network.coarse, self.network.fine, self.network.again]

    def grids(self, size):
        return [(3, 4), (5, 7), (5, 7)]


@pytest.mark.parametrize(("blocks", "grid"), [(None, (5, 7)), ((0, 2), (5, 7)), ((0,), (3, 4))])
def test_blocks_of_several_grids_meet_on_the_finest(blocks, grid):
    torch.manual_seed(0)
    tracer = Tracer(TwoGridsBackbone(TwoGrids()))
    images = torch.rand(2, 3, 20, 28)
    kl, abdiv = tracer.scan(images, timesteps=(0, 499), noising="gaussian", blocks=blocks)
    maps = []
    for level in (0, 499):
        inputs = []
        with tracer.backbone.capture(lambda *block, inputs=inputs: inputs.append(block[1:3])), torch.no_grad():
            timestep = torch.full((2,), level)
            noise = torch.randn((1, 3, 20, 28), generator=torch.Generator().manual_seed(0))
            tracer.backbone.predict(tracer.backbone.schedule.noise(images * 2 - 1, noise, timestep), timestep)
        read = [reference.attention_map(q.double(), k.double()) for q, k in inputs]
        chosen = [(read[index], tracer.backbone.grids(None)[index]) for index in blocks or range(3)]
        maps.append(torch.stack([reference.resize_attention(one, size, grid) for one, size in chosen]).mean(0))
    assert abdiv.shape == (2, 2, *grid)
    torch.testing.assert_close(kl[:, 0].double(), reference.step_kl(*maps), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(abdiv[:, 1].double(), reference.abdiv(maps[1], *grid), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("noising", ["inversion", "gaussian"])
def test_fixed_level_is_the_same_with_and_without_the_curve(tracer, images, noising):
    brief = tracer(images, timestep=299, noising=noising, return_abdiv=True)
    full = tracer(images, timestep=299, noising=noising, return_kl=True, return_abdiv=True)
    assert brief.kl is None and full.kl.shape == (2, len(TIMESTEPS) - 1)
    assert brief.timestep.tolist() == full.timestep.tolist() == [299, 299]
    torch.testing.assert_close(brief.abdiv, full.abdiv, rtol=1e-4, atol=1e-6)


def test_fixed_level_off_the_grid_is_visited(tracer, images):
    output = tracer(images, timestep=250, noising="gaussian", return_kl=True)
    assert output.timestep.tolist() == [250, 250]
    assert output.timesteps.tolist() == sorted({*TIMESTEPS, 250})


def test_numbers_of_other_kinds_are_levels_too(tracer, images):
    plain = tracer(images, timesteps=FOUR, timestep=99)
    other = tracer(images, timesteps=np.array(FOUR), timestep=torch.tensor(99))
    assert torch.equal(plain.edges, other.edges)


def test_threads_take_turns(tracer, images):
    expected = [tracer(image, timestep=0).edges for image in images]
    ready = threading.Barrier(4, timeout=60)

    def work(index):
        ready.wait()
        return [tracer(images[index % 2], timestep=0).edges for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for index, outputs in enumerate(pool.map(work, range(4))):
            assert all(torch.allclose(one, expected[index % 2], atol=1e-5) for one in outputs)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": (64,)}, ValueError, r"size must be a tuple \(height, width\) of positive integers, got \(64,\)"),
        ({"size": [64, 96]}, ValueError, r"size must be a tuple .* of positive integers, got \[64, 96\]"),
        ({"size": (22, 40)}, ValueError, "size must be positive multiples of 4 pixels"),
        ({"size": (20000, 9000)}, ValueError, "size must be at most 178956970 pixels, got 20000 x 9000"),
        ({"edge_scale": 0}, ValueError, "edge_scale must be from 1e-6 to 1e6, got 0"),
        ({"edge_scale": 1e-300}, ValueError, "edge_scale must be from 1e-6 to 1e6, got 1e-300"),
        ({"edge_scale": float("nan")}, ValueError, "edge_scale must be from 1e-6 to 1e6, got nan"),
        ({"contour_threshold": 0}, ValueError, "contour_threshold must be above 0 and at most 1, got 0"),
        ({"region_threshold": 1.5}, ValueError, "region_threshold must be above 0 and at most 1, got 1.5"),
        ({"timestep": "peak"}, TypeError, "timestep must be 'iep' or an integer"),
        ({"noising": "ddpm"}, ValueError, "noising must be 'inversion' or 'gaussian', got 'ddpm'"),
    ],
)
def test_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        make_backbone(**settings)


def test_settings_are_the_defaults_and_are_recorded(images):
    tracer = Tracer(make_backbone(timestep=199, noising="gaussian", blocks=(0, 1), edge_scale=0.5), name="some")
    output = tracer(images, return_abdiv=True)
    assert (output.model, output.noising, output.size) == ("some", "gaussian", (24, 40))
    assert output.timestep.tolist() == [199, 199]
    _, abdiv = tracer.scan(images, timesteps=(199,), noising="gaussian", blocks=(0, 1))
    assert torch.equal(output.abdiv, abdiv[:, 0])


def test_edges_are_a_monotone_map_at_the_inputs_size(tracer):
    photograph = (np.random.default_rng(0).random((37, 61, 3)) * 255).astype(np.uint8)
    output = tracer(photograph, timestep=99, noising="gaussian", return_abdiv=True)
    assert output.edges.shape == (1, 1, 37, 61) and output.edges.dtype == torch.float32
    assert output.edges.min() >= 0 and output.edges.max() <= 1
    spread = torch.nn.functional.interpolate(output.abdiv[None], (37, 61), mode="bilinear")
    torch.testing.assert_close(output.edges, 1 - torch.exp(-spread / tracer.backbone.settings.edge_scale))


def test_a_divergence_that_rounding_left_below_zero_is_no_edge():
    edges = edge_probability(torch.tensor([[[-1e-6, -1e-6], [0.0, 0.5]]]), 0.1, (5, 7))
    assert edges.shape == (1, 1, 5, 7)
    assert edges.min() == 0 and edges.max() == 1 - torch.exp(torch.tensor(-5.0))


def test_seed_matters_for_gaussian_noising_alone(tracer, images):
    def run(noising, seed):
        return tracer(images, timestep=499, noising=noising, seed=seed).edges

    assert torch.equal(run("gaussian", 1), run("gaussian", 1))
    assert not torch.equal(run("gaussian", 1), run("gaussian", 2))
    assert torch.equal(run("inversion", 1), run("inversion", 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"timestep": "peak"}, TypeError, "timestep must be 'iep' or an integer, got 'peak'"),
        ({"timestep": True}, TypeError, "timestep must be 'iep' or an integer, got True"),
        ({"timestep": 1000}, ValueError, "timestep must be from 0 to 999, got 1000"),
        ({"timesteps": (99, 0)}, ValueError, r"timesteps must rise and be from 0 to 999, got \(99, 0\)"),
        ({"timesteps": ()}, ValueError, "timesteps must rise and be from 0 to 999"),
        ({"timesteps": (0, 1000)}, ValueError, "timesteps must rise and be from 0 to 999"),
        ({"timesteps": (0, 9.5)}, TypeError, "timesteps must be a sequence of integers"),
        ({"timesteps": 5}, TypeError, "timesteps must be a sequence of integers, got 5"),
        ({"timesteps": (0,), "timestep": "iep"}, ValueError, "timesteps must be at least two for a KL curve"),
        ({"timesteps": (99, 199), "noising": "inversion"}, ValueError, "timesteps must start at 0 for inversion"),
        ({"noising": "ddpm"}, ValueError, "noising must be 'inversion' or 'gaussian', got 'ddpm'"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tracer, images, monkeypatch, arguments, error, message):
    monkeypatch.setattr(tracer.backbone, "predict", lambda *_: pytest.fail("the network was run"))
    with pytest.raises(error, match=message):
        tracer(images, **arguments)


@pytest.mark.parametrize("blocks", [(), (0, 0), (3,), (-1,)])
def test_wrong_blocks_are_refused(tracer, images, blocks):
    with pytest.raises(ValueError, match="blocks must be distinct indices from 0 to 2"):
        tracer.scan(images, blocks=blocks)


class TestFolder:
    """Weights in a folder: read back, or refused with one clear line."""

    @pytest.fixture
    def folder(self, tmp_path):
        backbone = make_backbone()
        save_file({k: v.half() for k, v in backbone.network.state_dict().items()}, tmp_path / "model.safetensors")
        config = {"family": "mini", "architecture": backbone.network.config.to_dict(), "tracing": {"size": [24, 40]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    def test_a_good_folder_is_read(self, folder, images):
        output = Tracer.from_pretrained(folder, device="cpu")(images, timestep=99)
        assert output.edges.shape == (2, 1, 24, 40) and output.model == str(folder)

    def test_a_missing_gpu_is_named(self, folder, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="device must be present, got 'cuda:1' where torch sees no GPU"):
            Tracer.from_pretrained(folder, device="cuda:1")

    def test_unknown_name_lists_the_known(self):
        with pytest.raises(ValueError, match=r"model must be one of mini, .*, or a folder .* got 'sd9'"):
            Tracer.from_pretrained("sd9")

    def refuse(self, folder, message):
        with pytest.raises(ValueError, match=message):
            Tracer.from_pretrained(folder)

    def test_truncated_weights(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refuse(folder, "model.safetensors is damaged")

    def test_weights_that_are_not_safetensors(self, folder):
        (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")
        self.refuse(folder, "model.safetensors is damaged")

    def test_missing_weights(self, folder):
        (folder / "model.safetensors").unlink()
        self.refuse(folder, "model must be complete and its files must fit each other")

    def test_weights_of_another_architecture(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["architecture"]["depth"] = 4
        (folder / "config.json").write_text(json.dumps(config))
        self.refuse(folder, "Missing key")

    def test_weights_with_nan(self, folder):
        weights = make_backbone().network.state_dict()
        weights["head.bias"] = torch.full_like(weights["head.bias"], float("nan"))
        save_file(weights, folder / "model.safetensors")
        self.refuse(folder, "holds numbers that are not finite in head.bias")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("heads", 0, "mini: heads must be from 1 to 4096, got 0"),
            ("patch", 0, "mini: patch must be from 1 to 4096, got 0"),
            ("depth", -1, "mini: depth must be from 1 to 4096, got -1"),
            ("dim", 2**62, "mini: dim must be from 1 to 4096, got 4611686018427387904"),
            ("dim", 24.0, "mini: dim must be an int, got float"),
        ],
    )
    def test_an_impossible_architecture(self, folder, name, value, message):
        config = json.loads((folder / "config.json").read_text())
        config["architecture"][name] = value
        (folder / "config.json").write_text(json.dumps(config))
        self.refuse(folder, message)

    def test_edges_that_are_no_numbers_are_refused(self, folder):
        weights = load_file(folder / "model.safetensors")
        weights = {name: weight.float().sign() * 1e38 if "to_q" in name else weight for name, weight in weights.items()}
        save_file(weights, folder / "model.safetensors")
        tracer = Tracer.from_pretrained(folder, device="cpu")
        with pytest.raises(RuntimeError, match=r"^edges: model must give finite numbers, got NaN from .*its weights"):
            tracer(np.random.default_rng(0).random((24, 40, 3)), timestep=99)

    @pytest.mark.parametrize(
        "text", ["{", "{}", '{"family": "other"}', '{"family": "mini", "architecture": {"x": 1}}', "[]"]
    )
    def test_damaged_configuration(self, folder, text):
        (folder / "config.json").write_text(text)
        self.refuse(folder, "model must be complete and its files must fit each other")

    def test_unknown_setting(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["tracing"]["color"] = 1
        (folder / "config.json").write_text(json.dumps(config))
        self.refuse(folder, r"unknown tracing settings \['color'\]")


def test_models_lists_what_is_embedded_first():
    assert trace_fast.models()[0] == "mini"


def test_channel_order(tracer, images):
    expected = tracer(images).edges
    assert not torch.equal(tracer(images.flip(1)).edges, expected)
    reordered = tracer.reordered("bgr")
    assert (tracer.channel_order, reordered.channel_order) == ("rgb", "bgr") and reordered.reordered("bgr") is reordered
    for output in (
        tracer(images.flip(1), channel_order="bgr"),
        tracer([images.flip(1)], channel_order="bgr")[0],
        reordered(images.flip(1)),
        reordered(images, channel_order="rgb"),
    ):
        assert torch.equal(output.edges, expected)
    assert torch.equal(reordered.edges(images), expected)
    with pytest.raises(ValueError, match="edges: channel_order must be 'rgb' or 'bgr', got 'gbr'"):
        tracer.reordered("gbr")
