"""Pseudo labels and gradient ridges, against values computed by hand."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from trace_fast.io.images import resize
from trace_fast.training.labels import STUFF_WEIGHT, gradient_ridges, label_scene, make_labels, pseudo_labels
from trace_fast.training.scenes import IGNORED


class TestPseudoLabels:
    def test_edge_is_above_and_interior_below_the_deviation(self):
        abdiv = torch.tensor([[[0.0, 4, 4, 4, 4], [4, 4, 4, 4, 8]]])  # mean 4, deviation 1.79
        label, valid = pseudo_labels(abdiv, interior=0)
        assert label.tolist() == [[[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]]
        assert valid.tolist() == [[[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]]

    def test_the_deviation_is_that_of_the_population(self):
        # mean 1, deviation 0.82; of a sample it would be 1
        label, valid = pseudo_labels(torch.tensor([[[0.0, 1, 2]]]), interior=0)
        assert (label.tolist(), valid.tolist()) == ([[[0, 0, 1]]], [[[1, 0, 1]]])

    def test_thresholds_are_those_of_each_image(self):
        abdiv = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(0)) ** 3
        label, valid = pseudo_labels(torch.cat([abdiv, 100 * abdiv + 3]))
        assert torch.equal(label[0], label[1]) and torch.equal(valid[0], valid[1])
        assert 0 < label.sum() < valid.sum() < valid.numel()

    @pytest.mark.parametrize(("interior", "tokens"), [(0.0, 1), (0.16, 4), (0.3, 6), (0.5, 10)])
    def test_the_lowest_share_is_interior_if_nothing_is_below_the_deviation(self, interior, tokens):
        abdiv = (torch.arange(20.0) / 20).pow(4).flip(0).view(1, 4, 5)  # skewed to the right
        assert abdiv.mean() - abdiv.std(correction=0) < 0
        label, valid = pseudo_labels(abdiv, interior=interior)
        inside = (valid > label).flatten().flip(0)
        assert inside.tolist() == [True] * tokens + [False] * (20 - tokens)
        assert label.sum() == (abdiv > abdiv.mean() + abdiv.std(correction=0)).sum() > 0

    def test_more_than_the_share_is_interior_if_more_is_below_the_deviation(self):
        abdiv = torch.tensor([[[1.0, 2, 3, 9, 9, 9, 9, 9, 9, 9]]])  # mean 6.9, deviation 3.24
        label, valid = pseudo_labels(abdiv, interior=0.1)
        assert not label.any() and valid.tolist() == [[[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]]

    def test_no_token_is_both_edge_and_interior(self):
        abdiv = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) ** 5
        label, valid = pseudo_labels(abdiv, interior=1.0)
        assert torch.equal(valid, torch.ones(3, 5, 7)) and 0 < label.mean() < 0.5

    def test_an_image_without_structure_has_no_edge(self):
        label, valid = pseudo_labels(torch.zeros(1, 3, 4))
        assert not label.any() and valid.all()

    def test_binary_labels_are_valid_everywhere(self):
        abdiv = torch.tensor([[[0.0, 4, 4, 4, 4], [4, 4, 4, 4, 8]]])
        label, valid = pseudo_labels(abdiv, "binary")
        assert label.tolist() == [[[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]] and valid.all()

    def test_soft_labels_are_the_probability(self):
        label, valid = pseudo_labels(torch.tensor([[[0.0, 0.2, 0.4], [-1e-3, 2, 50]]]), "soft", scale=0.2)
        expected = [[[0, 1 - np.exp(-1), 1 - np.exp(-2)], [0, 1 - np.exp(-10), 1]]]
        np.testing.assert_allclose(label.numpy(), expected, atol=1e-6)
        assert valid.all()


class TestMakeLabels:
    """Labels at the size of a decoder's output."""

    def make(self, abdiv, size, images=None, kind="ternary", interior=0.16):
        return make_labels(abdiv, size, images, kind, interior, scale=0.2)

    def test_thresholds_are_computed_on_tokens_and_the_others_stay_without_a_label(self):
        # columns of edge, neither, interior
        abdiv = torch.tensor([[[9.0, 1, 1, 1, 0], [9, 1, 1, 1, 0], [9, 1, 1, 1, 0]]])
        label, valid = self.make(abdiv, (12, 20))
        assert label.shape == (1, 1, 12, 20)
        assert label[0, 0].tolist() == [[1] * 4 + [0] * 16] * 12
        assert valid[0, 0].tolist() == [[1] * 4 + [0] * 12 + [1] * 4] * 12

    def test_corners_are_round(self):
        abdiv = torch.zeros(1, 3, 5)
        abdiv[0, 1, 2] = 9
        label, valid = self.make(abdiv, (12, 20))
        # along an axis, 0.625 or 0.875 of the token remain
        block = [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
        assert label[0, 0, 4:8, 8:12].tolist() == block and label.sum() == 12 and valid.all()

    def test_soft_labels_are_interpolated(self):
        label, valid = self.make(torch.tensor([[[0.0, 99]]]), (2, 4), kind="soft")
        assert_close(label, torch.tensor([[[[0, 0.25, 0.75, 1]] * 2]]))
        assert valid.all()

    @pytest.mark.parametrize("kind", ["ternary", "binary", "soft"])
    def test_at_the_size_of_the_tokens_they_are_the_pseudo_labels(self, kind):
        abdiv = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
        label, valid = self.make(abdiv, (3, 5), kind=kind, interior=0.5)
        expected_label, expected_valid = pseudo_labels(abdiv, kind, interior=0.5, scale=0.2)
        assert_close(label[:, 0], expected_label)
        assert torch.equal(valid[:, 0], expected_valid)

    def test_sharpened_labels_are_soft_labels_times_the_root_of_the_ridges(self):
        generator = torch.Generator().manual_seed(0)
        abdiv, images = torch.rand(2, 3, 5, generator=generator), torch.rand(2, 3, 12, 20, generator=generator)
        soft, _ = self.make(abdiv, (6, 10), kind="soft")
        label, valid = self.make(abdiv, (6, 10), images, "sharpened")
        assert_close(label, soft * gradient_ridges(resize(images, (6, 10))).sqrt())
        assert (label <= soft).all() and valid.all()

    def test_binarized_labels_are_sharpened_labels_pushed_apart(self):
        generator = torch.Generator().manual_seed(0)
        abdiv, images = torch.rand(2, 3, 5, generator=generator), torch.rand(2, 3, 12, 20, generator=generator)
        sharpened, _ = self.make(abdiv, (6, 10), images, "sharpened")
        label, valid = self.make(abdiv, (6, 10), images, "binarized")
        assert_close(torch.logit(label.double()) / 12, sharpened.double() - 0.42, rtol=0, atol=1e-4)
        assert valid.all()

    def test_combined_labels_are_the_geometric_mean_with_a_students_edges(self):
        abdiv, student = torch.tensor([[[0.0, 0.1, 0.2]]]), torch.tensor([[[[0.9, 0.4, 0.0]]]])
        arguments = abdiv, (1, 3), torch.rand(1, 3, 8, 24), "combined", 0.16, 0.1, student
        soft = 1 - torch.exp(-abdiv / 0.1)
        label, valid = make_labels(*arguments)
        assert_close(label, (soft * student).sqrt())
        assert valid.all()
        assert_close(make_labels(*arguments, 0.75)[0], (soft * student**3) ** 0.25)


class TestLabelScene:
    @pytest.fixture
    def instances(self):
        """Two instances that touch, at the left, and a border of two regions behind them, at the right."""
        instances = torch.zeros(6, 12, dtype=torch.int32)
        instances[1:4, :3], instances[1:4, 3:6] = 1, 2
        instances[:, 9:11] = IGNORED
        return instances

    def test_edges_are_where_instances_change(self, instances):
        label, _ = label_scene(instances, (6, 12))
        expected = torch.zeros(6, 12)
        expected[0, :6] = expected[3, :6] = 1  # above and along the lower side
        expected[1:4, 2] = expected[1:4, 5] = 1
        assert torch.equal(label[0, 0], expected)

    def test_pixels_beside_an_edge_have_no_label_and_stuff_counts_little(self, instances):
        label, weight = label_scene(instances, (6, 12))
        assert (weight[label > 0] == 1).all()
        assert weight[0, 0, 2].tolist() == [0, 0, 1, 0, 0, 1, 0, 1, 1, STUFF_WEIGHT, STUFF_WEIGHT, 1]

    def test_at_another_size(self, instances):
        small, _ = label_scene(instances, (3, 6))
        assert torch.equal(small, torch.nn.functional.max_pool2d(label_scene(instances, (6, 12))[0], 2))
        large, _ = label_scene(instances, (12, 24))
        assert large[0, 0, 5].nonzero().flatten().tolist() == [5, 11]  # lines stay one pixel wide


class TestGradientRidges:
    def test_an_outline_is_at_its_pixel_however_weak_it_is(self):
        images = torch.zeros(2, 3, 20, 24)
        images[0, :, :, 12:], images[1, :, :, 12:] = 1.0, 0.1
        ridges = gradient_ridges(images)
        assert ridges.shape == (2, 1, 20, 24)
        assert (ridges[..., 11:13] > 0.95).all()
        # the smoothing reaches three pixels; convolutions may leave rounding errors in constant areas
        assert ridges[..., :8].max() < 1e-3 and ridges[..., 16:].max() < 1e-3
        assert_close(ridges[0], ridges[1], rtol=0, atol=0.05)

    def test_of_two_close_outlines_the_weaker_one_has_lower_values(self):
        images = torch.zeros(1, 3, 20, 24)
        images[..., 10:], images[..., 13:] = 0.2, 1.0
        row = gradient_ridges(images)[0, 0, 10]
        assert row[12:14].min() > 0.9 and 0.1 < row[9] < 0.6

    @pytest.mark.parametrize(("options", "radius"), [({}, 3), ({"radius": 2}, 2)], ids=["default", "other"])
    def test_by_hand(self, options, radius):
        image = torch.rand(1, 2, 9, 11, generator=torch.Generator().manual_seed(0)).double()
        padded = np.pad(image[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="edge")
        weights = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
        soft = np.array(
            [
                [[(channel[i : i + 5, j : j + 5] * weights).sum() for j in range(11)] for i in range(9)]
                for channel in padded
            ]
        )
        ends = np.pad(soft, ((0, 0), (1, 1), (1, 1)), mode="edge")
        slopes = (ends[:, 1:-1, 2:] - ends[:, 1:-1, :-2]) / 2, (ends[:, 2:, 1:-1] - ends[:, :-2, 1:-1]) / 2
        gradient = np.sqrt((slopes[0] ** 2 + slopes[1] ** 2).sum(0))
        side = 2 * radius + 1
        padded = np.pad(gradient, radius, mode="constant")
        highest = np.array([[padded[i : i + side, j : j + side].max() for j in range(11)] for i in range(9)])
        padded = np.pad(highest, radius, mode="edge")
        mean = np.array([[padded[i : i + side, j : j + side].mean() for j in range(11)] for i in range(9)])
        expected = np.minimum(gradient / (mean + 1e-3), 1)
        np.testing.assert_allclose(gradient_ridges(image, **options)[0, 0].numpy(), expected, atol=1e-12)

    def test_a_constant_image_has_none(self):
        assert gradient_ridges(torch.full((1, 3, 9, 9), 0.3)).max() < 1e-3
