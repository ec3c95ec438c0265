"""``adm-rt``: one command, sub-commands that are imported only when called.

A sub-command is a module with ``add_arguments(parser)`` and ``run(args) -> exit code or None``.
Exit codes: 0 done, 1 the work failed, 2 the command line is wrong, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings

from adm_rt import __version__

# name -> (module, help line)
COMMANDS = {
    "sample": ("adm_rt.commands.sample", "make images"),
    "upscale": ("adm_rt.commands.upscale", "enlarge images with an upsampler"),
    "info": ("adm_rt.commands.info", "what this build is and uses, and why; or about one model"),
    "convert": ("adm_rt.commands.convert", "released .pt <-> folder of safetensors"),
    "export": ("adm_rt.commands.export", "ONNX graphs that run without PyTorch"),
    "build-engine": ("adm_rt.commands.build_engine", "TensorRT engines beforehand"),
    "train": ("adm_rt.training.cli", "train a diffusion model, a noisy classifier, an upsampler"),
    "evaluate": ("adm_rt.commands.evaluate", "bits per dimension; the digits experiment"),
    "bench": ("adm_rt.benchmarking", "time the ops, networks and samples against the alternatives"),
}


def main(argv=None):
    """Run one command line; returns its exit code. Errors and warnings are one line on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _dispatch(argv)
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted; nothing was written")
        return 130
    except BrokenPipeError:  # the reader of our output went away: `adm-rt info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, MemoryError) as error:
        if os.environ.get("ADM_RT_TRACEBACK"):
            raise
        _say(f"error: {_one_line(error)}")
        return 1


def build_parser(command=None):
    """The parser; only ``command``'s own arguments are filled in (None: of no command)."""
    parser = _Parser(
        prog="adm-rt",
        description="ADM diffusion models: sampling, guidance, training.",
        epilog="adm-rt COMMAND --help describes a command. Set ADM_RT_TRACEBACK=1 to see where "
        "an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"adm-rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help_line) in COMMANDS.items():
        below = commands.add_parser(name, help=help_line, allow_abbrev=False)
        if name == command:
            implementation = _import(name, module)
            implementation.add_arguments(below)
            below.set_defaults(run=implementation.run)
    return parser


class _Parser(argparse.ArgumentParser):
    """Its errors are one line: the usage of ``sample`` alone would fill a screen."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _dispatch(argv):
    command = next((a for a in argv if not a.startswith("-")), None)
    parser = build_parser(command)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # argparse has printed its line: 0 for --help, 2 for an error
        return int(end.code or 0)
    return int(args.run(args) or 0)


def _import(name, module):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise ImportError(f"adm-rt {name} is not in this build yet") from error
        raise ImportError(f"adm-rt {name} needs {error.name!r}, which is not installed") from error


def _one_line(error):
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        advice = "" if "batch_size" in text else "; use a smaller --batch-size"
        return f"out of memory{text and f': {text}'}{advice}"
    return text or type(error).__name__


def _show_warning(message, *where, **more):
    """A warning as one line: the place in the source means nothing on a command line."""
    _say(f"warning: {_one_line(message)}")


def _say(text):
    print(f"adm-rt: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
