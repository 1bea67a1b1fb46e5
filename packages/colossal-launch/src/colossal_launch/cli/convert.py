"""`colossal convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from colossal_core.errors import ConfigError, Problem
from colossal_launch.cli.console import say
from colossal_launch.cli.options import Debug


def convert(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, as `checkpoint.directory` names it.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or master (as it was trained).")] = "master",
    debug: Debug = False,
) -> int:
    """Writes the newest good checkpoint of a run, from whatever mesh, as a folder that transformers' `from_pretrained` loads.

    One process, one parameter in memory at a time.

    Examples:

        colossal convert runs/demo runs/demo-hf

        colossal convert runs/demo runs/demo-hf --dtype bfloat16
    """
    del debug
    import torch

    from colossal_core.checkpoint import find_latest, read_full
    from colossal_core.collectives import SingleProcess
    from colossal_core.precision import precision_of
    from colossal_launch.assembly import read_setup
    from colossal_launch.data.preparation import kept_text
    from colossal_launch.models.export import write_hf_folder
    from colossal_launch.run.job import CHECKPOINT_FOLDER, TEXT_FOLDER, build, config_path

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "master" and dtype not in dtypes:
        raise ConfigError([Problem("--dtype", "is not a dtype to write", f"use master, {', '.join(dtypes)}", dtype)])
    text = kept_text(run / TEXT_FOLDER)
    if not config_path(run).is_file() or text is None:
        reason = "holds no config.json with its text beside it"
        raise ConfigError([Problem("RUN", reason, "give the folder that checkpoint.directory named", str(run))])
    setup = read_setup(config_path(run))
    found = find_latest(run / CHECKPOINT_FOLDER, SingleProcess(torch.device("cpu")))
    if found is None:
        raise ConfigError([Problem("RUN", "holds no checkpoint", "train first", str(run))])
    built = build(setup, text, device="cpu")
    if built.config is None:
        raise ConfigError(
            [Problem("model", "has no transformers config", "convert transformers models only", str(run))]
        )
    kept = [(entry.kind, entry.full_name) for entry in found.manifest.tensors if entry.kind in ("parameter", "buffer")]
    write_hf_folder(
        built.config,
        ((name, read_full(found.path, kind, name)) for kind, name in kept),
        target,
        dtypes.get(dtype, precision_of(setup.config).master),
        architecture=type(built.module).__name__,
        tokenizer_file=text.tokenizer_file,
    )
    for skipped in found.skipped:
        say(skipped)
    say(f"step {found.step} of {run} written to {target}")
    return 0
