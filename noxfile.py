"""Every command that a developer or a CI runs: ``python3 -m nox -s NAME``; ``nox -l`` lists them."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "typing", "build"]

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
# A session imports only a small part of what it installs; that part is compiled when it is first imported.
OPTIONS = ("--no-compile", "-c", str(ROOT / "constraints.txt"))
# Each worker computes on one core, so that the workers do not wait for one another; and JAX takes longer to
# compile what a test runs than to run it.
ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
}
# With these flags a step compiles in a quarter of the time. Other versions of JAX may not know the last one.
OLD_EMITTERS = f"{ONE_CORE['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false"
# A device may wait long for another on a busy machine; JAX takes that for a deadlock in less than a minute.
EIGHT_DEVICES = (
    f"{ONE_CORE['XLA_FLAGS']} --xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# What users of each backend install; the tests say themselves which backends they need.
BACKENDS = {"numpy": "numpy", "array_api_strict": "numpy", "torch": "torch", "jax": "jax"}
# The modules of `benchmarks`, each with its extras, its dependency group, and what it does.
BENCHMARKS = {
    "demo": ("torch", "demo", "train on noisy quadratics and handwritten digits; figures go to demo-output"),
    "tasks": (
        "torch",
        "tasks",
        "tune and train every optimizer on every task: hours, with --short minutes",
    ),
    "claims": ("torch", "claims", "draw figures and tables of the paper's claims; arguments name the pages"),
    "step_cost": (
        "jax,torch",
        "benchmark",
        "time a step next to its floor, PyTorch's optimizers and optax's",
    ),
    "jax_cost": (
        "jax",
        "benchmark",
        "what mlbfgs costs in JAX: compilation, steps, ensembles, next to optax",
    ),
    "array_steps": ("numpy", "benchmark", "time a step in NumPy, or in CuPy with --device cuda"),
    "fit": ("numpy", "benchmark", 'run preset="fit" at constant rates, with and without noise'),
    "line_search": ("jax", "benchmark", "compare L-BFGS with a line search: ours, optax's and SciPy's"),
    "minimize": ("jax,scipy", "benchmark", "compare SciPy's L-BFGS-B with ours on 35 known test functions"),
    "curvature": ("diagnostics,torch", "claims", "draw the curvature found in a network while it trains"),
    "faults": (
        "jax,scipy,torch",
        "benchmark",
        "give every optimizer the same faults, and see what is left",
    ),
    "matrix_cost": (
        "torch",
        "tasks",
        "time a step of the Kronecker preconditioner next to SOAP, and its memory",
    ),
    "sharded_matrices": ("torch", "tasks", "what factors in blocks cost a sharded run in steps"),
    "generalisation": (
        "torch",
        "tasks",
        "what lowers the test loss, and variations of a step; ``report`` only writes the tables",
    ),
    "gpt2": ("torch", "benchmark", "time training steps of GPT-2 on a CUDA GPU"),
    "scaling": ("torch", "benchmark", "measure steps on 1, 2 and 4 processes, and project them to clusters"),
}


def install(session: nox.Session, *packages: str, groups: tuple[str, ...] = ()) -> None:
    """Install packages and dependency groups at the versions of the constraints file."""
    members = nox.project.dependency_groups(PROJECT, *groups) if groups else ()
    session.install(*OPTIONS, *packages, *members)


def pytest(session: nox.Session, *arguments: str, **env: str) -> None:
    """Run pytest with these arguments and then the session's, one core per worker."""
    session.run("pytest", *arguments, *session.posargs, env={**ONE_CORE, **env})


