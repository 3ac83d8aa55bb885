"""Models by name, folder and repository: tiny pipelines with their text encoders, saved and loaded offline."""

import copy
import inspect
import io
import json
import math
import re
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny import FAMILIES, PIPELINES, SIZE, embedded, pipeline
from torch.testing import assert_close

import trace_fast
from trace_fast import Detector, Tracer
from trace_fast.backbones import Kind, fetch_student, find_source, has_student, registry, wrap_pipeline
from trace_fast.backbones.loading import hub_errors, memory, pipelines

# of diffusers' own call of the hub
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")

LOADED = tuple(name for name in PIPELINES if name != "pixart-1024")
MINI = registry.EMBEDDED / "mini"


@pytest.fixture(scope="module", params=LOADED)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache of embedded prompts."""

    def refuse(*_, **__):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TRACE_FAST_CACHE", str(tmp_path / "cache"))
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    """Save a pipeline; return both it and its folder, which are shared and must not be changed."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = pipeline(family, folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    return pipe, folder / "model"


@pytest.fixture
def folder(saved, tmp_path):
    """Copy the folder of a pipeline, to change it."""
    return shutil.copytree(saved[1], tmp_path / "model")


@pytest.fixture
def images():
    return torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))


def load(folder, **options):
    return Tracer.from_pretrained(folder, device="cpu", size=SIZE, **options)


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_files(folder, files):
    """Write files of a folder by their names: text, or what becomes JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def assert_same_edges(output, expected):
    """Compare two outputs: in these models, a last bit of every weight changes edges by 2e-6 and KL by 4e-8."""
    assert_close(output.edges, expected.edges, rtol=0, atol=1e-5)
    assert_close(output.kl, expected.kl, rtol=0, atol=2e-7)


class TestFolders:
    @pytest.mark.slow
    def test_a_folder_gives_the_edges_of_its_pipeline(self, saved, images):
        pipe, folder = saved
        expected = Tracer.from_pipeline(pipe, size=SIZE)(images, timesteps=(0, 99, 499), return_abdiv=True)
        output = load(folder, local_files_only=True)(images, timesteps=(0, 99, 499), return_abdiv=True)
        assert output.model == str(folder)
        assert_same_edges(output, expected)
        assert_close(output.abdiv, expected.abdiv, rtol=0, atol=1e-6)

    @pytest.mark.slow
    def test_old_repositories_of_pixart_name_another_class(self, tmp_path, images):
        pipe, folder = pipeline("pixart", tmp_path), tmp_path / "model"
        pipe.save_pretrained(folder)
        config = folder / "transformer/config.json"
        old = {"num_vector_embeds": None, "only_cross_attention": False, "double_self_attention": False}
        edit_json(config, **old, _class_name="Transformer2DModel")
        values = json.loads(config.read_text())
        config.write_text(json.dumps({name: values[name] for name in values if name != "use_additional_conditions"}))
        edit_json(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
        expected = Tracer.from_pipeline(pipe, size=SIZE)(images, timesteps=(0, 99, 499))
        assert_same_edges(load(folder)(images, timesteps=(0, 99, 499)), expected)

    @pytest.mark.slow
    def test_weights_have_the_dtype_that_is_asked_for(self, saved, images):
        tracer = load(saved[1], dtype=torch.bfloat16)
        assert {weight.dtype for weight in tracer.backbone.network.parameters()} == {torch.bfloat16}
        edges = tracer(images, timesteps=(0, 499)).edges
        assert edges.dtype == torch.float32 and edges.isfinite().all()

    @pytest.mark.slow
    def test_edges_takes_a_folder(self, tmp_path):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        assert trace_fast.edges(torch.rand(3, 20, 28), model=tmp_path / "model").shape == (1, 1, 20, 28)


class TestEmptyPrompt:
    @pytest.mark.slow
    def test_it_is_embedded_once(self, folder, tmp_path, monkeypatch):
        first = load(folder).backbone.empty_prompt
        assert [path.suffix for path in (tmp_path / "cache/empty_prompts").iterdir()] == [".safetensors"]
        monkeypatch.setattr(pipelines, "encode_empty_prompt", lambda *_: pytest.fail("text encoders were loaded again"))
        for encoder in folder.glob("text_encoder*"):
            shutil.rmtree(encoder)
        second = load(folder).backbone.empty_prompt
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart"], indirect=True)
    def test_it_is_embedded_again_for_other_text_encoders_and_dtypes(self, saved, folder, family):
        pipe = copy.deepcopy(saved[0])
        half = load(folder, dtype=torch.bfloat16).backbone.empty_prompt
        before = load(folder).backbone.empty_prompt
        assert_close(before, wrap_pipeline(pipe, size=SIZE).empty_prompt, rtol=1e-3, atol=1e-4)
        if family == "sdxl":  # zeros, which no text encoder computes
            return
        assert half["encoder_hidden_states"].dtype == torch.bfloat16
        for parameter in pipe.text_encoder.parameters():
            parameter.data += 0.5
        pipe.text_encoder.save_pretrained(folder / "text_encoder")
        after = load(folder).backbone.empty_prompt
        assert_close(after, wrap_pipeline(pipe, size=SIZE).empty_prompt, rtol=1e-3, atol=1e-4)
        assert any(not torch.allclose(after[name].float(), before[name].float(), atol=1e-2) for name in before)

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["sdxl"], indirect=True)
    def test_text_encoders_that_are_not_needed_may_be_missing(self, folder):
        for part in (*folder.glob("text_encoder*"), *folder.glob("tokenizer*")):
            shutil.rmtree(part)
        embeddings = load(folder).backbone.empty_prompt["encoder_hidden_states"]
        assert embeddings.shape == (1, 77, 8) and not embeddings.any()

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["pixart"], indirect=True)
    def test_a_tokenizer_of_sentencepiece_is_enough(self, folder):
        # the repositories of PixArt have no other
        import sentencepiece

        model = io.BytesIO()
        lines = iter(["a photograph of a cat", "two dogs in the snow", "an empty prompt"])
        options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, vocab_size=26, **options)
        for path in (folder / "tokenizer").iterdir():
            path.unlink()
        (folder / "tokenizer/spiece.model").write_bytes(model.getvalue())
        words = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
        config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **words}
        (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
        prompt = load(folder).backbone.empty_prompt
        assert prompt["encoder_hidden_states"].shape[:2] == (1, 120)
        assert prompt["encoder_attention_mask"].sum() == 1  # the token that ends the prompt

    def test_it_has_the_papers_length(self, saved, family):
        prompt = wrap_pipeline(saved[0], size=SIZE).empty_prompt
        assert next(iter(prompt.values())).shape[:2] == (1, FAMILIES[family].prompt)


class TestOffload:
    @pytest.mark.slow
    @pytest.mark.parametrize("offload", ["model", "sequential"])
    def test_offloaded_parts_give_the_same_edges(self, saved, images, offload):
        images = images.expand(2, -1, -1, -1)
        plain, tracer = load(saved[1]), load(saved[1], offload=offload)
        assert tracer.device == torch.device("cpu")
        options = {"timesteps": (0, 499)}
        expected = {noising: plain(images, noising=noising, **options) for noising in ("gaussian", "inversion")}
        for noising in ("gaussian", "inversion", "gaussian"):  # weights are moved away and come back
            assert_same_edges(tracer(images, noising=noising, **options), expected[noising])
        network, vae = tracer.backbone.network, tracer.backbone.vae
        if offload == "model":  # each part moves the other away
            assert network._hf_hook.prev_module_hook.model is vae
            assert vae._hf_hook.prev_module_hook.model is network
        else:  # no weight stays; the autoencoder's decoder never runs
            assert {weight.device.type for part in (network, vae) for weight in part.parameters()} == {"meta"}

    @pytest.mark.slow
    def test_a_pipeline_that_is_offloaded_layer_by_layer(self, saved, images):
        from accelerate import cpu_offload

        expected = Tracer.from_pipeline(saved[0], size=SIZE)(images, timesteps=(0, 499))
        pipe = copy.deepcopy(saved[0])
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):  # as enable_sequential_cpu_offload does on a GPU
                cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
        assert pipe.vae.device.type == "meta"
        tracer = Tracer.from_pipeline(pipe, size=SIZE)
        assert tracer.device == torch.device("cpu")
        assert_same_edges(tracer(images, timesteps=(0, 499)), expected)

    @pytest.mark.slow
    def test_an_autoencoder_in_half_precision_runs_in_single(self, tmp_path, images):
        pipe = pipeline("sdxl", tmp_path)
        pipe.vae.register_to_config(force_upcast=True)
        pipe.save_pretrained(tmp_path / "model")
        plain, *offloaded = (
            load(tmp_path / "model", dtype=torch.float16, offload=offload) for offload in (None, "model", "sequential")
        )
        images = torch.nn.functional.interpolate(images, SIZE)
        expected = plain.backbone.encode(images)
        assert expected.isfinite().all()
        for tracer in offloaded:
            assert_close(tracer.backbone.encode(images), expected, rtol=1e-5, atol=1e-5)
            assert tracer.backbone.vae.dtype == torch.float16

    def test_weights_that_are_still_to_come_need_memory(self, monkeypatch):
        tracer = Tracer.from_pretrained("mini", device="cpu", offload="model")
        tracer.backbone.network._hf_hook.execution_device = torch.device("cuda")
        for name, value in (("memory_reserved", 500), ("memory_allocated", 100), ("mem_get_info", (2**30, 2**31))):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        needed = sum(4 * weight.numel() for weight in tracer.backbone.network.parameters())
        assert needed > 8_000_000 and tracer._map_memory() == (2**30 + 400 - needed) // 2

    @pytest.mark.parametrize("offload", ["cpu", True])
    def test_an_unknown_way_is_refused(self, offload):
        with pytest.raises(ValueError, match=f"load: offload must be 'model' or 'sequential' or None, got {offload!r}"):
            Tracer.from_pretrained("mini", device="cpu", offload=offload)


class TestMemory:
    def test_too_little_memory_is_refused_before_weights_are_read(self, tmp_path, monkeypatch):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        monkeypatch.setattr(memory, "free_bytes", lambda _: 90_000)
        monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("read"))
        with pytest.raises(RuntimeError, match=r"load: .* needs 0.0 GiB for its weights in float32, cpu has 0.0 GiB"):
            load(tmp_path / "model")

    @pytest.mark.slow
    def test_a_folder_is_measured_by_the_variant_that_is_loaded(self, tmp_path, monkeypatch):
        pipe, folder = pipeline("sd15", tmp_path), tmp_path / "model"
        pipe.save_pretrained(folder)
        pipe.save_pretrained(folder, variant="fp16")
        pipe.unet.save_pretrained(folder / "unet", variant="non_ema", max_shard_size="100KB")
        assert len(list((folder / "unet").glob("*.non_ema*.safetensors"))) > 1
        counts = []
        monkeypatch.setattr(pipelines, "check_memory", lambda name, parts, *_: counts.append(parts))
        for variant in (None, "fp16"):
            load(folder, variant=variant)
        pipelines.check_memory("it", pipelines.count_parts(find_source(folder), "unet", "non_ema"))
        unet, vae = (sum(weight.numel() for weight in part.parameters()) for part in (pipe.unet, pipe.vae))
        assert counts == [[unet, vae], [unet, vae], [unet, 0]]

    @pytest.mark.parametrize(
        ("parts", "dtype", "offload", "message"),
        [
            ((11, 1), "float32", None, "needs 24.0 GiB .* float32, cuda has 12.0 .*; dtype=torch.bfloat16 would fit"),
            ((11, 2), "bfloat16", None, "needs 13.0 GiB .*; offload='model' would fit"),
            ((16, 1), "bfloat16", None, "needs 17.0 GiB .*; offload='sequential' would fit"),
            ((16, 1), "bfloat16", "model", "needs 16.0 GiB .* cuda has 12.0 .*; offload='sequential' would fit"),
            ((128, 1), "bfloat16", "model", "needs 129.0 GiB .* cpu has 64.0 .*; take a smaller model or a larger"),
            ((64, 13), "bfloat16", "model", "needs 64.0 GiB .* cuda has 12.0 .*; take a smaller model or a larger"),
            ((11, 1), "bfloat16", None, None),
            ((16, 1), "bfloat16", "sequential", None),
        ],
    )
    def test_the_error_names_the_option_that_fits(self, monkeypatch, parts, dtype, offload, message):
        free = {"cuda": 12, "cpu": 64}  # GiB
        monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type] * 2**30)
        counts = [gibibytes * 2**29 for gibibytes in parts]  # numbers of two bytes each

        def check():
            memory.check_memory("it", counts, getattr(torch, dtype), torch.device("cuda"), offload)

        if message is None:
            check()
        else:
            with pytest.raises(RuntimeError, match=f"load: it {message}"):
                check()

    def test_main_memory_that_may_be_too_small_is_a_warning(self, monkeypatch):
        monkeypatch.setattr(memory, "free_bytes", lambda _: 2**30)
        options = ("it", [2**29 + 1], torch.bfloat16, torch.device("cpu"), None)
        with pytest.warns(UserWarning, match=r"^load: it needs 1.0 GiB .* cpu has 1.0 GiB free; take a smaller model"):
            memory.check_memory(*options)
        with pytest.raises(RuntimeError, match=r"^load: it needs 2\.0 GiB"):
            memory.check_memory("it", [2**30 + 1], *options[2:])

    def test_memory_in_caches_of_files_is_free(self, monkeypatch, tmp_path):
        """Count 16 GiB, of which 14 hold copies of files."""
        monkeypatch.setitem(sys.modules, "psutil", None)
        monkeypatch.setattr(memory, "MEMORY_FILE", tmp_path / "meminfo")
        lines = [
            "MemTotal:       33554432 kB",
            "MemFree:         2097152 kB",
            "MemAvailable:   16777216 kB",
            "Buffers: 9 kB",
        ]
        (tmp_path / "meminfo").write_text("\n".join(lines))
        assert memory.free_bytes(torch.device("cpu")) == 2**34
        (tmp_path / "meminfo").unlink()  # as on macOS
        assert memory.free_bytes(torch.device("cpu")) == math.inf
        memory.check_memory("it", [2**50], torch.float32, torch.device("cpu"), None)
        psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(free=2**31, available=2**33))
        monkeypatch.setitem(sys.modules, "psutil", psutil)
        assert memory.free_bytes(torch.device("cpu")) == 2**33
        assert memory.free_bytes(torch.device("mps")) == math.inf

    def test_memory_in_the_cache_of_torch_is_free(self, monkeypatch):
        for name, value in (("memory_reserved", 500), ("memory_allocated", 100), ("mem_get_info", (2**30, 2**31))):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        assert memory.free_bytes(torch.device("cuda")) == 2**30 + 400

    @pytest.mark.parametrize(
        "header", [b"", b"\xff" * 8, (9).to_bytes(8, "little") + b"[1, 2, 3]", b"\2" + bytes(7) + b"5 "]
    )
    def test_weights_whose_header_is_damaged(self, tmp_path, header):
        (tmp_path / "model.safetensors").write_bytes(header)
        with pytest.raises(ValueError, match=r"^model\.safetensors is damaged: "):
            memory.count_parameters(tmp_path / "model.safetensors")


class TestCachedPrompts:
    @pytest.fixture
    def encoded(self, monkeypatch):
        """Count how often the empty prompt is embedded."""
        calls = []
        original = pipelines.encode_empty_prompt
        monkeypatch.setattr(pipelines, "encode_empty_prompt", lambda *x: calls.append(1) or original(*x))
        return calls

    def test_a_damaged_one_is_reported_and_made_again(self, tmp_path, encoded):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        load(tmp_path / "model")
        (cache,) = (tmp_path / "cache" / "empty_prompts").iterdir()
        content, prompt = cache.read_bytes(), load_file(cache)
        with safe_open(cache, "pt") as file:
            metadata = file.metadata()
        halves = {name: value[..., :3].contiguous() for name, value in prompt.items()}
        flipped = bytearray(content)
        flipped[-1] ^= 1
        for count, damaged in enumerate((content[:-4], bytes(flipped), save(halves, metadata), save(prompt)), 2):
            cache.write_bytes(damaged)
            with pytest.warns(UserWarning, match=r"^load: '.*' is damaged, and the empty prompt is embedded again: "):
                load(tmp_path / "model")
            assert len(encoded) == count and len(cache.read_bytes()) == len(content)
        load(tmp_path / "model")
        assert len(encoded) == count

    def test_a_cache_that_cannot_be_written_does_not_end_the_load(self, tmp_path, encoded, monkeypatch):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        (tmp_path / "file").touch()
        monkeypatch.setenv("TRACE_FAST_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.warns(UserWarning, match=r"cannot be kept in '.*', so that .* set TRACE_FAST_CACHE to a folder"):
            load(tmp_path / "model")
        assert len(encoded) == 1

    def test_a_user_without_a_home_can_load(self, tmp_path, encoded, monkeypatch):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        for name in ("TRACE_FAST_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)

        def refuse():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", refuse)
        with pytest.warns(UserWarning, match=r"cannot be kept in '.*', so that .* set TRACE_FAST_CACHE to a folder"):
            load(tmp_path / "model")
        assert len(encoded) == 1

    def test_a_damaged_part_is_one_line(self, tmp_path):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        edit_json(tmp_path / "model" / "unet" / "config.json", attention_head_dim=0, num_attention_heads=0)
        with pytest.raises(ValueError, match=r"^load: model must be complete and its files must fit each other, got '"):
            load(tmp_path / "model")
        (weights,) = (tmp_path / "model" / "vae").glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"^load: model must be complete and its files must fit each other, got '"):
            load(tmp_path / "model")

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_a_part_without_all_of_its_weights(self, tmp_path, part):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        (path,) = (tmp_path / "model" / part).glob("*.safetensors")
        weights = load_file(path)
        name = next(name for name, weight in weights.items() if weight.ndim == 2)
        del weights[name]
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"^load: .* there are no weights for {re.escape(name)} of {part}$"):
            load(tmp_path / "model")

    @pytest.mark.parametrize(
        ("file", "option", "value"),
        [
            ("text_encoder/config.json", "hidden_size", "wide"),
            ("text_encoder/config.json", "num_hidden_layers", 3),
            ("tokenizer/tokenizer_config.json", "model_max_length", 2**70),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, tmp_path, file, option, value):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        edit_json(tmp_path / "model" / file, **{option: value})
        with pytest.raises(ValueError, match=r"^load: model must be complete and its files must fit each other, got '"):
            load(tmp_path / "model")


class TestSources:
    """`find_source`, which every way of loading goes through."""

    @pytest.mark.parametrize(
        ("files", "kind", "student"),
        [
            ({"config.json": {"family": "mini"}}, Kind.NETWORK, None),
            ({"config.json": {"family": "mini"}, "student/decoder.safetensors": ""}, Kind.NETWORK, "student"),
            ({"config.json": {}}, Kind.NETWORK, None),
            ({"config.json": "{"}, Kind.NETWORK, None),
            ({"config.json": {"model_type": "dinov2"}}, Kind.ENCODER, None),
            ({"config.json": {"architecture": "eva02"}}, Kind.ENCODER, None),
            ({"model_index.json": {}}, Kind.PIPELINE, None),
            ({"model_index.json": {}, "config.json": {}}, Kind.PIPELINE, None),
            ({"model_index.json": {}, "student/decoder.safetensors": ""}, Kind.PIPELINE, "student"),
            ({"config.json": {"base": {}, "decoder": {}}}, Kind.STUDENT, ""),
            ({"config.json": "{", "decoder.safetensors": ""}, Kind.STUDENT, ""),
            ({"student/decoder.safetensors": ""}, Kind.STUDENT, "student"),
            ({}, Kind.UNKNOWN, None),
        ],
        ids=str,
    )
    def test_a_folder_is_what_its_files_are(self, tmp_path, files, kind, student):
        source = find_source(write_files(tmp_path, files))
        assert (source.name, source.files.location, source.kind) == (str(tmp_path), str(tmp_path), kind)
        assert source.student == (None if student is None else str(tmp_path / student))
        assert has_student(tmp_path) is (student is not None)

    def test_a_name_is_known_and_comes_before_a_folder(self, tmp_path, monkeypatch):
        write_files(tmp_path, {"mini/config.json": {"model_type": "dinov2"}, "sdxl/model_index.json": {}})
        monkeypatch.chdir(tmp_path)
        with pytest.warns(UserWarning, match="model 'mini' is taken as the name of a model, not as the folder"):
            source = find_source("mini")
        assert (source.kind, source.files.location, source.student) == (Kind.NETWORK, str(MINI), str(MINI / "student"))
        warning = "model 'sdxl' is taken as the name of a model, not as the folder"
        with pytest.warns(UserWarning, match=warning):
            source = find_source("sdxl", revision="main")
        with pytest.warns(UserWarning, match=warning):
            assert not has_student("sdxl")
        assert (source.kind, source.files.location) == (Kind.PIPELINE, "stabilityai/stable-diffusion-xl-base-1.0")
        assert source.files.revision == "main"
        assert find_source("dinov2-b").kind is Kind.ENCODER
        for name, kind in (("mini", Kind.ENCODER), ("sdxl", Kind.PIPELINE)):
            for folder in (Path(name), f"./{name}"):
                source = find_source(folder)
                assert (source.kind, source.files.location) == (kind, str(Path(name)))

    @pytest.mark.parametrize(
        "name",
        [
            "no such model",
            "a/b/c",
            "/no/such/folder",
            Path("owner/name"),
            "./sd16",
            "../sd16",
            "models/my--model",
            "folder/model.",
            "owner/" + "x" * 97,
        ],
    )
    def test_other_names_are_unknown(self, name):
        assert find_source(name).kind is Kind.UNKNOWN and not has_student(name)
        with pytest.raises(ValueError, match=rf"model must be one of mini, sd15, .* got '{name}'"):
            Tracer.from_pretrained(name, device="cpu")
        with pytest.raises(ValueError, match=rf"that has a student, got '{name}' without decoder\.safetensors"):
            fetch_student(name)

    def test_a_file_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(write_files(tmp_path, {"folder/model_index.json": {}}))
        for name in ("folder/model_index.json", Path("folder/model_index.json")):
            with pytest.raises(
                ValueError, match=r"^load: model must be a folder, got the file 'folder/model_index\.json'"
            ):
                Tracer.from_pretrained(name, device="cpu")
            with pytest.raises(ValueError, match=r"that has a student, got 'folder/model_index\.json' without decoder"):
                fetch_student(name)

    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            ({"model_type": "dinov2"}, Kind.ENCODER),
            ({"base": {}, "decoder": {}}, Kind.STUDENT),
            ({"family": "mini"}, Kind.NETWORK),
            ({}, Kind.PIPELINE),
            (None, Kind.PIPELINE),
        ],
        ids=str,
    )
    def test_a_repository_is_asked_for_its_configuration_alone(self, tmp_path, monkeypatch, config, kind):
        requests = []

        def download(repository, name, **options):
            requests.append((repository, name, options))
            if config is None:
                raise LocalEntryNotFoundError("it is not in the cache")
            return str(write_files(tmp_path, {"config.json": config}) / name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        source = find_source("someone/model", revision="v1", local_files_only=True)
        assert (source.kind, source.files.location) == (kind, "someone/model")
        assert source.student == ("someone/model" if kind is Kind.STUDENT else None)
        assert requests == [("someone/model", "config.json", {"revision": "v1", "local_files_only": True})]

    def test_a_network_of_this_package_is_loaded_from_a_repository(self, monkeypatch, images):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, **__: str(MINI / name))
        expected = Tracer.from_pretrained("mini", device="cpu")(images)
        assert_same_edges(Tracer.from_pretrained("someone/mini", device="cpu")(images), expected)

    def test_a_student_is_not_a_base_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"load: model must be a base model for the search, got the student '.*'"):
            Tracer.from_pretrained(MINI / "student", device="cpu")
        with pytest.raises(ValueError, match=r"that has a student, got '.*base' without decoder\.safetensors"):
            Detector.from_pretrained(embedded(tmp_path / "base"), device="cpu")


class TestRegistry:
    def test_every_line_names_a_class_and_its_family(self):
        for table in (registry.PIPELINE_FAMILIES, registry.ENCODER_FAMILIES, registry.LANGUAGE_FAMILIES):
            for name in table:
                assert inspect.isclass(registry.find_family(name, table)), name
        for name in (*registry.PIPELINE_FAMILIES, *registry.UNSUPPORTED):
            assert hasattr(diffusers, name)
        assert registry.find_family("UNet", registry.PIPELINE_FAMILIES) is None

    def test_known_models_are_listed(self):
        models = ("mini", "sd15", "sdxl", "pixart", "sd3.5-medium", "sd3.5-large", "flux.1-dev", "flux.1-schnell")
        assert trace_fast.models()[:2] == models[:2]
        assert set(models) <= set(trace_fast.models())

    def test_a_network_without_attention_maps_is_refused_with_the_reason(self, tmp_path):
        message = r"must hold a network with attention maps, got SanaTransformer2DModel: its attention is linear"
        network = diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8
        )
        pipe = type("Pipe", (), {"transformer": network, "vae": None})()
        with pytest.raises(TypeError, match=f"from_pipeline: pipe {message}"):
            Tracer.from_pipeline(pipe)
        parts = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC", "scheduler": "DDIMScheduler"}
        index = {part: ["diffusers", name] for part, name in parts.items()}
        write_files(tmp_path, {"model_index.json": {"_class_name": "SanaPipeline", **index}})
        for part in parts:
            (tmp_path / part).mkdir()
        with pytest.raises(ValueError, match=f"load: model {message}"):  # no weights were asked for
            Tracer.from_pretrained(tmp_path, device="cpu")

    def test_a_network_of_no_family_is_refused(self, saved, family, monkeypatch):
        part = "unet" if (saved[1] / "unet").is_dir() else "transformer"
        name = json.loads((saved[1] / part / "config.json").read_text())["_class_name"]
        monkeypatch.delitem(registry.PIPELINE_FAMILIES, name)
        with pytest.raises(ValueError, match=f"load: model must hold one of .*, got {name} in "):
            load(saved[1])


class TestErrors:
    @pytest.fixture
    def folder(self, tmp_path):
        pipeline("sd15", tmp_path).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def refuse(self, folder, message, error=ValueError):
        with pytest.raises(error, match=message):
            load(folder)

    def test_a_missing_part(self, folder):
        shutil.rmtree(folder / "vae")
        self.refuse(folder, "load: model must be complete, got .*model' without vae")

    def test_weights_that_are_not_safetensors(self, folder):
        weights = folder / "unet/diffusion_pytorch_model.safetensors"
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
        self.refuse(folder, "load: model must be complete and its files must fit each other, got .*safetensors")

    def test_a_class_that_is_not_of_diffusers(self, folder):
        edit_json(folder / "model_index.json", unet=["remote_code", "UNet"])
        self.refuse(folder, r"load: unet must be a class of diffusers \d.*, got \[.remote_code., .UNet.\] in")

    @pytest.mark.parametrize("entry", [5, ["diffusers"], ["diffusers", 7], None], ids=str)
    def test_a_class_that_is_no_name(self, folder, entry):
        edit_json(folder / "model_index.json", vae=entry)
        self.refuse(folder, r"load: vae must be a class of diffusers \d.*, got ")

    @pytest.mark.parametrize(
        ("file", "name", "value"),
        [
            ("scheduler/scheduler_config", "prediction_type", ["epsilon"]),
            ("scheduler/scheduler_config", "beta_schedule", {}),
            ("scheduler/scheduler_config", "beta_start", "low"),
            ("scheduler/scheduler_config", "beta_end", float("nan")),
            ("vae/config", "scaling_factor", None),
            ("vae/config", "shift_factor", "x"),
        ],
    )
    def test_numbers_that_are_none(self, folder, file, name, value):
        edit_json(folder / f"{file}.json", **{name: value})
        with pytest.raises((TypeError, ValueError), match=r"^(load|from_pipeline): [^\n]+ must [^\n]+, got"):
            load(folder)

    def test_a_pipeline_without_a_denoiser(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        del index["unet"]
        (folder / "model_index.json").write_text(json.dumps(index))
        self.refuse(folder, "load: model must have a unet or transformer and a vae")

    def test_a_pipeline_that_diffusers_does_not_know(self, folder):
        edit_json(folder / "model_index.json", _class_name=["a", "b"])
        self.refuse(folder, r"load: model must be of a pipeline of diffusers, got \['a', 'b'\]")

    def test_a_missing_package(self, folder, monkeypatch):
        def missing(*_, **__):
            raise ImportError("No package metadata was found for bitsandbytes\nand more")

        monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", missing)
        message = "needs a package that cannot be imported: No package metadata was found for bitsandbytes$"
        self.refuse(folder, message, RuntimeError)

    def test_a_hub_that_must_not_be_asked(self):
        with pytest.raises(RuntimeError, match=r"someone/model is not on this machine, .*HF_HUB_OFFLINE"):
            Tracer.from_pretrained("someone/model", device="cpu", local_files_only=True)

    @pytest.mark.parametrize(
        ("cause", "error", "message"),
        [
            (GatedRepoError, RuntimeError, "load: sdxl is gated; accept its terms at https://huggingface.co/a/b and "),
            (RepositoryNotFoundError, ValueError, "load: model must be .* got 'a/b', which the hub does not have"),
            (LocalEntryNotFoundError, RuntimeError, "load: sdxl is not on this machine, .* with a network connection"),
            (ConnectionError, RuntimeError, "load: sdxl is not on this machine"),
            (PermissionError, ValueError, "load: model must be complete .*, got 'a/b': it failed"),
        ],
    )
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_an_error_of_the_hub_says_what_to_do(self, cause, error, message, wrapped):
        def fail():
            failure = cause.__new__(cause)
            failure.args = ("it failed",)
            try:
                raise failure
            except OSError as cause_of_it:
                if wrapped:
                    raise OSError("it failed") from cause_of_it
                raise

        with pytest.raises(error, match=message), hub_errors("sdxl", "a/b"):
            fail()
