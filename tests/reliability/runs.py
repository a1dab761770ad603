"""What a process trains and saves until it is killed."""

from __future__ import annotations

import os
import signal

import numpy as np

from tests.drivers import DRIVERS

SHAPES = {"weight": (60, 40), "bias": (40,), "scale": ()}


def start():
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), dtype=np.float32) for name, shape in SHAPES.items()}


def gradients(step, values):
    """Of a noisy quadratic; the noise is that of the step, and now and then there is a NaN."""
    rng = np.random.default_rng([1, step])
    grads = []
    for value in values:
        curvature = np.linspace(0.5, 3.0, value.size, dtype=value.dtype).reshape(value.shape)
        grads.append(curvature * value + np.asarray(0.01 * rng.normal(size=value.shape), dtype=value.dtype))
    if step % 13 == 6:
        grads[0].flat[step % grads[0].size] = np.nan
    return grads


def begin(kind, preconditioner="diagonal"):
    """A small network's worth of parameters, and a pair at almost every check."""
    return DRIVERS[kind](start(), check_every=1, update_every=4, preconditioner=preconditioner)


def done(driver):
    """Steps ever, skipped ones included: where the data stands."""
    return sum(driver.counts()[:2])


def step(driver, count):
    driver.step(gradients(count, driver.values()))


def live(kind, preconditioner, path, connection):
    """Resume if there is a file; train and save after every step, until killed."""
    driver = begin(kind, preconditioner)
    if path.exists():
        driver.load(path)
    count = done(driver)
    while True:
        step(driver, count)
        count += 1
        driver.save(path)
        connection.send(count)


def die_while_saving(kind, path, stage):
    """Resume, take a step, and be killed at a stage of saving it."""
    driver = begin(kind)
    driver.load(path)
    step(driver, done(driver))

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    owner, name = stage
    module = __import__(owner, fromlist=["_"])
    *parents, name = name.split(".")
    for parent in parents:
        module = getattr(module, parent)
    setattr(module, name, die)
    driver.save(path)
