"""Masks and prompts as other packages make them, read back by the packages themselves.

A test is skipped where its package is missing; `test_formats.py` and `test_export.py` have twins with stand-ins.
"""

import copy
import json

import numpy as np
import pytest
import torch
from neighbors import require
from PIL import Image

from trace_fast.masks.export import make_predictor_prompts, refine_results, write_panoptic
from trace_fast.masks.formats import open_masks
from trace_fast.masks.propagation import propagate

PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
EDGES = np.zeros((48, 64), np.float32)
EDGES[:, 31] = 1
WHOLE = np.zeros((1, 48, 64), dtype=bool)  # a mask over both sides of the edge
WHOLE[0, 1:47, 1:63] = True


def make_predictor():
    """Make a predictor of segment-anything with random weights and small layers."""
    sam = require("segment_anything.modeling")
    torch.manual_seed(0)
    transformer = sam.TwoWayTransformer(depth=1, embedding_dim=8, mlp_dim=16, num_heads=2)
    model = sam.Sam(
        sam.ImageEncoderViT(img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2, out_chans=8, window_size=0),
        sam.PromptEncoder(embed_dim=8, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=4),
        sam.MaskDecoder(transformer_dim=8, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=8),
    )
    return require("segment_anything").SamPredictor(model.eval())


class TestSegmentAnything:
    @pytest.fixture
    def predictor(self):
        predictor = make_predictor()
        predictor.set_image(PHOTO)
        return predictor

    def test_masks_of_the_predictor(self, predictor):
        points = np.array([[4.0, 2.0], [40.0, 30.0], [63.0, 47.0]])
        prompts = make_predictor_prompts(points, size=PHOTO.shape[:2], side=64)
        expected = predictor.transform.apply_coords(points, PHOTO.shape[:2])
        np.testing.assert_allclose(prompts["point_coords"][:, 0], expected, rtol=1e-6)
        tensors = {name: torch.from_numpy(value) for name, value in prompts.items()}
        masks, scores, _ = predictor.predict_torch(**tensors, multimask_output=False)
        assert masks.shape == (3, 1, 48, 64) and scores.shape == (3, 1)
        mask_set, restore = open_masks(masks)
        assert torch.equal(restore(mask_set, [[0], [1], [2]]), masks)
        logits, _, _ = predictor.predict_torch(**tensors, multimask_output=True, return_logits=True)
        several, _, _ = predictor.predict_torch(**tensors, multimask_output=True)
        soft, restore = open_masks(logits, cut=predictor.model.mask_threshold)
        assert torch.equal(restore(soft, [[k] for k in range(9)]) > 0, several)

    def test_each_point_is_an_object(self, predictor):
        points, boxes = np.array([[4.0, 2.0], [40.0, 30.0]]), np.array([[0, 0, 9, 9], [20, 20, 50, 40]])
        prompts = make_predictor_prompts(points, boxes, size=PHOTO.shape[:2], side=64)
        tensors = {name: torch.from_numpy(value) for name, value in prompts.items()}
        together, _, _ = predictor.predict_torch(**tensors, multimask_output=False, return_logits=True)
        for k in range(2):
            alone, _, _ = predictor.predict(
                points[k : k + 1], np.ones(1), boxes[k], multimask_output=False, return_logits=True
            )
            np.testing.assert_allclose(together[k].numpy(), alone, rtol=1e-3, atol=1e-4)

    def test_records_of_the_generator(self, predictor):
        generator = require("segment_anything").SamAutomaticMaskGenerator(
            predictor.model, points_per_side=3, pred_iou_thresh=-100, stability_score_thresh=0, box_nms_thresh=1
        )
        records = generator.generate(PHOTO)
        assert records
        mask_set, restore = open_masks(records)
        for one, record in zip(restore(mask_set, [[k] for k in range(len(records))]), records, strict=True):
            np.testing.assert_array_equal(one["segmentation"], record["segmentation"])
            assert {**one, "segmentation": None} == {**record, "segmentation": None}
        refined = propagate(records, EDGES, threshold=0.5)
        for record in refined:
            for x, y in record["point_coords"]:
                assert record["segmentation"][int(y), int(x)]
        assert len(require("supervision").Detections.from_sam(refined)) == len(refined)


class TestDetectron2:
    def test_instances(self):
        structures = require("detectron2.structures")
        instances = structures.Instances(
            (48, 64),
            pred_boxes=structures.Boxes(torch.tensor([[1.0, 1, 63, 47]])),
            scores=torch.tensor([0.75]),
            pred_classes=torch.tensor([3]),
            pred_masks=torch.from_numpy(WHOLE),
        )
        parts = propagate({"instances": instances, "sem_seg": None}, EDGES, threshold=0.5)["instances"]
        assert isinstance(parts, structures.Instances) and parts.pred_classes.tolist() == [3, 3]
        boxes = structures.BitMasks(parts.pred_masks).get_bounding_boxes()
        torch.testing.assert_close(boxes.tensor, parts.pred_boxes.tensor)
        mask_set, restore = open_masks(instances)
        again = restore(mask_set, [[0]])
        assert torch.equal(again.pred_masks, instances.pred_masks)
        assert torch.equal(again.pred_boxes.tensor, instances.pred_boxes.tensor)

    def test_bit_masks(self):
        structures = require("detectron2.structures")
        parts = propagate(structures.BitMasks(torch.from_numpy(WHOLE)), EDGES, threshold=0.5)
        assert isinstance(parts, structures.BitMasks) and len(parts) == 2 and parts.nonempty().all()


