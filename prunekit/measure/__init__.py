"""Measuring: time, throughput, memory, and where the figures came from."""

from prunekit.measure.comparison import bench
from prunekit.measure.memory import model_bytes, parameter_count, peak_memory
from prunekit.measure.provenance import provenance
from prunekit.measure.timing import Summary, interleave, summarise

__all__ = [
    "Summary",
    "bench",
    "interleave",
    "model_bytes",
    "parameter_count",
    "peak_memory",
    "provenance",
    "summarise",
]
