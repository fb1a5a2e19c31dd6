"""Protocols: what they may say, the cells that come of it, and one line for everything else."""

import json
import re

import pytest
import yaml

from prunekit.cli import main
from prunekit.cli import sweep as sweep_verb
from prunekit.errors import InputError
from prunekit.experiment.cells import Cell, cells_of
from prunekit.experiment.forecast import predict_sweep
from prunekit.experiment.protocol import Source, built_in, protocol_of, read_protocol
from prunekit.measure.cost import Shape
from prunekit.plan import kept_width
from tests.models import tiny_model
from tests.test_cost import CONFIGS, RATES

PLAIN = {
    "name": "small",
    "model": "demo",
    "target": "task.jsonl",
    "grids": [{"sparsities": [0.1, 0.35]}],
}


def with_grids(*grids, **more):
    return protocol_of(PLAIN | {"grids": list(grids)} | more)


def test_a_text_stands_for_a_corpus_and_what_is_left_out_has_its_default():
    found = protocol_of(PLAIN)
    assert found.target == Source("task.jsonl")
    assert found.grids[0].strategies == ("selective",)
    assert found.held_out == 0.2
    assert found.make is None


def test_cells_are_the_combinations_each_once_and_the_dense_model_first():
    found = with_grids(
        {"sparsities": [0.1, 0.2], "compensations": ["none", "lstsq"], "seeds": [1, 2]},
        {"sparsities": [0.1], "strategies": ["random"], "compensations": ["none"], "seeds": [1, 2]},
        {"sparsities": [0.2], "compensations": ["lstsq"]},
    )
    cells = cells_of(found)
    assert cells[0] == Cell("dense")
    assert len(cells) == len(set(cells)) == 1 + 4 + 2
    assert [c.seed for c in cells if c.strategy == "random"] == [1, 2]
    assert {c.criterion for c in cells if c.strategy == "random"} == {"random"}
    assert {c.seed for c in cells if c.strategy == "selective"} == {0}


def test_the_worst_come_first_and_a_recovery_right_behind_what_it_trains():
    grids = [
        {"sparsities": [0.1, 0.5], "recover_at": [0.5]},
        {"sparsities": [0.1], "strategies": ["reverse"], "compensations": ["none"]},
        {"sparsities": [0.1, 0.5], "strategies": ["random"], "compensations": ["none"]},
    ]
    found = with_grids(*grids, recovery="full", order="worst-first")
    assert [(c.strategy, c.sparsity, c.recovery) for c in cells_of(found)] == [
        ("dense", 0.0, ""),
        ("reverse", 0.1, ""),
        ("random", 0.5, ""),
        ("random", 0.1, ""),
        ("selective", 0.5, ""),
        ("selective", 0.5, "full"),
        ("selective", 0.1, ""),
    ]


def test_a_cells_key_depends_on_the_facts_and_on_every_option():
    cell = Cell("selective", 0.1, "wanda", "none")
    others = [Cell("reverse", 0.1, "wanda", "none"), Cell("selective", 0.1, "wanda", "lstsq")]
    keys = {cell.key({"a": 1}), cell.key({"a": 2}), *(other.key({"a": 1}) for other in others)}
    assert len(keys) == 4
    assert cell.key({"a": 1}) == Cell("selective", 0.1, "wanda", "none").key({"a": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "modle: unknown key; did you mean model?"),
        ({"target": None}, "target: got nothing; expected keys and values"),
        ({"target": {"rows": 3}}, "target.source: is missing"),
        ({"target": {"source": "x", "rows": -1}}, "target.rows: got -1; expected at least 0"),
        ({"target": {"source": "x", "rows": 2.5}}, "target.rows: got 2.5; expected a whole number"),
        ({"target": {"source": "x", "rows": True}}, "target.rows: got True; expected a whole"),
        ({"distractors": [{"source": 7}]}, "distractors[0].source: got 7; expected a text"),
        ({"held_out": 1.0}, "held_out: got 1.0; expected more than 0 and less than 1"),
        ({"held_out": float("nan")}, "held_out: got nan; expected a number"),
        ({"order": "best"}, "order: got 'best'; expected one of listed, worst-first"),
        ({"measure": {"speed": "yes"}}, "measure.speed: got 'yes'; expected true or false"),
        ({"grids": []}, "grids: got no cell"),
        ({"grids": [{"sparsities": []}]}, "grids: got no cell"),
        ({"grids": [{"sparsities": [0.1, 1.2]}]}, "grids[0].sparsities[1]: got 1.2; expected more"),
        ({"grids": [{"sparsities": ["a"]}]}, "grids[0].sparsities[0]: got 'a'; expected a number"),
        (
            {"grids": [{"sparsities": [0.1], "strategies": ["best"]}]},
            "grids[0].strategies[0]: got 'best'; expected one of selective, reverse, random",
        ),
        (
            {"grids": [{"sparsities": [0.1], "compensations": ["distill"]}]},
            "grids[0].compensations[0]: got 'distill'; expected one of none, bias, lstsq, seq",
        ),
        (
            {"grids": [{"sparsities": [0.1], "criteria": ["selectivity"]}]},
            "grids[0].criteria: selectivity needs `distractors`",
        ),
        (
            {"grids": [{"sparsities": [0.1], "recover_at": [0.2]}], "recovery": "lora"},
            "grids[0].recover_at: got 0.2, which is none of its sparsities",
        ),
        ({"recovery": "magic"}, "recovery.method: got 'magic'; expected one of lora, full, dist"),
        ({"make": {"preset": "mine"}}, "make.preset: got 'mine'; expected one of paper-math, pap"),
        (
            {"grids": [{"sparsities": [0.1], "recover_at": [0.1]}]},
            "grids[0].recover_at: needs `recovery`",
        ),
    ],
)
def test_a_protocol_of_wrong_shape_gives_one_line_that_names_the_key(
    tmp_path, capsys, change, message
):
    with pytest.raises(InputError, match=re.escape(message)):
        protocol_of(PLAIN | change)
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(PLAIN | change))
    assert main(["sweep", str(path)]) == 2
    out, line = capsys.readouterr()
    assert out == ""
    assert line.startswith(f"prunekit sweep: {path}: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is no YAML"), ("[1, 2]", "expected keys and values"), ("", "expected keys")],
)
def test_a_file_that_is_no_protocol_gives_one_line(tmp_path, text, message):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_protocol(path)


