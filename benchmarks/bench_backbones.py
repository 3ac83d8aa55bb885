"""The full-size backbones on a GPU, with random weights: the parts of a search, and the same with eager maps.

`encode` is the autoencoder, `forward` one plain call of the network, `capture` the same with every block's map
accumulated, `search` ten timesteps by inversion, `eager` the same with maps head by head in plain torch. `student` is
one pass of encode and network with the paper's decoder, its aim at most 1.15 times `encode` and `forward`; `student,
compiled` the same as a CUDA graph. Random weights prove wiring and latency, never quality. Needs diffusers on the
machine with the GPU.
"""

import functools
import gc

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
diffusers = pytest.importorskip("diffusers")
# warnings of the compiler about diffusers do not stop a measurement
pytestmark = pytest.mark.filterwarnings("default")

from memory import MODELS, make_tracer  # noqa: E402

from trace_fast import Detector  # noqa: E402
from trace_fast.decoder import make_decoder  # noqa: E402

TIMESTEPS = (0, *range(99, 900, 100))  # ten


@functools.lru_cache(maxsize=1)
def tracer(name):
    """Build a network of the published configuration on the GPU, in bfloat16, with random weights; one at a time."""
    gc.collect()
    torch.cuda.empty_cache()
    return make_tracer(name, "cuda", torch.bfloat16)


@pytest.mark.parametrize("stage", ["encode", "forward", "capture", "search", "eager"])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def bench_backbone(model, stage, measure, monkeypatch):
    traced = tracer(model)
    backbone = traced.backbone
    images = torch.rand(1, 3, *backbone.settings.size, device="cuda")
    latent, timestep = backbone.encode(images), torch.tensor([99], device="cuda")
    grids = backbone.grids(backbone.settings.size)
    blocks = range(len(grids))
    tokens = max(height * width for height, width in grids)
    total = torch.zeros(1, tokens, tokens, device="cuda")
    search = functools.partial(traced.scan, images, timesteps=TIMESTEPS, noising="inversion")
    calls = {
        "encode": lambda: backbone.encode(images),
        "forward": lambda: backbone.predict(latent, timestep),
        "capture": lambda: traced._attend(total, latent, timestep, blocks, grids),
        "search": search,
        "eager": search,
    }
    if stage == "capture":
        assert torch.equal(calls["forward"](), calls["capture"]())
        torch.testing.assert_close(total.sum(-1), torch.ones(1, tokens, device="cuda"), rtol=0, atol=1e-3)
    elif stage in ("search", "eager"):
        maps = search()
        monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
        for one, other in zip(maps, search(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
        if stage == "search":
            monkeypatch.delenv("TRACE_FAST_BACKEND")
    else:
        assert calls[stage]().isfinite().all()
    measure(f"{model}, random weights", stage, calls[stage], device="cuda")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", MODELS)
def bench_student(model, compiled, measure, monkeypatch):
    backbone = tracer(model).backbone
    images = torch.rand(1, 3, *backbone.settings.size, device="cuda")
    torch.manual_seed(0)
    detector = Detector(backbone, make_decoder("conv", backbone.finest_grid()))
    monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
    expected = detector.edges(images)
    monkeypatch.delenv("TRACE_FAST_BACKEND")
    if compiled:
        detector.compile()
    torch.testing.assert_close(detector.edges(images), expected, rtol=0, atol=1e-2)
    provider = "student, compiled" if compiled else "student"
    measure(f"{model}, random weights", provider, lambda: detector.edges(images), device="cuda")
