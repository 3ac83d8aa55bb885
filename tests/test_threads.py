"""Several threads that run the same networks at once: each gets what it would get alone, bit for bit."""

import functools
import threading
from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny import FAMILIES, SIZE, pipeline
from torch.utils.checkpoint import checkpoint

import trace_fast
from trace_fast import Detector, Tracer
from trace_fast.backbones import load_backbone, wrap_pipeline
from trace_fast.backbones.capture import network_lock
from trace_fast.decoder import make_decoder

pytestmark = pytest.mark.slow

THREADS = 8
ROUNDS = 5
SCAN = {"timesteps": (0, 499), "noising": "gaussian"}


@pytest.fixture(autouse=True)
def one_thread_each():
    """Tiny networks wait for a second thread longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(count=4):
    return [torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def run_in_threads(calls):
    """Return (name, result) of calls (name, function), made several times and at once; raise the first error."""
    results, errors, start = [], [], threading.Barrier(THREADS, timeout=60)

    def work(first):
        start.wait()
        try:
            for number in range(ROUNDS):
                name, call = calls[(first + number) % len(calls)]
                results.append((name, call()))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    assert len(results) == THREADS * ROUNDS
    return results


def assert_as_alone(calls):
    """Compare what threads get at once with what one thread gets in turn."""
    alone = {name: call() for name, call in calls}
    for name, result in run_in_threads(calls):
        expected = alone[name]
        pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
        assert all(torch.equal(one, other) for one, other in pairs), name


def tracer_calls(*tracers):
    """Return scans of every image by every tracer, in an order in which neighbors differ in tracer or image."""
    return [
        (f"tracer {number}, image {index}", lambda tracer=tracer, image=image: tracer.scan(image, **SCAN))
        for index, image in enumerate(images())
        for number, tracer in enumerate(tracers)
    ]


def make_pipe(family):
    torch.manual_seed(0)
    parts, empty_prompt = FAMILIES[family].parts()
    for name in ("unet", "transformer", "vae"):
        if name in parts:
            for parameter in parts[name].eval().parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return SimpleNamespace(**parts), empty_prompt


def pipe_calls(pipe, empty_prompt):
    """Return scans by two tracers of a pipeline, and calls of its network in no capture and without a lock."""
    backbones = [wrap_pipeline(pipe, empty_prompt, SIZE) for _ in range(2)]
    latents = [backbones[0].encode(image) for image in images()]

    @torch.no_grad()
    def predict(latent):
        return backbones[0].predict(latent, torch.tensor([99]))

    calls = tracer_calls(*map(Tracer, backbones))
    for index, latent in enumerate(latents):
        calls.insert(3 * index, (f"plain call, latent {index}", lambda latent=latent: predict(latent)))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd3.5-medium", "flux.2", "qwen-image", "z-image"])
def test_two_tracers_of_a_network_and_plain_calls(family):
    assert_as_alone(pipe_calls(*make_pipe(family)))


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_that_is_compiled(wrapped):
    pipe, empty_prompt = make_pipe("flux.1-dev")
    torch._dynamo.reset()
    if wrapped:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile(backend="eager")
    assert_as_alone(pipe_calls(pipe, empty_prompt))


@pytest.mark.slow
def test_a_search_and_a_student_of_one_network():
    backbone = load_backbone("mini", device=torch.device("cpu"), size=(32, 48))
    torch.manual_seed(0)
    detectors = [Detector(backbone, make_decoder("conv", backbone.finest_grid())) for _ in range(2)]
    calls = tracer_calls(Tracer(backbone))
    for number, detector in enumerate(detectors):
        for index, image in enumerate(images()):
            calls.append((f"student {number}, image {index}", lambda d=detector, image=image: d.edges(image)))
    assert_as_alone(calls)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "mini"])
def test_tracers_of_a_network_at_mixed_sizes(family):
    if family == "mini":
        backbone = load_backbone("mini", device=torch.device("cpu"), size=(32, 48))
        tracers = [Tracer(backbone).resized(size) for size in ((32, 48), (48, 32), (16, 64))]
    else:
        pipe, empty_prompt = make_pipe(family)
        tracers = [Tracer(wrap_pipeline(pipe, empty_prompt, size)) for size in (SIZE, SIZE[::-1], (32, 64))]
    photos = [torch.rand(1, 3, 20 + 7 * index, 41 - 5 * index) for index in range(3)]
    calls = [
        (f"tracer {number}, photo {index}", lambda tracer=tracer, photo=photo: tracer(photo, **SCAN).edges)
        for index, photo in enumerate(photos)
        for number, tracer in enumerate(tracers)
    ]
    assert_as_alone(calls)


@pytest.mark.slow
def test_the_models_that_edges_keeps():
    calls = [
        (f"stage {stage} of image {index}", lambda x=image, n=stage: trace_fast.edges(x, stage=n, size=(32, 48)))
        for index, image in enumerate(images())
        for stage in (1, 2)
    ]
    assert_as_alone(calls)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_a_whole_pipeline_that_makes_images_meanwhile(half, tmp_path):
    pipe = pipeline("sd15", tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    tracers = [Tracer.from_pipeline(pipe, size=SIZE) for _ in range(2)]
    if half:  # the autoencoder is cast to float32 and back for each image
        pipe.vae.register_to_config(force_upcast=True)
        pipe.vae.half()
    # a sampler has a state: one thread at a time
    sampler = threading.Lock()

    def make_image():
        with sampler:
            generator = torch.Generator().manual_seed(0)
            options = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 2, "output_type": "latent"}
            return pipe("", **options, generator=generator).images

    assert_as_alone([*tracer_calls(*tracers), *((f"pipeline {number}", make_image) for number in range(4))])


@pytest.mark.slow
def test_parts_whose_weights_come_and_go():
    from accelerate import cpu_offload

    pipe, empty_prompt = make_pipe("sd15")
    backbones = [wrap_pipeline(pipe, empty_prompt, SIZE) for _ in range(2)]
    for part in (pipe.vae, pipe.unet):
        cpu_offload(part, torch.device("cpu"))
    assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}
    assert_as_alone(tracer_calls(*map(Tracer, backbones)))


def test_a_backward_pass_in_autograds_thread_is_read_too():
    # on a GPU autograd runs checkpointed blocks again in another thread
    backbone = load_backbone("mini", device=torch.device("cpu"), size=SIZE)
    network, blocks = backbone.network.requires_grad_(True), []
    forwards = [block.forward for block in network.blocks]

    def gradient(checkpointed):
        for block, forward in zip(network.blocks, forwards, strict=True):
            block.forward = functools.partial(checkpoint, forward, use_reentrant=False) if checkpointed else forward
        network.zero_grad()
        blocks.clear()
        total = []

        def on_attention(index, query, key, *_):
            blocks.append(index)
            total.append((query * key).sum())

        with backbone.capture(on_attention):
            loss = backbone.predict(images()[0], torch.tensor([99])).square().sum()
            loss = loss + torch.stack(total).sum()
            backward = threading.Thread(target=loss.backward)
            backward.start()
            backward.join()
        return network.blocks[0].attn.to_q.weight.grad.clone()

    expected = gradient(False)
    assert blocks == list(range(len(forwards)))
    again = gradient(True)
    assert sorted(blocks) == sorted(2 * list(range(len(forwards))))
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_the_lock_is_the_networks():
    network = torch.nn.Linear(2, 2)
    assert network_lock(network) is network_lock(network)
    assert network_lock(torch.compile(network)) is network_lock(network)
    assert network_lock(torch.nn.Linear(2, 2)) is not network_lock(network)
