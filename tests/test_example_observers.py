"""The examples of `StepObserver`: their output, and the steps that they observe."""

import re
import runpy
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from altgrad import StepObserver
from tests.observation.watching import hook_count

EXAMPLES = Path(__file__).parents[1] / "examples"

# Code under the guard of huggingface_trainer.py is not run: the tests use only its callback.
ObserveSteps = runpy.run_path(str(EXAMPLES / "huggingface_trainer.py"))["ObserveSteps"]

# 23 batches of 4, the last one of 2, in windows of 4: the sixth window has 3.
SAMPLES, BATCH, WINDOW, EPOCHS = 90, 4, 4, 2
BACKWARDS_OF_STEPS = [4, 4, 4, 4, 4, 3] * EPOCHS
MAX_NORM = 0.1


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch):
    """Restore the global generator, which Trainers seed, and refuse network connections."""

    def connect(*_):
        raise AssertionError("an example used the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with torch.random.fork_rng():
        yield


# Output of the examples


def run_example(name, capsys):
    """Run an example; return its percentages for bf16 and e4m3fn, and the names at its end."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out, err = capsys.readouterr()
    assert err == ""
    rows = re.findall(r"^(\S+) +([\d.]+)% +([\d.]+)%$", out, re.MULTILINE)
    sentence = out.splitlines()[-1]
    assert sentence.startswith("Stored in bf16, these would be frozen: ")
    frozen = sentence.split(": ")[1].split(", ")
    return {row[0]: (float(row[1]), float(row[2])) for row in rows}, frozen


def check_gains_alone_are_frozen(shares, frozen, gains):
    assert frozen == gains
    for name, (bf16, e4m3fn) in shares.items():
        assert 0 <= bf16 <= e4m3fn <= 100, name
        assert (bf16 == 100) == (name in gains), name
        assert e4m3fn > 50, name


def test_the_plain_pytorch_example_names_the_gain_as_frozen(capsys):
    shares, frozen = run_example("plain_pytorch.py", capsys)
    assert list(shares) == [f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")]
    check_gains_alone_are_frozen(shares, frozen, ["1.weight"])


def test_the_huggingface_example_names_the_gains_as_frozen(capsys):
    shares, frozen = run_example("huggingface_trainer.py", capsys)
    assert list(shares) == [name for name, _ in tiny_model().named_parameters()]
    gains = [name for name in shares if "norm" in name]
    assert len(gains) == 5
    check_gains_alone_are_frozen(shares, frozen, gains)


# A Trainer's steps under an observer


def tiny_model():
    """Return a model with dropout, so that a random number drawn by an observer would show."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, num_attention_heads=2, attention_dropout=0.1, **shape)
    )


class RecordingAdamW(torch.optim.AdamW):
    """An AdamW that clones weights and gradients around its step, without hooks."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.recorded = []

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        step = SimpleNamespace(
            before=[p.detach().clone() for p in parameters],
            gradients=[p.grad.clone() for p in parameters],
        )
        loss = super().step(closure)
        step.after = [p.detach().clone() for p in parameters]
        self.recorded.append(step)
        return loss


class Unclipped(TrainerCallback):
    """A negative control: the gradients of each step before clipping, from backward hooks."""

    def __init__(self, model):
        self.steps, self.backwards_of_steps = [], []
        self._latest, self._backwards = {}, 0
        self._parameters = list(model.parameters())
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._keep)

    def _keep(self, parameter):
        self._latest[parameter] = parameter.grad.clone()
        self._backwards += parameter is self._parameters[0]

    def on_step_end(self, *_, **__):
        self.steps.append([self._latest[parameter] for parameter in self._parameters])
        self.backwards_of_steps.append(self._backwards)
        self._backwards = 0


class RaiseAfterThree(TrainerCallback):
    def on_step_end(self, _, state, __, **___):
        if state.global_step == 3:
            raise ArithmeticError("training fails")


def make_trainer(model, folder, *callbacks, optimizer=None):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        learning_rate=1e-2,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=WINDOW,
        max_grad_norm=MAX_NORM,
        seed=0,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
    )
    data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (SAMPLES, 8))]
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def norm(tensors):
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Record a training by an observer, by the optimizer itself, and before clipping."""
    with torch.random.fork_rng():
        return train_watched(tmp_path_factory.mktemp("watched"))


