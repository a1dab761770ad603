"""
Started in PyTorch, finished in JAX
===================================

One file holds a run: parameters, averages, curvature and momentum. Here PyTorch trains for 150 steps and JAX
for 150 more. The figure also shows the run that stays in PyTorch.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch

from mlbfgs_jax import load_state, mlbfgs
from mlbfgs_torch import MLBFGS

jax.config.update("jax_enable_x64", True)
random = np.random.default_rng(0)
inputs = random.normal(size=(256, 20)) * np.geomspace(0.1, 2.0, 20)
targets = np.sin(inputs @ random.normal(size=(20, 3)))
start = {
    "hidden": random.normal(size=(20, 32)) / 5,
    "out": random.normal(size=(32, 3)) / 6,
}


def train_in_torch(params, optimizer, steps):
    x, y = torch.tensor(inputs), torch.tensor(targets)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (torch.tanh(x @ params["hidden"]) @ params["out"] - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


params = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
optimizer = MLBFGS(list(params.items()), lr=2e-3)
in_torch = train_in_torch(params, optimizer, 150)
file = Path(tempfile.mkdtemp()) / "run.safetensors"
optimizer.save_state(file)
stayed = train_in_torch(params, optimizer, 150)

# %%
# The same model in JAX, in float64 too. ``load_state`` fills the parameters and the state.


def loss_in_jax(params):
    return jnp.mean((jnp.tanh(inputs @ params["hidden"]) @ params["out"] - targets) ** 2)


tx = mlbfgs(2e-3)
blank = jax.tree.map(jnp.zeros_like, {name: jnp.asarray(array) for name, array in start.items()})
moved, state = load_state(file, blank, tx.init(blank))


@jax.jit
def step(params, state):
    loss, grads = jax.value_and_grad(loss_in_jax)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


in_jax = []
for _ in range(150):
    moved, state, loss = step(moved, state)
    in_jax.append(float(loss))

# %%
# In float64 the two agree up to rounding, which the training amplifies.

print(
    f"largest relative difference of the losses: {np.max(np.abs(np.subtract(in_jax, stayed)) / stayed):.1e}"
)
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.semilogy(range(300), in_torch + stayed, "k", linewidth=4, alpha=0.2, label="PyTorch all the way")
axes.semilogy(range(150), in_torch, label="PyTorch")
axes.semilogy(range(150, 300), in_jax, label="JAX, resumed")
axes.set(xlabel="step", ylabel="loss")
axes.legend()
plt.show()
