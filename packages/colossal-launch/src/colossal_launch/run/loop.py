"""The training loop of `colossal train`, on one rank: the same line a step for every strategy."""

from __future__ import annotations

import math
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from colossal_core.errors import NonFiniteError
from colossal_core.gradient_statistics import units_not_finite
from colossal_launch.gradient_metrics import gradient_metrics
from colossal_launch.progress import ProgressLine, StepReport
from colossal_launch.run.evaluation import evaluate
from colossal_launch.run.job import CHECKPOINT_FOLDER
from colossal_launch.run.stopping import StopRequest
from colossal_launch.trackers import open_trackers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from colossal_core.config import TrainConfig
    from colossal_core.step import StepResult
    from colossal_core.trained import Trained
    from colossal_launch.data.loader import DistributedLoader
    from colossal_launch.data.packing import TextDataset
    from colossal_launch.speed import WorkPerToken
    from colossal_launch.trackers import Metrics, Tracker


_MAX_UNITS = 4
"""Names in a message about gradients."""

STOP_CHECK_STEPS = 10
"""Ranks agree on stopping at every step whose numbers are read, and at least this often."""


@dataclass
class Run:
    """One rank's run. speaks: whether this rank prints and writes metrics (rank 0). work and peak: for MFU, where the peak is known."""

    config: TrainConfig
    folder: Path
    trained: Trained
    loader: DistributedLoader
    validation: TextDataset
    speaks: bool
    work: WorkPerToken
    peak_flops: float | None
    _trackers: list[Tracker] = field(default_factory=list)
    _line: ProgressLine | None = None
    _last_saved: int = -1
    _unread: list[tuple[int, StepResult]] = field(default_factory=list)

    def __call__(self) -> int:
        """Trains to `train.num_steps` and returns the exit status: 0, or 130 / 143 after a signal, with a saved checkpoint.

        Raises: NonFiniteError when a loss or norm is not finite and the policy is to stop; CheckpointError when a save fails.
        """
        notes = self._resume()
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            if self.speaks:
                self._open(stack, notes)
            if self.trained.step >= self.config.train.num_steps:
                self._note(f"nothing left to do: step {self.trained.step} of {self.config.train.num_steps} is saved")
                return 0
            self._steps(stop)
            if stop.signal is None or self.trained.step == self.config.train.num_steps:
                self._finish()
        return 0 if stop.signal is None else stop.exit_status

    def _steps(self, stop: StopRequest) -> None:
        """Steps to the end, or to the one after which the ranks agree to stop: then it is saved."""
        num_steps, log_every = self.config.train.num_steps, self.config.train.log_every_steps
        started, since = time.perf_counter(), 0
        for batch in self.loader:
            result = self.trained.train_step(batch)
            step = self.trained.step
            self._unread.append((step, result))
            since += 1
            self._report_gradients(step)
            if step % log_every == 0 or step == num_steps:
                self._report(result, (time.perf_counter() - started) / since)
                started, since = time.perf_counter(), 0
            started += self._periodic(step)
            if step % min(log_every, STOP_CHECK_STEPS) == 0 and step != num_steps and self._agreed(stop):
                self._save()
                self._note(f"stopped at step {step}; start the same command again to go on")
                return

    def _agreed(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop; then all know. Communication: one all-reduce of 8 bytes."""
        if not self.trained.any_rank(stop.signal is not None):
            return False
        stop.signal = stop.signal or signal.SIGTERM
        return True

    def _resume(self) -> list[str]:
        """Takes back the newest good checkpoint. Returns what there is to say about it."""
        found = self.trained.load(self.folder / CHECKPOINT_FOLDER) if self.config.checkpoint.resume else None
        if found is None:
            return []
        self._last_saved = found.step
        return [*found.skipped, f"going on from step {found.step} ({found.path})"]

    def _open(self, stack: ExitStack, notes: Sequence[str]) -> None:
        self._trackers, left_out = open_trackers(self.folder, self.trained.step)
        for tracker in self._trackers:
            stack.callback(tracker.close)
        self._line = stack.enter_context(ProgressLine(self.config.train.num_steps, first_step=self.trained.step))
        for note in (*notes, *left_out):
            self._note(note)
        if self.peak_flops is not None:
            self._note(self.work.formula)

    def _check_finite(self) -> None:
        """Reads the losses and norms since the last look, which waits for the device. Raises NonFiniteError for the first that is none."""
        unread, self._unread = self._unread, []
        if self.config.train.non_finite != "stop":
            return
        for step, result in unread:
            loss, norm = float(result.loss), float(result.grad_norm)
            if math.isfinite(loss) and (math.isfinite(norm) or self.config.precision == "fp16"):
                continue
            what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
            message = (
                f"step {step}: the {what} is {value}: the update was left out and the run ends here "
                f"(train.non_finite: stop); {self._not_finite(step)}"
                "lower optimizer.lr, or set train.non_finite: skip to go on"
            )
            raise NonFiniteError(message)

    def _not_finite(self, step: int) -> str:
        """Which gradients are not finite, as a part of the message. They are the last step's, which may be later than the one that failed.

        Collective: the ranks have read the same loss and norm.
        """
        units = units_not_finite(self.trained.gradient_statistics())
        if not units:
            return ""
        names = ", ".join(unit or "the model itself" for unit in units[:_MAX_UNITS])
        more = f" and {len(units) - _MAX_UNITS} more" if len(units) > _MAX_UNITS else ""
        when = "" if step == self.trained.step else f" at step {self.trained.step}"
        return f"the gradients of {names}{more} are not finite{when}; "

    def _report_gradients(self, step: int) -> None:
        """Writes the statistics of this step's gradients where it is time to. Collective."""
        every = self.config.train.gradient_statistics_every_steps
        if every and step % every == 0:
            statistics = self.trained.gradient_statistics()
            if self.speaks:
                self._log(step, gradient_metrics(statistics))

    def _report(self, result: StepResult, seconds: float) -> None:
        """Shows and writes the numbers of a step."""
        self._check_finite()
        if not self.speaks:
            return
        step, loss, tokens = self.trained.step, float(result.loss), int(result.num_tokens)
        mfu = None
        if self.peak_flops is not None:
            mfu = tokens / seconds / self.trained.plan.mesh.world_size * self.work.flops / self.peak_flops
        metrics: dict[str, float | int | bool] = {
            "loss": loss,
            "grad_norm": float(result.grad_norm),
            "num_tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "skipped": bool(result.skipped),
            "skipped_steps": int(self.trained.skipped_steps),
            "memory_bytes": peak_memory_bytes(),
        }
        if mfu is not None:
            metrics["mfu"] = mfu
        self._log(step, metrics)
        if self._line is not None:
            memory, skipped = int(metrics["memory_bytes"]), int(metrics["skipped_steps"])
            self._line.show(StepReport(step, loss, tokens, seconds, memory, mfu, skipped))

    def _periodic(self, step: int) -> float:
        """Evaluates and saves where the config says so. Returns the seconds that this took: they are not the step's."""
        started = time.perf_counter()
        every_eval, every_save = self.config.train.eval_every_steps, self.config.checkpoint.every_steps
        if every_eval and step % every_eval == 0 and step != self.config.train.num_steps:
            self._evaluate()
        if every_save and step % every_save == 0 and step != self.config.train.num_steps:
            self._save()
        return time.perf_counter() - started

    def _finish(self) -> None:
        self._evaluate()
        self._save()

    def _evaluate(self) -> None:
        found = evaluate(self.trained, self.validation, self.loader.share, self.config.train.eval_num_batches)
        self._log(self.trained.step, {"val_loss": found.loss, "val_bits_per_byte": found.bits_per_byte})
        self._note(f"step {self.trained.step}: held-out loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte")

    def _save(self) -> None:
        if self._last_saved == self.trained.step:
            return
        self._check_finite()
        path = self.trained.save(self.folder / CHECKPOINT_FOLDER)
        self._last_saved = self.trained.step
        self._note(f"step {self.trained.step}: saved {path}")

    def _log(self, step: int, metrics: Metrics) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def _note(self, text: str) -> None:
        if self._line is not None:
            self._line.note(text)


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on the accelerator, else the process's resident size."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
