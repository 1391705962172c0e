"""A training ends with its verdicts, and its progress bar shows the share kept on demand."""

from pathlib import Path

import pytest
from pytorch_lightning.callbacks import TQDMProgressBar

from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, trainer


def test_the_end_of_fit_has_the_answer_the_path_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = PrecisionMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(Net(), batches(3))
    lines = capsys.readouterr().out.splitlines()
    (first,) = (k for k, line in enumerate(lines) if line.startswith("[AltGrad] "))
    assert any(word in lines[first] for word in ("ine: ", "Watch: ", "Unsure: "))
    assert lines[-1] == f"altgrad report {monitor.path}"


@pytest.mark.parametrize("silent", ["summary", "no step"])
def test_nothing_is_printed_without_a_verdict_or_a_wish_for_it(
    silent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_empty = silent == "no step"
    monitor = PrecisionMonitor(every_n_steps=100 if is_empty else 1, summary=is_empty)
    fit = trainer(tmp_path, monitor).fit
    if is_empty:
        with pytest.warns(UserWarning, match="observed no step"):
            fit(Net(), batches(3))
    else:
        fit(Net(), batches(3))
    assert "[AltGrad]" not in capsys.readouterr().out


class Bar(TQDMProgressBar):
    """A progress bar that notes what it shows of AltGrad after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[object] = []

    def on_train_batch_end(self, trainer, pl_module, *arguments):  # type: ignore[no-untyped-def]
        super().on_train_batch_end(trainer, pl_module, *arguments)
        self.shown.append(self.get_metrics(trainer, pl_module).get("altgrad"))


@pytest.mark.parametrize("wanted", [True, False])
def test_the_progress_bar_shows_the_share_kept_so_far(wanted: bool, tmp_path: Path) -> None:
    bar = Bar()
    monitor = PrecisionMonitor(
        every_n_steps=2, recipes=["bf16", "bf16-sr"], progress_bar=wanted, summary=False
    )
    trainer(tmp_path, monitor, bar, enable_progress_bar=True, max_epochs=2).fit(Net(), batches(4))
    if not wanted:
        assert bar.shown == [None] * 8
        return
    assert bar.shown[0] is None
    later = bar.shown[2:]
    assert all(str(each).startswith("bf16 ") and ", bf16-sr " in str(each) for each in later)
