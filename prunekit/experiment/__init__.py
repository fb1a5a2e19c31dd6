"""Experiments: many ways to prune one model, from one calibration."""
