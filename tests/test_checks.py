"""A batch of one image, where batch norm cannot train on it, is found before the first step."""

import copy

import pytest
import torch
from helpers import equal
from torch import nn

from engine.checks import check_single_images
from utils import UserError


class Norms(nn.Module):
    """Batch norms of maps of a quarter of the images' side, after what else changes in training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 4, stride=4))
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, images):
        return self.fc(self.last(self.dropout(self.norm(self.conv(images)))).amax((2, 3)))


def check(runtime, model, images=9, batch_size=4, epochs=((3, 4),), ranks=1, still=()):
    """Try a network, by default on the last of nine images."""
    check_single_images(model, {*still}, images, batch_size, epochs, runtime._replace(ranks=ranks))


@pytest.mark.parametrize("images, batch_size, ranks, epochs, is_found", [
    # Nine images in fours are two, two, and one.
    (9, 4, 1, [(3, 4)], True), (9, 4, 1, [(3, 4), (2, 4)], True), (9, 4, 1, [(3, 8), (3, 4)], True),
    (9, 4, 1, [(2, 4)], False), (9, 4, 1, [(3, 8), (2, 4)], False), (8, 4, 1, [(2, 4)], False),
    (50_000, 250, 1, [(200, 4)], False), (3, 4, 1, [(1, 4)], False),
    (50_000, 49_999, 1, [(2, 4)], True), (50_000, 99, 1, [(506, 4)], False),
    (50_001, 250, 1, [(201, 4)], True), (1, 4, 1, [(1, 4)], False),  # no other size would do
    # Of two or three images a process has one, of one each has the same.
    (10, 4, 2, [(3, 4)], True), (9, 4, 2, [(3, 4)], True), (11, 4, 2, [(3, 4)], True),
    (12, 4, 2, [(3, 4)], False), (12, 4, 3, [(3, 4)], True), (12, 4, 3, [(1, 4)], True),
    (12, 6, 3, [(2, 4)], False),
])
def test_a_share_of_one_image_is_found(runtime, images, batch_size, ranks, epochs, is_found):
    arguments = (images, batch_size, epochs, ranks)
    if not is_found:
        return check(runtime, Norms(), *arguments)
    says = (f"{images:,} images in batches of {batch_size:,} leave a process one image, on "
            "which batch norm cannot train; try another --batch-size")
    with pytest.raises(UserError, match=says):
        check(runtime, Norms(), *arguments)


def test_only_what_batch_norm_refuses_is_refused(runtime):
    """Neither maps of several pixels, nor other layers, nor norms in evaluation mode."""
    check(runtime, Norms(), epochs=[(3, 8)])
    check(runtime, nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.LayerNorm(10)))
    model = Norms()
    check(runtime, model, still=[model.norm, model.last])
    with pytest.raises(UserError, match="on which batch norm cannot train"):
        check(runtime, model, still=[model.norm])


def test_the_trial_leaves_no_trace(runtime):
    """Neither in the network, whose state and mode stay, nor in the random numbers."""
    model = Norms().eval()
    state, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check(runtime, model, epochs=[(3, 8), (3, 16)])
    assert equal(dict(model.state_dict()), dict(state))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not any(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def test_where_no_batch_of_one_image_comes_the_network_is_not_tried(runtime):
    check(runtime, None, images=50_000, batch_size=250, epochs=[(200, 4)])
