"""Losses of edge logits: by hand, weights, and what they are least for."""

import pytest
import torch
from torch.testing import assert_close

from trace_fast.training.losses import LOSSES, compute_loss, cross_entropy, dice


class TestDice:
    def test_by_hand(self):
        edges = torch.tensor([[[[0.5, 1.0, 0.25]]]])
        label = torch.tensor([[[[1.0, 1.0, 0.0]]]])
        # products 1.5, squares 0.25 + 1 + 0.0625 and 2
        assert_close(dice(edges, label, torch.ones(1, 1, 1, 3)), torch.tensor(1 - 4 / 4.3125))

    def test_pixels_without_a_label_are_ignored(self):
        edges = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        label, valid = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4)
        label[:, :, 0], valid[:, :, :2] = 1, 1
        expected = dice(edges[:, :, :2], label[:, :, :2], valid[:, :, :2])
        assert_close(dice(edges, label, valid), expected)
        dice(edges, label, valid).backward()
        assert not edges.grad[:, :, 2].any() and edges.grad[:, :, :2].all()

    def test_it_is_the_mean_over_images(self):
        edges, label = torch.rand(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
        valid = torch.ones(3, 1, 4, 5)
        losses = [dice(edges[i : i + 1], label[i : i + 1], valid[:1]) for i in range(3)]
        assert_close(dice(edges, label, valid), torch.stack(losses).mean())

    def test_the_label_itself_is_the_minimum(self):
        label = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(0))
        edges = label.clone().requires_grad_()
        loss = dice(edges, label, torch.ones_like(label))
        loss.backward()
        assert loss.abs() < 1e-6 and edges.grad.abs().max() < 1e-6

    def test_without_any_label_the_loss_is_zero(self):
        edges, label = torch.rand(2, 1, 1, 4, 5)
        assert dice(edges, label, torch.zeros(1, 1, 4, 5)).abs() < 1e-6


class TestCrossEntropy:
    def test_by_hand(self):
        # odds of 3 to 1: probabilities 0.75 and 0.25
        logits = torch.tensor([[[[3.0, 3.0, 1.0]]]]).log()
        label, weight = torch.tensor([[[[1.0, 0.0, 0.5]]]]), torch.tensor([[[[1.0, 0.5, 1.0]]]])
        parts = torch.tensor([-(torch.tensor(0.75).log()), -0.5 * torch.tensor(0.25).log(), torch.tensor(2.0).log()])
        assert_close(cross_entropy(logits, label, weight), parts.mean())

    @pytest.mark.parametrize("edge_weight", [0.5, 1.0, 10.0])
    @pytest.mark.parametrize("share", [0.1, 0.6])
    def test_the_least_is_at_the_probability_itself_however_much_edges_count(self, edge_weight, share):
        logits = torch.logit(torch.full((1, 1, 2, 3), share)).requires_grad_()
        loss = cross_entropy(logits, torch.full((1, 1, 2, 3), share), torch.ones(1, 1, 2, 3), edge_weight)
        loss.backward()
        assert logits.grad.abs().max() < 1e-6
        for change in (-0.1, 0.1):
            moved = cross_entropy(logits + change, torch.full((1, 1, 2, 3), share), torch.ones(1, 1, 2, 3), edge_weight)
            assert moved > loss

    def test_edges_count_more(self):
        logits, weight = torch.full((1, 1, 1, 2), 0.3), torch.ones(1, 1, 1, 2)
        missed = cross_entropy(logits - 9, torch.ones(1, 1, 1, 2), weight, 10) / cross_entropy(
            logits - 9, torch.ones(1, 1, 1, 2), weight, 1
        )
        assert 7 < missed < 10

    def test_pixels_without_a_label_are_ignored(self):
        logits, label = torch.randn(2, 2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
        weight = torch.zeros(2, 1, 3, 4)
        weight[..., :2] = 1
        logits.requires_grad_()
        cross_entropy(logits, label.sigmoid(), weight, 3.0).backward()
        assert not logits.grad[..., 2:].any() and logits.grad[..., :2].all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_names(name):
    logits, label, weight = torch.rand(3, 2, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    losses = {"dice": dice(logits.sigmoid(), label, weight), "cross-entropy": cross_entropy(logits, label, weight, 3.0)}
    assert losses["dice"] != losses["cross-entropy"]
    assert_close(compute_loss(name, logits, label, weight, 3.0), losses[name])
