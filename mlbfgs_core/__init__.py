"""mL-BFGS: momentum-averaged curvature pairs, written once against the array API standard.

`Method` holds the verbs, pure functions over a state, for NumPy, CuPy, PyTorch, JAX and any other array API
namespace. `mlbfgs_core.adapter` is the interface for those who write an adapter.

References
----------
Niu, Fabian, Lee, Soltanolkotabi, Avestimehr, "mL-BFGS: A Momentum-based L-BFGS for Distributed
Large-Scale Neural Network Optimization", TMLR 2023, arXiv:2307.13744.
"""

from .blocks import partition
from .config import Config
from .curvature import Spectrum, curvatures, inverse_hessian, spectrum
from .diagnostics import Diagnostics, FactorFigures, diagnostics, factor_figures
from .kernels import Kernels
from .method import Method
from .serialization import load_state, save_state
from .snapshot import Snapshot
from .state import MemoryPlan, State, plan_memory

__all__ = [
    "Config",
    "Diagnostics",
    "FactorFigures",
    "Kernels",
    "MemoryPlan",
    "Method",
    "Snapshot",
    "Spectrum",
    "State",
    "curvatures",
    "diagnostics",
    "factor_figures",
    "inverse_hessian",
    "load_state",
    "partition",
    "plan_memory",
    "save_state",
    "spectrum",
]
