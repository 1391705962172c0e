"""Ways to train with plain PyTorch loops."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tests.step_truth.designs import Design
from tests.step_truth.modes import POST, Mode, Run
from tests.step_truth.recording import Journal

BATCHES = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))


def batches(count: int = BATCHES) -> list[Tensor]:
    return list(torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(1)))


def compute_loss(module: nn.Module, batch: Tensor) -> Tensor:
    return module(batch).square().mean() + module(batch).sum()


def train(design: Design, module: nn.Module, optimizer: Optimizer) -> None:
    """Train in the plainest loop, observed by the design."""
    with design.watch(module, optimizer):
        for batch in batches():
            compute_loss(module, batch).backward()
            optimizer.step()
            optimizer.zero_grad()


def loop(
    kind: type[Optimizer] = AdamW, *, make: Callable[[], nn.Module] = network, **options: Any
) -> Run:
    def run(design: Design, _: Path) -> Journal:
        module = make()
        journal = Journal(module)
        optimizer = journal.optimizer(kind, module.parameters(), **({"lr": 0.01} | options))
        train(design, module, optimizer)
        return journal

    return run


def closure(kind: type[Optimizer], *, keyword: bool = False, **options: Any) -> Run:
    """Return a run whose optimizer calls a closure, which computes and clips the gradients."""

    def run(design: Design, _: Path) -> Journal:
        module = network()
        journal = Journal(module)
        optimizer = journal.optimizer(kind, module.parameters(), **({"lr": 0.01} | options))

        def evaluate(batch: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = compute_loss(module, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            return loss

        with design.watch(module, optimizer):
            for batch in batches():
                call = partial(evaluate, batch)
                _ = optimizer.step(closure=call) if keyword else optimizer.step(call)
        return journal

    return run


def scaler(*, fused: bool = False, inf_at: int | None = None, clip: bool = False) -> Run:
    """Return a run with a GradScaler used by hand; its scale is not a power of two."""

    def run(design: Design, _: Path) -> Journal:
        module = network()
        journal = Journal(module)
        optimizer = journal.optimizer(AdamW, module.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        with design.watch(module, optimizer, scaler=scaler):
            for number, batch in enumerate(batches()):
                scaler.scale(compute_loss(module, batch)).backward()
                if number == inf_at:
                    module[0].weight.grad[0, 0] = torch.inf
                if clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(module.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return journal

    return run


def no_set_to_none(design: Design, _: Path) -> Journal:
    module = network()
    journal = Journal(module)
    optimizer = journal.optimizer(SGD, module.parameters(), lr=0.01, momentum=0.9)
    with design.watch(module, optimizer):
        for number, batch in enumerate(batches()):
            if number != 2:  # here the gradients are zeros, and the momentum moves the weights
                compute_loss(module, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return journal


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, sparse=True)

    def forward(self, batch: Tensor) -> Tensor:
        return self.table((batch[:, 0] > 0).long())  # the same rows several times


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, batch: Tensor) -> Tensor:
        return self.second(self.first(batch))


class FrozenAndUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.used(self.frozen(batch))


def compiled(design: Design, _: Path) -> Journal:
    """Train a compiled module, whose parameter names gain a prefix."""
    module = network()
    journal = Journal(module)
    graph = torch.compile(module, backend="eager")
    optimizer = journal.optimizer(AdamW, graph.parameters(), lr=0.01)
    train(design, graph, optimizer)
    return journal


def compiled_step(design: Design, _: Path) -> Journal:
    module = network()
    journal = Journal(module)
    optimizer = journal.optimizer(AdamW, module.parameters(), lr=0.01)
    step = torch.compile(optimizer.step, backend="eager")
    with design.watch(module, optimizer):
        for batch in batches(3):
            compute_loss(module, batch).backward()
            step()
            optimizer.zero_grad()
    return journal


class Twice(AdamW):
    """An AdamW whose step calls the step of its base class, with its hooks."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.999)  # before the inner step, and so a part of this step
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.5, 0.5)  # after the inner step, and so a part of this step
        return loss


class ClosureToTheBase(AdamW):
    """An AdamW that passes its closure to its base class, and changes weights afterwards."""

    needs_closure = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.5, 0.5)
        return loss


def nested_closure(design: Design, folder: Path) -> Journal:
    AdamW([torch.ones(1)])  # from now on torch calls hooks around AdamW's own step, too
    return closure(ClosureToTheBase)(design, folder)


def sharpness_aware(design: Design, _: Path) -> Journal:
    """Train with SAM, which computes gradients at other weights; the wrapped optimizer steps."""
    module = network()
    journal = Journal(module)
    base = journal.optimizer(SGD, module.parameters(), lr=0.01)
    with design.watch(module, base):
        for batch in batches():
            found = [p.detach().clone() for p in module.parameters()]
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.01)
            base.zero_grad()
            compute_loss(module, batch).backward()
            with torch.no_grad():
                for p, old in zip(module.parameters(), found, strict=True):
                    p.copy_(old)
            base.step()
    return journal


