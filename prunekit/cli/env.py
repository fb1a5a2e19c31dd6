"""`prunekit env`: versions, backends, and what to do about what is missing."""

from __future__ import annotations

from prunekit.cli.output import Output
from prunekit.config import EnvConfig
from prunekit.criteria import CRITERIA
from prunekit.errors import InputError
from prunekit.integrations.loading import DEMO, load_tokenizer
from prunekit.measure.provenance import provenance
from prunekit.ops.backends import EXTENSION_PROBLEM, TRITON_PROBLEM, serving
from prunekit.ops.gated_mlp_cpu import DECODE_TOKENS
from prunekit.ops.registry import BACKENDS, OPERATIONS, forced_backend

CONFIG = EnvConfig
EXAMPLES = """  prunekit env
  prunekit env --json
  PRUNEKIT_BACKEND=reference prunekit env"""


def run(config: EnvConfig, output: Output) -> int:
    """Print what is here and what would serve each operation."""
    facts = provenance()
    forced = forced_backend()
    choices = {name: forced or serving(name) for name in OPERATIONS}
    decodes = choices["gated_mlp"] == "cpp" and EXTENSION_PROBLEM is None
    most = DECODE_TOKENS.get(facts["cpu_isa"], 0) if decodes else None
    shown = choices if most is None else choices | {"gated_mlp": _by_tokens(most)}
    demo = _demo_problem()
    problems = {
        "C++ extension": EXTENSION_PROBLEM,
        "Triton kernels": TRITON_PROBLEM,
        "demo model": demo,
    }
    versions = [(name, value or "not installed") for name, value in facts["versions"].items()]
    output.table(facts["device"], ("package", "version"), versions)
    rows = [
        (
            name,
            *("yes" if b in operation.backends else "–" for b in BACKENDS),
            shown[name],
        )
        for name, operation in OPERATIONS.items()
    ]
    output.table("operations", ("operation", *BACKENDS, "serves here"), rows)
    output.line("gram_update's cpp is oneDNN through torch, with or without the extension")
    if facts["cpu_isa"]:
        output.line(f"CPU kernels use {facts['cpu_isa']}")
    if forced:
        output.line(f"PRUNEKIT_BACKEND forces {forced}")
    for what, problem in problems.items():
        output.line(f"{what}: {problem or 'ready'}")
    output.line(f"criteria: {', '.join(sorted(CRITERIA))}")
    output.json(
        {
            **facts,
            "serving": choices,
            "cpu_decode_tokens": most,
            "problems": problems,
            "criteria": sorted(CRITERIA),
        }
    )
    return 0


def _by_tokens(most: int) -> str:
    """What serves gated_mlp on the CPU, whose C++ kernel takes up to ``most`` tokens."""
    return f"cpp for 1 to {most} tokens, torch above" if most else "torch"


def _demo_problem() -> str | None:
    try:
        load_tokenizer(DEMO)
    except InputError as error:
        return str(error)
    return None
