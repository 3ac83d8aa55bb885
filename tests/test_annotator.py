"""The annotator is called as those of controlnet_aux are, and its pictures are what diffusers takes."""

import inspect
import io

import numpy as np
import pytest
import torch
from neighbors import require
from PIL import Image

import trace_fast
from trace_fast import ControlNetAnnotator, Detector

PHOTO = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def annotator():
    return ControlNetAnnotator("mini", device="cpu", size=(32, 32))


class TestCall:
    def test_defaults(self, annotator):
        picture = annotator(Image.fromarray(PHOTO))
        assert picture.mode == "RGB" and picture.size == (832, 512)  # 512 / 48 * 80 is 853
        pixels = np.asarray(picture)
        assert (pixels == pixels[..., :1]).all() and pixels.max() > 0

    @pytest.mark.parametrize("image", [PHOTO, Image.fromarray(PHOTO), torch.from_numpy(PHOTO).permute(2, 0, 1)[None]])
    def test_by_position(self, annotator, image):
        pixels = annotator(image, 64, 128, "np")
        assert pixels.shape == (128, 256, 3) and pixels.dtype == np.uint8
        expected = annotator.detector(PHOTO, 64, 128)
        np.testing.assert_allclose(pixels[..., 1] / 255, expected, atol=0.5 / 255 + 1e-6)

    def test_options_of_other_annotators(self, annotator):
        options = {"safe": True, "scribble": False, "coarse": True, "low_threshold": 100}
        named = annotator(input_image=PHOTO, detect_resolution=64, image_resolution=64, output_type="np", **options)
        np.testing.assert_array_equal(named, annotator(PHOTO, 64, 64, "np"))

    def test_bgr(self):
        annotator = ControlNetAnnotator("mini", device="cpu", size=(32, 32), channel_order="bgr")
        expected = annotator(Image.fromarray(PHOTO), 64, 64, "np")
        np.testing.assert_array_equal(annotator(PHOTO[..., ::-1], 64, 64, "np"), expected)

    def test_batches_and_other_output_types(self, annotator):
        with pytest.raises(ValueError, match="edges: image must be one image, got 2"):
            annotator(torch.rand(2, 3, 48, 80), 64, 64)
        for output_type in ("pt", True, None):
            with pytest.raises(ValueError, match=f"edges: output_type must be 'pil' or 'np', got {output_type!r}"):
                annotator(PHOTO, 64, 64, output_type)
        with pytest.raises(ValueError, match="edges: detect_resolution must be at least 1, got 0"):
            annotator(PHOTO, 0)


class TestLoading:
    def test_a_detector_is_used_as_it_is(self, annotator):
        assert ControlNetAnnotator(annotator.detector).detector is annotator.detector
        assert annotator.to("cpu") is annotator

    def test_from_pretrained(self):
        annotator = ControlNetAnnotator.from_pretrained("mini", device="cpu", size=(32, 48))
        assert isinstance(annotator.detector, Detector) and annotator.detector.size == (32, 48)

    def test_a_model_without_a_student(self):
        with pytest.raises(ValueError, match="load: stage must be 1 or None for this Tracer, got 2"):
            ControlNetAnnotator(trace_fast.load("mini", stage=1, device="cpu"))


class TestConsumers:
    def test_the_processor_of_controlnet_aux(self, annotator, monkeypatch):
        module = require("controlnet_aux.processor")
        monkeypatch.setitem(module.MODELS, "trace", {"class": lambda: annotator, "checkpoint": False})
        monkeypatch.setitem(module.MODEL_PARAMS, "trace", {"safe": True})
        processor = module.Processor("trace", {"detect_resolution": 64, "image_resolution": 128})
        file = io.BytesIO()
        Image.fromarray(PHOTO).save(file, format="PNG")
        picture = processor(file.getvalue())
        assert picture.mode == "RGB" and picture.size == (256, 128)
        jpeg = processor(Image.fromarray(PHOTO), to_pil=False)
        with Image.open(io.BytesIO(jpeg)) as decoded:
            assert decoded.format == "JPEG" and decoded.size == (256, 128)

    def test_a_stand_in_for_the_processor(self, annotator):
        """Call it as the processor does: a PIL image, the options by name, and a file from the result."""
        for options in ({}, {"safe": True, "scribble": False}, {"image_resolution": 64}):
            file = io.BytesIO()
            annotator(Image.fromarray(PHOTO), **options).save(file, format="JPEG")
            assert file.tell()

    def test_its_arguments_are_those_of_an_annotator(self):
        hed = require("controlnet_aux").HEDdetector
        theirs = list(inspect.signature(hed.__call__).parameters.values())
        ours = list(inspect.signature(ControlNetAnnotator.__call__).parameters.values())
        assert [(one.name, one.default) for one in ours[:4]] == [(one.name, one.default) for one in theirs[:4]]
        assert ours[4].default == next(one for one in theirs if one.name == "output_type").default

    def test_maps_of_several_annotators_have_one_size(self, annotator):
        canny = require("controlnet_aux").CannyDetector()
        for size in (64, 200), (512, 300), (130, 130):
            theirs = canny(Image.fromarray(PHOTO), detect_resolution=size[0], image_resolution=size[1])
            assert annotator(Image.fromarray(PHOTO), *size).size == theirs.size

    def test_diffusers_takes_three_channels(self, annotator):
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(do_convert_rgb=False, do_normalize=False)
        tensor = processor.preprocess(annotator(Image.fromarray(PHOTO), 64, 64))
        assert tensor.shape == (1, 3, 64, 128) and 0 <= tensor.min() < tensor.max() <= 1
        expected = torch.from_numpy(annotator(PHOTO, 64, 64, "np") / 255).permute(2, 0, 1)[None]
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=1e-6)
