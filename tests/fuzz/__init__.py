"""Hostile input for every reader: by property tests, and by a coverage-guided fuzzer."""

KINDS = ("stats", "plan", "record", "nested", "gguf", "jsonl", "csv")  # of files
FRAMED = ("stats", "plan", "nested")  # safetensors: a header in JSON, before the tensors' bytes
