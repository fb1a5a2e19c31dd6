"""The house's rules: who may import whom, what importing prunekit costs, what it must not bring."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up; a module may import from its own layer and from those before it.
LAYERS = (
    ("config", "course", "errors", "files", "heap", "progress", "ranks", "tensors", "values"),
    ("prunekit_kernels",),
    ("ops",),
    ("arch", "stats", "unfinished", "nn", "observe", "corpus", "batching", "contrast"),
    ("backward", "gradients"),
    ("criteria", "allocation", "plan", "compact", "compensate", "choose"),
    ("checkpoint", "calibrate", "layerwise"),
    ("integrations", "tasks", "evaluate", "recover", "measure"),
    ("experiment",),
    ("report",),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MAY_IMPORT_TRANSFORMERS = {"integrations", "calibrate", "evaluate", "recover", "cli"}


def sources():
    for folder, top in (("prunekit", None), ("kernels", "prunekit_kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield path, top or parts[0]


def imports(path):
    """(line, module) of every import in a file, wherever it stands, those for types included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module
            if node.module == "prunekit":
                yield from ((node.lineno, f"prunekit.{alias.name}") for alias in node.names)


def layer_of(module):
    parts = module.split(".")
    if parts[0] == "prunekit_kernels":
        return "prunekit_kernels"
    return parts[1] if parts[0] == "prunekit" and len(parts) > 1 else None


@pytest.mark.parametrize(
    ("path", "layer"), [pytest.param(*s, id=str(s[0].name)) for s in sources()]
)
def test_a_module_imports_only_from_below(path, layer):
    if path == ROOT / "prunekit" / "__init__.py":
        return  # the front door names everything
    assert layer in LEVEL, f"{path}: in no layer; give it one in LAYERS"
    for line, module in imports(path):
        other = layer_of(module)
        if other is not None:
            assert LEVEL[other] <= LEVEL[layer], f"{path}:{line}: {layer} imports {module}"
        if module.split(".")[0] == "transformers":
            assert layer in MAY_IMPORT_TRANSFORMERS, f"{path}:{line}: imports transformers"


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("start", "heavy"),
    [
        ("import prunekit", ["transformers", "matplotlib", "accelerate", "datasets", "rich"]),
        ("from prunekit.cli import build_parser; build_parser()", ["matplotlib", "datasets"]),
    ],
)
def test_a_start_brings_nothing_heavy(start, heavy):
    code = f"{start}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_prunekit_works_without_the_extension_and_says_so(tmp_path):
    """A copy of the package without its compiled part imports, and serves by the references."""
    import shutil

    copy = tmp_path / "prunekit"
    shutil.copytree(ROOT / "prunekit", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import torch, prunekit\n"
        "from prunekit.ops import backends, gather_rows\n"
        "assert gather_rows(torch.arange(6).view(3, 2), torch.tensor([2])).tolist() == [[4, 5]]\n"
        "print(backends.serving('gather_rows'), '|', backends.EXTENSION_PROBLEM)"
    )
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "check": True}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.stdout.startswith("reference | the C++ extension is not built; with torch")


def test_every_package_is_installed():
    """An editable install finds what pyproject forgets to list; a wheel does not."""
    listed = set(
        re.findall(r'^    "(prunekit[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    )
    packages = {p.parent.relative_to(ROOT) for p in (ROOT / "prunekit").rglob("__init__.py")}
    data = {"prunekit.protocols"}  # YAML alone
    assert listed == {".".join(p.parts) for p in packages} | data | {"prunekit_kernels"}
