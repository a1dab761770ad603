"""Time whole training steps of GPT-2 (124 million parameters) on one GPU, with each optimizer in turn.

Forward and backward pass run under bfloat16 autocast on random tokens; parameters, gradients and the
optimizers' memory are float32. The optimizers take turns, window by window, with a loop that has no
optimizer; "share" is the part of the whole step that the optimizer adds to that loop.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mlbfgs_torch import MLBFGS

VOCABULARY, CONTEXT, WIDTH, HEADS, DEPTH = 50257, 1024, 768, 12, 12
PLAIN = "no optimizer"
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Any]] = {
    "AdamW, fused": lambda params: AdamW(params, lr=1e-4, fused=True),
    "AdamW, foreach": lambda params: AdamW(params, lr=1e-4, foreach=True),
    "mL-BFGS": lambda params: MLBFGS(params, lr=1e-4),
    "mL-BFGS, bfloat16 history": lambda params: MLBFGS(params, lr=1e-4, history_dtype="bfloat16"),
}


class GPT2(nn.Module):
    """Causal pre-norm transformer whose head is its embedding (Radford et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(WIDTH)
        self.layers = nn.TransformerEncoder(layer, DEPTH, norm, enable_nested_tensor=False)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Mean cross-entropy of each next token, for codes of shape (batch, `CONTEXT` + 1)."""
        places = torch.arange(CONTEXT, device=codes.device)
        x = self.tokens(codes[:, :-1]) + self.places(places)
        logits = self.layers(x, mask=self.mask, is_causal=True) @ self.tokens.weight.t()
        return nn.functional.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())


class Training:
    """A model and its optimizer, which may be none."""

    def __init__(self, name: str, batch: int) -> None:
        torch.manual_seed(0)
        self.model = GPT2().cuda()
        self.codes = torch.randint(VOCABULARY, (batch, CONTEXT + 1), device="cuda")
        self.optimizer = OPTIMIZERS[name](self.model.parameters()) if name in OPTIMIZERS else None

    def window(self, steps: int) -> float:
        """Mean milliseconds of a step; the host may run ahead of the device within the window."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast("cuda", torch.bfloat16):
                loss = self.model(self.codes)
            self.model.zero_grad()
            loss.backward()
            if self.optimizer is not None:
                self.optimizer.step()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / steps


def report(batches: list[int], steps: int, repeats: int) -> Iterator[str]:
    """The table, line by line."""
    yield f"GPT-2, 124M parameters, {torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    yield f"{'':28}{'tokens':>8}{'ms/step':>9}{'spread':>16}{'optimizer ms':>14}{'share':>7}{'x AdamW':>9}"
    for batch in batches:
        trainings = {name: Training(name, batch) for name in (PLAIN, *OPTIMIZERS)}
        times: dict[str, list[float]] = {name: [] for name in trainings}
        for training in trainings.values():
            training.window(20)  # allocates memory and fills the history
        for _ in range(repeats):
            for name, training in trainings.items():
                times[name].append(training.window(steps))
        middle = {name: statistics.median(values) for name, values in times.items()}
        for name, values in times.items():
            added, spread = middle[name] - middle[PLAIN], f"{min(values):.1f}-{max(values):.1f}"
            yield (
                f"{name:28}{batch * CONTEXT:8,}{middle[name]:9.1f}{spread:>16}{added:14.1f}"
                f"{added / middle[name]:7.0%}{middle[name] / middle['AdamW, fused']:9.2f}"
            )
        del trainings, training


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="sequences in a step")
    parser.add_argument("--steps", type=int, default=20, help="steps in a window")
    parser.add_argument("--repeats", type=int, default=3, help="windows for each row")
    options = parser.parse_args()
    for line in report(options.batch, options.steps, options.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
