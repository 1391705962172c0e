"""AltGrad: if I kept my weights in this number format, would they still move?

Names are imported when they are first used: `import altgrad` alone loads nothing, not even torch.

`altgrad.quantization` rounds to formats, `altgrad.observation` shows optimizer steps,
`altgrad.measurement` knows the metrics, `altgrad.report` reads run files and judges them.
"""

from typing import TYPE_CHECKING

from altgrad import _lazy
from altgrad._version import __version__

if TYPE_CHECKING:
    from altgrad import (
        measurement as measurement,
        observation as observation,
        quantization as quantization,
        report as report,
    )
    from altgrad.distributed.host_group import LostRankError
    from altgrad.measurement.figures import Figures, model_figures
    from altgrad.measurement.histogram import Histogram
    from altgrad.measurement.measure import DEFAULT_FORMATS, measure
    from altgrad.measurement.step_record import StepRecord
    from altgrad.monitor.monitor import UpdateMonitor
    from altgrad.monitor.schedule import StepSchedule
    from altgrad.observation.observer import StepObserver
    from altgrad.observation.rules import SamplingRule
    from altgrad.observation.step import OptimizerStep
    from altgrad.quantization.float_format import FloatFormat
    from altgrad.quantization.formats import get_format
    from altgrad.quantization.ops import quantize, spacing
    from altgrad.recipes.storage import WeightStorage

__all__ = [
    "DEFAULT_FORMATS",
    "Figures",
    "FloatFormat",
    "Histogram",
    "LostRankError",
    "OptimizerStep",
    "SamplingRule",
    "StepObserver",
    "StepRecord",
    "StepSchedule",
    "UpdateMonitor",
    "WeightStorage",
    "__version__",
    "get_format",
    "measure",
    "model_figures",
    "quantize",
    "spacing",
]

if not TYPE_CHECKING:  # a `__getattr__` would make every name Any for mypy
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            "distributed.host_group": "LostRankError",
            "measurement.figures": "Figures model_figures",
            "measurement.histogram": "Histogram",
            "measurement.measure": "DEFAULT_FORMATS measure",
            "measurement.step_record": "StepRecord",
            "monitor.monitor": "UpdateMonitor",
            "monitor.schedule": "StepSchedule",
            "observation.observer": "StepObserver",
            "observation.rules": "SamplingRule",
            "observation.step": "OptimizerStep",
            "quantization.float_format": "FloatFormat",
            "quantization.formats": "get_format",
            "quantization.ops": "quantize spacing",
            "recipes.storage": "WeightStorage",
        },
        submodules="measurement observation quantization report",
    )
