"""Tasks: what counts as an answer, how failures are named, and what a run leaves and resumes."""

import errno
import json
import math
import os
from dataclasses import replace

import pytest

from prunekit.errors import InputError
from prunekit.tasks import FAILURES, Generation, TaskResult, evaluate_task, read_task, run
from prunekit.tasks.answers import as_number, boxed, equivalent, last_number
from prunekit.tasks.arithmetic import arithmetic, arithmetic_corpus
from prunekit.tasks.base import Problem, Task
from prunekit.tasks.failures import failure_kind, repeats
from tests.models import tiny_model

HUMANEVAL = ("humaneval", {"allow_code_execution": True})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def grade(task, text, index=0, ended=True):
    return task.grade(task.problems[index], text, ended=ended)


# Failures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a" * 24, True),
        ("a" * 23, False),
        ("so it is;" * 4, True),
        ("so it is;" * 3, False),
        ("Well, " + "so it is. " * 5 + " \n\n", True),
        ("so it is. " * 5 + "And then?", False),
        ("12 12 12 12 12 12 12 12 12", True),
        ("12 13 14 15 16 17 18 19 20", False),
        ("".join(f"{i}. So, 2 * {i} = {2 * i}.\n" for i in range(97, 102)), True),
        ("".join(f"{i}. So, {'x' * i} it is.\n" for i in range(7, 12)), False),
        ("", False),
        ("a line of 30 different letters\n" * 3 + "a line of 31 different letters\n", False),
        (("x" * 299 + "y") * 4, True),
    ],
)
def test_a_loop_is_a_unit_four_times_over_24_characters(text, expected):
    assert repeats(text) is expected


@pytest.mark.parametrize(
    ("text", "ended", "parsed", "kind"),
    [
        ("", True, False, "empty"),
        (" \n", True, True, "empty"),
        (" \n", False, False, "trap"),
        ("no " * 20, False, False, "repetition"),
        ("no " * 20, True, True, "repetition"),
        ("on and on", False, True, "trap"),
        ("blue", True, False, "unparsable"),
        ("7", True, True, "wrong"),
    ],
)
def test_each_failure_has_one_name(text, ended, parsed, kind):
    assert failure_kind(text, ended=ended, parsed=parsed) == kind
    assert kind in FAILURES


def test_results_count_what_failed_and_how_sure_they_are():
    problems = tuple(Problem(str(i), "p", "7") for i in range(5))
    task = Task("t", problems, lambda p, text, ended: text == "7" if text.isdigit() else None)
    texts = [("7", True), ("7", False), ("8", True), ("x", True), ("x", False)]
    made = tuple(Generation(str(i), text, end, 2) for i, (text, end) in enumerate(texts))
    result = TaskResult.of(task, made)
    assert result.correct == (True, True, False, False, False)
    assert result.failures == {"trap": 1, "unparsable": 1, "wrong": 1}
    assert (result.accuracy, result.unended) == (0.4, 2)
    assert result.stderr == pytest.approx(math.sqrt(0.4 * 0.6 / 4))
    facts = result.as_dict()
    assert facts["metrics"][0]["value"] == 0.4
    assert (facts["problems"], facts["tokens"]) == (5, 10)


# Answers


@pytest.mark.parametrize(
    ("gold", "found", "expected"),
    [
        ("18", "18", True),
        ("18", "18.0", True),
        ("18", "17", False),
        ("1000", "1,000", True),
        ("70000", "\\$70{,}000", True),
        ("18", "\\$18", True),
        ("18", "18 dollars", True),
        ("18", "18\\text{ dollars}", True),
        ("18", "\\frac{36}{2}", True),
        ("0.5", "1/2", True),
        ("18", "3 \\times 6", True),
        ("18", "x = 18", True),
        ("50", "50\\%", True),
        ("-3", "-3", True),
        ("3", "-3", False),
        ("18", "eighteen", False),
    ],
)
def test_answers_are_compared_as_mathematics(gold, found, expected):
    assert bool(equivalent(gold, found)) is expected


def test_numbers_are_found_where_they_stand():
    assert last_number("16 - 3 - 4 = 9, then 9 * 2 = $1,018.50.") == "1,018.50"
    assert last_number("10-4") == "4"
    assert last_number("it is -4") == "-4"
    assert last_number("3, 5, 12,") == "12"
    assert last_number("none") is None
    assert as_number("$1,018.50") == as_number("1018.5 dollars")
    assert as_number("3x") is None


