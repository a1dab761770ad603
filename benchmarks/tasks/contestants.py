"""The optimizers that are compared: how each is constructed, and where its search begins.

None of them decays weights, since training is compared. Settings other than the learning rate are those that
each one documents, except where a note says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import heavyball
import pytorch_optimizer
import torch
import torchzero
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting
from torch import Tensor, nn
from torch.optim import Optimizer

from mlbfgs_torch import MLBFGS

from .problems import EQUATION, FIXED, GROUPS

__all__ = ["CONTESTANTS", "Contestant", "rate"]

Build = Callable[..., list[Optimizer]]


def rate(exponent: int) -> float:
    """Learning rate of the common grid: ``10 ** (exponent / 2)``."""
    return 10.0 ** (exponent / 2)


@dataclass(frozen=True)
class Contestant:
    """An optimizer with settings.

    Attributes
    ----------
    name, title : str
        Names for files and for people.
    build : callable
        Makes, from a model, a learning rate and the settings, the optimizers that step together.
    centre : int
        Exponent of the grid (`rate`) at which the search begins.
    documented : float
        Learning rate that its documentation gives.
    note : str
        A description.
    source : str
        Address of its code and documentation.
    settings : dict
        Keyword arguments of `build`.
    needs_closure : bool
        Whether it evaluates the loss itself, possibly many times in a step.
    ours : bool
        Whether its runs depend on the code of this repository.
    variant : bool
        Whether it is our default with something changed, and not one of the optimizers that are compared.
    constant : bool
        Whether it keeps its learning rate, since it averages parameters or searches along its lines.
    groups : tuple of str
        The groups of tasks that it is made for.
    """

    name: str
    title: str
    build: Build
    centre: int
    documented: float
    note: str
    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    needs_closure: bool = False
    ours: bool = False
    variant: bool = False
    constant: bool = False
    groups: tuple[str, ...] = GROUPS

    def optimizers(self, model: nn.Module, lr: float) -> list[Optimizer]:
        """The optimizers of a model."""
        return self.build(model, lr, **self.settings)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [param for param in model.parameters() if param.requires_grad]


def _plain(optimizer: Callable[..., Optimizer]) -> Build:
    """One optimizer for all parameters."""
    return lambda model, lr, **settings: [optimizer(_trained(model), lr=lr, **settings)]


def _ours(model: nn.Module, lr: float, **settings: Any) -> list[Optimizer]:
    """One optimizer that knows the parameters' names."""
    return [MLBFGS(model.named_parameters(), lr=lr, **settings)]


def _muon(model: nn.Module, lr: float, **settings: Any) -> list[Optimizer]:
    """Muon for the matrices of hidden layers, with convolutions as matrices; AdamW for everything else."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.GRU))]
    matrices = [p for m in layers for p in m.parameters(recurse=False) if p.requires_grad and p.ndim > 1][:-1]
    others = [p for p in _trained(model) if all(p is not matrix for matrix in matrices)]
    optimizers: list[Optimizer] = [torch.optim.AdamW(others, lr=lr, weight_decay=0.0)]
    if matrices:
        flat = [_flat(matrix) for matrix in matrices]
        optimizers.append(torch.optim.Muon(flat, lr=lr, weight_decay=0.0, **settings))
    return optimizers


def _flat(weight: Tensor) -> Tensor:
    """A view of the same memory as a matrix, which also receives the gradient."""
    matrix = weight.detach().flatten(1)

    def share(source: Tensor) -> None:
        matrix.grad = source.grad.flatten(1)

    weight.register_post_accumulate_grad_hook(share)
    return matrix


def _modules(*modules: Callable[[], Any]) -> Build:
    """A chain of torchzero modules, and the learning rate."""
    return lambda model, lr: [
        torchzero.Optimizer(_trained(model), *(make() for make in modules), torchzero.m.LR(lr))
    ]


def _wolfe() -> Any:
    """torchzero's line search, which without a fallback ends where it has once failed."""
    return torchzero.m.StrongWolfe(fallback=True)


