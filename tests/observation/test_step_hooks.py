"""`StepHooks`: when they call, on steps that nest, raise, take closures or are compiled."""

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim import optimizer as torch_optimizer

from altgrad.observation.step_hooks import StepHooks, step_depth

RATE = 0.5


class Recorder:
    """What the hooks call, in order, with the weights and gradients that they find."""

    def __init__(self, optimizer: Optimizer, due: bool = True) -> None:
        self.due = due
        self.calls: list[str] = []
        self.steps: list[tuple[int, Tensor | None, Tensor | None, Tensor]] = []
        self.hooks = StepHooks(optimizer, self.is_due, self.capture, self.finish)

    def is_due(self, hooks: StepHooks) -> bool:
        assert hooks is self.hooks
        self.calls.append("due")
        return self.due

    def capture(self, hooks: StepHooks, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        self.calls.append("capture")
        (p,) = optimizer.param_groups[0]["params"]
        return p.detach().clone(), p.grad.clone()

    def finish(self, hooks: StepHooks, optimizer: Optimizer, captured) -> None:
        assert hooks is self.hooks
        self.calls.append("finish")
        (p,) = optimizer.param_groups[0]["params"]
        self.steps.append((hooks.index, *(captured or (None, None)), p.detach().clone()))


def weights(gradient: float | None = 1.0) -> nn.Parameter:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    if gradient is not None:
        p.grad = torch.full((2,), gradient)
    return p


def assert_next_step_is_exact(
    recorder: Recorder, optimizer: Optimizer, p: Tensor, index: int, gradient: float = 3.0
) -> None:
    recorder.calls.clear()
    recorder.steps.clear()
    p.grad = torch.full_like(p, gradient)
    before = p.detach().clone()
    optimizer.step()
    assert recorder.calls == ["due", "capture", "finish"]
    ((shown_index, *tensors),) = recorder.steps
    expected = (before, torch.full_like(p, gradient), before - RATE * gradient)
    assert shown_index == index
    assert all(map(torch.equal, tensors, expected))
    assert torch.equal(p, expected[2])


# Without and with a closure


def test_the_calls_and_the_index_of_steps_without_a_closure() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)
    for index in range(3):
        assert recorder.hooks.index == index
        assert_next_step_is_exact(recorder, optimizer, p, index, gradient=index + 1.0)


def test_a_step_that_is_not_due_makes_one_call_and_counts() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer, due=False)
    optimizer.step()
    closures = []
    optimizer.step(lambda: closures.append(None))
    assert recorder.calls == ["due", "due"]
    assert len(closures) == 1
    recorder.due = True
    assert_next_step_is_exact(recorder, optimizer, p, index=2)


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_a_closure_computes_the_gradients_that_are_captured(keyword: bool) -> None:
    p = weights(gradient=None)
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)

    def closure() -> str:
        recorder.calls.append("closure")
        p.grad = torch.tensor([4.0, 5.0])
        return "loss"

    result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert result == "loss"
    assert recorder.calls == ["due", "closure", "capture", "finish"]
    ((_, before, gradient, after),) = recorder.steps
    assert before.tolist() == [1, 2]
    assert gradient.tolist() == [4, 5]
    assert after.tolist() == [-1, -0.5]


def test_a_closure_that_is_none_is_no_closure() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert recorder.calls == ["due", "capture", "finish"] * 2


def test_of_many_calls_of_a_closure_the_first_is_captured() -> None:
    p = weights(gradient=None)
    optimizer = LBFGS([p], lr=1e-2, max_iter=4)
    recorder = Recorder(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**4).sum()
        loss.backward()
        recorder.calls.append("closure")
        return loss

    optimizer.step(closure)
    assert recorder.calls.count("closure") > 1
    assert recorder.calls[:3] == ["due", "closure", "capture"]
    assert recorder.calls.count("capture") == recorder.calls.count("finish") == 1
    ((_, before, gradient, after),) = recorder.steps
    assert before.tolist() == [1, 2]
    assert torch.equal(gradient, 4 * before**3)
    assert torch.equal(after, p)