def test_the_last_box_that_closes_counts():
    assert boxed("\\boxed{\\frac{1}{2}} of it") == "\\frac{1}{2}"
    assert boxed("\\boxed{3} or \\boxed{5} or \\boxed{7") == "5"
    assert boxed("3") is None


# GSM8K


@pytest.fixture
def gsm(tmp_path):
    rows = [
        {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,024"},
        {"question": "And now?", "answer": "#### -3"},
    ]
    return read_task(f"gsm8k:{write(tmp_path / 'g.jsonl', rows)}")


def test_gsm8k_reads_what_follows_the_mark(gsm):
    assert [problem.answer for problem in gsm.problems] == ["1,024", "-3"]
    assert "How many?" in gsm.problems[0].prompt
    assert gsm.max_new_tokens == 1024


@pytest.mark.parametrize(
    ("text", "ended", "failure"),
    [
        ("So it is \\boxed{1024}.", True, ""),
        ("So it is \\boxed{1024}. Then again, 7", True, ""),
        ("So it is \\boxed{1024}. And on", False, ""),
        ("#### 1024", True, ""),
        ("#### 1024\n\nQuestion: 7", True, ""),
        ("The answer is 1,024 clips.", True, ""),
        ("12 * 2 = <<12*2=24>>1024", True, ""),
        ("1024 <<1024/2=512>>", True, ""),
        ("The answer is 1,024 clips and", False, "trap"),
        ("\\boxed{7} then 1024", True, "wrong"),
        ("I do not know.", True, "unparsable"),
        ("", True, "empty"),
        ("1024 " * 30, False, "repetition"),
    ],
)
def test_gsm8k_judges_the_final_answer(gsm, text, ended, failure):
    found = grade(gsm, text, ended=ended)
    assert (found.correct, found.failure) == (not failure, failure)


# HumanEval


def test_humaneval_asks_before_it_runs_code():
    with pytest.raises(InputError, match="pass --allow-code-execution"):
        read_task("humaneval")


def test_humaneval_passes_what_passes_its_tests():
    task = read_task(HUMANEVAL[0], limit=3, **HUMANEVAL[1])
    assert task.problems[0].prompt.endswith('"""')  # the indentation is the model's
    right = (
        "\n    for i, a in enumerate(numbers):\n        for b in numbers[i + 1:]:\n"
        "            if abs(a - b) < threshold:\n                return True\n    return False\n"
    )
    assert grade(task, right, ended=False).correct  # that it then ran on does not matter
    assert grade(task, "\n    return False\n").failure == "wrong"
    assert grade(task, "\n    return (\n").failure == "unparsable"
    assert grade(task, "", ended=True).failure == "empty"
    assert grade(task, "\n    import os\n    os._exit(0)\n").failure == "wrong"
    assert grade(task, "\n    return (\n", ended=False).failure == "trap"


@pytest.mark.slow
def test_every_solution_of_humaneval_passes():
    from prunekit.tasks.embedded import humaneval_rows

    task = read_task(HUMANEVAL[0], **HUMANEVAL[1])
    solutions = [row["canonical_solution"] for row in humaneval_rows()]
    failed = [
        problem.id
        for index, (problem, text) in enumerate(zip(task.problems, solutions, strict=True))
        if not grade(task, "\n" + text, index).correct
    ]
    assert len(solutions) == 164
    assert failed == []


# Arithmetic


def test_no_sum_is_in_both_training_and_evaluation():
    training = set()
    for seed in (0, 1, 7):
        corpus = arithmetic_corpus(2000, seed=seed)
        training |= {e.text[: e.completion_start] for e in corpus.examples}
        assert corpus == arithmetic_corpus(2000, seed=seed)
    tasks = [arithmetic(200, seed=seed) for seed in (0, 1)]
    assert not training & {p.prompt for task in tasks for p in task.problems}
    assert len({p.prompt for p in tasks[0].problems}) == 200
    shared = {p.prompt for p in tasks[0].problems} & {p.prompt for p in tasks[1].problems}
    assert len(shared) < 130  # another seed draws others, of which few are there to draw among


def test_sums_are_right_and_limits_nest():
    corpus = arithmetic_corpus(50, seed=3)
    for example in corpus.examples:
        prompt, completion = (
            example.text[: example.completion_start],
            example.text[example.completion_start :],
        )
        assert prompt.endswith(" =")
        assert completion.endswith(f" {eval(prompt[5:-2])}\n")
    few, many = read_task("arithmetic", limit=5), read_task("arithmetic", limit=9)
    assert few.problems == many.problems[:5]
    for problem in many.problems:
        assert int(problem.answer) == eval(problem.prompt[5:-2])


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (" {}", ""),
        ("{}.", ""),
        (" {} or", ""),
        (" {}1", "wrong"),
        (" {}.5", "wrong-ish"),
        ("", "empty"),
    ],
)
def test_arithmetic_takes_the_number_it_begins_with(text, failure):
    task = read_task("arithmetic", limit=1)
    found = grade(task, text.format(task.problems[0].answer))
    assert found.failure == {"wrong-ish": "unparsable"}.get(failure, failure)


