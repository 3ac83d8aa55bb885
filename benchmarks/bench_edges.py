"""Stage 1 end to end on a 640 x 480 photograph with the embedded model on the CPU, and its parts.

The stages are those of the whole search, 11 timesteps: `load` reads the JPEG, `forward` runs the network without
capture, `forward_capture` the same with every map accumulated, `divergence` measures all steps and maps, `post`
resizes the edges to the input. Other work on the machine changes times by more than capture does: `over_forward` is
the median of 55 pairs of passes, with capture and without, one right after the other.

The student, eager and compiled, is timed beside the search it was distilled from, the same search with every op in
plain torch, and its floor: one pass of the network.
"""

import itertools
import statistics
import time

import pytest
import torch
from PIL import Image

import trace_fast
from trace_fast import Detector, Tracer, ops, reference
from trace_fast.io import images as image
from trace_fast.tracer import TIMESTEPS, edge_probability

HEIGHT, WIDTH = 480, 640
EDGES = "edges of 640 x 480, mini"
STUDENT = "the student and its teacher, 512 x 512, mini"


@pytest.fixture(scope="module")
def tracer():
    return Tracer.from_pretrained("mini", device="cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    data = pytest.importorskip("skimage.data")
    path = tmp_path_factory.mktemp("photographs") / "photograph.jpg"
    Image.fromarray(data.coffee()).resize((WIDTH, HEIGHT)).save(path, quality=92)
    return path


@pytest.fixture(scope="module")
def maps(tracer):
    """Return a map for each timestep, of the tracer's grid: (T, 1, N, N), rows sum to 1."""
    height, width = tracer.backbone.grid(tracer.backbone.settings.size)
    tokens = height * width
    return torch.randn(len(TIMESTEPS), 1, tokens, tokens, device=tracer.device).mul_(3).softmax(-1)


@pytest.mark.parametrize("noising", ["inversion", "gaussian"])
def bench_search(measure, tracer, path, noising):
    def search():
        return tracer(path, timestep="iep", noising=noising)

    output = search()
    kl, abdiv = tracer.scan(image.read_image(path), noising=noising)
    assert output.edges.shape == (1, 1, HEIGHT, WIDTH)
    assert torch.equal(output.kl, kl)
    chosen = kl[0].argmax() + 1
    scale = tracer.backbone.settings.edge_scale
    assert torch.equal(output.edges, edge_probability(abdiv[:, chosen], scale, (HEIGHT, WIDTH)))
    measure(EDGES, f"search, {noising}", search)


def bench_edges_default(measure, path):
    edges = trace_fast.edges(path, device="cpu")
    assert edges.shape == (HEIGHT, WIDTH)
    assert 0 <= edges.min() < edges.max() <= 1
    measure(EDGES, "trace_fast.edges", lambda: trace_fast.edges(path, device="cpu"))


def compare(call, other, arguments):
    """Return the medians of the ratios of wall and of CPU time, other's over call's, called in turn."""
    ratios = []
    for index, argument in enumerate(arguments):
        times = {}
        for timed in (call, other) if index % 2 else (other, call):
            start = time.perf_counter(), time.process_time()
            timed(argument)
            times[timed] = time.perf_counter() - start[0], time.process_time() - start[1]
        ratios.append([later / earlier for earlier, later in zip(times[call], times[other], strict=True)])
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


@pytest.mark.parametrize("stage", ["load", "forward", "forward_capture", "divergence", "post"])
def bench_stage(measure, tracer, path, maps, stage):
    backbone, size = tracer.backbone, tracer.backbone.settings.size
    height, width = backbone.grid(size)
    pixels = image.read_image(path)
    latent = backbone.encode(image.resize(pixels, size))
    timesteps = [torch.tensor([timestep]) for timestep in TIMESTEPS]
    blocks = tuple(range(len(backbone.attentions())))
    total = torch.empty_like(maps[0])

    def load():
        return image.read_image(path)

    @torch.no_grad()
    def plain_pass(timestep):
        return backbone.predict(latent, timestep)

    @torch.no_grad()
    def captured_pass(timestep):
        return tracer._attend(total, latent, timestep, blocks, backbone.grids(size))

    def forward():
        return [plain_pass(timestep) for timestep in timesteps]

    def forward_capture():
        return [captured_pass(timestep) for timestep in timesteps]

    def divergence():
        return [ops.step_kl_abdiv(previous, current, height, width) for previous, current in itertools.pairwise(maps)]

    def post():
        return edge_probability(strength, backbone.settings.edge_scale, (HEIGHT, WIDTH))

    strength, work = divergence()[0][1], {}
    if stage == "forward_capture":
        assert all(torch.equal(a, b) for a, b in zip(forward(), forward_capture(), strict=True))
        work["over_forward"], work["over_forward_cpu"] = compare(plain_pass, captured_pass, 5 * timesteps)
    if stage == "divergence":
        kl, abdiv = reference.step_kl_abdiv(maps[0].double(), maps[1].double(), height, width)
        torch.testing.assert_close(divergence()[0][0].double(), kl, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(divergence()[0][1].double(), abdiv, rtol=1e-4, atol=1e-6)
    stages = {call.__name__: call for call in (load, forward, forward_capture, divergence, post)}
    measure("stages of the search, 11 timesteps", stage, stages[stage], **work)


@pytest.fixture(scope="module")
def square():
    return torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def detector():
    return Detector.from_pretrained("mini", device="cpu")


@pytest.mark.parametrize("backend", ["eager", "native"])
def bench_teacher(measure, monkeypatch, tracer, square, backend):
    def search():
        return tracer(square, timestep="iep").edges

    expected = search()
    if backend == "eager":
        monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
    torch.testing.assert_close(search(), expected, rtol=0, atol=1e-3)
    measure(STUDENT, "eager" if backend == "eager" else "search", search)


@torch.no_grad()
def bench_plain_pass(measure, detector, square):
    backbone = detector.backbone
    timestep = torch.tensor([detector.timestep])

    def run():
        return backbone.predict(backbone.encode(image.resize(square, backbone.settings.size)), timestep)

    assert run().isfinite().all()
    measure(STUDENT, "floor: one plain pass", run)


def bench_student(measure, monkeypatch, detector, square):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
    expected = detector.edges(square)
    monkeypatch.delenv("TRACE_FAST_BACKEND")
    torch.testing.assert_close(detector.edges(square), expected, rtol=0, atol=1e-4)
    measure(STUDENT, "student", lambda: detector.edges(square))


def bench_student_compiled(measure, detector, square):
    expected = detector.edges(square)
    compiled = Detector.from_pretrained("mini", device="cpu").compile()
    torch.testing.assert_close(compiled.edges(square), expected, rtol=0, atol=1e-4)
    measure(STUDENT, "student, compiled", lambda: compiled.edges(square))
