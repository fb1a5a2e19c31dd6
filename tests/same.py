"""When two calibrations gave the same."""

from dataclasses import fields

import torch


def assert_same(first, second):
    """All statistics are equal, bit by bit, and what is said of them."""
    assert second.names == first.names
    assert second.fingerprint == first.fingerprint
    assert second.provenance == first.provenance
    assert (second.prompts, second.distractor_prompts) == (first.prompts, first.distractor_prompts)
    for mine, other in (
        (first.gradient_squares, second.gradient_squares),
        (first.distractor_squares, second.distractor_squares),
    ):
        assert (mine is None) == (other is None)
        for a, b in zip(mine or (), other or (), strict=True):
            assert a is None or torch.equal(a, b)
    assert first.classes.keys() == second.classes.keys()
    for name, many in first.classes.items():
        for a, b in zip(many, second.classes[name], strict=True):
            for key in (field.name for field in fields(a)):
                value, other = getattr(a, key), getattr(b, key)
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, other), f"{name}: {key}"
                else:
                    assert value == other, f"{name}: {key}"
