"""`StepHooks` around steps that `torch.compile` compiles."""

import inspect

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer

from altgrad.observation.step_hooks import StepHooks
from tests.observation.recorder import (
    RATE,
    Recorder,
    nested,
    weights,
)


def test_torch_compiler_disable_sets_the_attributes_that_the_hooks_have() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    # torch has no public names for its hooks: torch/optim/optimizer.py.
    (hook,) = optimizer._optimizer_step_pre_hooks.values()
    # Private like the hooks before a step: torch/optim/optimizer.py.
    (post_hook,) = optimizer._optimizer_step_post_hooks.values()
    disabled = torch.compiler.disable(lambda: None)
    # The marks of torch.compiler.disable on a function: torch/_dynamo/decorators.py.
    assert disabled._torchdynamo_disable is hook._torchdynamo_disable is True
    assert post_hook._torchdynamo_disable is True
    assert recorder.hooks.remove()


@pytest.mark.skipif(
    "reason" not in inspect.signature(torch.compiler.disable).parameters,
    reason="torch.compiler.disable has no argument `reason` here",
)
def test_torch_compiler_disable_keeps_its_reason_under_the_name_that_the_hooks_use() -> None:
    disabled = torch.compiler.disable(lambda: None, reason="why")
    assert disabled._torchdynamo_disable_msg == "why"  # torch/_dynamo/decorators.py


@pytest.mark.parametrize("kind", ["SGD", "Adam", "nested"])
def test_a_compiled_step_is_observed_exactly(kind: str) -> None:
    torch.compiler.reset()
    p = weights()
    classes = {"SGD": SGD, "Adam": Adam, "nested": nested(parent_patched=True, depth=1)}
    optimizer = classes[kind]([p], lr=RATE)
    recorder = Recorder(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for index in range(3):
        p.grad = torch.full((2,), index + 1.0)
        before = p.detach().clone()
        step()
        assert not torch.equal(p, before)
        shown_index, *tensors = recorder.steps[-1]
        assert shown_index == index
        assert all(map(torch.equal, tensors, (before, p.grad, p)))
    assert recorder.calls == ["due", "capture", "finish"] * 3


def test_the_calls_around_a_compiled_step_are_not_compiled() -> None:
    """Compiled code may round differently, so that copies would not be exact."""
    torch.compiler.reset()
    traced, graphs = [], []

    class Asking(Recorder):
        def capture(self, hooks: StepHooks, optimizer: Optimizer):
            traced.append(torch.compiler.is_compiling())
            return super().capture(hooks, optimizer)

        def finish(self, *args) -> None:
            traced.append(torch.compiler.is_compiling())
            super().finish(*args)

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    optimizer = SGD([weights()], lr=RATE)
    recorder = Asking(optimizer)
    torch.compile(optimizer.step, backend=backend)()
    assert len(recorder.steps) == 1
    assert traced == [False, False]
    (graph,) = graphs
    assert graph[-1] == "add_"  # the update of SGD; torch 2.6 multiplies by the rate first


def test_a_step_compiled_with_fullgraph_raises_an_error_that_says_why() -> None:
    torch.compiler.reset()
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    # Up to torch 2.6 the error of torch only names the hook.
    said = r"AltGrad cannot observe .* with fullgraph=True|function <function StepHooks\."
    with pytest.raises(Exception, match=said):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert recorder.calls == []