def nested(design: Design, folder: Path) -> Journal:
    AdamW([torch.ones(1)])  # from now on torch calls hooks around AdamW's own step
    return loop(Twice)(design, folder)


class FailsOnce(SGD):
    """An SGD that fails in its third step, after it has moved some of the weights."""

    calls = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.calls += 1
        if self.calls == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise MemoryError
        return super().step(closure)


def exception_in_step(design: Design, _: Path) -> Journal:
    SGD([torch.ones(1)], lr=1)  # its step is nested, too
    module = network()
    journal = Journal(module)
    optimizer = journal.optimizer(FailsOnce, module.parameters(), lr=0.01)
    with design.watch(module, optimizer):
        for batch in batches():
            compute_loss(module, batch).backward()
            with suppress(MemoryError):
                optimizer.step()
            optimizer.zero_grad()
    return journal


def exception_in_closure(design: Design, _: Path) -> Journal:
    module = network()
    journal = Journal(module)
    optimizer = journal.optimizer(SGD, module.parameters(), lr=0.01)

    def evaluate(batch: Tensor, number: int) -> Tensor:
        optimizer.zero_grad()
        loss = compute_loss(module, batch)
        loss.backward()
        if number == 2:
            raise ValueError
        return loss

    with design.watch(module, optimizer):
        for number, batch in enumerate(batches()):
            with suppress(ValueError):
                optimizer.step(partial(evaluate, batch, number))
    return journal


