"""The tasks: a model, the loss of each step's mini-batch, and the losses that count at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from . import data, fields, networks

__all__ = ["EQUATION", "FIXED", "GROUPS", "LARGE", "SMALL", "TASKS", "Problem", "Task", "available"]

SMALL, LARGE, FEW, MORE = (
    "Networks, small batches",
    "Networks, large batches",
    "Few parameters, and factors",
    "More networks",
)
EQUATION, FIXED = "Differential equations", "Differential equations, full batch in float64"
GROUPS = (SMALL, LARGE, EQUATION, FEW, MORE, FIXED)


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
    group : str
        One of `GROUPS`. Points of an equation are drawn anew in each step, or stay and are in double
        precision.
    later : bool
        Whether it came to the table after the first sixteen, over which the goals count.
    version : int
        Raised whenever runs of before say nothing about the task any more.
    """

    name: str
    title: str
    steps: int
    make: Callable[[int], Problem]
    held_out: bool = False
    group: str = SMALL
    later: bool = False
    version: int = 1


def available(task: str) -> bool:
    """Whether the task's data are there."""
    return task != "fashion" or data.fashion_file() is not None


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
    known = equation.points(torch.Generator().manual_seed(7), 4)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        return equation.residual(model, equation.points(generator, 1))

    def evaluate() -> tuple[float, float]:
        train = equation.residual(model, known).item()
        with torch.no_grad():
            return train, equation.error(model).item()

    return Problem(model, loss, evaluate)


def full_batch(equation: fields.Equation, network: Callable[[], nn.Module], seed: int) -> Problem:
    """Learn a field from its differential equation, at the same points in every step, in double precision."""
    torch.manual_seed(seed)
    model = network().double()
    drawn = equation.points(torch.Generator().manual_seed(1_000_003 * (seed + 1)), 1)
    points = fields.Points(*(part.double() for part in drawn))

    def evaluate() -> tuple[float, float]:
        train = equation.residual(model, points).item()
        with torch.no_grad():
            return train, equation.error(model).item()

    return Problem(model, lambda step: equation.residual(model, points), evaluate)


def squares(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum over an example, mean over the examples."""
    return (prediction - target).square().flatten(1).sum(dim=1).mean()


def tokens(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every position's next token."""
    return nn.functional.cross_entropy(prediction.flatten(0, 1), target.flatten())


def factors(size: int, seed: int) -> Problem:
    """Factorise the scikit-learn digits from half of their pixels."""
    return supervised(networks.factorisation, data.entries, nn.functional.mse_loss, size, seed)


@cache
def _first_half() -> dict[str, Tensor]:
    """Parameters of the classifier after 300 steps of AdamW on the digits 0 to 4."""
    problem = supervised(
        networks.classifier, partial(data.half_of_the_classes, later=False), _cross_entropy, 128, 0
    )
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=3e-3)
    for step in range(300):
        problem.model.zero_grad()
        problem.loss(step).backward()
        optimizer.step()
    return problem.model.state_dict()


def fine_tuning(change: Callable[[nn.Sequential], nn.Module], size: int, seed: int) -> Problem:
    """Learn the digits 5 to 9 with a network that knows the others."""

    def network() -> nn.Module:
        with torch.random.fork_rng():
            trained = networks.classifier()
            trained.load_state_dict(_first_half())
        return change(trained)

    return supervised(network, partial(data.half_of_the_classes, later=True), _cross_entropy, size, seed)


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
_gru = partial(supervised, networks.gru, data.source_code, tokens, rows=500)
_vit = partial(supervised, networks.vit, data.mnist, _cross_entropy, rows=2_000)
_fashion = partial(supervised, networks.convolutions, data.fashion, _cross_entropy)
_words = partial(supervised, networks.bag, data.words, _cross_entropy)
_convection = partial(physics, fields.CONVECTION, networks.field)
_allen_cahn = partial(physics, fields.ALLEN_CAHN, networks.field)
_poisson_fixed = partial(full_batch, fields.POISSON, networks.small_field)
_burgers_fixed = partial(full_batch, fields.BURGERS, networks.small_field)
_frozen, _low_rank = partial(fine_tuning, networks.frozen), partial(fine_tuning, networks.low_rank)

_small, _held_out = partial(Task, group=SMALL), partial(Task, held_out=True)
_large, _few, _more = (partial(_held_out, group=group) for group in (LARGE, FEW, MORE))
_equation, _fixed = partial(Task, group=EQUATION), partial(Task, group=FIXED)

TASKS = {
    task.name: task
    for task in (
        _small("autoencoder", "Autoencoder, MNIST", 1_000, partial(_autoencoder, 128)),
        _small("classifier", "Classifier, MNIST", 1_000, partial(_classifier, 128)),
        _small("digits", "Classifier, 8x8 digits", 600, partial(_digits, 64)),
        _small("resnet", "ResNet, MNIST", 500, partial(_resnet, 64)),
        _small("transformer", "Transformer, Python source", 800, partial(_transformer, 24)),
        _large("autoencoder_1024", "Autoencoder, 1024", 500, partial(_autoencoder, 1_024)),
        _large("classifier_1024", "Classifier, 1024", 400, partial(_classifier, 1_024)),
        _large("digits_512", "8x8 digits, 512", 400, partial(_digits, 512)),
        _large("resnet_512", "ResNet, 512", 150, partial(_resnet, 512)),
        _large("transformer_192", "Transformer, 192", 200, partial(_transformer, 192)),
        _equation("poisson", "Poisson", 2_000, _poisson),
        _equation("burgers", "Burgers", 2_000, _burgers),
        _few("ill", "Logistic, ill-conditioned", 1_000, partial(_ill, 64)),
        _few("ill_1024", "Logistic, ill-conditioned, 1024", 500, partial(_ill, 1_024)),
        _few("cancer", "Logistic, breast cancer", 1_000, partial(_cancer, 64)),
        _few("factors", "Matrix factorisation, digits", 1_500, partial(factors, 512)),
        _more("gru", "GRU, Python source", 400, partial(_gru, 32), later=True),
        _more("vit", "Vision transformer, MNIST", 300, partial(_vit, 64), later=True),
        _more("fashion", "Convolutions, Fashion-MNIST", 600, partial(_fashion, 128), later=True),
        _more("words", "Bag of words, rare ones", 600, partial(_words, 64), later=True),
        _more("frozen", "Fine-tuning, frozen layer", 300, partial(_frozen, 64), later=True),
        _more("low_rank", "Fine-tuning, adapter", 300, partial(_low_rank, 64), later=True),
        _equation("convection", "Convection, speed 30", 2_000, _convection, later=True),
        _equation("allen_cahn", "Allen-Cahn", 2_000, _allen_cahn, later=True),
        _fixed("poisson_fixed", "Poisson, full batch", 2_000, _poisson_fixed, later=True),
        _fixed("burgers_fixed", "Burgers, full batch", 2_000, _burgers_fixed, later=True),
    )
}
