"""The tasks: a model, the loss of each step's mini-batch, and the losses that count at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import data, fields, networks

__all__ = ["TASKS", "Problem", "Task"]


@dataclass(frozen=True)
class Problem:
    """What an optimizer sees of a task.

    Attributes
    ----------
    model : torch.nn.Module
        Its parameters are trained.
    loss : callable
        The loss (0-d tensor) of the mini-batch of a step; the same step has the same batch for every
        optimizer, as often as it is asked for.
    evaluate : callable
        Training and test loss on fixed data, two numbers.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    evaluate: Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Task:
    """A task by name.

    Attributes
    ----------
    name, title : str
        For files and for people.
    steps : int
        Gradients that a run may take.
    make : callable
        The problem of a seed, which fixes the initial parameters and the mini-batches.
    held_out : bool
        Whether the task was kept out of the choice of default settings.
    base : str or None
        The task of which this is the version with large batches.
    """

    name: str
    title: str
    steps: int
    make: Callable[[int], Problem]
    held_out: bool = False
    base: str | None = None


def batches(rows: int, size: int, seed: int) -> Callable[[int], Tensor]:
    """The rows of each step's mini-batch, shuffled anew in every epoch."""
    per_epoch = rows // size
    orders: dict[int, Tensor] = {}

    def batch(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        if epoch not in orders:
            orders.clear()
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
            orders[epoch] = torch.randperm(rows, generator=generator)
        return orders[epoch][place * size : (place + 1) * size]

    return batch


def supervised(
    network: Callable[[], nn.Module],
    sets: Callable[[], tuple[data.Examples, data.Examples]],
    criterion: Callable[[Tensor, Tensor], Tensor],
    size: int,
    seed: int,
    *,
    rows: int = 4_000,
    ridge: float = 0.0,
) -> Problem:
    """Learn targets from inputs, `size` examples at a step.

    About `rows` examples tell the losses of a run; half of `ridge` times the squared parameters is added to
    the training loss.
    """
    train, test = sets()
    torch.manual_seed(seed)
    model = network()
    batch = batches(len(train.inputs), size, seed)
    known = torch.arange(0, len(train.inputs), max(1, len(train.inputs) // rows))

    def training(chosen: Tensor) -> Tensor:
        value = criterion(model(train.inputs[chosen]), train.targets[chosen])
        if ridge:
            value = value + ridge / 2 * sum(param.square().sum() for param in model.parameters())
        return value

    @torch.no_grad()
    def evaluate() -> tuple[float, float]:
        model.eval()
        both = (
            training(known).item(),
            criterion(model(test.inputs[:rows]), test.targets[:rows]).item(),
        )
        model.train()
        return both

    return Problem(model, lambda step: training(batch(step)), evaluate)


def physics(equation: fields.Equation, network: Callable[[], nn.Module], seed: int) -> Problem:
    """Learn a field from its differential equation, at points drawn anew in every step."""
    torch.manual_seed(seed)
    model = network()
    fixed = equation.points(torch.Generator().manual_seed(7), 4)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        return equation.residual(model, equation.points(generator, 1))

    def evaluate() -> tuple[float, float]:
        train = equation.residual(model, fixed).item()
        with torch.no_grad():
            return train, equation.error(model).item()

    return Problem(model, loss, evaluate)


def squares(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum over an example, mean over the examples."""
    return (prediction - target).square().flatten(1).sum(dim=1).mean()


def tokens(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every position's next token."""
    return nn.functional.cross_entropy(prediction.flatten(0, 1), target.flatten())


def factors(size: int, seed: int) -> Problem:
    """Factorise the scikit-learn digits from half of their pixels."""
    return supervised(networks.factorisation, data.entries, nn.functional.mse_loss, size, seed)


_cross_entropy = nn.functional.cross_entropy
_autoencoder = partial(supervised, networks.autoencoder, data.mnist_images, squares)
_classifier = partial(supervised, networks.classifier, data.mnist, _cross_entropy)
_ill = partial(supervised, networks.logistic(100), data.ill_conditioned, _cross_entropy)
# Classes that can be separated: only a penalty gives the loss a minimum. This one is scikit-learn's (C = 1).
_cancer = partial(supervised, networks.logistic(30), data.cancer, _cross_entropy, ridge=1 / 455)
_digits = partial(supervised, networks.digits, data.digits, _cross_entropy, ridge=1e-4)
_resnet = partial(supervised, networks.resnet, data.mnist_planes, _cross_entropy, rows=1_000)
_transformer = partial(supervised, networks.transformer, data.source_code, tokens, rows=500)
_poisson = partial(physics, fields.POISSON, networks.field)
_burgers = partial(physics, fields.BURGERS, networks.field)

TASKS = {
    task.name: task
    for task in (
        Task("autoencoder", "Deep autoencoder, MNIST", 1_000, partial(_autoencoder, 128)),
        Task("classifier", "Classifier, MNIST", 1_000, partial(_classifier, 128)),
        Task("digits", "Classifier, 8x8 digits", 600, partial(_digits, 64)),
        Task("ill", "Logistic regression, ill-conditioned", 1_000, partial(_ill, 64), held_out=True),
        Task("cancer", "Logistic regression, breast cancer", 1_000, partial(_cancer, 64), held_out=True),
        Task("resnet", "ResNet with BatchNorm, MNIST", 500, partial(_resnet, 64)),
        Task("transformer", "Character transformer, Python source", 800, partial(_transformer, 24)),
        Task("factors", "Matrix factorisation, 8x8 digits", 1_500, partial(factors, 512), held_out=True),
        Task("poisson", "PINN, Poisson", 2_000, _poisson),
        Task("burgers", "PINN, Burgers", 2_000, _burgers),
        Task(
            "autoencoder_1024",
            "Autoencoder, batch 1024",
            500,
            partial(_autoencoder, 1_024),
            True,
            "autoencoder",
        ),
        Task(
            "classifier_1024", "Classifier, batch 1024", 400, partial(_classifier, 1_024), True, "classifier"
        ),
        Task("digits_512", "8x8 digits, batch 512", 400, partial(_digits, 512), True, "digits"),
        Task("ill_1024", "Ill-conditioned, batch 1024", 500, partial(_ill, 1_024), True, "ill"),
        Task("resnet_512", "ResNet, batch 512", 150, partial(_resnet, 512), True, "resnet"),
        Task(
            "transformer_192", "Transformer, batch 192", 200, partial(_transformer, 192), True, "transformer"
        ),
    )
}
