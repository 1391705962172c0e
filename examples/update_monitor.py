"""Which weights would never have moved? Monitor a training loop, with a rule for some layers."""

import torch
from torch import nn

from altgrad import SamplingRule, UpdateMonitor

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 4))
teacher = nn.Linear(32, 4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

monitor = UpdateMonitor(
    model,
    formats=["bf16", "e4m3fn", "mxfp4"],
    every_n_steps=10,
    max_elements=1024,  # sampled from each large parameter, once for the whole run
    sampling=[
        SamplingRule("*.bias", enabled=False),
        SamplingRule("1.*", formats=["bf16"]),  # judge the LayerNorm for bf16 alone
    ],
    overhead_budget=0.05,  # share of the time; if steps cost more, fewer are observed
)
print(monitor.describe(), end="\n\n")

with monitor.attach(optimizer):
    for _ in range(300):
        inputs = torch.randn(64, 32)
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

assert monitor.latest is not None
print(f"{'layer':10}{'format':10}{'elements':>14}{'kept':>16}{'never moved':>13}")
for name, figures in monitor.latest.layers.items():
    for format in figures.formats:
        kept = f"kept_update_ratio/{format}"
        share = f"{figures[kept]:.2f} ± {figures.standard_error(kept):.3f}"
        never = figures[f"never_moved_frac/{format}"]
        sample = f"{figures.elements:,} of {figures.population:,}"
        print(f"{name:10}{format:10}{sample:>14}{share:>16}{never:13.1%}")
