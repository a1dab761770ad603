"""An optimizer's diagnostics as a table, as the figure of a recorded run, and as scalars for TensorBoard.

`table` needs Rich and `figure` needs matplotlib, which ``mlbfgs[diagnostics]`` installs; all else needs
neither.
"""

from .figure import figure
from .recorder import Reading, Recorder
from .rules import advice, remarks
from .scalars import log_scalars
from .table import table

__all__ = ["Reading", "Recorder", "advice", "figure", "log_scalars", "remarks", "table"]
