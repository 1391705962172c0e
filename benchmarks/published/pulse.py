"""Repeat a published result: at learning rates of RL, bf16 shows 1 % of the updates.

    python -m benchmarks.published.pulse       # a minute, from the root of the repository

Miahi and Belilovsky (PULSE, arXiv 2602.03839) report that per step about 99 % of the weights of
language models of 0.5 to 7 B parameters are bit-identical after the cast to bf16, at learning rates
around 1e-6. Here, a character transformer of 0.6 M parameters is trained as usual, and then with
AdamW at three small learning rates. The share of invisible updates is found in three ways:

- by casting the weights before and after a step, and comparing;
- by the figure `visible_frac` of the step in fp32;
- by the mean of 1 − min(1, abs(update) / spacing). The minimum is the chance that an update crosses
  the edge of a rounding interval, for a weight that lies anywhere in it.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn
from torch.utils.data import DataLoader

from altgrad import OptimizerStep, StepObserver, measure, spacing
from altgrad_lightning.demo_model import CharacterTransformer, Windows, standard_library_text
from benchmarks.paired import Target, print_table, print_targets
from examples.predict_and_confirm import Batch, loss_and_accuracy

EXPECTED = {1e-6: 0.991, 3e-6: 0.979, 1e-5: 0.948}
"""Share of invisible updates by learning rate, from an earlier run with another model and seed."""
TOLERANCE = 0.01
Shares = tuple[float, float, float]
"""Share of invisible updates: by casting, by the figure, and by the mean chance."""


def invisible(step: OptimizerStep) -> Shares:
    """Return, in three ways, the share of updates other than 0 that are invisible in bf16.

    An update is invisible if the weight rounds to the same bf16 number before and after it.
    """
    before = torch.cat([w.flatten() for w in step.before])
    after = torch.cat([w.flatten() for w in step.after])
    moved = before != after
    before, after = before[moved], after[moved]
    cast = (before.bfloat16() == after.bfloat16()).double().mean().item()
    by_figure = 1 - measure(before, after, formats="bf16")["visible_frac/bf16"]
    chance = ((after - before).double().abs() / spacing(before, "bf16").double()).clamp(max=1)
    return cast, by_figure, 1 - chance.mean().item()


def measured(pretraining: int, steps: int) -> dict[float, Shares]:
    """Return the shares of invisible updates by learning rate, as means over steps.

    Args:
        pretraining: Number of steps at 1e-3 before.
        steps: Number of steps at each learning rate; the second half counts.
    """
    batches = draw_batches(pretraining + steps)
    torch.manual_seed(0)
    net = CharacterTransformer()
    train(net, torch.optim.AdamW(net.parameters(), lr=1e-3), batches[:pretraining])
    start = {name: p.detach().clone() for name, p in net.state_dict().items()}
    shares: dict[float, Shares] = {}
    for lr in EXPECTED:
        net.load_state_dict(start)
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        seen: list[Shares] = []
        with StepObserver(net, lambda step, seen=seen: seen.append(invisible(step))).attach(
            optimizer
        ):
            train(net, optimizer, batches[pretraining:])
        late = seen[len(seen) // 2 :]  # by then, the moments of Adam have settled
        shares[lr] = tuple(statistics.fmean(each) for each in zip(*late, strict=True))  # type: ignore[assignment]
    return shares


def draw_batches(count: int) -> list[Batch]:
    """Return batches of 16 pieces of Python's source, and the next character of each one."""
    text = standard_library_text()
    torch.manual_seed(0)
    windows = DataLoader(Windows(text[: len(text) * 9 // 10], count * 16), batch_size=16)
    return [(batch[:, :-1], batch[:, 1:]) for batch in windows]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_and_accuracy(net, batch)[0].backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pretraining", type=int, default=300, help="steps at 1e-3 before")
    parser.add_argument("--steps", type=int, default=40, help="at each learning rate")
    arguments = parser.parse_args()
    shares = measured(arguments.pretraining, arguments.steps)
    print_table(
        ("learning rate", "invisible after the cast", "1 - visible_frac", "1 - E[min(1, u/S)]"),
        [(f"{lr:g}", *(f"{x:.2%}" for x in each)) for lr, each in shares.items()],
    )
    print_targets(
        [
            Target(f"{EXPECTED[lr]:.1%} at {lr:g}", abs(each[0] - EXPECTED[lr]), TOLERANCE)
            for lr, each in shares.items()
        ],
        ".4f",
    )


if __name__ == "__main__":
    main()
