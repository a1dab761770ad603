"""Every command that a developer or a CI runs: ``python3 -m nox -s NAME``; ``nox -l`` lists them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "typing", "build"]

ROOT = Path(__file__).parent
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
CONSTRAINTS = ("-c", str(ROOT / "constraints.txt"))
# Each worker computes on one core, so that the workers do not wait for one another; and JAX takes longer to
# compile what a test runs than to run it.
ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
}


def install(session: nox.Session, *packages: str, group: str | None = None) -> None:
    """Install packages and a dependency group at the versions of the constraints file."""
    members = nox.project.dependency_groups(GROUPS, group) if group else ()
    session.install(*CONSTRAINTS, *packages, *members)


@nox.session
def tests(session: nox.Session) -> None:
    """Test on NumPy, array-api-strict, PyTorch and JAX, without a GPU; arguments go to pytest."""
    install(session, "-e", ".[jax,torch]", group="test")
    session.run("pytest", "-n", "auto", *session.posargs, env=ONE_CORE)


@nox.session
def torch_suite(session: nox.Session) -> None:
    """Hold MLBFGS to what PyTorch's own tests ask of its optimizers, with their generators."""
    install(session, "-e", ".[torch]", group="torch-suite")
    session.run(
        "pytest",
        "-n",
        "auto",
        "--confcutdir=tests/torch_suite",
        "tests/torch_suite",
        *session.posargs,
        env=ONE_CORE,
    )


@nox.session
def optax_suite(session: nox.Session) -> None:
    """Run optax's own tests of its optimizers over mlbfgs, on eight virtual devices."""
    install(session, "-e", ".[jax]", group="optax-suite")
    flags = f"{ONE_CORE['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    path = "tests/optax_suite"
    env = {**ONE_CORE, "XLA_FLAGS": flags}
    session.run("pytest", "-n", "auto", f"--confcutdir={path}", path, *session.posargs, env=env)


@nox.session
@nox.parametrize("trainer", ["loops", "lightning", "accelerate", "jax"])
def trainers(session: nox.Session, trainer: str) -> None:
    """Train in plain PyTorch loops, in Lightning, in Accelerate; in Flax, Equinox and Orbax."""
    extra = "jax" if trainer == "jax" else "torch"
    install(session, "-e", f".[{extra}]", group=f"trainers-{trainer}")
    path = f"tests/trainers/test_{trainer}.py"
    session.run("pytest", "--confcutdir=tests/trainers", path, *session.posargs, env=ONE_CORE)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, group="lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the core strictly."""
    install(session, "-e", ".", group="typing")
    session.run("mypy")


@nox.session
def demo(session: nox.Session) -> None:
    """Train on noisy quadratics and handwritten digits; print tables, write figures to demo-output."""
    install(session, ".[demo]")
    session.run("python", "benchmarks/demo.py", *session.posargs)


@nox.session
def benchmark(session: nox.Session) -> None:
    """Time steps against their floor, PyTorch's optimizers and optax's; arguments go to the script."""
    install(session, ".[jax,torch]", group="benchmark")
    session.run("python", "benchmarks/step_cost.py", *session.posargs)


@nox.session
def line_search(session: nox.Session) -> None:
    """Compare L-BFGS with a line search: ours, optax's and SciPy's."""
    install(session, ".[jax]", group="benchmark")
    session.run("python", "benchmarks/line_search.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel, install it elsewhere, and import every package from there."""
    session.install("build")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder, ".")
        (wheel,) = Path(folder).glob("*.whl")
        install(session, f"{wheel}[jax,torch]")
        session.cd(folder)
        for package in ("mlbfgs_core", "mlbfgs_jax", "mlbfgs_torch"):
            session.run("python", "-P", "-c", f"import {package}; print({package}.__file__)")


@nox.session
def gpu(session: nox.Session) -> None:
    """Test on a CUDA GPU; fails where there is none."""
    install(session, "-e", ".[jax,torch]", group="test")
    session.run("pytest", "tests/gpu", *session.posargs)
