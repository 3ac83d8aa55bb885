"""Formats of masks: each is written as it was read, and malformed masks are refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as api

from trace_fast.io.arrays import array_to_tensor, mask_areas, mask_boxes
from trace_fast.masks import formats
from trace_fast.masks.formats import MaskSet, keep_visible, open_masks, paint_labels, semantic_masks
from trace_fast.masks.propagation import propagate
from trace_fast.ops import checks

EXAMPLES = settings(max_examples=30, deadline=None)


class Boxes:
    """A stand-in for detectron2's `Boxes`."""

    def __init__(self, tensor):
        assert tensor.ndim == 2 and tensor.shape[1] == 4 and tensor.dtype == torch.float32
        self.tensor = tensor

    def __getitem__(self, item):
        return Boxes(self.tensor[item])

    def __len__(self):
        return len(self.tensor)


class Instances:
    """A stand-in for detectron2's `Instances`, after its documentation: fields of one length, indexed together."""

    def __init__(self, image_size, **fields):
        self._image_size, self._fields = image_size, {}
        for name, value in fields.items():
            self.set(name, value)

    @property
    def image_size(self):
        return self._image_size

    def __setattr__(self, name, value):
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name):
        if name == "_fields" or name not in self._fields:
            raise AttributeError(name)
        return self._fields[name]

    def set(self, name, value):
        assert not self._fields or len(value) == len(self)
        self._fields[name] = value

    def get_fields(self):
        return self._fields

    def __getitem__(self, item):
        return Instances(self._image_size, **{name: value[item] for name, value in self._fields.items()})

    def __len__(self):
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("empty Instances does not support __len__")


def rle(mask, counts_type=str):
    """Encode a mask with pycocotools or, for a list, by counting."""
    if counts_type is list:
        flat = np.concatenate([[False], mask.T.ravel()])  # column by column, starting out of the mask
        ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), mask.size)
        return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}
    code = api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {**code, "counts": code["counts"] if counts_type is bytes else code["counts"].decode()}


