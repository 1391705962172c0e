"""Which layers, which steps and which elements are observed; torch only."""

from altgrad.sampling.dry_run import describe_layers
from altgrad.sampling.elements import sample_elements
from altgrad.sampling.layers import LayerSampling, SamplingRule, resolve_layers
from altgrad.sampling.steps import OverheadBudget, StepSchedule

__all__ = [
    "LayerSampling",
    "OverheadBudget",
    "SamplingRule",
    "StepSchedule",
    "describe_layers",
    "resolve_layers",
    "sample_elements",
]
