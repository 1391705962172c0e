"""From the tensors of a step to sums, from sums to metrics, from metrics to figures."""