def sam(mask, index, counts_type=None):
    """Make a record as SAM's generator writes it; its boxes end at the last pixel."""
    rows, columns = np.nonzero(mask)
    x0, y0, x1, y1 = (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else (0,) * 4
    return {
        "segmentation": rle(mask, counts_type) if counts_type else mask,
        "area": int(mask.sum()),
        "bbox": [int(x0), int(y0), int(x1 - x0), int(y1 - y0)],
        "predicted_iou": 0.9 - index / 7,
        "point_coords": [[1.5, 2.0 + index]],
        "stability_score": 0.95 + index / 100,
        "crop_box": [0, 0, *mask.shape[::-1]],
    }


def annotation(mask, index, counts_type=str):
    """Make an annotation as CutLER and ProMerge write it, whose category is a float."""
    code = rle(mask)
    return {
        "id": index + 1,
        "image_id": 42,
        "category_id": 1.0 + index,
        "iscrowd": 0,
        "area": float(api.area(code)),
        "bbox": api.toBbox(code).tolist(),
        "segmentation": rle(mask, counts_type),
        "score": 0.3 + index / 7,
        "width": mask.shape[1],
        "height": mask.shape[0],
    }


def detections(masks, compact=False):
    import supervision as sv

    count, xyxy = len(masks), sv.mask_to_xyxy(masks).astype(np.float32)
    if compact:
        from supervision.detection.compact_mask import CompactMask

        masks = CompactMask.from_dense(masks, xyxy, masks.shape[1:])
    return sv.Detections(
        xyxy=xyxy,
        mask=masks,
        confidence=0.9 - np.arange(count) / 7,
        class_id=np.arange(count) + 3,
        tracker_id=np.arange(count) + 100,
        data={
            "class_name": np.array([f"c{i}" for i in range(count)], dtype="<U9"),
            "tags": [str(i) for i in range(count)],
        },
        metadata={"camera": 7},
    )


def instances(masks):
    stack, count = torch.from_numpy(masks), len(masks)
    corners = np.zeros((count, 4), dtype=np.float32)
    for box, mask in zip(corners, masks, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            box[:] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return Instances(
        masks.shape[1:],
        pred_boxes=Boxes(torch.from_numpy(corners)),
        scores=torch.linspace(0.9, 0.1, count),
        pred_classes=torch.arange(count),
        pred_masks=stack,
    )


class BitMasks:
    """A stand-in for detectron2's `BitMasks`."""

    def __init__(self, tensor):
        self.tensor = tensor.bool()
        assert self.tensor.ndim == 3
        self.image_size = self.tensor.shape[1:]


def picture(mask, mode="L"):
    return Image.fromarray(mask if mode == "1" else mask * np.uint8(255))


def pipeline_record(mask, index):
    """Make a record as transformers' pipeline for image segmentation does."""
    return {"score": 0.9 - index / 7, "label": "cat" if index % 2 else "dog", "mask": picture(mask)}


def fields_of_transformers(masks):
    """Make the output of transformers' pipeline for mask generation."""
    return {
        "masks": list(masks),
        "scores": torch.linspace(0.9, 0.1, len(masks)),
        "bounding_boxes": mask_boxes(torch.from_numpy(masks), last=True).float(),
        "rle_mask": [rle(mask, list) for mask in masks],
        "is_last": [True],
    }


FORMATS = {
    "array": lambda masks: masks,
    "pictures (M, H, W)": lambda masks: masks * np.uint8(255),
    "tensor of pictures": lambda masks: torch.from_numpy(masks * np.uint8(255)),
    "tensor (k, 1, H, W)": lambda masks: torch.from_numpy(masks)[:, None],
    "array (1, M, H, W)": lambda masks: masks[None].astype(np.float32),
    "list of one stack (k, 1, H, W)": lambda masks: [torch.from_numpy(masks)[:, None]],
    "list of PIL images of mode L": lambda masks: [picture(mask) for mask in masks],
    "tuple of PIL images of mode 1": lambda masks: tuple(picture(mask, "1") for mask in masks),
    "transformers' segmentation": lambda masks: [pipeline_record(mask, i) for i, mask in enumerate(masks)],
    "transformers' mask generation": fields_of_transformers,
    "IRNet": lambda masks: {
        "score": np.linspace(0.9, 0.1, len(masks), dtype=np.float32),
        "mask": masks,
        "class": np.arange(len(masks)) // 2,
    },
    "DHR": lambda masks: {"keys": np.arange(len(masks)) + 3, "masks": masks.astype(np.float16)},
    "torchvision": lambda masks: {
        "boxes": mask_boxes(torch.from_numpy(masks), last=True).float(),
        "labels": torch.arange(len(masks)),
        "scores": torch.linspace(0.9, 0.1, len(masks)),
        "masks": torch.from_numpy(masks)[:, None].float(),
    },
    "detectron2's output": lambda masks: {"instances": instances(masks), "sem_seg": torch.zeros(54, 2, 3)},
    "BitMasks": lambda masks: BitMasks(torch.from_numpy(masks)),
    "array of uint8": lambda masks: masks.astype(np.uint8),
    "array of big-endian floats": lambda masks: masks.astype(">f4"),
    "reversed array": lambda masks: masks[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
    "tensor": torch.from_numpy,
    "tensor of bfloat16": lambda masks: torch.from_numpy(masks).bfloat16(),
    "tensor of uint16": lambda masks: torch.from_numpy(masks.astype(np.uint16)),
    "list of bool": list,
    "tuple of bool": tuple,
    "list of floats": lambda masks: list(masks.astype(np.float64)),
    "list of ints": lambda masks: list(masks.astype(np.int64)),
    "list of tensors": lambda masks: list(torch.from_numpy(masks)),
    "SAM": lambda masks: [sam(mask, i) for i, mask in enumerate(masks)],
    "SAM, uncompressed RLE": lambda masks: [sam(mask, i, list) for i, mask in enumerate(masks)],
    "SAM, compressed RLE": lambda masks: [sam(mask, i, str) for i, mask in enumerate(masks)],
    "RLE, str": lambda masks: [rle(mask, str) for mask in masks],
    "RLE, bytes": lambda masks: tuple(rle(mask, bytes) for mask in masks),
    "RLE, list": lambda masks: [rle(mask, list) for mask in masks],
    "annotations": lambda masks: [annotation(mask, i) for i, mask in enumerate(masks)],
    "annotations, uncompressed RLE": lambda masks: [annotation(mask, i, list) for i, mask in enumerate(masks)],
    "Detections": detections,
    "compact Detections": lambda masks: detections(masks, compact=True),
    "Instances": instances,
    "MaskSet": lambda masks: MaskSet(torch.from_numpy(masks)),
}


def same(one, other):
    """Equality of nested collections, including their types and dtypes."""
    assert type(one) is type(other)
    if isinstance(one, (np.ndarray, torch.Tensor)):
        assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            if key in ("area", "bbox"):  # int or float
                assert one[key] == other[key]
            else:
                same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, (Instances, Boxes, BitMasks, MaskSet)):
        same(vars(one), vars(other))
    elif isinstance(one, Image.Image):
        assert one.mode == other.mode and one.getpalette() == other.getpalette()
        same(np.asarray(one), np.asarray(other))
    elif type(one).__name__ == "Detections":
        same(one.xyxy, other.xyxy)
        assert type(one.mask) is type(other.mask)
        same(one.confidence, other.confidence)
        assert one == other
    else:
        assert one == other


@st.composite
def stacks(sample, least=0):
    """Masks of random pixels, empty and full ones, ones with a hole, of any shape from 1 x 1."""
    shape = sample(st.tuples(st.integers(least, 4), st.integers(1, 7), st.integers(1, 9)))
    masks = sample(hnp.arrays(bool, shape))
    for mask in masks:
        form = sample(st.sampled_from(["random", "empty", "full", "hole"]))
        if form != "random":
            mask[:] = form != "empty"
        if form == "hole":
            mask[1:-1, 1:-1] = False
    return masks


@pytest.mark.parametrize("name", FORMATS)
class TestIdentity:
    @pytest.mark.slow
    @EXAMPLES
    @given(masks=stacks())
    def test_masks_are_written_as_they_were_read(self, name, masks):
        collection = FORMATS[name](masks)
        mask_set, restore = open_masks(collection, masks.shape[1:])
        assert mask_set.masks.dtype == torch.bool
        np.testing.assert_array_equal(mask_set.masks.numpy(), masks)
        same(restore(mask_set, [[k] for k in range(len(masks))]), collection)

    @EXAMPLES
    @given(masks=stacks(least=1), pick=st.data())
    def test_fewer_and_more_masks(self, name, masks, pick):
        mask_set, restore = open_masks(FORMATS[name](masks))
        order = pick.draw(st.lists(st.integers(0, len(masks) - 1), max_size=6))
        result = MaskSet(mask_set.masks[order], None if mask_set.scores is None else mask_set.scores[order])
        again, _ = open_masks(restore(result, [[k] for k in order]), masks.shape[1:])
        np.testing.assert_array_equal(again.masks.numpy(), masks[order])
        if order and mask_set.scores is not None:
            np.testing.assert_array_equal(again.scores.numpy(), mask_set.scores[order].numpy())

    def test_no_masks(self, name):
        nothing = FORMATS[name](np.zeros((0, 3, 5), dtype=bool))
        mask_set, restore = open_masks(nothing, (3, 5))
        assert mask_set.masks.shape == (0, 3, 5)
        same(restore(mask_set, []), nothing)

    def test_a_result_without_masks(self, name):
        collection = FORMATS[name](np.ones((2, 3, 5), dtype=bool))
        mask_set, restore = open_masks(collection)
        left = restore(MaskSet(mask_set.masks[:0], None if mask_set.scores is None else mask_set.scores[:0]), [])
        assert type(left) is type(collection)
        assert open_masks(left, (3, 5))[0].masks.shape == (0, 3, 5)

    def test_memory_is_not_shared(self, name):
        masks = np.zeros((1, 3, 5), dtype=bool)
        collection = FORMATS[name](masks)
        mask_set, _ = open_masks(collection)
        if name != "MaskSet":
            mask_set.masks.fill_(True)
        assert not masks.any()

    def test_results_do_not_share_memory(self, name):
        masks = np.zeros((2, 3, 5), dtype=bool)
        mask_set, restore = open_masks(FORMATS[name](masks))
        out = restore(mask_set, [[0], [1]])
        for mask in out if isinstance(out, (list, tuple)) else (out,):
            mask = mask["segmentation"] if isinstance(mask, dict) and "segmentation" in mask else mask
            if isinstance(mask, (np.ndarray, torch.Tensor)):
                mask[...] = 1
        assert not masks.any()


class TestLabels:
    @EXAMPLES
    @given(labels=hnp.arrays(np.uint8, st.tuples(st.integers(1, 7), st.integers(1, 9)), elements=st.integers(0, 5)))
    def test_identity(self, labels):
        for dtype in ("u1", "i1", "<i2", ">i4", "i8", "u2", "u4"):
            label_map = (labels.astype(np.int64) * 20).astype(dtype)
            mask_set, restore = open_masks(label_map)
            assert len(mask_set.masks) == len(np.unique(labels[labels > 0]))
            groups = [[k] for k in range(len(mask_set.masks))]
            same(restore(mask_set, groups), label_map)
            if dtype != ">i4":
                tensor = torch.from_numpy(label_map)
                mask_set, restore = open_masks(tensor)
                same(restore(mask_set, groups), tensor)

    def test_parts_get_free_labels(self):
        label_map = np.array([[1, 1, 3, 3, 0, 5]], dtype=np.uint8)
        mask_set, restore = open_masks(label_map)
        masks = mask_set.masks
        left = masks & (torch.arange(6) % 2 == 0)
        parts = torch.stack(
            [left[0], mask_set.masks[0] & ~left[0], left[1], mask_set.masks[1] & ~left[1], mask_set.masks[2]]
        )
        out = restore(MaskSet(parts), [[0], [0], [1], [1], [2]])
        np.testing.assert_array_equal(out, [[1, 2, 3, 4, 0, 5]])

    def test_smaller_masks_lie_on_top(self):
        _, restore = open_masks(np.array([[1, 2, 3]]))
        masks = torch.tensor([[[0, 1, 0]], [[1, 1, 1]], [[1, 1, 0]]]).bool()
        np.testing.assert_array_equal(restore(MaskSet(masks), [[0], [1], [2]]), [[3, 1, 2]])

    def test_merged_masks_keep_the_first_label(self):
        mask_set, restore = open_masks(np.array([[4, 9]]))
        np.testing.assert_array_equal(restore(MaskSet(mask_set.masks.any(0)[None]), [[1, 0]]), [[4, 4]])

    @pytest.mark.parametrize("like", [np.asarray, torch.from_numpy])
    def test_too_many_for_the_dtype(self, like):
        mask_set, restore = open_masks(like(np.arange(1, 128, dtype=np.int8)[None]))
        with pytest.raises(ValueError, match="restore: result must be few enough masks for labels up to 127, got 128"):
            restore(MaskSet(mask_set.masks[[*range(127), 0]]), [[k] for k in (*range(127), 0)])

    def test_negative(self):
        message = "masks must be labels of at least 0, or listed in ignore, got"
        for labels, ignore in (([[0, -2]], None), ([[0, -1]], ()), ([[-1, -2]], -1)):
            with pytest.raises(ValueError, match=f"{message} {-2 if ignore != () else -1}"):
                open_masks(np.array(labels), ignore=ignore)

    def test_memory(self, monkeypatch):
        monkeypatch.setattr(checks, "MEMORY", 11)
        open_masks(np.array([[5, 0, 5]]))
        with pytest.raises(ValueError, match=r"masks must be small enough for 0.0 GiB of memory, got \(2, 3\)"):
            open_masks(np.array([[5, 0, 5], [0, 0, 9]]))

    @pytest.mark.parametrize(
        ("dtype", "void"), [("uint8", 255), ("uint16", 65535), ("int8", -1), (">i2", -1), ("int32", -1), ("int64", -1)]
    )
    def test_void_by_custom(self, dtype, void):
        label_map = np.array([[0, 2, 2, void], [7, 7, 0, void]]).astype(dtype)
        mask_set, restore = open_masks(label_map)
        assert mask_set.masks.flatten(1).sum(1).tolist() == [2, 2]
        same(restore(mask_set, [[0], [1]]), label_map)
        # masks that grow do not cover void
        written = restore(MaskSet(torch.ones_like(mask_set.masks[:1])), [[1]])
        same(written, np.where(label_map == label_map.dtype.type(void), label_map, 7).astype(dtype))

    def test_other_values_of_void(self):
        label_map = np.array([[0, 2, 255], [-1, 300, 255]])
        assert len(open_masks(label_map)[0].masks) == 3  # 255 is a number like others in 64 bits
        assert len(open_masks(label_map, ignore=(255, -1))[0].masks) == 2
        assert len(open_masks(label_map, ignore=[255, -1, 2])[0].masks) == 1
        assert len(open_masks(label_map.clip(0).astype(np.uint8), ignore=())[0].masks) == 3
        with pytest.raises(TypeError, match=r"open_masks: ignore must be integers, got 1\.5"):
            open_masks(label_map, ignore=1.5)

    def test_new_labels_are_not_void(self):
        label_map = np.arange(1, 255, dtype=np.uint8)[None]
        _, restore = open_masks(label_map)
        masks = torch.ones(255, 1, 254, dtype=torch.bool)
        with pytest.raises(ValueError, match="restore: result must be few enough masks for labels up to 255, got 255"):
            restore(MaskSet(masks), [[0], *([k] for k in range(254))])

    def test_the_picture_of_a_mask(self):
        label_map = np.array([[255, 255, 0, 255]], dtype=np.uint8)
        mask_set, restore = open_masks(label_map)
        assert len(mask_set.masks) == 1
        same(restore(mask_set, [[0]]), label_map)
        parts = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 1]]]).bool()
        same(restore(MaskSet(parts), [[0], [0]]), np.array([[1, 1, 0, 2]], dtype=np.uint8))

    def test_label_divisor(self):
        label_map = np.array([[7, 7, 26001, 26001, 26002, 0, 255]], dtype=np.int32)
        mask_set, restore = open_masks(label_map, label_divisor=1000, ignore=255)
        assert mask_set.classes.tolist() == [7, 26, 26]
        same(restore(mask_set, [[0], [1], [2]]), label_map)
        parts = mask_set.masks[[0, 0, 1, 1, 2]] & (torch.arange(7) % 2 == torch.tensor([0, 1, 0, 1, 0])[:, None, None])
        written = restore(MaskSet(parts), [[0], [0], [1], [1], [2]])
        same(written, np.array([[7, 7001, 26001, 26003, 26002, 0, 255]], dtype=np.int32))
        with pytest.raises(ValueError, match="label_divisor must be at least 2, got 1"):
            open_masks(label_map, label_divisor=1)
        _, restore = open_masks(np.array([[11, 12]]), label_divisor=3)
        message = "restore: result must have fewer than 3 masks of a class, got more of class 3"
        with pytest.raises(ValueError, match=message):
            restore(MaskSet(torch.ones(3, 1, 2) > 0), [[0], [0], [0]])

    def test_classes_of_labels_are_never_fused(self):
        label_map = np.zeros((20, 30), dtype=np.int32)
        label_map[4:16, 4:12], label_map[4:16, 12:26] = 11001, 12001
        mask_set, restore = open_masks(label_map, label_divisor=1000)
        whole = propagate(mask_set, np.zeros((20, 30), np.float32), threshold=0.5)
        assert whole.classes.tolist() == [11, 12]
        assert set(np.unique(restore(whole, [[0], [1]]))) <= {0, 11001, 12001}

    @pytest.mark.parametrize("mode", ["L", "P", "I", "I;16", "1"])
    def test_pictures(self, mode):
        labels = np.array([[0, 1, 1], [2, 0, 9]])
        if mode == "1":
            before = Image.fromarray(labels > 0)
        elif mode == "P":
            before = Image.fromarray(labels.astype(np.uint8))
            before.putpalette(bytes(range(48)))
        else:
            before = Image.fromarray(labels.astype({"L": np.uint8, "I": np.int32, "I;16": np.uint16}[mode]))
        assert before.mode == mode
        mask_set, restore = open_masks(before)
        count = len(mask_set.masks)
        assert count == (1 if mode == "1" else 3)
        same(restore(mask_set, [[k] for k in range(count)]), before)
        parts = restore(MaskSet(mask_set.masks[[0, 0]]), [[0], [0]])
        if mode == "1":
            same(parts, [before, before])

    @EXAMPLES
    @given(masks=stacks(least=1))
    def test_a_single_mask(self, masks):
        for one in (masks[0], torch.from_numpy(masks[0]), masks[0].astype(np.float16)):
            mask_set, restore = open_masks(one)
            assert mask_set.masks.shape == (1, *masks.shape[1:])
            same(restore(mask_set, [[0]]), one)
            assert restore(MaskSet(mask_set.masks[[0, 0]]), [[0], [0]]).shape == (2, *masks.shape[1:])

    def test_masks_of_prompts(self):
        stack = np.random.default_rng(0).random((2, 3, 4, 5)) > 0.5
        mask_set, restore = open_masks(stack)
        same(restore(mask_set, [[k] for k in range(6)]), stack)
        assert restore(MaskSet(mask_set.masks[:5]), [[k] for k in range(5)]).shape == (5, 1, 4, 5)
        _, restore = open_masks(stack[:1])
        assert restore(MaskSet(mask_set.masks[:2]), [[0], [1]]).shape == (1, 2, 4, 5)

    def test_soft_masks(self):
        soft = np.array([[[0.2, 0.7, 0.5]]], dtype=np.float32)
        for masks, cut in ((soft, 0.5), (soft - 0.5, 0.0), ({"keys": [15], "masks": soft}, 0.5), ([soft[0]], 0.5)):
            mask_set, restore = open_masks(masks, cut=cut)
            assert mask_set.masks.tolist() == [[[False, True, False]]]
            written = restore(mask_set, [[0]])
            written = written["masks"] if isinstance(written, dict) else written
            np.testing.assert_array_equal(np.asarray(written), [[[0, 1, 0]]])
        with pytest.raises(ValueError, match="open_masks: masks must be numbers, got nan"):
            open_masks(soft * np.nan, cut=0.5)
        with pytest.raises(TypeError, match="open_masks: cut must be "):
            open_masks(soft, cut="0.5")

    def test_collections_without_an_order_or_an_end(self):
        masks = [np.array([[1, 0]]) > 0, np.array([[1, 1]]) > 0]
        for collection in ((mask for mask in masks), iter(masks), {1: masks[0], 2: masks[1]}.values()):
            mask_set, restore = open_masks(collection)
            same(restore(mask_set, [[0], [1]]), masks)
        tensors = {torch.from_numpy(mask) for mask in masks}
        for collection in (tensors, frozenset(tensors)):
            mask_set, restore = open_masks(collection)
            written = restore(mask_set, [[0], [1]])
            assert type(written) is type(collection)
            assert sorted(mask.sum().item() for mask in written) == [1, 2]


