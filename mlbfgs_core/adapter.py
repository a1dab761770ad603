"""The interface for those who write an adapter: what lies between a framework's parameters and `Method`."""

from .blocks import Blocks, BlockSpec, one_block, validate_blocks
from .call import When
from .config import (
    SETTINGS,
    PreconditionerName,
    StepLength,
    as_number,
    check_names,
    check_old_names,
    check_real,
    is_zero,
    settings_in,
    settings_of_today,
    with_preset,
)
from .diagnostics import block_names
from .kernels import Leaf, Means, PairTile, StepEnd, part, square_roots
from .leaves import FlatLeaf, Member, pack
from .matrices import MatrixAxes, axes_in, check_matrix_axes, matrices_in
from .observation import Observation
from .overlap import Overlap, Place, find_overlap
from .preconditioner import FactorSums, Matrix, Preconditioner, Root, TileRoot
from .preconditioner.diagonal import DiagonalRoot
from .presets import Preset, default_rate, preset_momentum, preset_nesterov
from .scales import is_scaled
from .schedule import Upcoming
from .snapshot import coefficients, settings_of
from .state import (
    LEAF_COUNTS,
    LEAF_DTYPES,
    LEAF_NAMES,
    OF_MATRICES,
    RENAMED,
    Entry,
    accumulation_dtype,
    dtype_name,
    layout,
    leaf_arrays,
    with_leaf_arrays,
)
from .two_loop import two_loop
from .watch import Watch
from .window import mean_square_weight

__all__ = [
    "LEAF_COUNTS",
    "LEAF_DTYPES",
    "LEAF_NAMES",
    "OF_MATRICES",
    "RENAMED",
    "SETTINGS",
    "BlockSpec",
    "Blocks",
    "DiagonalRoot",
    "Entry",
    "FactorSums",
    "FlatLeaf",
    "Leaf",
    "Matrix",
    "MatrixAxes",
    "Means",
    "Member",
    "Observation",
    "Overlap",
    "PairTile",
    "Place",
    "Preconditioner",
    "PreconditionerName",
    "Preset",
    "Root",
    "StepEnd",
    "StepLength",
    "TileRoot",
    "Upcoming",
    "Watch",
    "When",
    "accumulation_dtype",
    "as_number",
    "axes_in",
    "block_names",
    "check_matrix_axes",
    "check_names",
    "check_old_names",
    "check_real",
    "coefficients",
    "default_rate",
    "dtype_name",
    "find_overlap",
    "is_scaled",
    "is_zero",
    "layout",
    "leaf_arrays",
    "matrices_in",
    "mean_square_weight",
    "one_block",
    "pack",
    "part",
    "preset_momentum",
    "preset_nesterov",
    "settings_in",
    "settings_of",
    "settings_of_today",
    "square_roots",
    "two_loop",
    "validate_blocks",
    "with_leaf_arrays",
    "with_preset",
]
