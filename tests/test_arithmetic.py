"""The sums that a small model learns: right at every step, and apart from those it is judged by."""

import pytest

from prunekit.errors import InputError
from prunekit.tasks.arithmetic import arithmetic, arithmetic_corpus, held_out_corpus


def test_every_step_of_a_solution_has_the_same_value():
    corpus = arithmetic_corpus(300)
    for example in corpus.examples:
        prompt, solution = (
            example.text[: example.completion_start],
            example.text[example.completion_start :],
        )
        assert prompt.startswith("Sum: ")
        assert prompt.endswith(" =")
        assert solution.endswith("\n")
        steps = [prompt[5:-2], *solution.strip().split(" = ")]
        assert len({eval(step) for step in steps}) == 1
        terms = [1 + step.count(" + ") + step.count(" - ") for step in steps]
        assert terms == list(range(terms[0], 0, -1))  # one less a step, down to the answer


def test_a_solution_is_graded_by_what_follows_its_last_sign_of_equality():
    task = arithmetic(60)
    held_out = held_out_corpus(60)
    for problem, example in zip(task.problems, held_out.examples, strict=True):
        solution = example.text.removeprefix(problem.prompt).rstrip("\n")
        assert task.grade(problem, solution, ended=True).correct
        assert task.grade(problem, f" {problem.answer}", ended=True).correct
        wrong = solution.rpartition(" ")[0] + f" {int(problem.answer) + 1}"
        assert task.grade(problem, wrong, ended=True).failure == "wrong"
        assert task.grade(problem, solution.rpartition(" ")[0], ended=True).failure != ""


def test_training_and_evaluation_share_no_sum_and_evaluation_has_an_end():
    training = {e.text for seed in (0, 1) for e in arithmetic_corpus(2000, seed=seed).examples}
    assert not training & {e.text for e in held_out_corpus(200).examples}
    with pytest.raises(InputError, match="got 4000 problems, expected at most 523"):
        arithmetic(4000)
