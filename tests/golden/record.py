"""Record the golden run, or after an intended change the figures of some metrics anew.

    python -m tests.golden.record stall_frac …  # only these metrics, from the recorded steps
    python -m tests.golden.record --everything  # done once, by 0.1.0: files and checkpoints are its

A metric whose figures change is listed with its reason in CHANGED of test_golden.py.

Each figure comes with a tolerance: 0 for what follows from counts and extrema, for others what a
change of each sum by 1e-12 of its absolute terms makes of them (all terms are positive).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from altgrad import StepRecord
from altgrad.measurement import get_metric
from altgrad.measurement.columns import FORMAT_SUMS, SUMS
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.step_table import StepTable
from tests.golden import replay
from tests.golden.replay import RecordedRun, RecordedStep

STEPS = 4
RELATIVE_ERROR = 1e-12
ROUNDED_OPERATIONS = 4 * 2.0**-52
"""The few divisions and roots from sums to a figure, which mathematical libraries round apart."""
SUMS_OF_REALS = {
    *("ulps", "paired_gradient_abs", "stiffness", "stiffness_gradient", "gradient_per_stiffness"),
    *("grid_error", "kept", "kept_update_cubed", "stochastic_move", "stochastic_variance"),
    *("weight_sq", "update_sq", "update_4th", "gradient_sq", "paired_gradient_sq"),
    *("stiffness_sq", "grid_error_sq", "kept_sq", "lost_sq", "judged_sq", "judged_4th"),
}


class RecordedNet(nn.Module):
    """A net with a convolution, gains at 1, a matrix that is sampled, zeros, and bf16 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.hidden = nn.Linear(64, 48, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(48, 10)
        self.low = nn.Linear(10, 6, bias=False, dtype=torch.bfloat16)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, *, use_low: bool) -> Tensor:
        features = self.conv(images).relu().mean(1).flatten(1)
        outputs = self.head(self.hidden(self.norm(features)).relu())
        return self.low(outputs.bfloat16()).float() if use_low else outputs


def train_and_record() -> RecordedRun:
    torch.manual_seed(0)
    net = RecordedNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    steps = []
    for index in range(STEPS):
        images = torch.randn(4, 3, 10, 10)
        optimizer.zero_grad()
        # In the second step low.weight has no gradient.
        net(images, use_low=index != 1).square().mean().backward()
        stepped = {name: p for name, p in net.named_parameters() if p.grad is not None}
        gradients = {name: p.grad.clone() for name, p in stepped.items()}
        optimizer.step()
        after = {name: p.detach().clone() for name, p in stepped.items()}
        steps.append(RecordedStep(gradients, after))
    return RecordedRun(start, steps)


def perturbed_records(seed: int) -> list[StepRecord]:
    """Return the records with each sum changed by up to 1e-12 of itself."""
    generator = torch.Generator().manual_seed(seed)
    with_model = StepTable.with_model

    def with_perturbed_sums(formats: Any, vectors: Numbers, judged: Any) -> Any:
        names = [*SUMS, *FORMAT_SUMS * len(formats)]
        names += [""] * (vectors.shape[1] - len(names))
        is_real = np.array([name in SUMS_OF_REALS for name in names])
        noise = torch.rand(vectors.shape, dtype=torch.float64, generator=generator).numpy() * 2 - 1
        return with_model(formats, vectors * (1 + RELATIVE_ERROR * noise * is_real), judged)

    with mock.patch.object(StepTable, "with_model", with_perturbed_sums):
        return replay.replay()[0]


def figures_as_json() -> dict[str, Any]:
    records, _ = replay.replay()
    others = [perturbed_records(seed) for seed in range(20)]
    rows = []
    keys = [*records[0].model]
    perturbed = zip(*(replay.rows_of(each) for each in others), strict=True)
    for (step, layer, figures), twins in zip(replay.rows_of(records), perturbed, strict=True):
        row = {"step": step, "layer": layer}
        row |= {"population": figures.population, "elements": figures.elements}
        values = [figures[key] for key in keys]
        row["figures"] = [*map(replay.number_to_json, values)]
        row["tolerances"] = tolerances(values, [[t[2][key] for key in keys] for t in twins])
        errors = [figures.standard_error(key) for key in keys]
        row["errors"] = [*map(replay.number_to_json, errors)]
        row["error_tolerances"] = tolerances(
            errors, [[t[2].standard_error(key) for key in keys] for t in twins], exact=False
        )
        histograms = ("ulps", *(f"steps/{format}" for format in figures.formats))
        row["histograms"] = {key: figures.histogram(key) for key in histograms}
        rows.append(row)
    return {"keys": keys, "rows": rows}


def tolerances(
    values: list[float], others: list[list[float]], *, exact: bool = True
) -> list[float]:
    found = []
    for k, value in enumerate(values):
        assert all(math.isnan(other[k]) == math.isnan(value) for other in others), k
        changes = [abs(other[k] - value) for other in others if math.isfinite(value)]
        largest = max(changes, default=0.0)
        rounding = ROUNDED_OPERATIONS * abs(value) if math.isfinite(value) else 0.0
        is_exact = largest == 0.0 and exact
        # Twenty draws miss the worst case; twice their largest change covers it.
        found.append(0.0 if is_exact else float(f"{2 * largest + rounding:.2g}"))
    return found


def write_figures(figures: dict[str, Any]) -> None:
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in figures["rows"])
    text = f'{{"keys":{json.dumps(figures["keys"])},"rows":[\n{rows}\n]}}\n'
    replay.FIGURES_FILE.write_text(text, encoding="utf-8")


def record_everything() -> None:
    replay.DATA.mkdir(exist_ok=True)
    run = train_and_record()
    steps = [step._asdict() for step in run.steps]
    torch.save({"start": run.start, "steps": steps}, replay.STEPS_FILE)
    write_figures(figures_as_json())
    _, monitor = replay.replay(last_step=replay.CHECKPOINT_STEP)
    torch.save(monitor.state_dict(), replay.STATE_FILE)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        keeping = ModelCheckpoint(
            dirpath=folder,
            filename="{step}",
            every_n_epochs=1,
            save_top_k=-1,
        )
        replay.fit(folder, keeping)
        replay.RUN_FILE.write_bytes((folder / "altgrad.jsonl").read_bytes())
        path = folder / f"step={replay.CHECKPOINT_STEP}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["callbacks"][keeping.state_key]  # it holds paths of this machine
        (state,) = checkpoint["callbacks"].values()
        state["output"]["run_file"] = replay.RUN_FILE.name
        torch.save(checkpoint, replay.CHECKPOINT_FILE)


def record_metrics(metrics: list[str]) -> None:
    """Renew figures and errors of these metrics; all else stays as it was recorded."""
    for metric in metrics:
        get_metric(metric)  # or an error that lists near names
    old, new = replay.load_figures(), figures_as_json()
    renewed = {key: k for k, key in enumerate(new["keys"]) if key.split("/")[0] in metrics}
    for row, recorded in zip(new["rows"], old["rows"], strict=True):
        for part in ("figures", "tolerances", "errors", "error_tolerances"):
            recorded[part] = [
                row[part][renewed[key]] if key in renewed else number
                for key, number in zip(old["keys"], recorded[part], strict=True)
            ]
    write_figures(old)


if __name__ == "__main__":
    if sys.argv[1:] == ["--everything"]:
        record_everything()
    elif sys.argv[1:]:
        record_metrics(sys.argv[1:])
    else:
        sys.exit(__doc__)
