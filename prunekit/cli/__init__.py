"""The command line: `prunekit VERB ...`, one file a verb."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from prunekit.cli.output import Output
from prunekit.cli.parser import Parser, add_options, to_config
from prunekit.course import Stopped
from prunekit.errors import CheckError, InputError
from prunekit.ops.registry import BackendError, check_forced
from prunekit.ranks import started

VERBS = (
    "demo",
    "calibrate",
    "prune",
    "search",
    "recover",
    "export",
    "eval",
    "bench",
    "sweep",
    "report",
    "inspect",
    "diff",
    "env",
)

SHARED = "calibrate", "recover"  # whose work the processes of torchrun share

_INTRO = """prunekit removes the MLP neurons that a task does not need, repairs what the
removal broke, and proves what it won.

  prunekit demo                                            the whole story, on a small model
  prunekit prune MODEL --target task.jsonl --sparsity 0.2 -o small
  prunekit eval small --data held_out.jsonl
  prunekit bench small --baseline MODEL"""


def build_parser() -> Parser:
    """The parser of every verb, each made from its config."""
    from argparse import RawDescriptionHelpFormatter

    formatter = RawDescriptionHelpFormatter
    parser = Parser(prog="prunekit", description=_INTRO, formatter_class=formatter)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name in VERBS:
        module = importlib.import_module(f"prunekit.cli.{name}")
        summary = module.CONFIG.__doc__
        verb = verbs.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=summary,
            epilog="examples:\n" + module.EXAMPLES,
            formatter_class=formatter,
        )
        add_options(verb, module.CONFIG)
        verb.add_argument("--json", action="store_true", help="print one JSON document instead")
        verb.set_defaults(module=module)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb: 0 done, 1 a check failed, 2 bad usage or bad input."""
    logging.basicConfig(format="prunekit: %(message)s", level=logging.WARNING, stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a file says need not be printable
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    namespace = parser.parse_args(arguments)
    if namespace.version:
        import prunekit

        print(f"prunekit {prunekit.__version__}")
        return 0
    if not namespace.verb:
        parser.print_help()
        return 2
    output = Output(as_json=namespace.json)
    try:
        check_forced()
        if started() > 1 and namespace.verb not in SHARED:
            raise InputError(
                f"torchrun started {started()} processes; {' and '.join(SHARED)} share their work, "
                "this would do it as often"
            )
        return namespace.module.run(to_config(namespace, namespace.module.CONFIG), output)
    except (InputError, BackendError) as error:
        print(f"prunekit {namespace.verb}: {error}", file=sys.stderr)
        return 2
    except CheckError as error:
        print(f"prunekit {namespace.verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our stdout went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Stopped as error:
        print(f"prunekit {namespace.verb}: {error}; --resume goes on", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("prunekit: interrupted", file=sys.stderr)
        return 130
