"""The coordinates in which the method runs: `R` of each leaf; the inverse Hessian is ``R^T H' R``.

A preconditioner is a module with a class that fulfils the contract of `Preconditioner`, an entry in
`PRECONDITIONERS` and a name in `mlbfgs_core.Config`; its dense twin stands in `mlbfgs_core.reference`.
"""

from __future__ import annotations

from ..config import Config
from .diagonal import Diagonal
from .identity import Identity
from .kronecker import FactorSums, Kronecker, Matrix, is_basis_step
from .root import Preconditioner, Root, TileRoot

__all__ = ["FactorSums", "Matrix", "Preconditioner", "Root", "TileRoot", "is_basis_step", "preconditioner_of"]

PRECONDITIONERS: dict[str, Preconditioner] = {
    "none": Identity(),
    "diagonal": Diagonal(),
    "kronecker": Kronecker(),
}


def preconditioner_of(config: Config) -> Preconditioner:
    """The preconditioner that the settings ask for."""
    return PRECONDITIONERS[config.preconditioner]
