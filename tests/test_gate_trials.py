"""The gate's trials: what is made slower, and what counts as a failure."""

from collections import Counter

import torch

from bench.gate_trials import failures, said, slowed
from prunekit.measure.gate import OK, REGRESSED, UNDECIDED, Verdict
from prunekit.measure.parts import parts_of


def verdict(said):
    return Verdict("tg", 1.0, 1.0, 11, 0.0, 0.0, 0.0, said)


def test_a_check_says_the_worst_of_its_tests():
    assert said([verdict(OK), verdict(UNDECIDED), verdict(REGRESSED)]) == REGRESSED
    assert said([verdict(OK), verdict(UNDECIDED)]) == UNDECIDED
    assert said([verdict(OK)]) == OK


def test_what_fails_and_what_may_stay_undecided():
    right = {
        "unchanged": Counter({OK: 19, UNDECIDED: 1}),
        "slower": Counter({REGRESSED: 20}),
        "unchanged, busy": Counter({UNDECIDED: 20}),
        "slower, busy": Counter({UNDECIDED: 5, REGRESSED: 15}),
    }
    assert failures(right) == []
    wrong = {
        "unchanged": Counter({OK: 19, REGRESSED: 1}),
        "slower": Counter({REGRESSED: 19, UNDECIDED: 1}),
        "unchanged, busy": Counter({REGRESSED: 2, OK: 18}),
        "slower, busy": Counter({OK: 3}),
    }
    assert [line.split(":")[0] for line in failures(wrong)] == list(wrong)


def test_a_slowed_model_computes_the_same_and_comes_back(llama):
    ids = torch.arange(3, 9)[None]
    before = llama(ids).logits
    with slowed(llama, 0.1):
        assert all("forward" in vars(module) for module in parts_of(llama)["mlp"])
        assert torch.equal(llama(ids).logits, before)
    assert not any("forward" in vars(module) for module in parts_of(llama)["mlp"])