def _heavyball(optimizer: Callable[..., Optimizer]) -> Build:
    """One of HeavyBall's, without its compiler, as the others run."""

    def build(model: nn.Module, lr: float, **settings: Any) -> list[Optimizer]:
        heavyball.utils.compile_mode = None
        return [optimizer(_trained(model), lr=lr, **settings)]

    return build


_TORCH = "https://docs.pytorch.org/docs/stable/generated/torch.optim."
_KOZISTR = "https://github.com/kozistr/pytorch_optimizer"
_HEAVYBALL = "https://github.com/HomebrewML/HeavyBall"
_TORCHZERO = "https://github.com/inikishev/torchzero"
_ADAMW = _plain(torch.optim.AdamW)


def _dense(name: str, title: str, method: Callable[[], Any], shown: str) -> Contestant:
    """A method with a dense matrix and a line search, for points that stay."""
    return Contestant(
        name,
        title,
        _modules(method, _wolfe),
        0,
        1.0,
        f"torchzero's {shown}, a dense matrix, with strong Wolfe line search; its rate does not fall",
        _TORCHZERO,
        needs_closure=True,
        constant=True,
        groups=(FIXED,),
    )


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            "mlbfgs",
            "mL-BFGS",
            _ours,
            -6,
            1e-3,
            "this library with default settings",
            "https://arxiv.org/abs/2307.13744",
            ours=True,
        ),
        Contestant(
            "mlbfgs_kronecker",
            "mL-BFGS Kronecker",
            _ours,
            -6,
            1e-3,
            'this library with preconditioner="kronecker"',
            "https://arxiv.org/abs/2307.13744",
            {"preconditioner": "kronecker"},
            ours=True,
        ),
        Contestant(
            "mlbfgs_kronecker_0",
            "Kronecker, no pairs",
            _ours,
            -6,
            1e-3,
            'this library with preconditioner="kronecker" and history_size=0',
            "https://arxiv.org/abs/2409.11321",
            {"preconditioner": "kronecker", "history_size": 0},
            ours=True,
        ),
        Contestant(
            "mlbfgs_equations",
            "Kronecker, for equations",
            _ours,
            -6,
            1e-3,
            "this library with the settings that its documentation gives for differential equations",
            "https://arxiv.org/abs/2307.13744",
            {
                "preconditioner": "kronecker",
                "preconditioner_beta": 0.95,
                "momentum": 0.95,
                "update_every": 20,
                "history_size": 10,
            },
            ours=True,
            groups=(EQUATION, FIXED),
        ),
        Contestant(
            "mlbfgs_0",
            "default, no pairs",
            _ours,
            -6,
            1e-3,
            "this library with history_size=0",
            "https://arxiv.org/abs/2307.13744",
            {"history_size": 0},
            ours=True,
        ),
        Contestant(
            "mlbfgs_unit",
            'mL-BFGS "unit"',
            _ours,
            -1,
            0.1,
            'the default with step_length="unit": its learning rate is the length of the whole step',
            "https://arxiv.org/abs/2307.13744",
            {"step_length": "unit"},
            ours=True,
        ),
        Contestant(
            "adamw",
            "AdamW",
            _ADAMW,
            -4,
            1e-3,
            "betas 0.9 and 0.999",
            f"{_TORCH}AdamW.html",
            {"betas": (0.9, 0.999), "weight_decay": 0.0},
        ),
        Contestant(
            "adamw_99",
            "AdamW 0.99",
            _ADAMW,
            -4,
            1e-3,
            "betas 0.9 and 0.99",
            f"{_TORCH}AdamW.html",
            {"betas": (0.9, 0.99), "weight_decay": 0.0},
        ),
        Contestant(
            "nadam",
            "NAdam",
            _plain(torch.optim.NAdam),
            -4,
            2e-3,
            "Adam with Nesterov's momentum, as the default of this library has it; betas 0.9 and 0.999",
            f"{_TORCH}NAdam.html",
        ),
        Contestant(
            "cautious",
            "Cautious AdamW",
            _modules(lambda: torchzero.m.Adam(0.9, 0.999), lambda: torchzero.m.Cautious(normalize=True)),
            -4,
            1e-3,
            "torchzero's Adam and Cautious: without the components that oppose the gradient, rescaled",
            _TORCHZERO,
        ),
        Contestant(
            "schedule_free",
            "Schedule-free AdamW",
            _plain(pytorch_optimizer.ScheduleFreeAdamW),
            -4,
            2.5e-3,
            "pytorch_optimizer's; it averages parameters instead of lowering the learning rate",
            _KOZISTR,
            constant=True,
        ),
        Contestant(
            "mars",
            "MARS",
            _plain(pytorch_optimizer.MARS),
            -4,
            3e-3,
            "pytorch_optimizer's MARS-AdamW, for vectors too, without its second gradient",
            _KOZISTR,
            {"optimize_1d": True},
        ),
        Contestant(
            "sgd",
            "SGD",
            _plain(torch.optim.SGD),
            -2,
            1e-3,
            "momentum 0.9",
            f"{_TORCH}SGD.html",
            {"momentum": 0.9, "weight_decay": 0.0},
        ),
        Contestant(
            "muon",
            "Muon",
            _muon,
            -4,
            1e-3,
            "Muon for the weights of all layers but the last, AdamW for all else; one learning rate",
            f"{_TORCH}Muon.html",
            {"adjust_lr_fn": "match_rms_adamw"},
        ),
        Contestant(
            "soap",
            "SOAP",
            _plain(pytorch_optimizer.SOAP),
            -4,
            3e-3,
            "pytorch_optimizer's, a new basis every 10 steps",
            _KOZISTR,
            {"weight_decay": 0.0},
        ),
        Contestant(
            "shampoo",
            "Shampoo",
            _plain(pytorch_optimizer.ScalableShampoo),
            -4,
            1e-3,
            "pytorch_optimizer's ScalableShampoo with RMSProp's step length, averaged momentum and new roots "
            "every 10 steps (its defaults are SGD's step length and 1,000 steps, too many for these runs)",
            _KOZISTR,
            {
                "graft_type": LayerWiseGrafting.RMSPROP,
                "moving_average_for_momentum": True,
                "preconditioning_compute_steps": 10,
                "weight_decay": 0.0,
            },
        ),
        Contestant(
            "kron",
            "PSGD Kron",
            _plain(pytorch_optimizer.Kron),
            -5,
            1e-3,
            "pytorch_optimizer's Kron: PSGD with Kronecker factors, momentum 0.9",
            _KOZISTR,
            {"momentum": 0.9, "weight_decay": 0.0},
        ),
        Contestant(
            "soap_heavyball",
            "SOAP (HeavyBall)",
            _heavyball(heavyball.SOAP),
            -4,
            3e-3,
            "HeavyBall's, a new basis every 2 steps",
            _HEAVYBALL,
            {"weight_decay": 0.0},
        ),
        Contestant(
            "kron_heavyball",
            "PSGD Kron (HeavyBall)",
            _heavyball(heavyball.PSGDKron),
            -5,
            1e-3,
            "HeavyBall's PSGD with Kronecker factors",
            _HEAVYBALL,
        ),
        Contestant(
            "psgd_lra",
            "PSGD LRA",
            _modules(lambda: torchzero.m.PSGDLRAWhiten(inner=torchzero.m.EMA(0.9))),
            -4,
            1e-3,
            "torchzero's PSGDLRAWhiten: PSGD with a preconditioner of rank 10, momentum 0.9",
            _TORCHZERO,
        ),
        Contestant(
            "olbfgs",
            "online L-BFGS",
            _modules(lambda: torchzero.m.Online(torchzero.m.LBFGS(history_size=10))),
            -2,
            1e-2,
            "torchzero's LBFGS in Online: both gradients of a pair on one mini-batch, two gradients a step",
            _TORCHZERO,
            needs_closure=True,
        ),
        Contestant(
            "lbfgs",
            "L-BFGS",
            _plain(torch.optim.LBFGS),
            0,
            1.0,
            "PyTorch's with strong Wolfe line search, history 10, up to 20 iterations on a mini-batch",
            f"{_TORCH}LBFGS.html",
            {"line_search_fn": "strong_wolfe", "history_size": 10},
            needs_closure=True,
        ),
        Contestant(
            "lbfgs_search",
            "L-BFGS, history 100",
            _plain(torch.optim.LBFGS),
            0,
            1.0,
            "PyTorch's with strong Wolfe line search and history 100; its rate does not fall",
            f"{_TORCH}LBFGS.html",
            {
                "line_search_fn": "strong_wolfe",
                "history_size": 100,
                "tolerance_grad": 0.0,
                "tolerance_change": 0.0,
            },
            needs_closure=True,
            constant=True,
            groups=(FIXED,),
        ),
        _dense("bfgs", "BFGS", torchzero.m.BFGS, "BFGS"),
        _dense("ssbroyden", "Self-scaled Broyden", torchzero.m.SSVM, "SSVM"),
        Contestant(
            "mlbfgs_fit",
            'mL-BFGS "fit"',
            _ours,
            -1,
            0.1,
            'this library with preset="fit"',
            "https://arxiv.org/abs/2307.13744",
            {"preset": "fit"},
            ours=True,
        ),
        Contestant(
            "mlbfgs_paper",
            'mL-BFGS "paper"',
            _ours,
            -2,
            0.1,
            'this library with preset="paper": the recipe that the authors published',
            "https://arxiv.org/abs/2307.13744",
            {"preset": "paper"},
            ours=True,
        ),
        Contestant(
            "mlbfgs_formulas",
            'mL-BFGS "formulas"',
            _ours,
            -3,
            0.1,
            'this library with preset="formulas": the published formulas and nothing else',
            "https://arxiv.org/abs/2307.13744",
            {"preset": "formulas"},
            ours=True,
        ),
        Contestant(
            "mlbfgs_lbfgs",
            'mL-BFGS "lbfgs"',
            _ours,
            -4,
            0.1,
            'this library with preset="lbfgs": textbook L-BFGS at every step, no line search',
            "https://arxiv.org/abs/2307.13744",
            {"preset": "lbfgs"},
            ours=True,
        ),
    )
}

_CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "heavy_ball": ("heavy-ball momentum", {"nesterov": False}),
    "no_momentum": ("no momentum", {"momentum": 0.0}),
    "no_pairs": ("no pairs at all", {"adaptive": False, "update_every": 10**9}),
    "history_10": ("ten pairs", {"history_size": 10}),
    "no_shrinkage": ("noise stays in the pairs", {"shrinkage": 1.0}),
    "no_floor": ("no cosine floor", {"min_cosine": 0.0}),
    "floor_40": ("a cosine floor of 0.4", {"min_cosine": 0.4}),
    "fixed": ("a pair every 50 steps, noise stays in it", {"adaptive": False}),
    "every_100": ("a pair at most every 100 steps", {"update_every": 100}),
    "exponential": ("exponential averages, decay 0.9", {"beta": 0.9}),
    "half_power": ("half the preconditioner's power", {"preconditioner_power": 0.5}),
    "no_preconditioner": ("no preconditioner", {"preconditioner": "none"}),
    "layers": ("a block for each layer", {"blocks": "layer"}),
}
CONTESTANTS |= {
    f"mlbfgs_{name}": replace(
        CONTESTANTS["mlbfgs"], name=f"mlbfgs_{name}", title=title, settings=settings, variant=True
    )
    for name, (title, settings) in _CHANGES.items()
}
