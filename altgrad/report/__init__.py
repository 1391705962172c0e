"""Reports of a run, made of records and other plain numbers; they never see a model."""

from altgrad.report.drawings import heat_map, kept_map, png, ranges, steps_histogram, svg

__all__ = ["heat_map", "kept_map", "png", "ranges", "steps_histogram", "svg"]