def compiled_once(session: nox.Session) -> dict[str, str]:
    """An environment in which JAX keeps what it compiles, since many tests compile the same steps."""
    return {  # absolute, since tests change the directory
        "JAX_COMPILATION_CACHE_DIR": str(Path(session.create_tmp()).absolute() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_library(session: nox.Session, marks: str) -> None:
    """Run the library's own tests of these marks."""
    install(session, "-e", ".[diagnostics,jax,scipy,torch]", groups=("test", "triton"))
    pytest(session, "-n", "auto", "-m", marks, XLA_FLAGS=OLD_EMITTERS, **compiled_once(session))


@nox.session
def tests(session: nox.Session) -> None:
    """Test on NumPy, array-api-strict, PyTorch and JAX, without a GPU; arguments go to pytest."""
    run_library(session, "not slow")


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that `tests` leaves out because they take long."""
    run_library(session, "slow")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Test the benchmarks, and what the documentation claims with their help."""
    install(session, "-e", ".[jax,scipy,torch]", groups=("test", "tasks"))
    # Each file goes to one worker, since tests of a file share what they have trained.
    pytest(session, "-n", "auto", "--dist", "loadfile", "tests/benchmarks", **compiled_once(session))


def declared(*lines: str) -> Iterator[Requirement]:
    """Requirements as pyproject.toml declares them; one on the package itself stands for its extras."""
    for requirement in map(Requirement, lines):
        if requirement.name != PROJECT["project"]["name"]:
            yield requirement
        for extra in requirement.extras:
            yield from declared(*PROJECT["project"]["optional-dependencies"][extra])


def oldest(requirement: Requirement) -> str:
    """The requirement pinned to its lower bound."""
    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return f"{requirement.name}=={bound}" + (f"; {requirement.marker}" if requirement.marker else "")


def run_alone(session: nox.Session, backend: str, *, minimum: bool) -> None:
    """Install one backend without the constraints file, and run the tests that need no other."""
    extras = f"{BACKENDS[backend]},scipy"
    groups = ("test", "triton") if backend == "torch" else ("test",)
    tools = nox.project.dependency_groups(PROJECT, *groups)
    wanted = declared(*PROJECT["project"]["dependencies"], f"{PROJECT['project']['name']}[{extras}]", *tools)
    session.install("--no-compile", "-e", f".[{extras}]", *map(oldest if minimum else str, wanted))
    pytest(session, "-n", "auto", f"--backends={backend}")


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
    install(session, "-e", ".[torch]", groups=("torch-suite",))
    pytest(session, "-n", "auto", "--confcutdir=tests/torch_suite", "tests/torch_suite")


@nox.session
def optax_suite(session: nox.Session) -> None:
    """Run optax's own tests of its optimizers over mlbfgs, on eight virtual devices."""
    install(session, "-e", ".[jax]", groups=("optax-suite",))
    env = {"XLA_FLAGS": EIGHT_DEVICES, **compiled_once(session)}
    pytest(session, "-n", "auto", "--confcutdir=tests/optax_suite", "tests/optax_suite", **env)


@nox.session
@nox.parametrize("trainer", ["loops", "lightning", "accelerate", "jax"])
def trainers(session: nox.Session, trainer: str) -> None:
    """Train in plain PyTorch loops, in Lightning, in Accelerate; in Flax, Equinox and Orbax."""
    install(session, "-e", ".[jax]" if trainer == "jax" else ".[torch]", groups=(f"trainers-{trainer}",))
    pytest(session, "--confcutdir=tests/trainers", f"tests/trainers/test_{trainer}.py")


@nox.session
def embedding(session: nox.Session) -> None:
    """Test the core inside torchzero, pytorch_optimizer, Optimistix, and Keras on JAX and on PyTorch."""
    install(session, "-e", ".[jax,scipy,torch]", groups=("embedding",))
    path = "tests/embedding"
    env = {"KERAS_HOME": str(Path(session.create_tmp()).absolute()), **compiled_once(session)}
    parallel = ("-n", "auto", "--dist", "loadfile", f"--confcutdir={path}")
    pytest(session, path, *parallel, KERAS_BACKEND="jax", **env)
    pytest(session, f"{path}/test_keras.py", f"--confcutdir={path}", KERAS_BACKEND="torch", **env)


@nox.session
def reliability(session: nox.Session) -> None:
    """Kill runs, fill disks, and train for a long time."""
    install(session, "-e", ".[jax,scipy,torch]", groups=("test",))
    pytest(session, "-n", "auto", "tests/reliability")


@nox.session
def distributed(session: nox.Session) -> None:
    """Train on up to four processes, and on eight virtual devices, as one process does; run the examples."""
    install(session, "-e", ".[jax,torch]", groups=("distributed",))
    # Each file goes to one worker, since tests of a file share what JAX has compiled and what examples wrote.
    pytest(session, "-n", "auto", "--dist", "loadfile", "tests/distributed", XLA_FLAGS=EIGHT_DEVICES)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting, and the workflows."""
    install(session, groups=("lint",))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("zizmor", "--offline", "--quiet", ".github")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the core strictly."""
    install(session, "-e", ".[checkpoint]", groups=("typing",))
    session.run("mypy")


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark: ``-- NAME`` and its own arguments; without a name, list them."""
    name, *arguments = session.posargs or [""]
    if name not in BENCHMARKS:
        for known, (*_, what) in BENCHMARKS.items():
            session.log(f"{known:14} {what}")
        if name:
            session.error(f"`NAME` must be one of these, got {name!r}")
        return
    extras, group, _ = BENCHMARKS[name]
    install(session, "-e", f".[{extras}]", groups=(group,))
    env = ONE_CORE if name in ("claims", "generalisation", "tasks") else {}
    session.run("python", "-m", f"benchmarks.{name}", *arguments, env=env)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site with its gallery in docs/_build/html; a warning is an error."""
    install(session, "-e", ".[diagnostics,jax,scipy,torch]", groups=("docs",))
    options = ("-W", "--keep-going", "-b", "html", *session.posargs)
    session.run("sphinx-build", *options, "docs", "docs/_build/html", env=ONE_CORE)


@nox.session
def build(session: nox.Session) -> None:
    """Build the package and check it; the sdist passes the core's tests, the wheel holds every package.

    ``-- --outdir FOLDER`` keeps what has been built, and ``--tag v0.1.0`` must be its version.
    """
    parser = argparse.ArgumentParser(prog="nox -s build --")
    parser.add_argument("--outdir", type=Path)
    parser.add_argument("--tag")
    options = parser.parse_args(session.posargs)
    version = PROJECT["project"]["version"]
    if options.tag not in (None, f"v{version}"):
        session.error(f"`--tag` must be v{version}, the version in pyproject.toml, got {options.tag}")
    install(session, groups=("release", "test"))
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder, ".")  # the wheel from the sdist
        (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
        session.run("twine", "check", "--strict", str(wheel), str(sdist))
        session.run("check-wheel-contents", str(wheel))
        shutil.unpack_archive(sdist, folder)
        install(session, f"{wheel}[diagnostics,jax,scipy,torch]")
        if options.outdir is not None:
            options.outdir.mkdir(parents=True, exist_ok=True)
            for file in (wheel, sdist):
                shutil.copy(file, options.outdir)
        session.cd(Path(folder) / sdist.name.removesuffix(".tar.gz"))
        pytest(session, "-q", "-n", "auto", "--backends=numpy", "tests/core")
        session.cd(folder)
        names = ("arrays", "core", "cupy", "diagnostics", "jax", "scipy", "torch")
        for package in ("mlbfgs", *(f"mlbfgs_{name}" for name in names)):
            session.run("python", "-P", "-c", f"import {package}; print({package}.__file__)")


@nox.session
def gpu(session: nox.Session) -> None:
    """Test CuPy, PyTorch and JAX on a CUDA GPU; fails where there is none."""
    install(session, "-e", ".[cupy,jax,torch]", "jax[cuda12]", groups=("test",))
    env = {"TRITON_INTERPRET": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    session.run("pytest", "tests/gpu", *session.posargs, env=env)
