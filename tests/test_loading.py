"""Models in folders of the hub's own layout: tiny pipelines with their text encoders, saved and loaded offline."""

import json
import shutil

import diffusers
import pytest
import torch
from tiny import SIZE, pipeline

import trace_fast
from trace_fast import Tracer
from trace_fast.backbones import registry, wrap_pipeline
from trace_fast.backbones.loading import memory, pipelines

# of diffusers' own call of the hub
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")

PIPELINES = ("sd15", "sdxl", "pixart", "sd3.5-large", "flux.1-dev")


@pytest.fixture(params=PIPELINES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network and a cache of its own."""
    import socket

    def refuse(*_, **__):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TRACE_FAST_CACHE", str(tmp_path / "cache"))
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture
def saved(family, tmp_path):
    """A pipeline and the folder it was saved to."""
    pipe = pipeline(family, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    return pipe, tmp_path / "model"


def test_a_folder_gives_what_its_pipeline_gives(saved):
    pipe, folder = saved
    images = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    expected = Tracer.from_pipeline(pipe, size=SIZE)(images, timesteps=(0, 99, 499), return_abdiv=True)
    tracer = Tracer.from_pretrained(folder, device="cpu", size=SIZE, local_files_only=True)
    found = tracer(images, timesteps=(0, 99, 499), return_abdiv=True)
    assert found.model == str(folder)
    torch.testing.assert_close(found.abdiv, expected.abdiv)
    torch.testing.assert_close(found.edges, expected.edges)


def test_the_class_that_repositories_of_pixart_name(tmp_path):
    # they were made before it had a class of its own
    pipe, folder = pipeline("pixart", tmp_path), tmp_path / "model"
    pipe.save_pretrained(folder)
    index, config = folder / "model_index.json", folder / "transformer/config.json"
    old = {"num_vector_embeds": None, "only_cross_attention": False, "double_self_attention": False}
    values = {**json.loads(config.read_text()), **old, "_class_name": "Transformer2DModel"}
    config.write_text(json.dumps({name: values[name] for name in values if name != "use_additional_conditions"}))
    index.write_text(json.dumps({**json.loads(index.read_text()), "transformer": ["diffusers", "Transformer2DModel"]}))
    images = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    expected = Tracer.from_pipeline(pipe, size=SIZE)(images, timesteps=(0, 99, 499)).edges
    found = Tracer.from_pretrained(folder, device="cpu", size=SIZE)(images, timesteps=(0, 99, 499)).edges
    torch.testing.assert_close(found, expected)


def test_the_empty_prompt_is_embedded_once(saved, tmp_path, monkeypatch):
    _, folder = saved
    first = Tracer.from_pretrained(folder, device="cpu", size=SIZE).backbone.empty_prompt
    files = list((tmp_path / "cache" / "empty_prompts").iterdir())
    assert [file.suffix for file in files] == [".safetensors"]
    monkeypatch.setattr(pipelines, "encode_empty_prompt", lambda *_: pytest.fail("text encoders were loaded again"))
    for encoder in folder.glob("text_encoder*"):
        shutil.rmtree(encoder)
    second = Tracer.from_pretrained(folder, device="cpu", size=SIZE).backbone.empty_prompt
    assert {name: x.shape for name, x in first.items()} == {name: x.shape for name, x in second.items()}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_empty_prompt_is_embedded_anew_for_other_encoders_and_dtypes(saved, family):
    pipe, folder = saved
    first = Tracer.from_pretrained(folder, device="cpu", size=SIZE, dtype=torch.bfloat16).backbone.empty_prompt
    exact = Tracer.from_pretrained(folder, device="cpu", size=SIZE).backbone.empty_prompt
    expected = wrap_pipeline(pipe, size=SIZE).empty_prompt
    torch.testing.assert_close(exact, expected, rtol=1e-3, atol=1e-4)
    if family == "sdxl":  # zeros
        return
    assert first["encoder_hidden_states"].dtype == torch.bfloat16
    for parameter in pipe.text_encoder.parameters():
        parameter.data += 0.5
    pipe.text_encoder.save_pretrained(folder / "text_encoder")
    again = Tracer.from_pretrained(folder, device="cpu", size=SIZE).backbone.empty_prompt
    torch.testing.assert_close(again, wrap_pipeline(pipe, size=SIZE).empty_prompt, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(again[name], exact[name]) for name in exact)


def test_text_encoders_that_are_not_asked_need_not_be_there(tmp_path):
    pipe, folder = pipeline("sdxl", tmp_path), tmp_path / "model"
    pipe.save_pretrained(folder)
    for part in (*folder.glob("text_encoder*"), *folder.glob("tokenizer*")):
        shutil.rmtree(part)
    empty_prompt = Tracer.from_pretrained(folder, device="cpu", size=SIZE).backbone.empty_prompt
    assert empty_prompt["encoder_hidden_states"].shape == (1, 77, 8) and not empty_prompt["encoder_hidden_states"].any()


def test_a_tokenizer_of_sentencepiece_alone(tmp_path):
    # all that the repositories of PixArt have
    import io

    import sentencepiece

    pipe, folder = pipeline("pixart", tmp_path), tmp_path / "model"
    pipe.save_pretrained(folder)
    model = io.BytesIO()
    lines = iter(["a photograph of a cat", "two dogs in the snow", "an empty prompt"])
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, vocab_size=26, **options)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer/spiece.model").write_bytes(model.getvalue())
    words = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **words}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    empty_prompt = Tracer.from_pretrained(folder, device="cpu", size=SIZE).backbone.empty_prompt
    assert empty_prompt["encoder_hidden_states"].shape[:2] == (1, 120)
    assert empty_prompt["encoder_attention_mask"].sum() == 1  # the token that ends the prompt


def test_a_network_that_is_not_known_is_told(saved, family, monkeypatch):
    _, folder = saved
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    kind = json.loads((folder / part / "config.json").read_text())["_class_name"]
    monkeypatch.delitem(registry.PIPELINE_FAMILIES, kind)
    with pytest.raises(ValueError, match=f"load: model must hold one of .*, got {kind} in "):
        Tracer.from_pretrained(folder, device="cpu", size=SIZE)


def test_what_cannot_be_loaded_is_told(saved, family, monkeypatch):
    _, folder = saved
    index = json.loads((folder / "model_index.json").read_text())
    if family != "sdxl":
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["a", "b"]}))
        with pytest.raises(ValueError, match=r"load: model must be of a pipeline of diffusers, got \['a', 'b'\]"):
            Tracer.from_pretrained(folder, device="cpu", size=SIZE)
        (folder / "model_index.json").write_text(json.dumps(index))

    def missing(*_, **__):
        raise ImportError("No package metadata was found for bitsandbytes\nand more")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", missing)
    told = "needs a package that cannot be imported: No package metadata was found for bitsandbytes$"
    with pytest.raises(RuntimeError, match=told):
        Tracer.from_pretrained(folder, device="cpu", size=SIZE)


def test_the_empty_prompt_has_the_papers_length(saved, family):
    pipe, _ = saved
    empty_prompt = wrap_pipeline(pipe, size=SIZE).empty_prompt
    tokens = {"sd15": 77, "sdxl": 77, "pixart": 120, "sd3.5-large": 77 + 256, "flux.1-dev": 512}[family]
    assert empty_prompt["encoder_hidden_states"].shape[:2] == (1, tokens)


def test_dtype_is_that_of_the_weights(saved):
    _, folder = saved
    tracer = Tracer.from_pretrained(folder, device="cpu", size=SIZE, dtype=torch.bfloat16)
    assert {p.dtype for p in tracer.backbone.network.parameters()} == {torch.bfloat16}
    edges = tracer(torch.rand(1, 3, 20, 28), timesteps=(0, 99, 499)).edges
    assert edges.dtype == torch.float32 and edges.isfinite().all()


def test_weights_that_are_still_to_come_take_room(monkeypatch):
    tracer = Tracer.from_pretrained("mini", device="cpu", offload="model")
    tracer.backbone.network._hf_hook.execution_device = torch.device("cuda")
    for name, value in (("memory_reserved", 500), ("memory_allocated", 100), ("mem_get_info", (2**30, 2**31))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    needed = sum(4 * p.numel() for p in tracer.backbone.network.parameters())
    assert needed > 8_000_000 and tracer._room() == (2**30 + 400 - needed) // 2


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_parts_give_the_same(saved, offload):
    _, folder = saved
    images = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    plain = Tracer.from_pretrained(folder, device="cpu", size=SIZE)
    tracer = Tracer.from_pretrained(folder, device="cpu", size=SIZE, offload=offload)
    assert tracer.device == torch.device("cpu")
    for noising in ("gaussian", "inversion", "gaussian"):
        expected, found = (t(images, timesteps=(0, 99, 499), noising=noising) for t in (plain, tracer))
        assert torch.equal(found.kl, expected.kl) and torch.equal(found.edges, expected.edges)
    network, vae = tracer.backbone.network, tracer.backbone.vae
    if offload == "model":  # each makes the other leave
        assert network._hf_hook.prev_module_hook.model is vae
        assert vae._hf_hook.prev_module_hook.model is network
    else:  # nothing stays behind; the autoencoder's decoder was never asked
        assert {p.device.type for part in (network, vae) for p in part.parameters()} == {"meta"}


def test_a_pipeline_that_is_offloaded_layer_by_layer(saved):
    from accelerate import cpu_offload

    pipe, _ = saved
    images = torch.rand(1, 3, *SIZE)
    expected = Tracer.from_pipeline(pipe, size=SIZE)(images, timesteps=(0, 499)).edges
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):  # as enable_sequential_cpu_offload does on a GPU
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert pipe.vae.device.type == "meta"
    tracer = Tracer.from_pipeline(pipe, size=SIZE)
    assert tracer.device == torch.device("cpu")
    assert torch.equal(tracer(images, timesteps=(0, 499)).edges, expected)


def test_sequential_offload_in_half_precision_is_upcast(tmp_path):
    pipe = pipeline("sdxl", tmp_path)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.save_pretrained(tmp_path / "model")
    images = torch.rand(1, 3, *SIZE)
    plain, *others = (
        Tracer.from_pretrained(tmp_path / "model", device="cpu", size=SIZE, dtype=torch.float16, offload=offload)
        for offload in (None, "model", "sequential")
    )
    expected = plain.backbone.encode(images)
    assert expected.isfinite().all()
    for tracer in others:
        assert torch.equal(tracer.backbone.encode(images), expected)
        assert tracer.backbone.vae.dtype == torch.float16


def test_edges_takes_a_folder(tmp_path):
    pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
    image = torch.rand(3, 20, 28)
    assert trace_fast.edges(image, model=tmp_path / "model").shape == (1, 1, 20, 28)


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def refuse(self, folder, message, error=ValueError):
        with pytest.raises(error, match=message):
            Tracer.from_pretrained(folder, device="cpu", size=SIZE)

    def test_a_missing_part(self, folder):
        shutil.rmtree(folder / "vae")
        self.refuse(folder, "load: model must be complete.*, got .*model' without vae")

    def test_weights_that_are_not_safetensors(self, folder):
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
        self.refuse(folder, "load: model must be complete.*, got .*safetensors")

    def test_a_class_that_is_not_of_diffusers(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = ["remote_code", "UNet"]
        (folder / "model_index.json").write_text(json.dumps(index))
        self.refuse(folder, r"load: unet must be a class of diffusers .*, got remote_code.UNet")

    def test_a_pipeline_without_a_denoiser(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        del index["unet"]
        (folder / "model_index.json").write_text(json.dumps(index))
        self.refuse(folder, "load: model must have a unet or transformer and a vae")

    def test_too_little_memory(self, folder, monkeypatch):
        monkeypatch.setattr(memory.os, "sysconf", lambda _: 300)  # 90,000 bytes
        message = r"load: .* needs 0.0 GiB for its weights in float32, cpu has 0.0 GiB free"
        self.refuse(folder, message, RuntimeError)

    def test_too_little_memory_names_what_would_fit(self, monkeypatch):
        room = {"cuda": 12, "cpu": 64}  # GiB
        monkeypatch.setattr(memory, "free_bytes", lambda device: room[device.type] * 2**30)
        cuda, half, network, vae = torch.device("cuda"), torch.bfloat16, 11 * 2**29, 2**29  # numbers, of two bytes each

        def check(parts, dtype=half, offload=None):
            memory.check_memory("it", parts, dtype, cuda, offload)

        check([network, vae])
        check([16 * 2**29, vae], offload="sequential")
        for parts, dtype, offload, message in (
            (
                [network, vae],
                torch.float32,
                None,
                "needs 24.0 GiB .* float32, cuda has 12.0 .*; dtype=torch.bfloat16 w",
            ),
            ([network, 2 * vae], half, None, "needs 13.0 GiB .*; offload='model' would fit"),
            ([16 * 2**29, vae], half, None, "needs 17.0 GiB .*; offload='sequential' would fit"),
            ([16 * 2**29, vae], half, "model", "needs 16.0 GiB .* cuda has 12.0 .*; offload='sequential' would fit"),
            ([64 * 2**29, vae], half, "model", "needs 65.0 GiB .* cpu has 64.0 .*; take a smaller model or a larger"),
        ):
            with pytest.raises(RuntimeError, match=f"load: it {message}"):
                check(parts, dtype, offload)

    @pytest.mark.parametrize("offload", ["cpu", True])
    def test_an_offload_that_is_none(self, offload):
        with pytest.raises(
            ValueError, match=f"load: offload must be one of model, sequential, or None, got {offload!r}"
        ):
            Tracer.from_pretrained("mini", device="cpu", offload=offload)

    def test_a_hub_that_is_not_to_be_asked(self, monkeypatch):
        with pytest.raises(RuntimeError, match=r"someone/something is not on this machine, .*HF_HUB_OFFLINE"):
            Tracer.from_pretrained("someone/something", device="cpu", local_files_only=True)

    def test_neither_name_nor_folder_nor_repository(self):
        with pytest.raises(ValueError, match=r"model must be one of mini, sd15, .* got 'no such model'"):
            Tracer.from_pretrained("no such model")


def test_known_models_are_listed():
    assert trace_fast.models()[:2] == ("mini", "sd15")
    assert {"sdxl", "pixart", "sd3.5-large", "sd3.5-medium", "flux.1-dev", "flux.1-schnell"} <= set(trace_fast.models())
