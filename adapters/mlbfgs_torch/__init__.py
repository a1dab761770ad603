"""mL-BFGS for PyTorch: `MLBFGS` takes the place of `torch.optim.AdamW`."""

from .optimizer import MLBFGS

__all__ = ["MLBFGS"]
