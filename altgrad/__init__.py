"""AltGrad: if I kept my weights in this number format, would they still move?"""

from altgrad._version import __version__
from altgrad.measurement.figures import Figures, model_figures
from altgrad.measurement.measure import DEFAULT_FORMATS, measure
from altgrad.measurement.step_record import StepRecord
from altgrad.monitor.monitor import UpdateMonitor
from altgrad.monitor.schedule import StepSchedule
from altgrad.observation import OptimizerStep, StepObserver
from altgrad.observation.rules import SamplingRule
from altgrad.quantization import FloatFormat, get_format, quantize, spacing
from altgrad.recipes.storage import WeightStorage

__all__ = [
    "DEFAULT_FORMATS",
    "Figures",
    "FloatFormat",
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
