"""
Rosenbrock's function in SciPy
==============================

``minimize_mlbfgs`` next to SciPy's own L-BFGS-B. Both are L-BFGS with a line search, so they need about the
same number of evaluations. The differences: an objective that is undefined in places is no obstacle here, and
noisy objectives have their own mode (see :doc:`/scipy`).
"""

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize, rosen, rosen_der

from mlbfgs_scipy import minimize_mlbfgs

start = np.asarray([-1.2, 1.0])
paths = {}
for name, method in (("minimize_mlbfgs", minimize_mlbfgs), ("L-BFGS-B", "L-BFGS-B")):
    path = [start]
    result = minimize(
        rosen, start, jac=rosen_der, method=method, callback=lambda x, path=path: path.append(x.copy())
    )
    paths[name] = np.asarray(path)
    print(f"{name:16s} {result.nit} iterations, {result.nfev} evaluations, f = {result.fun:.1e}")

# %%
# The points after each iteration, and how the value falls.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
grid = np.meshgrid(np.linspace(-1.6, 1.4, 200), np.linspace(-0.6, 1.6, 200))
left.contour(*grid, np.log10(rosen(np.asarray(grid)) + 1e-3), 15, cmap="Greys", linewidths=0.8)
for (name, path), marker in zip(paths.items(), "o.", strict=True):
    left.plot(*path.T, marker=marker, markersize=4, linewidth=1, label=name)
    right.semilogy([rosen(point) for point in path], label=name)
left.set(xlabel="x", ylabel="y")
right.set(xlabel="iteration", ylabel="value")
left.legend()
plt.show()