def warm_up(rates: Iterable[float], *, tensor: bool = False) -> Run:
    def run(design: Design, _: Path) -> Journal:
        module = network()
        journal = Journal(module)
        optimizer = journal.optimizer(AdamW, module.parameters(), lr=0.01)
        with design.watch(module, optimizer):
            for rate, batch in zip(rates, batches(), strict=True):
                optimizer.param_groups[0]["lr"] = torch.tensor(rate) if tensor else rate
                compute_loss(module, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        return journal

    return run


def two_rates(design: Design, _: Path) -> Journal:
    module = network()
    journal = Journal(module)
    groups = [
        {"params": module[0].parameters(), "lr": 0.0},
        {"params": module[3].parameters(), "lr": 0.01},
    ]
    optimizer = journal.optimizer(AdamW, groups)
    train(design, module, optimizer)
    return journal


def shared_by_two(design: Design, _: Path) -> Journal:
    """Step the same parameters by two optimizers in turn."""
    module = network()
    journal = Journal(module)
    first = journal.optimizer(SGD, module.parameters(), lr=0.01)
    second = journal.optimizer(AdamW, module.parameters(), lr=0.01)
    with design.watch(module, first, second):
        for batch in batches():
            compute_loss(module, batch).backward()
            first.step()
            second.step()
            first.zero_grad()
    return journal


def closure_moves_weights(design: Design, _: Path) -> Journal:
    """Normalise weights in the closure: the step begins where the closure ends."""
    module = network()
    journal = Journal(module)
    optimizer = journal.optimizer(AdamW, module.parameters(), lr=0.01)

    def evaluate(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            module[0].weight.div_(module[0].weight.norm())
        loss = compute_loss(module, batch)
        loss.backward()
        return loss

    with design.watch(module, optimizer):
        for batch in batches():
            optimizer.step(partial(evaluate, batch))
    return journal


def edited_by_a_hook(design: Design, _: Path) -> Journal:
    """Clip the gradients in another pre-hook."""
    module = network()
    journal = Journal(module)
    optimizer = journal.optimizer(AdamW, module.parameters(), lr=0.01)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)

    optimizer.register_step_pre_hook(clip)
    train(design, module, optimizer)
    return journal


def in_backward(design: Design, _: Path) -> Journal:
    """Step one optimizer for each parameter as soon as its gradient is computed."""
    module = network()
    journal = Journal(module)
    optimizers = {p: journal.optimizer(SGD, [p], lr=0.01) for p in module.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with design.watch(module, *optimizers.values()):
        for batch in batches():
            compute_loss(module, batch).backward()
    return journal


def grown(design: Design, _: Path) -> Journal:
    """Add a layer to the module and the optimizer in mid-run."""
    module = network()
    new = nn.Linear(2, 2)
    journal = Journal(nn.Sequential(*module, new))
    optimizer = journal.optimizer(AdamW, module.parameters(), lr=0.01)
    with design.watch(module, optimizer):
        for number, batch in enumerate(batches()):
            if number == 3:
                module.append(new)
                optimizer.add_param_group({"params": new.parameters()})
            compute_loss(module, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return journal


def accelerated(design: Design, _: Path) -> Journal:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    module = network()
    journal = Journal(module)
    raw = journal.optimizer(AdamW, module.parameters(), lr=0.01)
    module, optimizer = accelerator.prepare(module, raw)
    with design.watch(module, optimizer):
        for batch in batches(8):
            with accelerator.accumulate(module):
                accelerator.backward(compute_loss(module, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(module.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    return journal


def accelerated_scaler(design: Design, _: Path) -> Journal:
    """Train with accelerate in fp16: its wrapper knows the scaler, so no argument names it."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    module = network()
    journal = Journal(module)
    raw = journal.optimizer(AdamW, module.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    optimizer = AcceleratedOptimizer(raw, scaler=scaler)
    with design.watch(module, optimizer):
        for number, batch in enumerate(batches()):
            scaler.scale(compute_loss(module, batch)).backward()
            if number == 2:
                module[0].weight.grad[0, 0] = torch.inf
            optimizer.step()
            optimizer.zero_grad()
    return journal


def fabric(design: Design, _: Path) -> Journal:
    from lightning_fabric import Fabric

    runner = Fabric(accelerator="cpu", devices=1)
    module = network()
    journal = Journal(module)
    raw = journal.optimizer(AdamW, module.parameters(), lr=0.01)
    module, optimizer = runner.setup(module, raw)
    with design.watch(module.module, optimizer):
        for batch in batches():
            runner.backward(compute_loss(module, batch))
            runner.clip_gradients(module, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
    return journal


NESTEROV = {"nesterov": True, "momentum": 0.9, "foreach": True}
INF = {"inf": 1}
lbfgs = closure(torch.optim.LBFGS)
fused_clipped = scaler(fused=True, clip=True)
fused_inf = scaler(fused=True, inf_at=2)
tensor_rate = loop(lr=torch.tensor(0.01))
sparse_adam = loop(torch.optim.SparseAdam, make=Sparse)
three_zeros = warm_up([0, 0, 0.01, 0.02, 0.03, 0])
tensor_zeros = warm_up([0, 0.01, 0.02, 0.03, 0.04, 0], tensor=True)

PLAIN_MODES = (
    Mode("AdamW", loop(), steps=6),
    Mode("AdamW foreach", loop(foreach=True), steps=6),
    Mode("AdamW fused", loop(fused=True), steps=6),
    Mode("SGD nesterov foreach", loop(SGD, **NESTEROV), steps=6, wrong=(POST,)),
    Mode("Adafactor", loop(torch.optim.Adafactor), steps=6),
    Mode("learning rate is a tensor", tensor_rate, steps=6),
    Mode("closure", closure(AdamW), steps=6),
    Mode("closure by keyword", closure(AdamW, keyword=True), steps=6),
    Mode("closure of LBFGS, called many times", lbfgs, steps=6, wrong=(POST,)),
    Mode("closure moves weights", closure_moves_weights, steps=6, wrong=(POST,)),
    Mode("GradScaler by hand", scaler(), steps=6),
    Mode("GradScaler, clipped", scaler(clip=True), steps=6),
    Mode("GradScaler, inf", scaler(inf_at=2), steps=5, skipped=INF),
    Mode("GradScaler, fused", scaler(fused=True), steps=6),
    Mode("GradScaler, fused, clipped", fused_clipped, steps=6),
    Mode("GradScaler, fused inf", fused_inf, steps=5, skipped=INF, wrong=(POST,)),
    Mode("set_to_none=False", no_set_to_none, steps=6),
    Mode("sparse, SGD", loop(SGD, make=Sparse), steps=6),
    Mode("sparse, SparseAdam", sparse_adam, steps=6),
    Mode("tied", loop(make=Tied), steps=6),
    Mode("frozen and unused", loop(make=FrozenAndUnused), steps=6),
    Mode("compiled module", compiled, steps=6, wrong=(POST,)),
    Mode("compiled step", compiled_step, steps=3),
    Mode("nested super().step()", nested, steps=6, wrong=(POST,)),
    Mode("nested super().step(closure)", nested_closure, steps=6, wrong=(POST,)),
    Mode("SAM, the optimizer in it", sharpness_aware, steps=6),
    Mode("exception in step", exception_in_step, steps=5, wrong=(POST,)),
    Mode("exception in closure", exception_in_closure, steps=5),
    Mode("learning rate 0", three_zeros, 3, {"learning rate 0": 3}, wrong=(POST,)),
    Mode("learning rate 0, tensor", tensor_zeros, 4, {"learning rate 0": 2}, wrong=(POST,)),
    Mode("learning rate 0 of one group", two_rates, steps=6, wrong=(POST,)),
    Mode("two optimizers share parameters", shared_by_two, steps=12),
    Mode("gradients edited by a hook", edited_by_a_hook, steps=6),
    Mode("optimizers in backward", in_backward, steps=36),
    Mode("parameters added in mid-run", grown, steps=6),
    Mode("accelerate, accumulated, clipped", accelerated, steps=2),
    Mode("accelerate, GradScaler, inf", accelerated_scaler, steps=5, skipped=INF),
    Mode("Fabric, clipped", fabric, steps=6),
)
