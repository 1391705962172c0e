"""`StepHooks` around steps that torch.compile compiles."""

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


def test_torch_compiler_disable_sets_the_attributes_that_the_hooks_bear() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    (hook,) = optimizer._optimizer_step_pre_hooks.values()
    (post_hook,) = optimizer._optimizer_step_post_hooks.values()
    disabled = torch.compiler.disable(lambda: None)
    assert disabled._torchdynamo_disable is hook._torchdynamo_disable is True
    assert post_hook._torchdynamo_disable is True
    assert recorder.hooks.remove()


@pytest.mark.skipif(
    "reason" not in inspect.signature(torch.compiler.disable).parameters,
    reason="this torch gives no reasons",
)
def test_torch_compiler_disable_keeps_its_reason_where_the_hooks_do() -> None:
    disabled = torch.compiler.disable(lambda: None, reason="why")
    assert disabled._torchdynamo_disable_msg == "why"


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


def test_what_is_called_around_a_compiled_step_is_not_compiled() -> None:
    """Compiled code computes other bits, and a callback is not the user's model."""
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
    assert graph[-1] == "add_"  # SGD's own; torch 2.6 multiplies by the rate first


def test_a_step_that_is_compiled_as_one_graph_says_that_it_cannot_be_observed() -> None:
    torch.compiler.reset()
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    # Up to torch 2.6 its error names only our hook.
    said = r"AltGrad cannot observe .* with fullgraph=True|function <function StepHooks\._before"
    with pytest.raises(Exception, match=said):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert recorder.calls == []