class TestPanoptic:
    SEGMENTS = (
        {"id": 1, "isthing": True, "category_id": 17, "instance_id": 0, "score": 0.75, "area": 3.0},
        {"id": 4, "isthing": False, "category_id": 40, "area": 3, "bbox": [1, 0, 2, 2]},
    )

    def test_parts_of_things_and_of_stuff(self):
        segment_map = torch.tensor([[1, 1, 4, 255], [1, 4, 4, 0]], dtype=torch.int32)
        mask_set, restore = open_masks((segment_map, list(self.SEGMENTS)))
        assert mask_set.classes.tolist() == [17, 40] and mask_set.scores is None
        same(restore(mask_set, [[0], [1]]), (segment_map, list(self.SEGMENTS)))
        first = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool()
        parts = [mask for whole in mask_set.masks for mask in (whole & first, whole & ~first)]
        written, segments = restore(MaskSet(torch.stack(parts)), [[0], [0], [1], [1]])
        assert written.tolist() == [[1, 1, 4, 255], [2, 4, 4, 0]]
        assert [(one["id"], one["category_id"], one["area"]) for one in segments] == [
            (1, 17, 2),
            (2, 17, 1),
            (4, 40, 3),
        ]
        written, segments = restore(MaskSet(torch.ones(1, 2, 4) > 0), [[1]])
        assert written.tolist() == [[4, 4, 4, 255], [4, 4, 4, 4]]
        assert segments == [{**self.SEGMENTS[1], "area": 7, "bbox": [0, 0, 4, 2]}]

    @pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
    def test_transformers(self, dtype):
        output = {
            "segmentation": torch.tensor([[0, 0, -1], [1, 1, -1]], dtype=dtype),
            "segments_info": [
                {"id": 0, "label_id": 3, "was_fused": False, "score": 0.9},
                {"id": 1, "label_id": 5, "was_fused": False, "score": 0.6},
            ],
        }
        mask_set, restore = open_masks(output)
        assert mask_set.classes.tolist() == [3, 5] and mask_set.masks.sum() == 4
        same(restore(mask_set, [[0], [1]]), output)
        written = restore(MaskSet(mask_set.masks[:1], torch.tensor([0.25])), [[0]])
        assert written["segmentation"].tolist() == [[0, 0, -1], [-1, -1, -1]]
        assert written["segments_info"] == [{**output["segments_info"][0], "score": 0.25}]

    def test_an_output_of_detectron2(self):
        output = {"panoptic_seg": (torch.tensor([[1, 4]]), list(self.SEGMENTS)), "sem_seg": torch.zeros(2, 1, 2)}
        mask_set, restore = open_masks(output)
        written = restore(mask_set, [[0], [1]])
        assert list(written) == ["panoptic_seg", "sem_seg"] and written["panoptic_seg"][0].tolist() == [[1, 4]]
        output["instances"] = instances(ONE)
        assert len(open_masks(output)[0].masks) == 1


