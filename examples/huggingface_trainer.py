"""Which layers would stand still in bf16? Observe the optimizer of a Hugging Face Trainer.

A callback attaches a `StepObserver`, which shows the weights before and after each tenth step.
"""

import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from altgrad import OptimizerStep, StepObserver, measure

FORMATS = ("bf16", "e4m3fn")


class ObserveSteps(TrainerCallback):
    """A callback that attaches an observer to the optimizer that the Trainer makes."""

    def __init__(self, observer: StepObserver) -> None:
        self.observer = observer

    def on_train_begin(self, *_: object, **kwargs: Any) -> None:
        self.observer.attach(kwargs["optimizer"])

    def on_train_end(self, *_: object, **__: Any) -> None:
        self.observer.detach()


if __name__ == "__main__":
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=64, **shape))
    tokens = (torch.randint(64, (640, 1)) + torch.arange(16)) % 64  # the model learns to count
    stalls = {name: [] for name, _ in model.named_parameters()}

    def on_step(step: OptimizerStep) -> None:
        """Measure a step at once: its tensors are valid until this function returns."""
        tensors = zip(step.names, step.before, step.after, step.gradients, strict=True)
        for name, before, after, gradient in tensors:
            figures = measure(before, after, gradient, FORMATS)
            stalls[name].append([figures[f"stall_frac/{format}"] for format in FORMATS])

    observer = StepObserver(model, on_step, should_observe=lambda index: index % 10 == 9)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=1e-3,
            gradient_accumulation_steps=4,
            max_grad_norm=0.1,
            seed=0,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[ObserveSteps(observer)])
        with observer:  # detaches even if training raises; on_train_end is not called then
            trainer.train()

    means = {name: torch.tensor(shares).nanmean(0).tolist() for name, shares in stalls.items()}
    print(f"{'updates that stall':46}", *(f"{format:>8}" for format in FORMATS))
    for name, shares in means.items():
        print(f"{name:46}", *(f"{share:8.1%}" for share in shares))
    frozen = [name for name, (bf16, _) in means.items() if bf16 > 0.99]
    print("Stored in bf16, these would be frozen:", ", ".join(frozen) or "none")
