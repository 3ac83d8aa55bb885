"""How object-wise attention is: labels of tokens, shares by hand, and drawn scenes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from trace_fast import Tracer
from trace_fast.training.inside import attention_inside, label_tokens, measure_inside
from trace_fast.training.scenes import IGNORED, SceneFile


def test_tokens_of_two_instances_or_of_ignored_pixels_have_no_label():
    instances = torch.zeros(4, 12, dtype=torch.int32)
    instances[:, :3], instances[:2, 4:6], instances[:, 8:10] = 1, 2, 3
    instances[3, 9], instances[:, 10:] = 0, IGNORED
    assert label_tokens(instances, (2, 6)).view(2, 6).tolist() == [[1, 0, 2, 0, 3, 0], [1, 0, 0, 0, 0, 0]]


class TestAttentionInside:
    def test_by_hand(self):
        attention = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
        inside, chance = attention_inside(attention, torch.tensor([4, 0, 4]))
        assert_close((inside, chance), (0.8, 2 / 3))

    def test_attention_to_itself_alone_is_inside(self):
        assert attention_inside(torch.eye(5), torch.tensor([1, 1, 2, 3, 0]))[0] == 1

    def test_no_object(self):
        with pytest.raises(ValueError, match="labels must have at least one token of an instance, got none"):
            attention_inside(torch.eye(3), torch.zeros(3, dtype=torch.int64))


class TestMeasureInside:
    @pytest.fixture
    def scene(self, tmp_path) -> SceneFile:
        """Return a red rectangle on green, 64 x 64 pixels, off the center."""
        instances = np.zeros((64, 64), np.uint16)
        instances[16:48, 8:24] = 1
        image = np.where(instances[..., None] > 0, [220, 30, 30], [40, 160, 60]).astype(np.uint8)
        return self.write(tmp_path, image, instances)

    def write(self, folder: Path, image, instances) -> SceneFile:
        scene = SceneFile(folder / "0.jpg", folder / "0.png")
        Image.fromarray(image).save(scene.image, quality=95)
        Image.fromarray(instances).save(scene.instances)
        return scene

    def test_the_embedded_model_attends_to_the_object_more_than_by_chance(self, scene):
        tracer = Tracer.from_pretrained("mini", device="cpu", size=(48, 64))
        inside, chance = measure_inside(tracer, [scene])
        assert_close(chance, 0.125)
        assert 0.4 < inside < 1

    def test_it_is_that_of_the_map(self, scene):
        tracer = Tracer.from_pretrained("mini", device="cpu", size=(64, 64))
        image = torch.from_numpy(np.asarray(Image.open(scene.image)).copy()).permute(2, 0, 1)[None] / 255
        rows = torch.zeros(16, 16, dtype=torch.bool)
        rows[4:12, 2:6] = True
        rows = rows.flatten()
        expected = tracer.attention(image)[0][rows][:, rows].sum(1).mean()
        assert_close(measure_inside(tracer, [scene])[0], expected.item(), rtol=1e-5, atol=0)

    def test_scenes_without_objects(self, tmp_path):
        scene = self.write(tmp_path, np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint16))
        tracer = Tracer.from_pretrained("mini", device="cpu", size=(32, 32))
        with pytest.raises(ValueError, match="scenes must have an instance that fills a token, got none"):
            measure_inside(tracer, [scene])
