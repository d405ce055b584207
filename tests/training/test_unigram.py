"""The unigram baseline."""

import math

import pytest
import torch

from rlm_training.micro import Micro
from rlm_training.unigram import expected_counts, unigram_losses


def test_counts_follow_the_mix() -> None:
    counts = {"a": torch.tensor([10, 0, 0]), "b": torch.tensor([1, 1, 2])}
    assert expected_counts(counts, {"a": 3.0, "b": 1.0}, 400).tolist() == [325.0, 25.0, 50.0]


def test_losses_of_a_smoothed_unigram_model() -> None:
    counts = torch.tensor([5, 1, 0, 0])  # smoothed: 6, 2, 1, 1 of 10
    targets = torch.tensor([[0, 1], [3, 0]])
    scale = torch.tensor([[0.5, 0.25], [0.25, 0.0]])  # the last token does not count
    micro = Micro(0, 1, targets, targets, (scale > 0).float(), scale, scale)
    expected = -(0.5 * math.log(0.6) + 0.25 * math.log(0.2) + 0.25 * math.log(0.1))
    assert unigram_losses(counts, {"books": micro}) == {"books": pytest.approx(expected)}