def train_watched(folder):
    model = tiny_model()
    optimizer = RecordingAdamW(model.parameters(), lr=1e-2)
    unclipped = Unclipped(model)
    seen = []

    def on_step(step):
        seen.append(
            SimpleNamespace(
                index=step.index,
                names=step.names,
                optimizer=step.optimizer,
                before=[each.clone() for each in step.before],
                gradients=[each.clone() for each in step.gradients],
                after=[each.clone() for each in step.after],
            )
        )

    observer = StepObserver(model, on_step, strict=True)
    trainer = make_trainer(model, folder, ObserveSteps(observer), unclipped, optimizer=optimizer)
    with observer:
        trainer.train()
    return SimpleNamespace(
        names=tuple(name for name, _ in model.named_parameters()),
        seen=seen,
        optimizer=optimizer,
        unclipped=unclipped,
        trainer=trainer,
        skipped=observer.skipped,
    )


def test_steps_of_the_trainer_are_observed_bit_for_bit(watched):
    assert watched.trainer.state.global_step == len(BACKWARDS_OF_STEPS)
    assert watched.unclipped.backwards_of_steps == BACKWARDS_OF_STEPS
    assert [step.index for step in watched.seen] == list(range(len(BACKWARDS_OF_STEPS)))
    assert not watched.skipped
    for seen, recorded in zip(watched.seen, watched.optimizer.recorded, strict=True):
        assert seen.optimizer is watched.optimizer
        assert seen.names == watched.names
        for kind in ("before", "gradients", "after"):
            pairs = zip(getattr(seen, kind), getattr(recorded, kind), strict=True)
            assert all(torch.equal(*pair) for pair in pairs), kind
        # Equality would prove little if no weight moved.
        assert not any(map(torch.equal, seen.before, seen.after))


def test_gradients_of_the_trainer_are_observed_accumulated_and_clipped(watched):
    for seen, unclipped in zip(watched.seen, watched.unclipped.steps, strict=True):
        assert norm(unclipped) > 2 * MAX_NORM
        assert norm(seen.gradients) == pytest.approx(MAX_NORM, rel=1e-4)
        assert norm(seen.gradients) <= MAX_NORM
        factor = MAX_NORM / norm(unclipped)
        for gradient, before_clipping in zip(seen.gradients, unclipped, strict=True):
            assert not torch.equal(gradient, before_clipping)
            torch.testing.assert_close(gradient, before_clipping * factor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("under_with", [True, False])
def test_a_failed_training_leaves_no_hooks_under_with(tmp_path, under_with):
    """Check that hooks stay without `with`: the Trainer does not call `on_train_end`."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    indices = []
    observer = StepObserver(model, lambda step: indices.append(step.index), strict=True)
    trainer = make_trainer(
        model, tmp_path, ObserveSteps(observer), RaiseAfterThree(), optimizer=optimizer
    )
    if under_with:
        with pytest.raises(ArithmeticError), observer:
            trainer.train()
    else:
        with pytest.raises(ArithmeticError):
            trainer.train()
    assert indices == [0, 1, 2]
    assert hook_count(optimizer) == (0 if under_with else 2)


def test_the_observer_detaches_at_the_end_of_the_training(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    observer = StepObserver(model, lambda step: None, strict=True)
    make_trainer(model, tmp_path, ObserveSteps(observer), optimizer=optimizer).train()
    assert hook_count(optimizer) == 0


def test_observing_changes_no_bit_of_the_trained_weights(tmp_path):
    trained = []
    for observing in (False, True):
        torch.manual_seed(1)
        model = tiny_model()
        observer = StepObserver(model, lambda step: None, strict=True)
        make_trainer(model, tmp_path, *([ObserveSteps(observer)] if observing else [])).train()
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *trained))