def test_an_optimizer_that_does_not_call_its_closure_has_nothing_captured() -> None:
    class Deaf(SGD):
        def step(self, closure=None):
            return None

    p = weights()
    optimizer = Deaf([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step(lambda: None)
    assert recorder.calls == ["due", "finish"]
    assert recorder.steps[0][1] is None
    assert recorder.hooks.index == 1


def test_other_arguments_of_a_step_and_of_its_closure_pass_through() -> None:
    got = []

    class Particular(SGD):
        def step(self, closure, *others, **options):
            got.append((others, options, closure(1, option=2)))
            return super().step()

    optimizer = Particular([weights()], lr=RATE)
    recorder = Recorder(optimizer)

    def closure(*inputs, **options):
        return inputs, options

    optimizer.step(closure, "other", option="own")
    optimizer.step(closure=closure, option="own")
    returned = ((1,), {"option": 2})
    assert got == [(("other",), {"option": "own"}, returned), ((), {"option": "own"}, returned)]
    assert len(recorder.steps) == 2


def test_a_first_argument_that_is_no_closure_reaches_the_step_as_it_is() -> None:
    got = []

    class Informed(SGD):
        def step(self, metric):
            got.append(metric)
            return super().step()

    optimizer = Informed([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step(0.25)
    assert got == [0.25]
    assert len(recorder.steps) == 1
    assert recorder.steps[0][1] is not None


@pytest.mark.parametrize("why", ["not due", "gone"])
def test_where_no_step_is_observed_the_closure_is_not_wrapped(why: str) -> None:
    got = []

    class Listening(SGD):
        def step(self, closure=None):
            got.append(closure)

    def closure() -> None:
        """Never called."""

    optimizer = Listening([weights()], lr=RATE)
    recorder = Recorder(optimizer, due=False)
    if why == "gone":
        del recorder
    optimizer.step(closure)
    assert got == [closure]


def test_hooks_that_were_put_on_within_a_step_do_not_count_that_step() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorders = []
    optimizer.step(lambda: recorders.append(Recorder(optimizer)))
    assert recorders[0].calls == []
    assert_next_step_is_exact(recorders[0], optimizer, p, index=0)


# Steps that call super().step()


def nested(parent_patched: bool, depth: int) -> type[Optimizer]:
    """Classes of their own each time: torch patches `step` of a class at its first instance."""

    class Parent(Optimizer):
        def __init__(self, params, **options) -> None:
            super().__init__(params, options)

        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(RATE * p.grad)
            return loss

    def child_of(parent: type[Optimizer]) -> type[Optimizer]:
        class Child(parent):
            def step(self, closure=None):
                return super().step(closure)

        if parent_patched:
            parent([weights()], lr=RATE)
        assert getattr(parent.step, "hooked", False) is parent_patched
        return Child

    kind = Parent
    for _ in range(depth):
        kind = child_of(kind)
    return kind


@pytest.mark.parametrize("call", ["none", "positional", "keyword"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("parent_patched", [True, False], ids=["patched", "not_patched"])
def test_a_step_that_calls_that_of_its_parent_is_one_step(
    parent_patched: bool, depth: int, call: str
) -> None:
    p = weights(gradient=None if call != "none" else 6.0)
    optimizer = nested(parent_patched, depth)([p], lr=RATE)
    recorder = Recorder(optimizer)

    def closure() -> None:
        recorder.calls.append("closure")
        p.grad = torch.full((2,), 6.0)

    for index in range(2):
        recorder.calls.clear()
        recorder.steps.clear()
        before = p.detach().clone()
        if call != "none":
            p.grad = None
        {
            "none": optimizer.step,
            "positional": lambda: optimizer.step(closure),
            "keyword": lambda: optimizer.step(closure=closure),
        }[call]()
        assert [each for each in recorder.calls if each != "closure"] == [
            "due",
            "capture",
            "finish",
        ]
        ((shown_index, *tensors),) = recorder.steps
        assert shown_index == index
        assert all(map(torch.equal, tensors, (before, torch.full((2,), 6.0), before - 3)))
    assert recorder.hooks.index == 2


def test_what_a_subclass_does_after_that_of_its_parent_is_part_of_the_step() -> None:
    class Shrinking(SGD):
        def step(self, closure=None):
            super().step()
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(0.5)

    SGD([weights()], lr=RATE)
    p = weights()
    optimizer = Shrinking([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    assert recorder.steps[0][3].tolist() == [0.25, 0.75]


def test_an_unobserved_step_that_nests_is_asked_for_once() -> None:
    optimizer = nested(parent_patched=True, depth=1)([weights()], lr=RATE)
    recorder = Recorder(optimizer, due=False)
    optimizer.step()
    assert recorder.calls == ["due"]
    assert recorder.hooks.index == 1


# Steps that raise


class Failing(SGD):
    """Raises what it is told to, before or after the weights have changed."""

    early: BaseException | None = None
    late: BaseException | None = None

    def step(self, closure=None):
        if self.early is not None:
            raise self.early
        result = super().step(closure)
        if self.late is not None:
            raise self.late
        return result


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["early", "late", "closure"])
def test_after_a_step_that_raised_the_next_one_is_exact(place: str, kind: type) -> None:
    SGD([weights()], lr=RATE)
    p = weights()
    optimizer = Failing([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    recorder.calls.clear()

    def closure() -> None:
        raise kind("here")

    if place != "closure":
        setattr(optimizer, place, kind("here"))
    with pytest.raises(kind, match="here"):
        optimizer.step(closure if place == "closure" else None)
    optimizer.early = optimizer.late = None
    assert "finish" not in recorder.calls
    assert step_depth(optimizer) == 0
    assert_next_step_is_exact(recorder, optimizer, p, index=1)


def test_a_step_with_a_closure_after_one_that_raised_captures_anew() -> None:
    p = weights()
    optimizer = Failing([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.late = ValueError("late")
    with pytest.raises(ValueError, match="late"):
        optimizer.step()
    optimizer.late = None

    def closure() -> None:
        p.grad = torch.full((2,), 8.0)

    before = p.detach().clone()
    optimizer.step(closure)
    ((_, shown, gradient, after),) = recorder.steps
    assert torch.equal(shown, before)
    assert gradient.tolist() == [8, 8]
    assert torch.equal(after, before - 4)


def test_an_unobserved_step_after_one_that_raised_is_not_finished_with_its_copies() -> None:
    optimizer = Failing([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.late = ValueError("late")
    with pytest.raises(ValueError, match="late"):
        optimizer.step()
    optimizer.late, recorder.due = None, False
    recorder.calls.clear()
    optimizer.step()
    assert recorder.calls == ["due"]
    assert recorder.hooks._captured is None


def test_an_inner_step_that_raised_may_be_called_again() -> None:
    failures = [RuntimeError("once")]

    class Parent(SGD):
        def step(self, closure=None):
            super().step()
            if failures:
                raise failures.pop()

    class Stubborn(Parent):
        def step(self, closure=None):
            try:
                super().step()
            except RuntimeError:
                super().step()

    Parent([weights()], lr=RATE)
    p = weights()
    optimizer = Stubborn([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    assert not failures
    assert recorder.calls == ["due", "capture", "finish"]
    ((_, before, _, after),) = recorder.steps
    assert before.tolist() == [1, 2]
    assert after.tolist() == [0, 1]


def test_a_plain_step_after_a_nested_one_that_raised_is_finished() -> None:
    """The nesting of the step that raised must not hide the end of the next one."""

    class Parent(SGD):
        def step(self, closure=None):
            return super().step()

    class Child(Parent):
        nests = True

        def step(self, closure=None):
            if self.nests:
                super().step()
                raise ValueError("nested")
            with torch.no_grad():
                p.sub_(RATE * p.grad)

    Parent([weights()], lr=RATE)
    p = weights()
    optimizer = Child([p], lr=RATE)
    recorder = Recorder(optimizer)
    with pytest.raises(ValueError, match="nested"):
        optimizer.step()
    optimizer.nests = False
    assert_next_step_is_exact(recorder, optimizer, p, index=0)


# forget, remove, and who holds whom


def test_what_is_forgotten_within_a_step_is_not_finished() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)

    def closure() -> None:
        p.grad = torch.ones(2)
        recorder.hooks.forget()

    optimizer.step(closure)
    assert recorder.calls == ["due"]
    assert_next_step_is_exact(recorder, optimizer, p, index=1)


def test_what_is_forgotten_is_freed() -> None:
    optimizer = Failing([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.late = ValueError("late")
    with pytest.raises(ValueError, match="late"):
        optimizer.step()
    held = [weakref.ref(tensor) for tensor in recorder.hooks._captured]
    assert all(each() is not None for each in held)
    recorder.hooks.forget()
    assert all(each() is None for each in held)


def test_a_finished_step_is_not_held() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    held = [weakref.ref(tensor) for tensor in recorder.steps.pop()[1:]]
    assert all(each() is None for each in held)


def test_removed_hooks_call_no_more() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    assert recorder.hooks.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step()
    assert recorder.calls == []
    assert recorder.hooks.remove()  # harmless


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_within_a_step_hooks_are_not_removed(register: str) -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    removed = []

    def remove(*_: object) -> None:
        removed.append(recorder.hooks.remove())

    getattr(optimizer, register)(remove)
    optimizer.step()
    assert removed == [False]
    assert recorder.calls == ["due", "capture", "finish"]
    assert recorder.hooks.remove()


def test_hooks_of_an_optimizer_that_is_gone_are_removed() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    assert recorder.hooks.optimizer is optimizer
    del optimizer
    gc.collect()
    assert recorder.hooks.optimizer is None
    assert recorder.hooks.remove()


def test_without_the_object_that_is_called_a_step_is_a_plain_one() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)
    calls, gone = recorder.calls, weakref.ref(recorder)
    del recorder
    assert gone() is None
    optimizer.step(lambda: None)
    assert calls == []
    assert p.tolist() == [0.5, 1.5]


def test_an_object_that_goes_in_mid_step_is_not_called_again() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorders = [Recorder(optimizer)]
    calls = recorders[0].calls
    optimizer.step(recorders.clear)
    assert calls == ["due"]
    recorders.append(Recorder(optimizer))
    calls = recorders[0].calls
    optimizer.register_step_pre_hook(lambda *_: recorders.clear())
    optimizer.step()
    assert calls == ["due", "capture"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_an_observed_optimizer_can_be_copied_without_its_hooks(copied) -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    copied(optimizer).step()
    assert recorder.calls == []


# step_depth


def test_torch_puts_a_function_named_wrapper_with_a_local_self_around_each_step() -> None:
    SGD([weights()], lr=RATE)
    code = SGD.step.__code__
    assert code.co_name == "wrapper"
    assert code.co_filename == torch_optimizer.__file__
    assert "self" in code.co_varnames


def test_the_depth_is_that_of_this_optimizer() -> None:
    depths = []
    inner, outer = (
        nested(parent_patched=True, depth=depth)([weights()], lr=RATE) for depth in (0, 1)
    )
    outer.register_step_pre_hook(lambda *_: inner.step())
    for optimizer in (inner, outer):
        optimizer.register_step_post_hook(
            lambda *_: depths.append((step_depth(inner), step_depth(outer)))
        )
    assert (step_depth(inner), step_depth(outer)) == (0, 0)
    outer.step()
    assert depths == [(1, 1), (1, 2), (0, 2), (0, 1)]


def test_other_functions_with_a_local_self_are_no_steps() -> None:
    optimizer = SGD([weights()], lr=RATE)
    depths = []
    optimizer.register_state_dict_pre_hook(lambda _: depths.append(step_depth(optimizer)))
    optimizer.state_dict()  # in the file of torch's wrapper

    def wrapper(self: Optimizer) -> None:
        depths.append(step_depth(self))

    wrapper(optimizer)
    assert depths == [0, 0]


# torch.compile


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