MAPS = {
    "label map": lambda masks: masks[0].astype(int),
    "PIL label map": lambda masks: Image.fromarray(masks[0].astype(np.uint8)),
    "panoptic": lambda masks: (masks[0].astype(int), [{"id": 1, "category_id": 3}]),
    "transformers' panoptic": lambda masks: {
        "segmentation": torch.from_numpy(masks[0].astype(int)),
        "segments_info": [{"id": 1, "label_id": 3, "score": 0.5}],
    },
}


class TestFields:
    MASKS = np.array([[[1, 1, 0], [1, 0, 0]], [[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]], dtype=bool)
    UNION = MaskSet(torch.from_numpy(MASKS[:2].any(0)[None]), torch.tensor([0.75]))

    def test_sam(self):
        records = [sam(mask, k) for k, mask in enumerate(self.MASKS)]
        records[0]["predicted_iou"], records[0]["extra"] = 0.1, "first"
        _, restore = open_masks(records)
        (out,) = restore(self.UNION, [[0, 1]])
        same(out["segmentation"], self.MASKS[:2].any(0))
        assert out["area"] == 4 and out["bbox"] == [0, 0, 2, 1] and out["predicted_iou"] == 0.75
        # of the best of both, and measured again or left out where the mask is another
        assert list(out) == ["segmentation", "area", "bbox", "predicted_iou", "point_coords", "crop_box"]
        assert out["crop_box"] == records[1]["crop_box"]
        ((x, y),) = out["point_coords"]
        assert out["segmentation"][int(y), int(x)]

    def test_parts_of_a_record(self):
        mask = np.ones((4, 6), dtype=bool)
        record = {**sam(mask, 0), "id": 7, "point_coords": [[1.5, 2.0], [0.0, 3.0], [5.5, 0.5]]}
        _, restore = open_masks([record])
        halves = np.stack([mask, mask])
        halves[0, :, 3:], halves[1, :, :3] = False, False
        lower = halves[1] & (np.arange(4) >= 2)[:, None]
        one, two, three = restore(MaskSet(torch.from_numpy(np.stack([*halves, lower]))), [[0]] * 3)
        assert one["point_coords"] == [[1.5, 2.0], [0.0, 3.0]] and two["point_coords"] == [[5.5, 0.5]]
        assert three["point_coords"] == [[4.0, 2.0]] and lower[2, 4]
        assert one["id"] == 7 and not any("id" in part or "stability_score" in part for part in (two, three))
        assert (one["bbox"], two["bbox"]) == ([0, 0, 2, 3], [3, 0, 2, 3]) and one["area"] == 12
        (whole,) = restore(MaskSet(torch.from_numpy(mask[None])), [[0]])
        same(whole, record)

    def test_annotations(self):
        entries = [annotation(mask, k) for k, mask in enumerate(self.MASKS)]
        mask_set, restore = open_masks(entries)
        assert mask_set.classes.tolist() == [1, 2, 3]
        np.testing.assert_array_equal(mask_set.scores, np.float32([0.3, 0.3 + 1 / 7, 0.3 + 2 / 7]))
        (out,) = restore(self.UNION, [[0, 1]])
        assert out["area"] == 4 and out["bbox"] == [0, 0, 3, 2] and out["score"] == 0.75
        assert out["id"] == 2 and out["image_id"] == 42 and out["category_id"] == 2.0
        json.dumps(out)

    def test_records_have_no_new_fields(self):
        bare = [{"segmentation": mask} for mask in self.MASKS]
        mask_set, restore = open_masks(bare)
        assert mask_set.scores is None and mask_set.classes is None
        (out,) = restore(self.UNION, [[2]])
        assert list(out) == ["segmentation"]

    def test_polygons_become_rle_where_the_mask_is_another(self):
        entry = {"segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]], "category_id": 1, "area": 4.5}
        mask_set, restore = open_masks([entry], (3, 4))
        assert mask_set.masks.sum() == 4
        (out,) = restore(mask_set, [[0]])
        assert out == entry and out["segmentation"] is not entry["segmentation"]
        (out,) = restore(MaskSet(~mask_set.masks), [[0]])
        assert out == {"segmentation": rle(~mask_set.masks[0].numpy()), "category_id": 1, "area": 8}

    @pytest.mark.parametrize("compact", [False, True])
    def test_detections(self, compact):
        _, restore = open_masks(detections(self.MASKS, compact))
        out = restore(self.UNION, [[1, 0]])
        np.testing.assert_array_equal(np.asarray(out.mask), self.UNION.masks.numpy())
        assert out.xyxy.tolist() == [[0, 0, 2, 1]] and out.xyxy.dtype == np.float32
        assert out.confidence.tolist() == [0.75] and out.class_id.tolist() == [3] and out.tracker_id.tolist() == [100]
        assert out.data == {"class_name": "c0", "tags": ["0"]} and out.metadata == {"camera": 7}

    def test_empty_detections(self):
        import supervision as sv

        mask_set, restore = open_masks(sv.Detections.empty(), (3, 5))
        assert mask_set.masks.shape == (0, 3, 5)
        assert restore(mask_set, []) == sv.Detections.empty()
        mask_set, restore = open_masks(sv.Detections.empty())
        assert mask_set.masks.shape == (0, 0, 0)
        assert restore(mask_set, []) == sv.Detections.empty()

    def test_detections_of_sam(self):
        import supervision as sv

        records = [sam(mask, k) for k, mask in enumerate(self.MASKS)]
        before = sv.Detections.from_sam(records)
        mask_set, restore = open_masks(before)
        assert mask_set.scores is None
        assert restore(mask_set, [[0], [1], [2]]) == before

    def test_instances(self):
        collection = instances(self.MASKS)
        collection.set("embedding", torch.arange(6).reshape(3, 2))
        mask_set, restore = open_masks(collection)
        out = restore(self.UNION, [[1, 0]])
        same(out.pred_masks, self.UNION.masks)
        same(out.pred_boxes.tensor, torch.tensor([[0.0, 0, 3, 2]]))
        same(out.scores, torch.tensor([0.75]))
        same(out.pred_classes, torch.tensor([0]))
        same(out.embedding, torch.tensor([[0, 1]]))
        same(collection.pred_masks, mask_set.masks)

    def test_fields_of_a_dictionary(self):
        before = fields_of_transformers(self.MASKS)
        before["extra"] = np.arange(6).reshape(3, 2)
        _, restore = open_masks(before)
        out = restore(MaskSet(torch.from_numpy(self.MASKS[:2].any(0)[None]), torch.tensor([0.75])), [[0, 1]])
        same(out["masks"], [self.MASKS[:2].any(0)])
        assert out["scores"].tolist() == [0.75] and out["bounding_boxes"].tolist() == [[0, 0, 2, 1]]
        assert out["rle_mask"] == [rle(self.MASKS[:2].any(0), list)] and out["extra"].tolist() == [[0, 1]]
        assert out["is_last"] == [True] and before["bounding_boxes"].shape == (3, 4)

    def test_names_are_classes(self):
        records = [pipeline_record(mask, k) for k, mask in enumerate(self.MASKS)]
        assert open_masks(records)[0].classes.tolist() == [0, 1, 0]
        for record in records:
            record["score"] = None
        mask_set, restore = open_masks(records)
        assert mask_set.scores is None
        assert [one["score"] for one in restore(mask_set, [[0], [1], [2]])] == [None] * 3
        fields = {"masks": self.MASKS, "labels": ["cat", "dog", "cat"]}
        mask_set, restore = open_masks(fields)
        assert mask_set.classes.tolist() == [0, 1, 0]
        assert restore(MaskSet(mask_set.masks[1:]), [[1], [2]])["labels"] == ["dog", "cat"]

    def test_parts_of_a_detection_have_tracks_of_their_own(self):
        _, restore = open_masks(detections(self.MASKS))
        masks = torch.from_numpy(self.MASKS)[[0, 0, 1, 0]]
        out = restore(MaskSet(masks), [[0], [0], [1], [0]])
        assert out.tracker_id.tolist() == [100, 103, 101, 104]

    def test_instances_of_masks_alone(self):
        mask_set, restore = open_masks(Instances((2, 3), pred_masks=torch.from_numpy(self.MASKS)))
        assert mask_set.scores is None and mask_set.classes is None
        same(restore(self.UNION, [[0, 1]]).pred_masks, self.UNION.masks)

    def test_scores_of_the_best_member_without_new_ones(self):
        records = [sam(mask, k) for k, mask in enumerate(self.MASKS)]
        _, restore = open_masks(records)
        (out,) = restore(MaskSet(self.UNION.masks), [[2, 1]])
        assert out["predicted_iou"] == records[1]["predicted_iou"]

    def test_the_first_of_equal_scores(self):
        records = [{**sam(mask, k), "predicted_iou": 0.5} for k, mask in enumerate(self.MASKS)]
        records[1]["crop_box"] = [1, 1, 1, 1]
        _, restore = open_masks(records)
        assert restore(self.UNION, [[2, 1]])[0]["crop_box"] == [1, 1, 1, 1]

    def test_a_mask_set_is_returned_as_it_is(self):
        before = MaskSet(torch.from_numpy(self.MASKS), torch.rand(3), torch.arange(3))
        mask_set, restore = open_masks(before)
        assert mask_set is before
        assert restore(self.UNION, [[0, 1]]) is self.UNION

    def test_form_is_that_of_the_best_member(self):
        mixed = [self.MASKS[0], rle(self.MASKS[1], bytes), torch.from_numpy(self.MASKS[2]).float()]
        mask_set, restore = open_masks(mixed)
        same(restore(mask_set, [[0], [1], [2]]), mixed)

    @pytest.mark.parametrize("like", [np.asarray, torch.from_numpy])
    def test_a_mask_of_a_list_does_not_keep_the_others(self, like):
        mask_set, restore = open_masks([like(mask) for mask in self.MASKS])
        out = [torch.as_tensor(mask) for mask in restore(mask_set, [[0], [1], [2]])]
        assert all(mask.untyped_storage().nbytes() == mask.numel() for mask in out)

    def test_bytes_viewed_as_bool(self):
        for collection in ((self.MASKS * np.uint8(255)).view(bool), list((self.MASKS * np.uint8(255)).view(bool))):
            mask_set, restore = open_masks(collection)
            assert mask_set.masks.view(torch.uint8).max() == 1
            np.testing.assert_array_equal(restore(mask_set, [[0], [1], [2]]), self.MASKS)

    def test_gradients_stay_out(self):
        mask_set, restore = open_masks(torch.ones(1, 2, 3, requires_grad=True))
        assert not restore(mask_set, [[0]]).requires_grad


ONE = np.ones((1, 2, 3), dtype=bool)
RLE = rle(ONE[0])


def malformed(**fields):
    return [{**sam(ONE[0], 0), **fields}]


class TestErrors:
    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            ("photo.png", "masks must be a MaskSet, a label map .*, .*, a list .* or detectron2's Instances, got str"),
            (None, "masks must be a MaskSet, .* got NoneType"),
            (ONE.astype(complex), "masks must be bool, or integers or floats that are 0 or 1, got complex128"),
            (torch.ones(1, 2, 3, dtype=torch.complex64), "masks must be bool, .* got torch.complex64"),
            (ONE.astype(str), "masks must be bool, .* got <U"),
            ([ONE[0].astype(object)], r"masks\[0\] must be bool, .* got object"),
            ([ONE[0], "x"], r"masks\[1\] must be an array, a tensor or RLE, got str"),
            ([[[0, 0, 1, 0, 1, 1]]], r"masks\[0\] must be an array, a tensor or RLE, got list"),
            (malformed(segmentation="x"), r"masks\[0\] must be an array, a tensor or RLE, got str"),
            (malformed(predicted_iou="x"), r"predicted_iou must be numbers, got \['x'\]"),
            (
                Instances((2, 3), pred_boxes=Boxes(torch.zeros(1, 4))),
                "masks must be Instances with a tensor pred_masks, got NoneType",
            ),
            (MaskSet(torch.ones(1, 2, 3)), "masks must be bool, got float32"),
            (MaskSet(torch.ones(1, 2, 3) > 0, torch.ones(1).double()), "scores must be float32, got float64"),
            (MaskSet(ONE), "masks must be a bool tensor, got ndarray"),
        ],
    )
    def test_type(self, masks, message):
        with pytest.raises(TypeError, match=f"open_masks: {message}"):
            open_masks(masks)

    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            (ONE[0, 0], r"masks must be \(H, W\), \(M, H, W\) or \(B, M, H, W\), got \(3,\)"),
            (ONE[None, None], r"masks must be \(H, W\), .* got \(1, 1, 1, 2, 3\)"),
            (np.zeros((1, 0, 3), dtype=bool), r"masks must be \(H, W\), .* got \(1, 0, 3\)"),
            (np.zeros((0, 3), dtype=bool), r"masks must be \(H, W\), .* got \(0, 3\)"),
            (np.zeros((0, 3), dtype=np.int64), r"masks must be \(H, W\), got \(0, 3\)"),
            (ONE * 2, "masks must be 0 or 1, got 2"),
            (torch.full((1, 2, 3), 0.5), "masks must be 0 or 1, got 0.5; soft masks need a cut"),
            (np.array([[[0, 1, 255]]], np.uint8), "masks must be 0 or 1, got 1"),
            (Image.new("RGB", (3, 2)), "masks must be a picture of mode 1, L, P, I or I;16, got RGB"),
            ([Image.new("P", (3, 2))], r"masks\[0\] must be a picture of mode 1 or L, got P"),
            ({"mask": ONE, "class": np.arange(2)}, r"class must be \(1,\), one for each mask, got \(2,\)"),
            ({"masks": ONE, "scores": [0.5, 1]}, r"scores must be \(1,\), one for each mask, got \(2,\)"),
            ({"segmentation": ONE[0] * 1}, r"masks must have a segmentation \(H, W\) and segments_info, got others"),
            ((ONE[0] * 1, [{"id": 1}, {"id": 1}]), r"ids of segments must differ, got \[1, 1\]"),
            ([ONE[0] * np.nan], r"masks\[0\] must be 0 or 1, got nan"),
            ([ONE[0], ONE], r"masks\[1\] must be \(H, W\), got \(1, 2, 3\)"),
            ([ONE[0], ONE[0].T], r"masks\[1\] must be of size \(2, 3\), got \(3, 2\)"),
            ([RLE, {**RLE, "size": [3, 2]}], r"masks\[1\]: segmentation must be of its image's size \(2, 3\), got"),
            ([{**RLE, "size": [2**30, 2**30]}], r"masks\[0\]: size must be at most 178956970 pixels, got 1073741824 x"),
            ([{**RLE, "size": [2]}], r"masks\[0\]: segmentation must be RLE with its size"),
            ([{**RLE, "counts": "?"}], r"masks\[0\]: counts must be"),
            ([{**RLE, "counts": b""}], r"masks\[0\]: counts must be a compressed RLE"),
            ([{**RLE, "counts": [1, 2]}], r"masks\[0\]: counts must be at least 0 and sum to 2 \* 3, got \[1, 2\]"),
            ([{**RLE, "counts": [7, -1]}], r"masks\[0\]: counts must be at least 0"),
            ([{**RLE, "counts": [0, 6.0]}], r"masks\[0\]: counts must be integers"),
            ([{"size": [2, 3]}], r"masks\[0\]: counts must be a list or a string, got None"),
            ([{}], r"masks\[0\]: segmentation must be RLE with its size, got {}"),
            ([sam(ONE[0], 0), RLE], r"masks\[1\] must have a segmentation like others, got none"),
            ([sam(ONE[0], 0), ONE[0]], r"masks\[1\] must have a segmentation like others, got none"),
            (malformed(segmentation=[[0, 0, 1, 0, 1, 1]]), "size must be given with polygons, got None"),
            (malformed(predicted_iou=np.nan), "predicted_iou must be finite in float32, got nan"),
            (malformed(predicted_iou=1e300), "predicted_iou must be finite in float32, got 1e"),
            (malformed(predicted_iou=None), "predicted_iou must be finite in float32, got nan"),
            (malformed(category_id=2**63), r"masks\[0\]: category_id must be an integer of 64 bits, got 922337"),
            (malformed(category_id=1.5), r"masks\[0\]: category_id must be an integer, got 1.5"),
            (
                [*malformed(), {"segmentation": ONE[0]}],
                r"masks\[1\] must have a predicted_iou like masks\[0\], got none",
            ),
            (
                Instances((3, 2), pred_masks=torch.from_numpy(ONE)),
                r"pred_masks must be of image_size \(3, 2\), got \(2, 3\)",
            ),
            (MaskSet(torch.ones(1, 2, 3) > 0, torch.ones(2)), r"scores must be \(M\) with M = 1, got \(2,\)"),
            (MaskSet(torch.ones(2, 3) > 0), r"masks must be \(M, H, W\), got \(2, 3\)"),
        ],
    )
    def test_value(self, masks, message):
        with pytest.raises(ValueError, match=f"open_masks: .*{message}"):
            open_masks(masks)

    def test_polygon(self):
        with pytest.raises(ValueError, match=r"masks\[0\]: polygon must be an even number of finite coordinates"):
            open_masks(malformed(segmentation=[[0, 0, 1]]), (2, 3))
        with pytest.raises(ValueError, match=r"masks\[0\]: polygon must be an even number of finite coordinates"):
            open_masks(malformed(segmentation=[[0, 0, 1, 0, 1, -(2**63)]]), (2, 3))

    def test_size_and_memory(self, monkeypatch):
        polygons = malformed(segmentation=[[0, 0, 1, 0, 1, 1]])
        with pytest.raises(ValueError, match="open_masks: size must be at most 178956970 pixels, got 40000 x 40000"):
            open_masks(polygons, (40000, 40000))
        monkeypatch.setattr(checks, "MEMORY", 10)
        for masks, size in (([RLE, RLE], None), (polygons * 2, (2, 3))):
            with pytest.raises(ValueError, match=r"open_masks: masks must be small enough for .* got \(2, 2, 3\)"):
                open_masks(masks, size)

    def test_classes_that_are_no_integers(self):
        import supervision as sv

        detections = sv.Detections(np.zeros((2, 4)), ONE.repeat(2, 0) > 0, class_id=np.array([1.2, 1.9]))
        with pytest.raises(TypeError, match="open_masks: class_id must be integers, got float64"):
            open_masks(detections)
        masks = torch.from_numpy(ONE > 0).repeat(2, 1, 1)
        with pytest.raises(TypeError, match="open_masks: pred_classes must be integers, got float32"):
            open_masks(Instances((2, 3), pred_masks=masks, pred_classes=torch.tensor([1.2, 1.9])))

    def test_detections(self):
        import supervision as sv

        box = np.array([[0.0, 0, 1, 1]])
        with pytest.raises(ValueError, match="masks must be Detections with a mask, got boxes alone"):
            open_masks(sv.Detections(xyxy=box))
        with pytest.raises(ValueError, match="confidence must be finite in float32, got nan"):
            open_masks(sv.Detections(xyxy=box, mask=ONE, confidence=np.array([np.nan])))

    @pytest.mark.parametrize("name", FORMATS)
    def test_size(self, name):
        with pytest.raises(ValueError, match=r"open_masks: .*size \(3, 2\), got \(2, 3\)"):
            open_masks(FORMATS[name](ONE), (3, 2))

    @pytest.mark.parametrize("size", [(3,), (0, 3)])
    def test_size_itself(self, size):
        with pytest.raises(ValueError, match=r"size must be \(height, width\), both at least 1"):
            open_masks(ONE, size)

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ([], "groups must be 1, one for each mask, got 0"),
            ([[]], r"groups must hold indices of 1 masks, got \[\]"),
            ([[1]], r"groups must hold indices of 1 masks, got \[1\]"),
            ([[-1]], r"groups must hold indices of 1 masks, got \[-1\]"),
        ],
    )
    def test_groups(self, groups, message):
        mask_set, restore = open_masks(ONE)
        with pytest.raises(ValueError, match=f"restore: {message}"):
            restore(mask_set, groups)

    def test_result_of_another_size(self):
        _, restore = open_masks(ONE)
        with pytest.raises(ValueError, match=r"restore: result must be of size \(2, 3\), got \(3, 2\)"):
            restore(MaskSet(torch.ones(1, 3, 2) > 0), [[0]])

    def test_without_pycocotools(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        open_masks([sam(ONE[0], 0)])[1](open_masks(ONE)[0], [[0]])
        with pytest.raises(RuntimeError, match=r"open_masks: pycocotools must be installed"):
            open_masks([RLE])


class TestRegistry:
    def test_a_format_is_one_entry(self, monkeypatch):
        """Return a mask by its box, which no other format accepts."""

        def read(box, options):
            masks = torch.zeros(1, *options.size, dtype=torch.bool)
            masks[0, box["top"] : box["bottom"], box["left"] : box["right"]] = True
            return MaskSet(masks), lambda result, best: [mask_boxes(result.masks).tolist(), best]

        boxes = formats.MaskFormat("a box", lambda masks: isinstance(masks, dict) and "top" in masks, read)
        monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, boxes))
        mask_set, restore = open_masks({"left": 1, "top": 0, "right": 4, "bottom": 2}, (3, 5))
        assert mask_set.masks.sum() == 6
        assert restore(MaskSet(mask_set.masks[[0, 0]]), [[0], [0]]) == [[[1, 0, 4, 2]] * 2, [0, 0]]
        with pytest.raises(TypeError, match="detectron2's Instances or a box, got int"):
            open_masks(3)

    def test_every_format_is_tested(self):
        accepted = {
            next(known.name for known in formats.FORMATS if known.accepts(convert(ONE)))
            for convert in (*FORMATS.values(), *MAPS.values())
        }
        assert accepted == {known.name for known in formats.FORMATS}


