"""mL-BFGS: momentum-averaged curvature pairs, written once against the array API standard.

Pure functions over a state, for NumPy, CuPy, PyTorch, JAX and any other array API namespace. See
`step` for the whole step, and `project`, `observe`, `refresh` and `direction` for its parts.

References
----------
Niu, Fabian, Lee, Soltanolkotabi, Avestimehr, "mL-BFGS: A Momentum-based L-BFGS for Distributed
Large-Scale Neural Network Optimization", TMLR 2023, arXiv:2307.13744.
"""

from .averages import Observation, observe, project
from .blocks import partition
from .config import Config, Settings, default_rate, preset_momentum, preset_nesterov
from .curvature import Spectrum, curvatures, spectrum
from .diagnostics import Diagnostics, block_names, diagnostics
from .direction import direction, step, unscaled_step, upcoming
from .history import refresh
from .kernels import Kernels
from .scales import is_scaled
from .serialization import load_state, save_state
from .snapshot import Snapshot
from .state import LEAF_ARRAYS, MemoryPlan, State, init, plan_memory

__all__ = [
    "LEAF_ARRAYS",
    "Config",
    "Diagnostics",
    "Kernels",
    "MemoryPlan",
    "Observation",
    "Settings",
    "Snapshot",
    "Spectrum",
    "State",
    "block_names",
    "curvatures",
    "default_rate",
    "diagnostics",
    "direction",
    "init",
    "is_scaled",
    "load_state",
    "observe",
    "partition",
    "plan_memory",
    "preset_momentum",
    "preset_nesterov",
    "project",
    "refresh",
    "save_state",
    "spectrum",
    "step",
    "unscaled_step",
    "upcoming",
]
