"""In your own training loop: which layers would stand still if they were stored in bf16?"""

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
    """Keep the figures; the tensors are valid until this returns."""
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

shares = {name: torch.tensor(of_layer).nanmean(0).tolist() for name, of_layer in stalls.items()}
print(f"{'updates that stall':20}", *(f"{format:>8}" for format in FORMATS))
for name, of_layer in shares.items():
    print(f"{name:20}", *(f"{share:8.1%}" for share in of_layer))
frozen = [name for name, (bf16, _) in shares.items() if bf16 > 0.99]
print("Stored in bf16, these would be frozen:", ", ".join(frozen) or "none")