def test_a_missing_protocol_names_those_that_come_with_prunekit():
    with pytest.raises(InputError, match="no such file; prunekit's protocols are mini-code, mini-"):
        read_protocol("nowhere")


def test_every_protocol_of_prunekits_is_whole_and_the_papers_widths_divide_by_128():
    assert {"mini-math", "mini-code"} < set(built_in())
    for name in built_in():
        found = read_protocol(name)
        assert found.name == name
        assert found.about
        if not name.startswith("paper"):
            continue
        width = {"1.5b": 8960, "7b": 18944}[name.rsplit("-", 1)[1]]
        cells = cells_of(found)
        sparsities = sorted({c.sparsity for c in cells if c.sparsity})
        kept = [kept_width(width, s, found.multiple_of) for s in sparsities]
        assert len(set(kept)) == 7
        assert all(
            w % 128 == 0 and abs(1 - w / width - s) < 1e-4
            for w, s in zip(kept, sparsities, strict=True)
        )
        assert {c.seed for c in cells if c.strategy == "random"} == {33, 42}
        assert {c.compensate for c in cells} == {"none"}
        assert sum(c.recovery == "lora" for c in cells) == 7
        assert found.tasks[0].max_new_tokens == 1024


def test_another_model_takes_the_protocols_place():
    assert read_protocol("paper-math-7b", model="mine").model == "mine"


@pytest.mark.parametrize("name", ["paper-math-1.5b", "paper-code-7b"])
def test_a_dry_run_needs_no_more_than_a_config(tmp_path, capsys, monkeypatch, name):
    size = name.rsplit("-", 1)[1].upper()
    config, _, _ = CONFIGS[size]
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sweep_verb, "measure_rates", lambda *_: RATES)
    out = tmp_path / "run"
    arguments = ["sweep", name, "--model", str(tmp_path), "--dry-run", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    cells = facts["cells"]
    assert len(cells) == 1 + 7 * (2 + 1 + 2)
    widths = sorted({cell["widths"][0] for cell in cells}, reverse=True)
    assert widths[0] == config["intermediate_size"]
    assert all(width % 128 == 0 for width in widths)
    assert len(widths) == 8
    for cell in cells:
        assert cell["answers"] > cell["losses"] > 0
        assert (cell["recover"] > 0) == (cell["cell"]["recovery"] == "lora")
    assert facts["peak_bytes"] > cells[0]["bytes"] > 1e9
    total = sum(cell["seconds"] for cell in cells) + facts["measuring"]
    assert facts["seconds"] == pytest.approx(total + sum(p["seconds"] for p in facts["before"]))
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "36 cells" in text
    assert "nothing run (--dry-run)" in text
    assert not out.exists()


def test_the_forecast_of_a_forward_is_that_of_its_products():
    found = protocol_of(PLAIN | {"target": {"source": "t", "rows": 100}, "held_out": 0.2})
    shape = Shape.of(tiny_model("llama"))
    dense = predict_sweep(found, shape, RATES).cells[0]
    tokens = 20 * 180
    assert dense.losses == 2 * tokens * (shape.decoder + shape.head) / RATES.products
    half = predict_sweep(
        protocol_of(PLAIN | {"grids": [{"sparsities": [0.5]}], "multiple_of": 16}), shape, RATES
    ).cells[1]
    assert half.widths == (48, 48)
    assert half.bytes == shape.total * 4 - 2 * 48 * 3 * 32 * 4


def test_scores_and_prunings_that_serve_several_cells_are_counted_once():
    grids = [{"sparsities": [0.2, 0.4], "recover_at": [0.4]}]
    found = protocol_of(PLAIN | {"grids": grids, "recovery": "lora"})
    _, first, second, trained = predict_sweep(found, Shape.of(tiny_model("llama")), RATES).cells
    assert first.prune > second.prune > trained.prune == 0
    assert trained.recover > second.recover == 0
