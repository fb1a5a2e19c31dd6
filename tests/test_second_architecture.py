"""The second architecture's benchmark: nothing held out is trained on, and a lost race is told."""

from bench import second_architecture as second
from prunekit.criteria import CRITERIA


def test_held_out_files_are_not_trained_on_and_tests_are_left_out():
    seen, unseen = second.split()
    assert len(unseen) > 20
    assert not set(seen) & {text for text in unseen if len(text) > 200}
    assert not any("import unittest\n" in text and "class Test" in text for text in unseen)


def test_prompts_are_pieces_of_the_files_spread_over_all_of_them():
    files = [chr(97 + i) * 10 * second.PROMPT for i in range(8)]
    corpus = second.prompts(files, 16, "letters")
    assert len(corpus.examples) == 16
    assert {example.text[0] for example in corpus.examples} == set("abcdefgh")
    assert all(len(example.text) == second.PROMPT for example in corpus.examples)


def test_every_criterion_of_others_is_a_rival():
    own = {"auto", "rms", "reconstruction", "reconstruction_fisher"}
    assert {criterion for criterion, _ in second.RIVALS} == set(CRITERIA) - own


def test_a_rival_that_loses_no_more_is_named():
    rises = {second.DEFAULT: {0.2: 0.1, 0.5: 0.2}, "wanda + lstsq": {0.2: 0.2, 0.5: 0.19}}
    assert second.beaten_by(rises) == ["wanda + lstsq at 50.0%"]
    assert second.table(rises).splitlines()[2] == "| wanda + lstsq | 0.200 | 0.190 |"
