"""The verbs of `colossal`, and how every error becomes one readable message and an exit status."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from colossal_core.errors import ColossalError
from colossal_launch.cli import bench, convert, doctor, plan, plugins, script, train, verify
from colossal_launch.cli.console import complain
from colossal_launch.run.failure import WorkerError, described, location

application = typer.Typer(
    name="colossal",
    help="Train large models on many GPUs, written as for one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
application.command("train")(train.train)
application.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(script.run)
application.command("plan")(plan.plan)
application.command("verify")(verify.verify)
application.command("doctor")(doctor.doctor)
application.command("plugins")(plugins.plugins)
application.add_typer(bench.application, name="bench")
application.command("convert")(convert.convert)


def run(arguments: list[str] | None = None) -> None:
    """Runs one verb and leaves with its exit status. `--debug` anywhere shows tracebacks."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _terminated_as_exit():
            status = application(given, standalone_mode=False, prog_name="colossal")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        sys.exit(report(error, "--debug" in given))
    sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM leaves as Ctrl-C does, through every clean-up, where nothing more is done about it."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report(error: Exception, debug: bool) -> int:
    """One message on standard error, unwrapped, after the traceback where that was asked for. Returns the exit status."""
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    # click's own usage errors carry `show` and `exit_code`; typer may vendor click, so they are known by their shape.
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    if isinstance(error, WorkerError):
        if debug and error.rank_traceback:
            sys.stderr.write(error.rank_traceback)
    elif debug:
        traceback.print_exception(error)
    if isinstance(error, ColossalError):
        told = not isinstance(error, WorkerError) or error.known or debug
        complain((str(error) or type(error).__name__) + ("" if told else _HINT))
        return error.exit_status
    complain(f"{described(error)} ({location(error)})" + ("" if debug else _HINT))
    return 1


_HINT = "\n--debug shows the traceback"
