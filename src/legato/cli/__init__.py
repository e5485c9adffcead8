"""The command line. Nothing here imports Keras before it has to.

Exit status: 0 done; 1 failed; 2 wrong usage or config; 75 stopped by a signal
with everything saved: run the same command again.
"""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from legato import errors
from legato.cli import (
    diffing,
    evaluating,
    exporting,
    inspecting,
    profiling,
    training,
    verifying,
)

FAILED = 1
WRONG_USAGE = 2
STOPPED = errors.Stopped.CODE
INTERRUPTED = 130  # Ctrl-C before there was anything to save

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Args:
        argv: the arguments after the program's name; None takes those of the
            process.
    """
    parser = _make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"legato {version('legato')}")
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return WRONG_USAGE
    # key=value may stand anywhere; argparse takes it only beside CONFIG.
    overrides = [text for text in rest if _is_override(text)]
    unknown = [text for text in rest if text not in overrides]
    if unknown or (overrides and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    warnings.formatwarning = _format_warning
    debug = args.debug or os.environ.get("LEGATO_DEBUG", "") not in ("", "0")
    return _run(args.command, args, debug)


def _run(command: Command, args: argparse.Namespace, debug: bool) -> int:
    """Turns what a command raises into a message and a status.

    What is neither legato's nor a signal is a mistake in the user's code or
    in ours: it is let through, for its traceback.
    """
    try:
        return command(args)
    except errors.LegatoError as error:
        if debug:
            traceback.print_exc()
        else:
            problems = inspecting.printable(str(error))
            many = "\n" in problems
            start = "errors:\n" if many else "error: "
            print(f"legato: {start}{problems}", file=sys.stderr)
        wrong = isinstance(error, errors.ConfigError)
        return WRONG_USAGE if wrong else FAILED
    except (errors.Stopped, errors.Interrupted) as stop:
        print(f"legato: {stop}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        if debug:
            raise
        print("legato: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `legato inspect ... | head`: there is no one left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="legato",
        description=(
            "Keras training runs that can be killed at any instant and go on, "
            "bit for bit."
        ),
        epilog=(
            "Exit status: 0 done; 1 failed; 2 wrong usage or config; 75 "
            "stopped by a signal with everything saved: run the same command "
            "again. LEGATO_DEBUG=1 shows tracebacks."
        ),
    )
    parser.add_argument(
        "--version", action="store_true", help="show the version and exit"
    )
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (
        training,
        evaluating,
        exporting,
        verifying,
        profiling,
        inspecting,
        diffing,
    ):
        command = module.add_parser(commands)
        command.add_argument(
            "--debug", action="store_true", help="show tracebacks of errors"
        )
        command.set_defaults(command=module.run)
    return parser


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("-")


def _format_warning(message, category, filename, lineno, line=None) -> str:
    if issubclass(category, errors.LegatoWarning):
        return f"legato: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