# Others


def test_reasoning_gym_is_judged_by_its_own_scorer():
    task = read_task("reasoning-gym:spell_backward", limit=3, seed=1)
    answer = task.problems[0].answer
    assert grade(task, f"Well. <answer> {answer} ").correct
    assert grade(task, answer).correct
    assert grade(task, "<answer>zzz").failure == "wrong"
    assert grade(task, "It is <answer>").failure == "unparsable"
    with pytest.raises(InputError, match=r"reasoning-gym:none: expected one of .*chain_sum"):
        read_task("reasoning-gym:none")


def test_jsonl_matches_as_each_row_says(tmp_path):
    rows = [
        {"prompt": "a", "answer": "Paris"},
        {"prompt": "b", "answer": 12, "match": "number"},
        {"prompt": "c", "answer": "blue", "match": "contains"},
    ]
    task = read_task(f"jsonl:{write(tmp_path / 'own.jsonl', rows)}")
    assert (task.name, task.stop) == ("own", ())
    assert grade(task, " Paris\n").correct
    assert grade(task, "Paris, France").failure == "wrong"
    assert grade(task, "it is 12.0, yes", 1).correct
    assert grade(task, "it is 12 or 13", 1).failure == "wrong"
    assert grade(task, "it is", 1).failure == "unparsable"
    assert grade(task, "the blue one", 2).correct
    assert read_task(f"jsonl:{write(tmp_path / 'o.jsonl', rows[:1])}").stop == ("\n",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, "t.jsonl:1: expected `prompt`"),
        ({"prompt": "x"}, "t.jsonl:1: expected `answer`"),
        ({"prompt": "x", "answer": "y", "match": "like"}, "match: got 'like'; expected one of exa"),
        (
            {"prompt": "x", "answer": "y", "match": "number"},
            "got 'y', which nothing can match by n",
        ),
        ({"prompt": "x", "answer": " "}, "which nothing can match"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_task(f"jsonl:{write(tmp_path / 't.jsonl', [row])}")


@pytest.mark.parametrize("spec", ["gsm", "gsm8k", "humaneval:x", "arithmetic:2", "jsonl:", ""])
def test_an_unknown_task_is_answered_with_those_there_are(spec):
    with pytest.raises(InputError, match="expected one of gsm8k:FILE, humaneval, arithmetic"):
        read_task(spec)


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch, tmp_path):
    import sys

    for package, spec in (
        ("reasoning_gym", "arithmetic"),
        ("reasoning_gym", "reasoning-gym:chain_sum"),
        ("math_verify", "gsm8k:none.jsonl"),
        ("lm_eval", "lm-eval:arc_easy"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=r"is not installed; pip install 'prunekit\["):
            read_task(spec)


# Running


@pytest.fixture
def words(folder):
    from prunekit.integrations.loading import load_tokenizer

    return load_tokenizer(str(folder))


@pytest.fixture
def echo():
    """12 prompts of different lengths for the tiny model of words; a w7 ends each answer."""
    texts = [" ".join(f"w{3 + (i * j) % 90}" for j in range(2 + i % 5)) for i in range(1, 13)]
    problems = tuple(Problem(str(i), text, f"w{i}") for i, text in enumerate(texts))
    return Task("echo", problems, lambda p, text, ended: p.answer in text, max_new_tokens=10)


def test_a_run_gives_results_in_the_tasks_order(words, echo):
    model = tiny_model("llama")
    one = evaluate_task(model, words, echo, batch_size=1, quiet=True)
    many = evaluate_task(model, words, echo, batch_size=5, quiet=True)
    assert one == many
    assert [g.id for g in many.generations] == [p.id for p in echo.problems]
    assert {g.tokens for g in many.generations} == {10}
    assert all(g.text.startswith(" ") or g.text.startswith("w") for g in many.generations)


def test_a_task_may_be_asked_as_a_chat(words, echo):
    model, template = tiny_model("llama"), "w3 {{ messages[0]['content'] }} w4"
    asked = tuple(replace(p, prompt=f"w3 {p.prompt} w4") for p in echo.problems)
    as_text = evaluate_task(model, words, replace(echo, problems=asked), quiet=True)
    chat = replace(echo, chat=True)
    plain = evaluate_task(model, words, chat, quiet=True)  # there is no template yet
    words.chat_template = template
    model.train()
    assert evaluate_task(model, words, chat, quiet=True) == as_text
    assert model.training
    assert plain == evaluate_task(model, words, echo, quiet=True) != as_text


def test_a_run_that_was_killed_goes_on_and_ends_alike(monkeypatch, tmp_path, words, echo):
    model, path = tiny_model("llama"), tmp_path / "runs" / "echo.jsonl"
    whole = evaluate_task(model, words, echo, batch_size=5, quiet=True)
    batches = []

    def counting(*args, **options):
        batches.append(len(args[2]))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    generate = run.generate_batch
    monkeypatch.setattr(run, "generate_batch", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate_task(model, words, echo, batch_size=5, resume=path, quiet=True)
    assert len(path.read_text().splitlines()) == 1 + 5
    torn = path.read_text() + '{"id": "3", "te'
    path.write_text(torn)
    assert evaluate_task(model, words, echo, batch_size=5, resume=path, quiet=True) == whole
    assert batches == [5, 5, 5, 2]
    assert evaluate_task(model, words, echo, batch_size=5, resume=path, quiet=True) == whole
    assert batches == [5, 5, 5, 2]
    assert len(path.read_text().splitlines()) == 1 + 12
    half = path.read_text().splitlines(keepends=True)[:9]  # a batch of which some lines are missing
    path.write_text("".join(half))
    assert evaluate_task(model, words, echo, batch_size=5, resume=path, quiet=True) == whole
    assert batches == [5, 5, 5, 2, 5, 2]


def test_generations_of_another_run_are_refused(tmp_path, words, echo):
    path = tmp_path / "echo.jsonl"
    model = tiny_model("llama")
    evaluate_task(model, words, echo, resume=path, quiet=True)
    with pytest.raises(InputError, match="has generations of another max_new_tokens; give ano"):
        evaluate_task(model, words, echo, resume=path, max_new_tokens=3, quiet=True)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(InputError, match="has generations of another model"):
        evaluate_task(model, words, echo, resume=path, quiet=True)
    with pytest.raises(InputError, match="batch size: got 0"):
        evaluate_task(model, words, echo, batch_size=0, quiet=True)
    path.write_text("{}\nnothing\n")
    with pytest.raises(InputError, match="is no file of generations"):
        evaluate_task(model, words, echo, resume=path, quiet=True)


def test_lm_eval_runs_its_own_tasks_on_our_model(tmp_path, folder, words):
    pytest.importorskip("lm_eval")
    from prunekit.integrations.loading import load

    rows = [{"q": f"w{a} w{a + 1}", "a": f"w{a + 2}"} for a in range(3, 13)]
    data = write(tmp_path / "words.data", rows)
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: [w5, w6, w7, w8, w9, w10, w11, w12, w13, w14]\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    task = read_task(f"lm-eval:{tmp_path / 'choose.yaml'}", limit=8)
    result = evaluate_task(load(folder), words, task, quiet=True)
    assert len(result.correct) == 8
    assert [metric.name for metric in result.metrics] == ["acc"]
    assert result.metrics[0].value == result.accuracy
    assert result.metrics[0].stderr == pytest.approx(result.stderr)
    assert result.failures.get("wrong", 0) == 8 - sum(result.correct)
    with pytest.raises(InputError, match="lm-eval knows no such task"):
        read_task("lm-eval:no-such-task-at-all")


def test_a_full_disk_is_one_clear_line(monkeypatch, tmp_path, words, echo):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="echo: cannot be written: No space left on device"):
        evaluate_task(tiny_model("llama"), words, echo, resume=tmp_path / "echo", quiet=True)
