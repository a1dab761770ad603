"""
What noise does to L-BFGS
=========================

A quadratic with condition number 1,000 in 100 dimensions, each of which holds the same part of the loss at
the start. Each gradient is noisy, like that of a mini-batch. Textbook L-BFGS takes differences of single
gradients, which the noise destroys. mL-BFGS takes differences of averages.
"""

import matplotlib.pyplot as plt
import numpy as np

import mlbfgs_core as core

np.seterr(all="ignore")  # some runs diverge
curvature = np.geomspace(0.01, 10.0, 100)


def losses(config, rate, steps=1500):
    """Loss after each step, until it has blown up; the noise is the same for every method."""
    random = np.random.default_rng(0)
    x = 1 / np.sqrt(curvature)
    state = None if config is None else core.Method(config).init([x])
    result = []
    for _ in range(steps):
        direction = curvature * x + 0.1 * random.normal(size=100)
        if config is not None:
            (direction,), state = core.Method(config).step(state, [x], [direction])
        x = x - rate * direction
        result.append(0.5 * curvature @ x**2)
        if not result[-1] < 1e8:
            break
    return result


# %%
# Each method runs with three rates. The output is the mean of the last 100 losses; the loss at the start is
# 50.

methods = {
    "SGD": None,
    "textbook L-BFGS": core.Config(preset="lbfgs"),
    "published formulas": core.Config(preset="formulas"),
    'mL-BFGS, preset="fit"': core.Config(preset="fit"),
}
rates = (0.03, 0.1, 0.3)
runs = {name: {rate: losses(config, rate) for rate in rates} for name, config in methods.items()}
for name, own in runs.items():
    cells = [f"rate {rate:g}: {np.mean(values[-100:]):<9.2g}" for rate, values in own.items()]
    print(f"{name:22s}", *cells)

# %%
# These are the curves at rate 0.1. A curve that ends has left the picture for good. Every method has rates
# that are too high for it: for mL-BFGS 0.3 is too high here, and its loss ends above the start.

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, own in runs.items():
    axes.semilogy(own[0.1], label=name)
axes.set(xlabel="step", ylabel="loss", ylim=(1e-2, 1e5))
axes.legend()
plt.show()
