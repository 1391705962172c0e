"""Which layers would stand still in bf16? Observe the optimizer of a plain training loop.

A `StepObserver` shows the weights before and after each tenth step, and the gradients as the
optimizer applied them: accumulated over four batches, and clipped.
"""

import torch
from torch import nn

from altgrad import OptimizerStep, StepObserver, measure

FORMATS = ("bf16", "e4m3fn")

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 4))
teacher = nn.Linear(32, 4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

stalls = {name: [] for name, _ in model.named_parameters()}


def on_step(step: OptimizerStep) -> None:
    """Measure a step at once: its tensors are valid until this function returns."""
    tensors = zip(step.names, step.before, step.after, step.gradients, strict=True)
    for name, before, after, gradient in tensors:
        figures = measure(before, after, gradient, FORMATS)
        stalls[name].append([figures[f"stall_frac/{format}"] for format in FORMATS])


with StepObserver(model, on_step, should_observe=lambda index: index % 10 == 9).attach(optimizer):
    for batch in range(400):
        inputs = torch.randn(64, 32)
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        (loss / 4).backward()
        if batch % 4 == 3:  # four batches make one step
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()

means = {name: torch.tensor(shares).nanmean(0).tolist() for name, shares in stalls.items()}
print(f"{'updates that stall':20}", *(f"{format:>8}" for format in FORMATS))
for name, shares in means.items():
    print(f"{name:20}", *(f"{share:8.1%}" for share in shares))
frozen = [name for name, (bf16, _) in means.items() if bf16 > 0.99]
print("Stored in bf16, these would be frozen:", ", ".join(frozen) or "none")
