"""Time what AltGrad and other tools add to a training step.

    python benchmarks/training_step.py [--quick] [--threads N] [--tokens 32 1024]

With numba installed, the native kernel measures; `ALTGRAD_KERNEL=eager` in front shows the step
without it.

The model is a GPT of 10.1 M parameters in 100 tensors, float32, with AdamW and random tokens. Each
variant trains its own copy of it, from the same state on the same tokens, and observes every step,
without twins. A round steps each variant once, in a new order. At the end, all copies must have the
same weights, bit for bit.

- **floor**: the least that it can cost to cover all elements. Before the step, weights and
  gradients are copied to buffers that are reused. After it come the difference of the weights,
  three norms for each tensor, and one copy to the host.
- **Lightning**: `grad_norm` and a CSV logger, without the Trainer that normally calls them.
- **twins**: a monitor that steps twins at every step, and observes the first step alone. Twins are
  paired with plain steps in rounds of their own.
- **wandb**: `watch(log="all")` and a `log` at each step, offline. It works in the background, and
  would slow other variants: it is paired with a plain step alone. Left out if not installed.

The script also counts, for one step of each variant, the tensor operations that torch dispatches (a
foreach function is one) and the copies to the host, less those of a plain step. These counts do not
depend on the machine.
"""

# ruff: noqa: SLF001 - torch has no public foreach functions

from __future__ import annotations

import copy
import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from gpt import VOCABULARY, Gpt
from paired import (
    Quartiles,
    Seconds,
    Target,
    counting,
    paired_steps,
    parse_with_threads,
    prepare_kernel,
    print_environment,
    print_table,
    print_targets,
    quartiles,
    ratios,
    script_arguments,
    time_calls,
    write_json,
)
from torch import Tensor, nn
from torch.nn import functional

from altgrad import UpdateMonitor

FORMATS = ("e4m3fn", "e5m2", "fp16", "bf16")
SAMPLES = (1_024, 2_048, 4_096)
DEFAULT_SAMPLE = inspect.signature(UpdateMonitor).parameters["max_elements"].default
SHAPES = {32: (1, 32), 1_024: (4, 256), 2_048: (8, 256)}  # tokens in a step: (batch, context)
QUICK_LIMIT = 1_024  # tokens
ROUNDS = {32: 60, 1_024: 20, 2_048: 12}

PLAIN = "plain step"
FLOOR = "floor: copies, difference, 3 norms"
FULL = "altgrad, all elements"
LIGHTNING = "Lightning grad_norm, CSV logger"
TWINS = {
    "twins of five recipes": ("bf16", "bf16-sr", "bf16-kahan", "bf16-true", "e4m3fn-sr"),
    "twins of the default recipes": None,
}
WANDB = 'wandb.watch(log="all"), offline'


TWIN_DEMANDS = ((32, 1.06), (1_024, 1.01))  # tokens, and the largest ratio to a plain step

Add = Callable[["Training", ExitStack], None]
"""Function that adds a variant to a training, and to the stack what has to be closed at the end."""


class Row(NamedTuple):
    """The steps of one variant at one batch size: median time, and ratio to a plain step."""

    tokens: int
    variant: str
    rounds: int
    milliseconds: float
    ratio: Quartiles


