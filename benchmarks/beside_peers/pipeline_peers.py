"""torch's own pipelines: `torch.distributed.pipelining` on a Llama cut by hand, with the stages that the library cuts.

Parameters and gradients of a stage are bfloat16, and each rank keeps float32 masters and states of its own stages, as torch's guide has
it; gradients of microbatches are added in bfloat16. torch's split backward pass takes nothing that is compiled, neither blocks nor the loss
(2.11 to 2.13), so ZBV runs with `compile=false`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from beside_peers.config import BETAS, LEARNING_RATE, WEIGHT_DECAY
from beside_peers.models import Filler, Shape, on_meta
from beside_peers.peers import loss_of, prepare_blocks
from beside_peers.rows import Row
from beside_peers.world import World
from torch import nn

if TYPE_CHECKING:
    from colossal_core.program import ActionKind
    from colossal_pipeline import Trace
    from colossal_pipeline.recorder import StepRecorder

CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "looped-bfs": "ScheduleLoopedBFS",
    "zbv": "ScheduleZBVZeroBubble",
}


class LlamaStage(nn.Module):
    """Some layers of a Llama: token ids [1, T] or the stream [1, T, D] to the stream, or to logits [1, T, V]."""

    def __init__(self, model: nn.Module, layers: range, *, last: bool) -> None:
        super().__init__()
        inner: Any = model.get_submodule("model")
        self.embedding: nn.Module | None = inner.embed_tokens if layers.start == 0 else None
        self.layers = nn.ModuleList(inner.layers[index] for index in layers)
        self.rotary: nn.Module = inner.rotary_emb
        self.norm: nn.Module | None = inner.norm if last else None
        self.head: nn.Module | None = model.get_submodule("lm_head") if last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream: torch.Tensor = x if self.embedding is None else self.embedding(x)
        positions = torch.arange(stream.shape[1], device=stream.device).unsqueeze(0)
        rotary = self.rotary(stream, positions)
        for layer in self.layers:
            stream = layer(stream, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        if self.norm is not None and self.head is not None:
            stream = self.head(self.norm(stream))
        return stream


class TorchPipeline:
    """One schedule of torch over all ranks, one sequence a microbatch unless the row says otherwise."""

    def __init__(self, row: Row, shape: Shape, world: World) -> None:
        from colossal_pipeline import SCHEDULES

        assert shape.architecture == "llama", f"stages are cut by hand, of a Llama and not of {shape.architecture}"
        contestant = row.parsed
        self._row, self._world = row, world
        self._recorder: StepRecorder | None = None
        self._num_microbatches = row.micro_batch * world.size // row.sequences_a_pass
        spec = SCHEDULES[contestant.schedule]
        self._chunks = spec.min_chunks
        ranks = spec.stage_ranks(world.size, self._chunks)
        own = [stage for stage, rank in enumerate(ranks) if rank == world.rank]
        self._has_first, self._has_last = 0 in own, len(ranks) - 1 in own
        modules = _stages_of(row, shape, world, own, len(ranks))
        self._parameters = [one for module in modules for one in module.parameters()]
        self._masters = [nn.Parameter(one.detach().float()) for one in self._parameters]
        for one in self._parameters:
            one.data = one.detach().to(torch.bfloat16)
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self._mean_loss = loss_of(row)
        self._schedule = self._scheduled(contestant.schedule, modules, own, len(ranks), shape)
        starts = [*starts_of(shape, len(ranks)), shape.num_layers]
        self._blocks = tuple(stop - start for start, stop in pairwise(starts))

    def _scheduled(self, name: str, modules: Sequence[nn.Module], own: Sequence[int], count: int, shape: Shape) -> Any:
        from torch.distributed import pipelining
        from torch.distributed.pipelining import PipelineStage, schedules

        size = (self._row.sequences_a_pass, shape.sequence_length)
        ids = torch.empty(size, dtype=torch.long, device="meta")
        stream = _example((*size, shape.hidden_size))
        logits = _example((*size, int(shape.config["vocab_size"])))
        stages = []
        for index, module in zip(own, modules, strict=True):
            given, made = ids if index == 0 else stream, logits if index == count - 1 else stream
            stage = PipelineStage(module, index, count, self._world.device, input_args=(given,), output_args=(made,))
            if (
                self._world.device.type == "cpu"
            ):  # torch 2.11 greets the next stage on the same rank, to which gloo has no connection
                vars(stage)["_get_init_p2p_neighbors_ops"] = list
            self._watch(stage, index)
            stages.append(stage)
        kind = getattr(pipelining, CLASSES[name], None) or getattr(schedules, CLASSES[name])
        return kind(stages[0] if self._chunks == 1 else stages, self._num_microbatches, loss_fn=self._loss)

    def _watch(self, stage: Any, index: int) -> None:
        """Tells the recorder, where there is one, of what torch calls forward, backward, backward of inputs and of weights."""
        forward, backward, weights = (
            stage.forward_one_chunk,
            stage.backward_one_chunk,
            stage.backward_weight_one_chunk,
        )

        def told(kind: ActionKind, microbatch: int, run: Callable[[], Any]) -> Any:
            from colossal_core.program import Action

            if self._recorder is None:
                return run()
            self._recorder.begin(Action(kind, index, microbatch))
            made = run()
            self._recorder.end()
            return made

        def watched_forward(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            return told("forward", microbatch, lambda: forward(microbatch, *args, **kwargs))

        def watched_backward(
            microbatch: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
        ) -> Any:
            kind: ActionKind = "backward" if full_backward else "backward_input"
            return told(kind, microbatch, lambda: backward(microbatch, loss, full_backward, last_backward))

        def watched_weights(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            return told("backward_weight", microbatch, lambda: weights(microbatch, *args, **kwargs))

        stage.forward_one_chunk = watched_forward
        stage.backward_one_chunk = watched_backward
        stage.backward_weight_one_chunk = watched_weights

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self._mean_loss(logits, labels)
        if self._recorder is not None:
            self._recorder.end()  # the loss belongs to the forward pass of the last stage
        return loss

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss is known where the last stage is: there as often as there are ranks, so that its mean over the ranks is the loss."""
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
        given = (ids,) if self._has_first else ()
        if self._has_last:
            losses: list[torch.Tensor] = []
            self._schedule.step(*given, target=labels, losses=losses, return_outputs=False)
            loss = torch.stack([one.detach() for one in losses]).mean() * self._world.size
        else:
            self._schedule.step(*given, return_outputs=False)
            loss = torch.zeros((), device=self._world.device)
        self._update()
        return loss

    def _update(self) -> None:
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        torch._foreach_copy_([one.detach() for one in self._parameters], [one.detach() for one in self._masters])

    def recorded_step(self, ids: torch.Tensor) -> Trace | None:
        """A step with its time line, on rank 0."""
        from colossal_pipeline import SCHEDULES, Trace
        from colossal_pipeline.recorder import StepRecorder, on_one_clock

        self._recorder = recorder = StepRecorder(self._world.device)
        self.step(ids)
        self._recorder = None
        line, error = on_one_clock(recorder.spans(), self._gather)
        name = self._row.parsed.schedule
        ranks = SCHEDULES[name].stage_ranks(self._world.size, self._chunks)
        trace = Trace(name, 0, self._num_microbatches, ranks, self._blocks, error, line)
        return trace if self._world.rank == 0 else None

    def _gather(self, data: bytes) -> list[bytes]:
        found: list[Any] = [None] * self._world.size
        dist.all_gather_object(found, data.decode())
        return [str(one).encode() for one in found]


