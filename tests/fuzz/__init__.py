"""Hostile input for every reader: by property tests, and by a coverage-guided fuzzer."""
