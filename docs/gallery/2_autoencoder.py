"""
An autoencoder against AdamW
============================

The handwritten digits of scikit-learn pass through a bottleneck of eight numbers, in batches of 256. Each
optimizer gets four learning rates, and its best one counts.
"""

import time
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from mlbfgs_torch import MLBFGS

torch.set_num_threads(1)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
sizes = (64, 96, 32, 8, 32, 96, 64)


def build():
    torch.manual_seed(0)
    layers = []
    for wide, narrow in pairwise(sizes):
        layers += [torch.nn.Linear(wide, narrow), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1], torch.nn.Sigmoid())


def train(make_optimizer, steps=500):
    """Losses on all images, and seconds spent in training, every 20 steps."""
    model = build()
    optimizer = make_optimizer(model.named_parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    batches = torch.Generator().manual_seed(0)
    losses, seconds, spent = [], [], 0.0
    for step in range(steps):
        begin = time.perf_counter()
        batch = images[torch.randint(len(images), (256,), generator=batches)]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(batch), batch).backward()
        optimizer.step()
        schedule.step()
        spent += time.perf_counter() - begin
        if step % 20 == 19:
            with torch.no_grad():
                losses.append(float(torch.nn.functional.mse_loss(model(images), images)))
            seconds.append(spent)
    return losses, seconds


# %%
# All rates are tried, so that no optimizer is held back by a bad one.

best = {}
for name, method, rates in (
    ("mL-BFGS", MLBFGS, (3e-4, 1e-3, 3e-3, 1e-2)),
    ("AdamW", torch.optim.AdamW, (3e-3, 1e-2, 3e-2, 1e-1)),
):
    runs = {rate: train(partial(method, lr=rate)) for rate in rates}
    told = [f"lr {rate:g}: {losses[-1]:.4f}" for rate, (losses, _) in runs.items()]
    print(f"{name:8s}", ", ".join(told))
    best[name] = min(runs.values(), key=lambda run: run[0][-1])

# %%
# The losses over steps and over time. This model is small, so a step of mL-BFGS takes longer than the model's
# own forward and backward passes: measured by time, this is the best case for AdamW.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
over_steps, over_time = axes
for name, (losses, seconds) in best.items():
    over_steps.semilogy(range(20, 20 * len(losses) + 1, 20), losses, label=name)
    over_time.semilogy(seconds, losses, label=name)
over_steps.set(xlabel="step", ylabel="loss")
over_time.set(xlabel="seconds")
over_steps.legend()
plt.show()