class TestSemantic:
    MAP = np.array([[0, 15, 15], [12, 255, 15]], dtype=np.uint8)

    @pytest.mark.parametrize("like", [np.asarray, torch.from_numpy])
    def test_masks_of_tags(self, like):
        mask_set = semantic_masks(like(self.MAP), [15, 3, 12, 15])
        assert mask_set.classes.tolist() == [15, 12] and mask_set.scores is None
        np.testing.assert_array_equal(mask_set.masks.numpy(), [self.MAP == 15, self.MAP == 12])

    def test_class_without_its_tag_is_left_out(self):
        assert semantic_masks(self.MAP, [12]).masks.sum() == 1
        assert semantic_masks(self.MAP, []).masks.shape == (0, 2, 3)

    def test_palette_png(self, tmp_path):
        picture = Image.fromarray(self.MAP)
        picture.putpalette(bytes(range(256)) * 3)
        picture.save(tmp_path / "map.png")
        with Image.open(tmp_path / "map.png") as picture:
            assert picture.mode == "P"
            mask_set = semantic_masks(np.asarray(picture), [15])
        np.testing.assert_array_equal(mask_set.masks.numpy(), [self.MAP == 15])

    def test_errors(self):
        with pytest.raises(
            TypeError, match="semantic_masks: class_map must be an integer array or tensor, got float64"
        ):
            semantic_masks(self.MAP.astype(float), [1])
        with pytest.raises(TypeError, match="semantic_masks: class_map must be an integer array or tensor, got str"):
            semantic_masks("map.png", [1])
        with pytest.raises(ValueError, match=r"semantic_masks: class_map must be \(H, W\), got \(1, 2, 3\)"):
            semantic_masks(self.MAP[None], [1])
        with pytest.raises(ValueError, match="semantic_masks: tags must be classes, got 255, which is void"):
            semantic_masks(self.MAP, [255])
        for tag in (1.9, 1.0, torch.tensor(1.9), "1"):
            with pytest.raises(TypeError, match="semantic_masks: tags must be integers, got "):
                semantic_masks(self.MAP, [tag])
        with pytest.raises(ValueError, match="semantic_masks: tags must be integers of 64 bits, got 92233"):
            semantic_masks(self.MAP, [2**63])
        tags = torch.tensor([15], dtype=torch.uint8)
        assert semantic_masks(self.MAP, tags).classes.tolist() == [tag for tag in [15] if (tag == self.MAP).any()]


