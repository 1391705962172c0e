"""One fp32 run predicts the results of runs whose weights really are stored."""

from __future__ import annotations

import pytest
import torch

from altgrad import WeightStorage
from altgrad.report import Verdict
from examples.predict_and_confirm import (
    FORMATS,
    Experiment,
    Updates,
    about_gains,
    digits,
    experiment,
    gains,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*`logger=False`.*", "ignore:.*no `val_dataloader`.*", "ignore:.*GPU.*"
)


def check(found: Experiment, formats: tuple[str, ...]) -> None:
    """Check bounds for a run and each matrix, the order of formats, the remedy and the gains."""
    for format in formats:
        nearest = found.stored[format, "nearest"]
        assert found.prediction("stall_frac", format) == pytest.approx(
            nearest.updates.stall(), abs=0.05
        )
        matrices = [name for name, weight in nearest.weights.items() if weight.dim() > 1]
        assert len(matrices) == 3
        for name in matrices:
            assert found.prediction("stall_frac", format, name) == pytest.approx(
                nearest.updates.stall(name), abs=0.08
            ), (format, name)
        assert found.stored[format, "stochastic"].loss <= 1.5 * found.fp32.loss
    by_kept = sorted(formats, key=lambda f: -found.prediction("kept_update_ratio", f))
    by_loss = sorted(formats, key=lambda f: found.stored[f, "nearest"].loss)
    assert by_kept == by_loss
    coarsest = found.stored[formats[-1], "nearest"].loss
    assert coarsest > 3 * found.fp32.loss  # otherwise there is no damage to predict
    check_gains(found)


def check_gains(found: Experiment) -> None:
    assert gains(found) == ["net.1.weight", "net.4.weight"]
    for name in gains(found):
        assert found.prediction.verdicts[name]["bf16"].verdict is Verdict.FROZEN
        assert found.prediction("never_moved_frac", "bf16", name) == 1.0
        assert (found.stored["bf16", "nearest"].weights[name] == 1.0).all()
        assert found.stored["bf16", "nearest"].updates.never_moved(name) == 1.0
        assert (found.fp32.weights[name] != 1.0).float().mean() > 0.9
        assert (found.fp32.weights[name] - 1).abs().max() > 0.02
        assert (found.stored["bf16", "stochastic"].weights[name] != 1.0).any()


def test_one_run_predicts_other_runs(tmp_path) -> None:
    """Check the fast version: 60 steps and two formats with one seed."""
    formats = ("bf16", "e4m3fn")
    found = experiment(digits(0, 60), tmp_path, formats, ["nearest", "stochastic"])
    check(found, formats)
    assert about_gains([found]).startswith(
        "Of the 2 LayerNorm gains in 1 run in bf16, 2 of 2 are predicted to be frozen, and 2 of 2 "
        "are exactly 1.0 after training; in fp32 they move by up to 0.0"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_run_predicts_other_runs_at_full_length(seed: int, tmp_path) -> None:
    check(experiment(digits(seed, 300), tmp_path, FORMATS, ["nearest", "stochastic"]), FORMATS)


def test_stalled_updates_are_counted_for_each_weight() -> None:
    """Move two weights at 1 and one at 2^-6 by 0.001, then by 0.01, in bf16."""
    net = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 1.0, 2**-6]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    updates = Updates(net)
    updates.attach(optimizer, WeightStorage("bf16"))
    for gradient in ([0.001, 0.0, 0.001], [0.001, 0.01, 0.01]):
        net.weight.grad = torch.tensor([gradient])
        optimizer.step()
    assert updates.stalls == [{"weight": (1, 2)}, {"weight": (1, 3)}]
    assert updates.stall() == updates.stall("weight") == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert updates.never_moved() == pytest.approx(1 / 3)
