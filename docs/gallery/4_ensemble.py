"""
An ensemble in JAX
==================

Sixty-four networks are trained at once, with ``jax.vmap``. Each has its own curvature and takes its own
pairs. Their spread shows where the fit is uncertain.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from mlbfgs_jax import mlbfgs

key_of_x, key_of_noise = jax.random.split(jax.random.key(0))
x = jnp.sort(jax.random.uniform(key_of_x, (80, 1), minval=-2, maxval=2), axis=0)
x = jnp.where((x > 0) & (x < 0.8), x - 0.9, x)  # no data between 0 and 0.8
y = jnp.sin(3 * x) + 0.1 * jax.random.normal(key_of_noise, x.shape)


def init(key):
    first, second, third = jax.random.split(key, 3)
    return {
        "hidden": 3 * jax.random.normal(first, (1, 32)),
        "bias": 2 * jax.random.normal(second, (32,)),
        "out": jax.random.normal(third, (32, 1)) / 6,
    }


def predict(params, x):
    return jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"]


steps = 300
tx = mlbfgs(optax.cosine_decay_schedule(0.03, steps))


def train(key):
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((predict(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = init(key)
    (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return params, state[0].pairs[0], losses


models, pairs, losses = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(1), 64))
print("pairs taken by each model:", sorted({int(number) for number in pairs}))

# %%
# On the left are all losses; the noise in the data has a mean square of 0.01. On the right are the models.

grid = jnp.linspace(-2.2, 2.2, 200)[:, None]
curves = jax.vmap(predict, (0, None))(models, grid)[..., 0]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.semilogy(losses.T, color="C0", alpha=0.2, linewidth=1)
left.set(xlabel="step", ylabel="loss")
right.plot(grid, curves.T, color="C0", alpha=0.15, linewidth=1)
right.plot(x, y, "k.", markersize=4)
right.set(xlabel="x", ylabel="y", ylim=(-2, 2))
plt.show()