@EXAMPLES
@given(masks=stacks())
def test_masks_that_are_visible(masks):
    visible, indices = keep_visible(torch.from_numpy(masks))
    assert (visible.sum(0) == torch.from_numpy(masks).any(0)).all() and visible.flatten(1).any(1).all()
    order = sorted(range(len(masks)), key=lambda k: (masks[k].sum(), -k))  # the smallest first
    for mask, index in zip(visible.numpy(), indices.tolist(), strict=True):
        above = masks[order[: order.index(index)]].any(0)
        np.testing.assert_array_equal(mask, masks[index] & ~above)


def test_painted_masks_are_numbered_from_1():
    masks = torch.tensor([[[True, True, False]], [[False, True, False]]])
    assert paint_labels(masks).tolist() == [[1, 2, 0]] and paint_labels(masks, [9, 7]).tolist() == [[9, 7, 0]]
    for labels in ([9], [9, 7, 5]):
        with pytest.raises(ValueError, match=f"paint_labels: labels must be 2, one for each mask, got {len(labels)}"):
            paint_labels(masks, labels)


@pytest.mark.parametrize("function", [paint_labels, keep_visible])
@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (np.zeros((1, 2, 3), bool), TypeError, "a bool tensor, got ndarray"),
        (torch.zeros(1, 2, 3), TypeError, "a bool tensor, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), ValueError, r"\(M, H, W\), got \(2, 3\)"),
    ],
    ids=["array", "float", "one mask"],
)
def test_only_stacks_of_masks_are_painted(function, masks, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: masks must be {message}$"):
        function(masks)


@EXAMPLES
@given(masks=stacks())
def test_areas_and_boxes(masks):
    for stack in (masks, masks[:, ::-1, ::2].copy(), masks.transpose(0, 2, 1), (masks * np.uint8(255)).view(bool)):
        areas = mask_areas(torch.from_numpy(stack))
        assert areas.dtype == torch.int64 and areas.tolist() == [int(mask.sum()) for mask in stack]
        corners = []
        for mask in stack:
            rows, columns = np.nonzero(mask)
            empty = not len(rows)
            corners.append([0] * 4 if empty else [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert mask_boxes(torch.from_numpy(stack)).tolist() == corners


def test_as_tensor_copies_only_where_it_must():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert array_to_tensor(array).data_ptr() == array.ctypes.data
    fixed = array.copy()
    fixed.flags.writeable = False
    # contiguous to numpy, since an axis of length 1 has no next entry, and not to torch
    backwards = array[1:2][::-1]
    assert backwards.flags.c_contiguous and backwards.strides[0] < 0
    for other in (array[::-1, ::-1], array.T, array.astype(">f4"), fixed, array[1:, ::2], backwards):
        assert array_to_tensor(other).tolist() == other.tolist()


def test_defaults_of_torch_do_not_matter():
    every = [convert(ONE) for convert in FORMATS.values()]
    with torch.device("meta"):
        assert open_masks([], (3, 5))[0].masks.device.type == "cpu"
        for one in every:
            mask_set, restore = open_masks(one, (2, 3))
            same(restore(mask_set, [[0]]), one)


@pytest.mark.parametrize("empty", [[], ()], ids=["list", "tuple"])
def test_no_masks_have_the_size_that_is_asked_for(empty):
    mask_set, restore = open_masks(empty, (3, 5))
    assert mask_set.masks.shape == (0, 3, 5) and restore(mask_set, []) == empty
    assert open_masks(empty)[0].masks.shape == (0, 0, 0)


@pytest.mark.slow
def test_plain_masks_import_no_other_library():
    code = (
        "import sys, numpy as np\n"
        "from trace_fast.masks.formats import open_masks\n"
        "mask_set, restore = open_masks([np.ones((2, 3), bool)])\n"
        "restore(mask_set, [[0]])\n"
        "assert not {'pycocotools', 'supervision', 'detectron2', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensor", "list of tensors", "Instances"])
def test_masks_stay_on_their_device(name):
    masks = np.ones((2, 3, 5), dtype=bool)
    collection = torch.from_numpy(masks).cuda()
    if name == "list of tensors":
        collection = list(collection)
    elif name == "Instances":
        collection = Instances((3, 5), pred_masks=collection, scores=torch.tensor([0.5, 0.6]).cuda())
    mask_set, restore = open_masks(collection)
    assert mask_set.masks.is_cuda
    out = restore(mask_set, [[0], [1]])
    out = out.pred_masks if name == "Instances" else out
    assert all(mask.is_cuda for mask in out)


@pytest.mark.gpu
def test_mixed_devices():
    with pytest.raises(ValueError, match=r"open_masks: masks\[1\] must be on cpu like masks\[0\], got cuda:0"):
        open_masks([ONE[0], torch.from_numpy(ONE[0]).cuda()])
