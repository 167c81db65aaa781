"""The command line: ``fastllm doctor`` and ``fastllm patch MODEL --dry-run``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import NoReturn

from fastllm import __version__


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 success, 1 it failed, 2 it was called wrongly."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        first_line = (str(error).splitlines() or [""])[0]
        print(f"fastllm {arguments.command}: error: {first_line or type(error).__name__}", file=sys.stderr)
        return 1


def _parser() -> _Parser:
    parser = _Parser(
        prog="fastllm",
        description="Fused kernels for LLMs: look at this machine, or at what a patch would change in a model.",
    )
    parser.add_argument("--version", action="version", version=f"fastllm {__version__}")
    shared = _Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON for a program to read")
    shared.add_argument("--debug", action="store_true", help="on an error, print the traceback")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    doctor = commands.add_parser(
        "doctor",
        parents=[shared],
        help="versions, backends, what is missing and how to mend it, two measured numbers",
        description="Prints the versions found, the CPU and GPUs, each backend with the reason and the remedy where it "
        "is missing, and this machine's copy bandwidth and matmul rate as just measured. Takes a few seconds.",
    )
    doctor.add_argument("--no-measure", action="store_true", help="leave out the two measurements")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from fastllm import doctor

    report = doctor.collect(measure=not arguments.no_measure)
    print(json.dumps(report, indent=2) if arguments.json else doctor.render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
