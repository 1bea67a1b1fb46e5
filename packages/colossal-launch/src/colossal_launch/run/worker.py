"""One rank of `colossal train`: `python -m colossal_launch.run.worker CONFIG.json`, started by the agent, torchrun, Slurm or MPI."""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.loss import LossFunction
    from colossal_launch.assembly import Setup
    from colossal_launch.session import Ranks


def run_rank(setup: Setup) -> int:
    """Joins the group, trains, leaves. Returns the exit status; the group is left whatever happens.

    The text was prepared in the run's folder, on this host, before: the ranks only open it.
    """
    from colossal_launch import session

    config = setup.config
    timeout = timedelta(seconds=config.train.timeout_seconds)
    try:
        ranks = session.launch(config.train.device, timeout)
        status = _train(setup, ranks)
    except BaseException:
        session.finish(grace=timedelta(0))
        raise
    session.finish()
    return status


def _train(setup: Setup, ranks: Ranks) -> int:
    import torch

    from colossal_launch import session
    from colossal_launch.booster import Booster
    from colossal_launch.data.preparation import open_text
    from colossal_launch.models.building import import_function
    from colossal_launch.run.job import TEXT_FOLDER, build, sections_of
    from colossal_launch.run.loop import Run
    from colossal_launch.speed import peak_flops, work_per_token

    config = setup.config
    model, data = sections_of(config)
    folder = Path(config.checkpoint.directory)
    text = open_text(data, folder / TEXT_FOLDER)
    built = build(setup, text, device=str(ranks.device))
    loss_fn: LossFunction | None = import_function(model.loss, "model.loss") if model.loss is not None else None
    booster = Booster(config, text.tokenizer_file)
    work = work_per_token(built.module, built.config, data.sequence_length)
    trained = booster.boost(built.module, loss_fn=loss_fn, weights=built.weights)
    loader = booster.dataloader(text.dataset("train", data))
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    run = Run(
        config=config,
        folder=folder,
        trained=trained,
        loader=loader,
        validation=text.dataset("validation", data),
        speaks=session.rank() == 0,
        work=work,
        peak_flops=peak_flops(name, config.precision),
    )
    return run()


def main() -> None:
    """A worker of our own launcher: its errors are told by the launcher, once. Before the first step a signal ends it at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    from colossal_launch.run.failure import recorded
    from colossal_launch.run.parent import end_with_launcher

    end_with_launcher()

    def run() -> int:
        from colossal_launch.assembly import read_setup

        return run_rank(read_setup(sys.argv[1]))

    sys.exit(recorded(run, aloud=False))


if __name__ == "__main__":
    main()
