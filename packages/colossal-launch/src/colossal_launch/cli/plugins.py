"""`colossal plugins`."""

from __future__ import annotations

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
    from rich.console import Console
    from rich.table import Table

    found = discover()
    table = Table(title=f"plugins (contract {PLUGIN_API[0]}.{PLUGIN_API[1]})", title_justify="left")
    for column in ("plugin", "distribution", "version", "contract", "hooks"):
        table.add_column(column, no_wrap=True)
    for info in found.infos:
        table.add_row(info.name, info.distribution, info.version, f"{info.api[0]}.{info.api[1]}", ", ".join(info.hooks))
    console = Console(width=140)
    console.print(table)
    for spec in found.strategies():
        console.print(f"strategy {spec.name}: section {spec.section}", highlight=False)
    console.print(f"optimizers: {', '.join(sorted(found.optimizers()))}", highlight=False)
    return 0
