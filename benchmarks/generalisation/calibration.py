"""How sure a classifier is of its answers, and how often it is right."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["Measures", "expected_calibration_error", "measure", "temperature"]

BINS = 15
GOLDEN = (math.sqrt(5) - 1) / 2


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = BINS) -> float:
    """Mean distance of accuracy from confidence, over bins of equal width in confidence.

    Parameters
    ----------
    logits : Tensor
        (N, classes)
    targets : Tensor
        (N,), the right classes.
    bins : int
        How many.

    Returns
    -------
    float

    References
    ----------
    Guo et al., ICML 2017, arXiv:1706.04599, equation 3.

    Examples
    --------
    Two answers with confidence 0.8, one of them right, in one bin:

    >>> logits = torch.log(torch.tensor([[0.8, 0.2], [0.2, 0.8]]))
    >>> round(expected_calibration_error(logits, torch.tensor([0, 0])), 4)
    0.3
    """
    confidence, answers = logits.double().softmax(dim=1).max(dim=1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    surplus = torch.zeros(bins, dtype=torch.float64)
    surplus.index_add_(0, place, confidence - (answers == targets).double())
    return (surplus.abs().sum() / len(targets)).item()


def temperature(logits: Tensor, targets: Tensor) -> float:
    """What the logits have to be divided by for the lowest cross-entropy, between 1/20 and 20.

    Notes
    -----
    The cross-entropy is convex in the inverse of the temperature, so a golden-section search finds it.

    References
    ----------
    Guo et al., ICML 2017, arXiv:1706.04599, section 4.2.
    """
    logits = logits.double()

    def loss(log: float) -> float:
        return cross_entropy(logits / math.exp(log), targets).item()

    low, high = -math.log(20), math.log(20)
    for _ in range(40):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return math.exp((low + high) / 2)


class Measures(NamedTuple):
    """What is known of a network at the end of a run.

    Attributes
    ----------
    train : float
        Training loss.
    accuracy, loss : float
        On the test set.
    calibrated : float
        Test loss with logits divided by the temperature.
    error, calibrated_error : float
        Expected calibration error on the test set, without and with the temperature.
    temperature : float
        Fitted on the validation set.
    """

    train: float
    accuracy: float
    loss: float
    calibrated: float
    error: float
    calibrated_error: float
    temperature: float


def measure(train: float, known: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Measures:
    """Measures from the training loss, and from logits and targets of the validation and the test set."""
    heat = temperature(*known)
    logits, targets = test
    return Measures(
        train,
        (logits.argmax(dim=1) == targets).double().mean().item(),
        cross_entropy(logits, targets).item(),
        cross_entropy(logits / heat, targets).item(),
        expected_calibration_error(logits, targets),
        expected_calibration_error(logits / heat, targets),
        heat,
    )