class TestTransformers:
    def test_masks_of_its_sam(self):
        from tiny import sam

        processor = sam()[1]
        low = torch.randn(1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        masks = processor.image_processor.post_process_masks(low, torch.tensor([[48, 64]]), torch.tensor([[24, 32]]))
        assert isinstance(masks, list) and masks[0].shape == (2, 3, 48, 64)
        mask_set, restore = open_masks(masks)
        (written,) = restore(mask_set, [[k] for k in range(6)])
        assert torch.equal(written, masks[0])

    @pytest.mark.parametrize("kind", ["instance", "panoptic"])
    def test_segmentation(self, kind):
        from transformers import Mask2FormerImageProcessor
        from transformers.utils import ModelOutput

        generator = torch.Generator().manual_seed(0)
        outputs = ModelOutput(
            class_queries_logits=4 * torch.randn(1, 6, 5, generator=generator),
            masks_queries_logits=4 * torch.randn(1, 6, 12, 16, generator=generator),
        )
        process = getattr(Mask2FormerImageProcessor(), f"post_process_{kind}_segmentation")
        (result,) = process(outputs, threshold=0.1, target_sizes=[(48, 64)])
        before = copy.deepcopy(result)
        mask_set, restore = open_masks(result)
        assert len(mask_set.masks) == len(result["segments_info"]) > 0
        written = restore(mask_set, [[k] for k in range(len(mask_set.masks))])
        assert written["segmentation"].dtype == before["segmentation"].dtype
        assert torch.equal(written["segmentation"], before["segmentation"])
        visible = set(before["segmentation"].unique().tolist())
        assert written["segments_info"] == [one for one in before["segments_info"] if one["id"] in visible]


def encode(mask):
    from pycocotools import mask as api

    code = api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


# pycocotools' decode
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
class TestPanopticApi:
    CATEGORIES = ({"id": 7, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0})

    def write(self, folder):
        segments = np.array([[1, 1, 2], [0, 2, 2]])
        infos = [{"id": 1, "category_id": 7}, {"id": 2, "category_id": 9}]
        write_panoptic(folder / "p.json", folder / "p", [(1, "a.jpg", segments, infos)], self.CATEGORIES)
        return segments, json.loads((folder / "p.json").read_text())

    def test_categories_have_colors(self, tmp_path):
        utils = require("panopticapi.utils")
        segments, content = self.write(tmp_path)
        generator = utils.IdGenerator({one["id"]: one for one in content["categories"]})
        assert len({generator.get_id_and_color(7)[0] for _ in range(3)}) == 3
        with Image.open(tmp_path / "p" / "a.png") as picture:
            np.testing.assert_array_equal(utils.rgb2id(np.array(picture)), segments)

    def test_the_quality_of_a_file_against_itself_is_one(self, tmp_path):
        evaluation = require("panopticapi.evaluation")
        _, content = self.write(tmp_path)
        categories = {one["id"]: one for one in content["categories"]}
        (annotation,) = content["annotations"]
        folder = str(tmp_path / "p")
        counts = evaluation.pq_compute_single_core(0, [(annotation, annotation)], folder, folder, categories)
        assert counts.pq_average(categories, isthing=None)[0]["pq"] == 1

    @pytest.mark.parametrize("exclusive", [False, True])
    def test_exclusive_masks_become_segments(self, tmp_path, exclusive):
        converter = require("converters.detection2panoptic_coco_format")
        masks = np.ones((2, 2, 3), dtype=bool)
        masks[1, :, :1] = False
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 2, "width": 3}],
            "annotations": [
                {"id": k + 1, "image_id": 1, "category_id": 7, "segmentation": encode(mask)}
                for k, mask in enumerate(masks)
            ],
            "categories": [{**self.CATEGORIES[0], "color": [9, 9, 9]}],
        }
        refine_results(content, tmp_path / "out.json", lambda *pair: pair[:2], exclusive=exclusive)
        arguments = [1], {7: content["categories"][0]}, str(tmp_path)
        from pycocotools.coco import COCO

        refined = COCO(str(tmp_path / "out.json"))
        if not exclusive:
            with pytest.raises(Exception, match="overlap"):
                converter.convert_detection_to_panoptic_coco_format_single_core(0, refined, *arguments)
            return
        (record,) = converter.convert_detection_to_panoptic_coco_format_single_core(0, refined, *arguments)
        assert [one["area"] for one in record["segments_info"]] == [2, 4]


def test_supervision_reads_parts():
    sv = require("supervision")
    detections = sv.Detections(sv.mask_to_xyxy(WHOLE).astype(np.float32), WHOLE, tracker_id=np.array([5]))
    parts = propagate(detections, EDGES, threshold=0.5)
    assert parts.tracker_id.tolist() == [5, 6]
    np.testing.assert_array_equal(sv.mask_to_xyxy(parts.mask), parts.xyxy)
