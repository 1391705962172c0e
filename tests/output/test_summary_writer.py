"""`WriterLogger`: a SummaryWriter gets numbers, pictures and verdicts."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from altgrad import Histogram
from altgrad.output import WriterLogger
from altgrad.output.charts import Row
from altgrad.output.loggers import (
    can_show,
    describe_runs,
    log_histograms,
    log_row,
    wrap_loggers,
)


def test_a_summary_writer_gets_numbers_and_histograms(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        logger = WriterLogger(writer)
        assert can_show([logger])
        (runs,) = wrap_loggers([logger])
        log_row(runs, Row(7, {"ulp_mean": 0.25}, {}, {"layer": {"ulp_mean": 0.5}}))
        log_histograms([logger], 7, {"steps/bf16": Histogram(-3, (1, 0, 2))})
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    found = {tag: [(each.step, each.value) for each in each] for tag, each in scalars.items()}
    assert found == {
        "2-AltGrad-model/ulp_mean": [(7, 0.25)],
        "3-AltGrad-layers/ulp_mean/layer": [(7, 0.5)],
    }
    (histogram,) = events.Histograms("6-AltGrad-steps/steps/bf16")
    assert histogram.histogram_value.num == 3


def test_a_run_is_described_by_the_folder_of_its_writer(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        described = describe_runs([WriterLogger(writer)])
    expected = {"logger": "WriterLogger", "name": None, "id": None, "version": str(tmp_path)}
    assert described == [expected]
