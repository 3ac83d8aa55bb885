"""Arguments of a network beside the latent, from its own pipeline and from a backbone; the grid is not square."""

import inspect

import diffusers
import pytest
import torch
from tiny import FAMILIES, PIPELINES, SIZE, pipeline

from trace_fast.backbones import wrap_pipeline

# of diffusers' own call of the hub
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")


def received(network, call):
    """Return the tensors that a network receives in its one call, by the names of arguments and of their items."""
    calls = []

    def note(module, args, kwargs):
        calls.append(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            call()
    finally:
        handle.remove()
    (arguments,) = calls
    values = {}
    for name, value in arguments.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        values |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("family", PIPELINES)
def test_a_network_receives_from_a_backbone_what_its_pipeline_gives(family, tmp_path):
    pipe = pipeline(family, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    if not FAMILIES[family].flow:  # a sampler that can do with one step
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    backbone = wrap_pipeline(pipe, size=SIZE)
    prompt = {"prompt": ""}
    if family == "sdxl":  # its empty prompt is zeros where it is the negative one
        pipe.text_encoder_2.config.projection_dim = backbone.empty_prompt["text_embeds"].shape[1]
        names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
        prompt = {names[name]: x for name, x in backbone.empty_prompt.items()}
    options = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 1, "guidance_scale": 1.0}
    options |= FAMILIES[family].call
    expected = received(network, lambda: pipe(**prompt, **options, output_type="latent"))

    sample = FAMILIES[family].sample(expected, backbone.grids(SIZE)[0])
    level = pipe.scheduler.timesteps[:1]
    ours = received(network, lambda: backbone.predict(sample, level))
    for name in [name for name in expected if name.endswith("_mask") and name not in ours]:
        assert expected.pop(name).bool().all()  # it masks nothing: of Qwen-Image in diffusers 0.35
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        one, other = torch.broadcast_tensors(ours[name], value)
        # embedded twice, in batches of other sizes
        close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(one, other, **close, msg=lambda text, name=name: f"{name}: {text}")