def _example(size: tuple[int, ...]) -> torch.Tensor:
    """What crosses between stages, without its values; a gradient comes back for it."""
    return torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True)


def _stages_of(row: Row, shape: Shape, world: World, own: Sequence[int], count: int) -> list[LlamaStage]:
    """This rank's stages, with their first values; no other stage's are drawn."""
    model = on_meta(shape)
    filler = Filler(model, shape.block_names(), world.device)
    prepare_blocks(model, row, shape)
    starts = [*starts_of(shape, count), shape.num_layers]
    layers = [range(starts[stage], starts[stage + 1]) for stage in own]
    for index in (index for one in layers for index in one):
        filler.fill(f"{shape.blocks}.{index}")
    if 0 in own or count - 1 in own:
        filler.fill("")
    made = [LlamaStage(model, one, last=stage == count - 1) for stage, one in zip(own, layers, strict=True)]
    for module in made:
        module.train()
    return made


def starts_of(shape: Shape, count: int) -> tuple[int, ...]:
    """The first layer of each stage, as the library cuts them: by the weights of matrix products, the head with the last layer."""
    from colossal_pipeline.cutting import balanced_starts

    head = shape.counted_vocab * shape.hidden_size
    layer = (shape.matmul_weights - head) // shape.num_layers
    return balanced_starts([*[layer] * (shape.num_layers - 1), layer + head], count)
