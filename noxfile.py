"""Every command that a developer or a CI runs: ``python3 -m nox -s NAME``; ``nox -l`` lists them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "typing", "build"]

# A session imports a small part of what it installs: that is compiled when it is first imported, and kept.
FAST = "--no-compile"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

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
# On a busy machine they wait long for one another, which JAX takes for a deadlock after less than a minute.
EIGHT_DEVICES = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# For each backend alone: the extras that its users install, and tests that import no other framework.
CORE = (
    "tests/core/test_arguments.py",
    "tests/core/test_step.py",
    "tests/properties/test_averages.py",
    "tests/properties/test_inverse_hessian.py",
    "tests/properties/test_pairs.py",
)
NUMPY = (
    "mlbfgs_core",
    "adapters/mlbfgs_arrays",
    "adapters/mlbfgs_scipy",
    "tests/adapters/test_arrays.py",
    "tests/adapters/test_arrays_kernels.py",
    "tests/adapters/test_arrays_parameters.py",
    "tests/adapters/test_scipy.py",
    "tests/core/test_serialization.py",
)
TORCH = ("adapters/mlbfgs_torch", "tests/adapters/test_torch.py", "tests/adapters/test_torch_kernels.py")
JAX = ("adapters/mlbfgs_jax", "tests/adapters/test_jax.py")
BACKENDS = {
    "numpy": ("numpy,scipy", (*CORE, *NUMPY)),
    "array_api_strict": ("scipy", CORE),
    "torch": ("torch,scipy", (*CORE, *TORCH)),
    "jax": ("jax,scipy", (*CORE, *JAX)),
}


def install(session: nox.Session, *packages: str, group: str | None = None) -> None:
    """Install packages and a dependency group at the versions of the constraints file."""
    members = nox.project.dependency_groups(GROUPS, group) if group else ()
    session.install(FAST, *CONSTRAINTS, *packages, *members)


@nox.session
def tests(session: nox.Session) -> None:
    """Test on NumPy, array-api-strict, PyTorch and JAX, without a GPU; arguments go to pytest."""
    others = nox.project.dependency_groups(GROUPS, "tasks", "triton")
    install(session, "-e", ".[jax,scipy,torch]", *others, group="test")
    session.run("pytest", "-n", "auto", *session.posargs, env={**ONE_CORE, **compiled_once(session)})


def compiled_once(session: nox.Session) -> dict[str, str]:
    """An environment in which JAX keeps what it compiles, since many tests compile the same steps."""
    return {  # absolute, since tests change the directory
        "JAX_COMPILATION_CACHE_DIR": str(Path(session.create_tmp()).absolute() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def declared(*lines: str) -> Iterator[Requirement]:
    """Requirements as pyproject.toml declares them; those on the package itself are of its extras."""
    for requirement in map(Requirement, lines):
        if requirement.name != GROUPS["project"]["name"]:
            yield requirement
        for extra in requirement.extras:
            yield from declared(*GROUPS["project"]["optional-dependencies"][extra])


def oldest(requirement: Requirement) -> str:
    """The requirement pinned to its lower bound."""
    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return f"{requirement.name}=={bound}" + (f"; {requirement.marker}" if requirement.marker else "")


def run_alone(session: nox.Session, backend: str, *, minimum: bool) -> None:
    """Install one backend without the constraints file, and run its tests."""
    extras, paths = BACKENDS[backend]
    package = f"{GROUPS['project']['name']}[{extras}]"
    groups = ("test", "triton") if backend == "torch" else ("test",)
    tools = [
        line for line in nox.project.dependency_groups(GROUPS, *groups) if Requirement(line).name != "torch"
    ]
    wanted = declared(*GROUPS["project"]["dependencies"], package, *tools)
    session.install(FAST, "-e", f".[{extras}]", *(map(oldest, wanted) if minimum else map(str, wanted)))
    session.run("pytest", "-n", "auto", f"--backends={backend}", *paths, *session.posargs, env=ONE_CORE)


@nox.session
@nox.parametrize("backend", list(BACKENDS))
def minimums(session: nox.Session, backend: str) -> None:
    """Test each backend alone, with the oldest versions that pyproject.toml allows."""
    run_alone(session, backend, minimum=True)


@nox.session
@nox.parametrize("backend", list(BACKENDS))
def newest(session: nox.Session, backend: str) -> None:
    """Test each backend alone, with the newest versions that there are."""
    run_alone(session, backend, minimum=False)


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
    path = "tests/optax_suite"
    env = {
        **ONE_CORE,
        "XLA_FLAGS": f"{ONE_CORE['XLA_FLAGS']} {EIGHT_DEVICES}",
        **compiled_once(session),
    }
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
def embedding(session: nox.Session) -> None:
    """Test the core inside torchzero, pytorch_optimizer, Optimistix, and Keras on JAX and on PyTorch."""
    install(session, "-e", ".[jax,scipy,torch]", group="embedding")
    path = "tests/embedding"
    env = {
        **ONE_CORE,
        "KERAS_HOME": str(Path(session.create_tmp()).absolute()),
        **compiled_once(session),
    }
    options = (f"--confcutdir={path}", *session.posargs)
    parallel = ("-n", "auto", "--dist", "loadfile")
    session.run("pytest", path, *parallel, *options, env={**env, "KERAS_BACKEND": "jax"})
    session.run("pytest", f"{path}/test_keras.py", *options, env={**env, "KERAS_BACKEND": "torch"})


@nox.session
def reliability(session: nox.Session) -> None:
    """Kill runs, fill disks, run for long, and give other optimizers the same faults."""
    install(session, "-e", ".[jax,scipy,torch]", group="test")
    session.run("pytest", "-n", "auto", "tests/reliability", *session.posargs, env=ONE_CORE)


@nox.session
def distributed(session: nox.Session) -> None:
    """Train on up to four processes, and on eight virtual devices, as one process does; run the examples."""
    install(session, "-e", ".[jax,torch]", group="distributed")
    env = {**ONE_CORE, "XLA_FLAGS": f"{ONE_CORE['XLA_FLAGS']} {EIGHT_DEVICES}"}
    # A file to a worker, since tests of a file share what JAX has compiled and what an example has left.
    session.run("pytest", "-n", "auto", "--dist", "loadfile", "tests/distributed", *session.posargs, env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, group="lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the core strictly."""
    install(session, "-e", ".[checkpoint]", group="typing")
    session.run("mypy")


