"""The examples run from end to end under `torchrun`, and survive what happens to jobs on a cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

LAUNCHER = Path(__file__).with_name("example_launcher.py")
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TIMEOUT = 120.0
VALIDATION_IMAGES = 21  # an odd number, so that the sampler of two ranks repeats one


def launch(ranks: int, example: str, *options: object, **faults: int) -> subprocess.CompletedProcess[str]:
    """Run an example to its end."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *torchrun, str(LAUNCHER), str(EXAMPLES / example), *map(str, options)]
    limits = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **limits, **{name: str(value) for name, value in faults.items()}}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks too
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def finish(ranks: int, example: str, *options: object, **faults: int) -> str:
    """Run an example that must succeed; what it printed."""
    done = launch(ranks, example, *options, **faults)
    assert done.returncode == 0, done.stdout
    return done.stdout


def figures(output: str, name: str) -> dict[int, float]:
    """The values that were printed under a name, by the number of the step or epoch."""
    found = re.findall(rf"^(?:step|epoch) (\d+)  (?:.*  )?{name} (\S+)", output, flags=re.MULTILINE)
    return {int(step): float(value) for step, value in found}


def pairs(output: str) -> int:
    """The number of curvature pairs in the last line of diagnostics."""
    return int(
        re.findall(r"^step \d+  pairs (\d+)  .*  skipped steps 0  cosine 0\.", output, re.MULTILINE)[-1]
    )


def newest(checkpoints: Path) -> Path:
    return checkpoints / (checkpoints / "latest").read_text()


def read(checkpoints: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint by its path."""
    file = checkpoints / "whole.pt"
    dcp_to_torch_save(newest(checkpoints), file)
    return dict(tensors(torch.load(file, weights_only=False)))


def tensors(tree: object, path: str = ""):
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from tensors(value, f"{path}/{name}")


# ImageNet


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noisy images of three colours, a class each."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 24), ("val", VALIDATION_IMAGES // 3)):
        for channel in range(3):
            (folder / part / f"class{channel}").mkdir(parents=True)
            for number in range(count):
                pixels = generator.normal(60.0, 40.0, (32, 32, 3))
                pixels[:, :, channel] += 120.0
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / part / f"class{channel}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def imagenet(images):
    """The options of a run of two epochs of nine steps."""
    shape = ["--model", "small", "--image-size", 32, "--epochs", 2, "--warmup-epochs", 0.5]
    run = ["--batch-size", 8, "--workers", 0, "--log-every", 1, "--save-every", 7, "--diagnostics-every", 6]
    return ["imagenet_resnet50.py", "--data", images, *shape, *run, "--set", "update_every=4"]


@pytest.fixture(scope="module")
def uninterrupted(imagenet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, finish(2, *imagenet, "--checkpoints", folder)


@pytest.fixture(scope="module")
def killed(imagenet, tmp_path_factory):
    """A folder that a run has left whose ranks were killed in their second checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    done = launch(2, *imagenet, "--checkpoints", folder, KILLED_IN_SAVE=2)
    assert done.returncode != 0
    assert "SIGKILL" in done.stdout
    return folder


def test_imagenet_run_learns_and_counts_each_validation_image_once(uninterrupted):
    _, output = uninterrupted
    losses = figures(output, "loss")
    assert len(losses) == 18
    first, last = ([losses[step] for step in steps] for steps in (range(1, 4), range(14, 19)))
    assert np.mean(last) < 0.75 * np.mean(first)
    top1, top5 = figures(output, "val top-1"), figures(output, "val top-5")
    assert top1.keys() == top5.keys() == {1, 2}
    assert top1[2] > 0.6
    assert set(top5.values()) == {1.0}  # of three classes; with a repeated image it would be 22 / 21
    assert re.search(
        r"^step 6  pairs \d+  rejected \d+  skipped steps 0  cosine 0\.\d+$", output, re.MULTILINE
    )
    assert f"finished after 18 steps with a top-1 accuracy of {top1[2]:.2%}" in output


def test_a_run_killed_in_a_save_and_resumed_ends_with_the_same_bits(
    imagenet, uninterrupted, killed, tmp_path
):
    assert {path.name for path in killed.glob("step-*")} == {"step-000000007", "step-000000009"}
    assert newest(killed).name == "step-000000007"
    resumed = shutil.copytree(killed, tmp_path / "resumed")
    output = finish(2, *imagenet, "--checkpoints", resumed, "--resume")
    assert "resumed at step 7 of 18" in output
    assert {path.name for path in resumed.glob("step-*")} == {"step-000000014", "step-000000018"}
    expected, actual = read(uninterrupted[0]), read(resumed)
    kinds = ("conv1.weight", "running_mean", "history", "counters")
    assert all(any(kind in path for path in expected) for kind in kinds), "not all of the run was read"
    assert expected.keys() == actual.keys()
    different = [path for path, value in expected.items() if not torch.equal(value, actual[path])]
    assert different == []


def test_a_run_goes_on_sharded_and_then_on_one_rank(imagenet, killed, tmp_path):
    folder, twin = (shutil.copytree(killed, tmp_path / name) for name in ("moved", "replicated"))
    options, bfloat16 = [*imagenet, "--checkpoints", folder, "--resume"], ["--amp", "bf16", "--stop-after", 9]
    output = finish(2, *options, "--parallel", "fsdp2", *bfloat16)
    replicated = finish(2, *imagenet, "--checkpoints", twin, "--resume", *bfloat16)
    losses = figures(output, "loss")
    assert losses.keys() == {8, 9}
    assert losses == pytest.approx(figures(replicated, "loss"), rel=5e-3)  # each rounds to bfloat16 elsewhere
    assert newest(folder).name == "step-000000009"
    output = finish(1, *options)
    assert "resumed at step 9 of 18" in output
    assert figures(output, "loss").keys() == set(range(10, 19))
    assert "finished after 18 steps" in output


# Language model

SMALL = ["--layers", 2, "--width", 32, "--heads", 2, "--context", 32, "--batch-size", 8]
RUN = ["--steps", 40, "--warmup", 4, "--log-every", 4, "--evaluate-every", 40, "--clip", 1]
RUN += ["--set", "update_every=8"]
BYTES = ["language_model.py", *SMALL, *RUN, "--dtype", "bfloat16"]


def test_language_model_learns_and_goes_on_after_sigterm_on_another_number_of_ranks(tmp_path):
    whole = finish(2, *BYTES, "--checkpoints", tmp_path / "whole")
    validation = figures(whole, "val loss")
    assert validation[0] == pytest.approx(np.log(256), abs=0.2)
    assert validation[40] < validation[0] - 1.5
    folder = tmp_path / "stopped"
    output = finish(2, *BYTES, "--checkpoints", folder, TERMINATED_AFTER=18)
    assert "stopped after step 20" in output
    assert newest(folder).name == "step-000000020"
    output = finish(1, *BYTES, "--checkpoints", folder, "--resume", "--offload")
    assert "resumed at step 20 of 40" in output
    losses = {step: loss for step, loss in figures(whole, "loss").items() if step > 20}
    assert len(losses) == 5
    assert figures(output, "loss") == pytest.approx(losses, rel=5e-3)  # sums in another order, in bfloat16
    assert pairs(output) == pairs(whole) > 3
