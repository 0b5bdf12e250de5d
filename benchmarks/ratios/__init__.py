"""Ratios of two works on this machine: the pipeline, the metrics and the training step."""