@nox.session
def demo(session: nox.Session) -> None:
    """Train on noisy quadratics and handwritten digits; print tables, write figures to demo-output."""
    install(session, ".[demo]")
    session.run("python", "-m", "benchmarks.demo", *session.posargs)


@nox.session
def benchmark(session: nox.Session) -> None:
    """Tune and train all optimizers on all tasks, for hours; ``-- --short``: for minutes, no docs."""
    install(session, ".[torch]", group="tasks")
    session.run("python", "-m", "benchmarks.tasks", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def step_cost(session: nox.Session) -> None:
    """Time steps against their floor, PyTorch's optimizers and optax's; arguments go to the first script."""
    install(session, ".[jax,torch]", group="benchmark")
    session.run("python", "benchmarks/step_cost.py", *session.posargs)
    session.run("python", "benchmarks/array_steps.py")


@nox.session
def claims(session: nox.Session) -> None:
    """Write the figures and tables of the pages on the paper's claims; arguments name the pages."""
    install(session, ".[torch]", group="claims")
    session.run("python", "-m", "benchmarks.claims", *session.posargs, env=ONE_CORE)


@nox.session
def line_search(session: nox.Session) -> None:
    """Compare L-BFGS with a line search: ours, optax's and SciPy's."""
    install(session, ".[jax]", group="benchmark")
    session.run("python", "benchmarks/line_search.py", *session.posargs)


@nox.session
def minimize(session: nox.Session) -> None:
    """Compare SciPy's L-BFGS-B with ours on the test functions of More, Garbow and Hillstrom."""
    install(session, ".[jax,scipy]", group="benchmark")
    session.run("python", "-m", "benchmarks.minimize", *session.posargs)


@nox.session
def curvature(session: nox.Session) -> None:
    """Draw the curvature found in a network while it trains, for the page on diagnostics."""
    install(session, ".[diagnostics,torch]", "scikit-learn")
    session.run("python", "benchmarks/curvature.py", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Give the same faults to every optimizer, and print what is left of the runs."""
    install(session, ".[jax,scipy,torch]", group="benchmark")
    session.run("python", "benchmarks/faults.py", *session.posargs)


@nox.session
def scaling(session: nox.Session) -> None:
    """Measure steps on 1, 2 and 4 processes, and project them to clusters; arguments go to the script."""
    install(session, ".[torch]", group="benchmark")
    session.run("python", "-m", "benchmarks.scaling", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site with its gallery in docs/_build/html; a warning is an error."""
    install(session, "-e", ".[diagnostics,jax,scipy,torch]", group="docs")
    options = ("-W", "--keep-going", "-b", "html", *session.posargs)
    session.run("sphinx-build", *options, "docs", "docs/_build/html", env=ONE_CORE)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel, install it elsewhere, and import every package from there."""
    session.install("build")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder, ".")
        (wheel,) = Path(folder).glob("*.whl")
        install(session, f"{wheel}[diagnostics,jax,scipy,torch]")
        session.cd(folder)
        names = ("arrays", "core", "cupy", "diagnostics", "jax", "scipy", "torch")
        for package in ("mlbfgs", *(f"mlbfgs_{name}" for name in names)):
            session.run("python", "-P", "-c", f"import {package}; print({package}.__file__)")


@nox.session
def gpu(session: nox.Session) -> None:
    """Test CuPy, PyTorch and JAX on a CUDA GPU; fails where there is none."""
    install(session, "-e", ".[cupy,jax,torch]", "jax[cuda12]", group="test")
    env = {"TRITON_INTERPRET": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    session.run("pytest", "tests/gpu", *session.posargs, env=env)
