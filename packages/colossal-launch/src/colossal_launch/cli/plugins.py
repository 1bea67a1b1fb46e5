"""`colossal plugins`."""

from __future__ import annotations

from colossal_launch.cli.console import say
from colossal_launch.cli.options import Debug


def plugins(debug: Debug = False) -> int:
    """Lists the installed plugins, what they contribute, and the config sections that they add.

    Examples:

        colossal plugins

        COLOSSAL_PLUGINS=zero,comm colossal plugins
    """
    del debug
    from colossal_core.hookspecs import PLUGIN_API
    from colossal_core.plugins import discover

    found = discover()
    say(f"plugins of contract {PLUGIN_API[0]}.{PLUGIN_API[1]}")
    header = ("plugin", "distribution", "version", "contract", "hooks")
    rows = [
        (info.name, info.distribution, info.version, f"{info.api[0]}.{info.api[1]}", ", ".join(info.hooks))
        for info in found.infos
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for spec in found.strategies():
        say(f"strategy {spec.name}: section {spec.section}")
    say(f"optimizers: {', '.join(sorted(found.optimizers()))}")
    return 0
