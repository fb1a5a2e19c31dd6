"""A study of a tiny model, of ten cells."""

import json

GRIDS = [
    {"sparsities": [0.2, 0.5], "criteria": ["wanda"], "compensations": ["lstsq", "none"]},
    {
        "sparsities": [0.2, 0.5],
        "strategies": ["random"],
        "compensations": ["none"],
        "seeds": [1, 2],
    },
    {"sparsities": [0.2], "strategies": ["reverse"], "criteria": ["selectivity"]}
    | {"compensations": ["none"]},
]


def tiny_protocol(folder, path):
    """A protocol's plain values, over files of words written to a folder."""
    for name, step in (("task", 1), ("other", 7)):
        rows = [
            {"text": " ".join(f"w{3 + (i + step * j) % 90}" for j in range(9))} for i in range(40)
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i + 2}"} for i in range(3, 15)]
    (path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return {
        "name": "tiny",
        "about": "A tiny random model.",
        "model": str(folder),
        "target": str(path / "task.jsonl"),
        "distractors": [str(path / "other.jsonl")],
        "grids": GRIDS,
        "tasks": [{"spec": f"jsonl:{path / 'words.jsonl'}", "problems": 6, "max_new_tokens": 4}],
        "multiple_of": 16,
        "measure": {"speed": False, "memory": False},
    }


def bare(rows):
    """What two runs of one protocol must share: all but the time it took."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
