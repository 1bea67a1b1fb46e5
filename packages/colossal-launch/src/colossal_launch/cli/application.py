"""The verbs of `colossal`, and how every error becomes one readable message and an exit status."""

from __future__ import annotations

import sys
import traceback

import typer
from colossal_core.errors import ColossalError

from colossal_launch.cli import bench, convert, doctor, plan, plugins, script, train, verify

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
    """Runs one verb. `--debug` anywhere shows tracebacks."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        status = application(given, standalone_mode=False, prog_name="colossal")
    except ColossalError as error:
        report(error, debug)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Exit as left:
        sys.exit(left.exit_code)
    except Exception as error:
        # click's own usage errors carry `show` and `exit_code`; typer may vendor click, so they are known by their shape.
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if callable(show) and isinstance(code, int):
            show()
            sys.exit(code)
        raise
    sys.exit(status if isinstance(status, int) else 0)


def report(error: ColossalError, debug: bool) -> None:
    """One message on standard error, unwrapped; the traceback only when asked for."""
    if debug:
        traceback.print_exception(error)
        return
    lines = str(error).splitlines() or [type(error).__name__]
    print(f"error: {lines[0]}", file=sys.stderr)
    for line in lines[1:]:
        print(f"       {line}", file=sys.stderr)
