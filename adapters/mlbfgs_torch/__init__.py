"""mL-BFGS for PyTorch: `MLBFGS` drops in where `torch.optim.AdamW` stands."""

from .optimizer import MLBFGS

__all__ = ["MLBFGS"]
