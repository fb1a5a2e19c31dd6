"""Pruned models on disk: ordinary transformers folders, with the recipe beside the weights."""

from prunekit.checkpoint.save import RECORD, read_record, remember, save, verify, weight_bytes

__all__ = ["RECORD", "read_record", "remember", "save", "verify", "weight_bytes"]