class Training:
    """A copy of the model in training, with functions of a variant before and after each step.

    Args:
        model: The model to copy.
        shape: Number of texts in a batch, and of tokens in a text.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int]) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.before_step: Callable[[], object] = lambda: None
        self.after_step: Callable[[Tensor], object] = lambda _loss: None
        self._shape = shape
        self._generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        batch, context = self._shape
        tokens = torch.randint(VOCABULARY, (batch, context + 1), generator=self._generator)
        logits = self.model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.before_step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_step(loss)


def monitored(max_elements: int | None) -> Add:
    def add(training: Training, stack: ExitStack) -> None:
        monitor = UpdateMonitor(
            training.model,
            formats=FORMATS,
            every_n_steps=1,
            max_elements=max_elements,
            recipes=(),
            strict=True,  # else an error would end the observation, which would then cost nothing
        )
        stack.enter_context(monitor.attach(training.optimizer))

    return add


def step_twins(recipes: tuple[str, ...] | None) -> Add:
    def add(training: Training, stack: ExitStack) -> None:
        monitor = UpdateMonitor(
            training.model,
            every_n_steps=lambda index: index == 0,
            recipes=recipes,
            strict=True,
        )
        stack.enter_context(monitor.attach(training.optimizer))

    return add


def add_nothing(_training: Training, _stack: ExitStack) -> None:
    pass


def add_floor(training: Training, _stack: ExitStack) -> None:
    weights = [p.detach() for p in training.model.parameters()]
    kept_weights = [torch.empty_like(p) for p in weights]
    kept_gradients = [torch.empty_like(p) for p in weights]

    def before_step() -> None:
        gradients = [p.grad for p in training.model.parameters()]
        torch._foreach_copy_(kept_weights, weights)
        torch._foreach_copy_(kept_gradients, gradients)

    def after_step(_loss: Tensor) -> None:
        norms = [*torch._foreach_norm(kept_weights), *torch._foreach_norm(kept_gradients)]
        torch._foreach_sub_(kept_weights, weights)
        torch.stack([*norms, *torch._foreach_norm(kept_weights)]).tolist()

    training.before_step, training.after_step = before_step, after_step


def add_lightning(training: Training, stack: ExitStack) -> None:
    from pytorch_lightning.loggers import CSVLogger
    from pytorch_lightning.utilities import grad_norm

    logger = CSVLogger(stack.enter_context(tempfile.TemporaryDirectory()))
    training.before_step = lambda: logger.log_metrics(grad_norm(training.model, norm_type=2))


def add_wandb(training: Training, stack: ExitStack) -> None:
    import wandb

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
    stack.callback(run.finish)
    run.watch(training.model, log="all", log_freq=1)
    training.after_step = lambda loss: run.log({"loss": loss.item()})


def sampled(elements: int) -> str:
    return f"altgrad, {elements:,} of each"


def make_groups() -> list[dict[str, Add]]:
    """Return the functions that add each variant, in groups that are timed one after the other.

    Each group has a plain step.
    """
    group = {PLAIN: add_nothing, FLOOR: add_floor}
    for sample in sorted({*SAMPLES, *([DEFAULT_SAMPLE] if DEFAULT_SAMPLE else [])}):
        group[sampled(sample)] = monitored(sample)
    group[FULL] = monitored(None)
    group[LIGHTNING] = add_lightning
    groups = [group, {PLAIN: add_nothing} | {each: step_twins(TWINS[each]) for each in TWINS}]
    if importlib.util.find_spec("wandb"):
        return [*groups, {PLAIN: add_nothing, WANDB: add_wandb}]
    print("wandb is not installed: left out")
    return groups


def step_all(
    group: dict[str, Add], model: nn.Module, tokens: int, rounds: int
) -> tuple[Seconds, dict[str, tuple[int, int]]]:
    """Time the steps of a group, check that all weights are equal, and count operations.

    Args:
        group: The variants.
        model: The model that each variant copies.
        tokens: Number of tokens in a step.
        rounds: Number of rounds.

    Returns:
        The times of each variant; and for one step of each, its operations and copies to the host.
    """
    trainings = {name: Training(model, SHAPES[tokens]) for name in group}
    with ExitStack() as stack:
        for name, training in trainings.items():
            group[name](training, stack)
            first = time_calls(training.step)
            print(f"  {name}: the first step took {first:.2f} s", flush=True)
        steps = {name: training.step for name, training in trainings.items()}
        paired_steps(steps, 2, untimed=0)  # the first steps also set up scales and buffers
        seconds = paired_steps(steps, rounds, untimed=int(tokens <= 32))
        check_same_weights(trainings)
        counted = {name: count_operations(trainings[name]) for name in group}
    return seconds, counted


def count_operations(training: Training) -> tuple[int, int]:
    with counting() as counts:
        training.step()
    return counts.operations, counts.host_copies


def check_same_weights(trainings: dict[str, Training]) -> None:
    expected = trainings[PLAIN].model.state_dict()
    for name, training in trainings.items():
        found = training.model.state_dict()
        if not all(torch.equal(expected[key], found[key]) for key in expected):
            raise SystemExit(f"{name}: its weights differ from those of the plain steps")


def make_rows(tokens: int, seconds: Seconds) -> list[Row]:
    return [
        Row(tokens, name, len(taken), 1e3 * quartiles(taken).median, ratios(seconds, name, PLAIN))
        for name, taken in seconds.items()
    ]


def print_rows(rows: list[Row]) -> None:
    print(f"\n{rows[0].tokens:,} tokens a step, {rows[0].rounds} rounds\n")
    cells = [
        (
            row.variant,
            f"{row.milliseconds:,.0f}",
            f"{row.ratio.median:.3f}",
            f"{row.ratio.low:.3f} to {row.ratio.high:.3f}",
        )
        for row in rows
    ]
    print_table(("", "ms", "ratio to plain", "quartiles"), cells)
    print()


def print_counts(counted: dict[str, tuple[int, int]]) -> None:
    plain = counted[PLAIN]
    print(f"\nA plain step: {plain[0]:,} operations, {plain[1]:,} host copies. Added to it:\n")
    rows = [
        (name, f"{operations - plain[0]:,}", f"{copies - plain[1]:,}")
        for name, (operations, copies) in counted.items()
        if name != PLAIN
    ]
    print_table(("", "operations", "host copies"), rows)


def find_targets(rows: list[Row]) -> list[Target]:
    default = sampled(DEFAULT_SAMPLE) if DEFAULT_SAMPLE else FULL
    demands = [(default, 32, 1.15), (default, 1_024, 1.02)]
    demands += [(each, tokens, most) for each in TWINS for tokens, most in TWIN_DEMANDS]
    measured = {(row.variant, row.tokens): row.ratio.median for row in rows}
    return [
        Target(f"{name}, {tokens:,} tokens", measured.get((name, tokens)), at_most)
        for name, tokens, at_most in demands
    ]


def main() -> None:
    parser = script_arguments("Time what observing adds to a training step, paired.")
    parser.add_argument("--tokens", nargs="+", type=int, default=tuple(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 60, 20 and 12")
    arguments = parse_with_threads(parser)
    print_environment()
    prepare_kernel()
    torch.manual_seed(0)
    model = Gpt()
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors")
    groups = make_groups()
    rows: list[Row] = []
    counted: dict[str, tuple[int, int]] = {}
    for tokens in arguments.tokens:
        if arguments.quick and tokens > QUICK_LIMIT:
            continue
        rounds = arguments.rounds or ROUNDS[tokens] // (5 if arguments.quick else 1)
        for group in groups:
            seconds, of_group = step_all(group, model, tokens, rounds)
            counted |= of_group
            its_rows = make_rows(tokens, seconds)
            print_rows(its_rows)
            rows += its_rows
    print_counts(counted)
    targets = find_targets(rows)
    print_targets(targets, ".3f")
    figures = {
        "steps": [row._asdict() for row in rows],
        "operations_and_host_copies": counted,
        "targets": [target._asdict() for target in targets],
    }
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
