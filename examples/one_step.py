"""Measure one AdamW step: how much of each layer's update would three formats keep?"""

import torch
from torch import nn

from altgrad import measure

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
inputs, labels = torch.randn(128, 64), torch.randint(10, (128,))

nn.functional.cross_entropy(model(inputs), labels).backward()
before = {name: p.detach().clone() for name, p in model.named_parameters()}
optimizer.step()

for name, parameter in model.named_parameters():
    figures = measure(before[name], parameter, parameter.grad)
    kept = (f"{f} {figures[f'kept_update_ratio/{f}']:5.2f}" for f in ("bf16", "e4m3fn", "e5m2"))
    print(f"{name:10} keeps", *kept)
