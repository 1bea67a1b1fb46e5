"""What crosses between the stages of a pipeline: activations one way, their gradients the other.

Every link (an ordered pair of ranks, activations and gradients apart) has a communicator of its own, so that a message that is waited for
holds up no other. Shapes are those of the batch, which every stage has: the first message of a new shape is led by a header of
fixed size, and no later one. Nothing is pickled. Between two stages of one rank tensors are handed over as they are.

On GPUs the first steps of a batch's shapes send through host memory. What runs for the first time makes the host wait for all that its
GPU has begun (kernels are loaded, libraries make their handles), and a receive that has been posted is begun: two ranks that each wait so
for a message of the other's would wait for ever. Later steps send from GPU to GPU, and nothing waits for the host.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from colossal_core.collectives import Collectives, Handle, Transfer
from colossal_core.errors import CommunicationError
from colossal_core.program import Action, Program

Payload = Literal["activations", "gradients"]
Signature = tuple[object, ...]

PIPELINE = ("pp",)
HEADER_SIZE = 128
"""int64 numbers in a header: how many tensors, then for each its dtype, whether it gets a gradient, its number of dimensions and these."""
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
HOST = torch.device("cpu")
FIRST_STEPS = 2
"""The second is the first in which gradients are already there, and in which parameters come from an update."""
AHEAD = 2
"""Receives are posted this many forward or backward actions before the one that they stand in front of."""


def signature_of(microbatch: Mapping[str, Tensor]) -> Signature:
    """What the shapes of activations depend on: those of the inputs, and whether there will be gradients."""
    return (torch.is_grad_enabled(), *((key, tuple(value.shape)) for key, value in sorted(microbatch.items())))


def link_use(payload: Payload, source: int, target: int) -> str:
    """The communicator of a link. Two links of one rank never share one: neighbours are told apart by the lower one's parity, the
    link that closes a ring has a name of its own.
    """
    way = "up" if target > source else "down"
    place = str(min(source, target) % 2) if abs(source - target) == 1 else "ring"
    return f"{payload} {way} {place}"


@dataclass(frozen=True)
class _Form:
    """Shape and dtype of a tensor that crosses, and whether a gradient comes back for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool

    @staticmethod
    def of(tensor: Tensor) -> _Form:
        return _Form(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


@dataclass
class _Incoming:
    """A message that was asked for. forms: of its tensors. landings: where they go when they have come through host memory."""

    tensors: tuple[Tensor, ...]
    forms: tuple[_Form, ...]
    handle: Handle | None
    landings: tuple[Tensor, ...] = ()


class StageLinks:
    """This rank's links. A step begins with `begin`; then for each action `post_ahead`, and what the action asks for; then `finish`.
    first_steps: of a batch's shapes, whose messages go through host memory.
    """

    def __init__(self, program: Program, collectives: Collectives, first_steps: int | None = None) -> None:
        self._program = program
        self._collectives = collectives
        self._forms: dict[tuple[Signature, int], tuple[_Form, ...]] = {}
        self._inbox: dict[tuple[Payload, int, int], _Incoming] = {}
        self._outbox: dict[tuple[Payload, int, int], tuple[Tensor, ...]] = {}
        self._sending: deque[tuple[Handle, Action, tuple[Tensor, ...]]] = deque()
        self._actions: Sequence[Action] = ()
        self._arrived: Callable[[], None] | None = None
        self._signatures: Sequence[Signature] = ()
        self._posted = 0
        on_gpus = collectives.device.type != "cpu"
        self._first_steps = (FIRST_STEPS if on_gpus else 0) if first_steps is None else first_steps
        self._num_steps: Counter[Signature] = Counter()
        self._through_host = False
        for use in sorted({self._use(action) for actions in program.actions for action in actions if _moves(action)}):
            collectives.prepare(PIPELINE, use)
            if self._first_steps:
                collectives.prepare(PIPELINE, _host_use(use), device=HOST)

    def begin(
        self, actions: Sequence[Action], signatures: Sequence[Signature], arrived: Callable[[], None] | None = None
    ) -> None:
        """A new list of actions; what an exception left behind is forgotten. signatures: of each microbatch. arrived: called when a message
        that was waited for is there.
        """
        self._actions, self._signatures, self._posted = actions, signatures, 0
        self._through_host = any(self._num_steps[signature] < self._first_steps for signature in signatures)
        self._num_steps.update(set(signatures))  # here, where every rank comes by, and not where some may have failed
        self._arrived = arrived
        self._inbox.clear()
        self._outbox.clear()
        self._sending.clear()

    def post_ahead(self, index: int) -> None:
        """Asks for the messages that the next few actions wait for, as far as their shapes are known; on every link in order."""
        if not self._signatures:
            return
        computing, position = 0, max(index, self._posted)
        while position < len(self._actions) and computing <= AHEAD:
            action = self._actions[position]
            if action.kind == "receive":
                forms = self._known(action)
                if forms is None:
                    return
                self._post(action, forms)
                self._posted = position + 1
            elif not _moves(action):
                computing += 1
            position += 1

    def receive(self, index: int) -> None:
        """A receive action: asks for its message where that has not been done, after reading its header where the shape is new."""
        if index < self._posted:
            return
        action = self._actions[index]
        forms = self._known(action)
        if forms is None:
            assert action.carries == "activations", f"{action}: gradients come back for activations that were sent"
            forms = self._read_header(action)
            self._forms[self._boundary(action)] = forms
        self._post(action, forms)
        self._posted = index + 1

    def take(self, payload: Payload, action: Action) -> tuple[Tensor, ...]:
        """What has come for a stage and a microbatch. Activations that get a gradient are leaves."""
        incoming = self._inbox.pop((payload, action.stage, action.microbatch))
        if incoming.handle is not None:
            with self._telling(f"waiting for the {payload} of microbatch {action.microbatch} in front of {action}"):
                incoming.handle.wait()
            if self._arrived is not None:
                self._arrived()
        tensors = incoming.tensors
        if incoming.landings:
            for landing, tensor in zip(incoming.landings, tensors, strict=True):
                landing.copy_(tensor)
            tensors = incoming.landings
        if payload == "activations":
            for tensor, form in zip(tensors, incoming.forms, strict=True):
                tensor.requires_grad_(form.differentiable)
        return tensors

    def give(self, payload: Payload, action: Action, to_stage: int, tensors: Sequence[Tensor]) -> None:
        """What an action made for a neighbouring stage: handed over on this rank, else kept for the send action that follows."""
        ranks = self._program.stage_ranks
        if ranks[action.stage] == ranks[to_stage]:
            forms = tuple(_Form.of(tensor) for tensor in tensors)
            cut_off = tuple(tensor.detach() for tensor in tensors)
            self._inbox[payload, to_stage, action.microbatch] = _Incoming(cut_off, forms, None)
        else:
            self._outbox[payload, action.stage, action.microbatch] = tuple(tensors)

    def send(self, action: Action) -> None:
        """A send action: starts its message and does not wait for it."""
        tensors = self._outbox.pop((action.carries, action.stage, action.microbatch))
        forms = tuple(_Form.of(tensor) for tensor in tensors)
        if action.carries == "activations":
            known = self._forms.get(self._boundary(action))
            if known is None:
                self._forms[self._boundary(action)] = forms
                self._start_send(action, (self._header(action, forms),), tag="shapes of activations")
            elif known != forms:
                changed = next((one, other) for one, other in zip(known, forms, strict=True) if one != other)
                message = (
                    f"stage {action.stage} made activations of {changed[1]}, and for a batch of the same shapes {changed[0]} before: "
                    "what crosses between stages must depend on the batch's shapes alone"
                )
                raise CommunicationError(message)
        if tensors:
            # All that later steps do on the GPU is done in the first ones too: copied there, and kept until it has been sent.
            own = tuple(tensor.detach().contiguous() for tensor in tensors)
            self._start_send(action, tuple(tensor.to(self._device) for tensor in own), tag=action.carries, kept=own)

    def finish(self) -> None:
        """Waits for what is still being sent."""
        while self._sending:
            handle, action, _ = self._sending.popleft()
            with self._telling(f"sending at {action}"):
                handle.wait()
        self._arrived = None
        assert not self._inbox and not self._outbox, f"left over: {[*self._inbox, *self._outbox]}"

    def _start_send(
        self, action: Action, tensors: tuple[Tensor, ...], *, tag: str, kept: tuple[Tensor, ...] = ()
    ) -> None:
        while self._sending and self._sending[0][0].is_done():
            self._sending.popleft()
        peer = self._program.stage_ranks[action.peer_stage]
        transfers = [Transfer("send", tensor, peer) for tensor in tensors]
        with self._telling(f"sending at {action}"):
            handle = self._collectives.start_exchange(transfers, PIPELINE, use=self._use(action), tag=tag)
        self._sending.append((handle, action, (*tensors, *kept)))

    def _post(self, action: Action, forms: tuple[_Form, ...]) -> None:
        if action.carries == "gradients":
            forms = tuple(form for form in forms if form.differentiable)
        landings: tuple[Tensor, ...] = ()
        if self._through_host:
            landings = tuple(_empty(form, self._collectives.device) for form in forms)
        tensors = tuple(_empty(form, self._device) for form in forms)
        handle = self._start_receive(action, tensors, tag=action.carries) if tensors else None
        self._inbox[action.carries, action.stage, action.microbatch] = _Incoming(tensors, forms, handle, landings)

    def _start_receive(self, action: Action, tensors: Sequence[Tensor], *, tag: str) -> Handle:
        peer = self._program.stage_ranks[action.peer_stage]
        transfers = [Transfer("receive", tensor, peer) for tensor in tensors]
        with self._telling(f"asking at {action}"):
            return self._collectives.start_exchange(transfers, PIPELINE, use=self._use(action), tag=tag)

    def _known(self, action: Action) -> tuple[_Form, ...] | None:
        return self._forms.get(self._boundary(action))

    def _boundary(self, action: Action) -> tuple[Signature, int]:
        """The border that a message crosses, by the stage before it, for a batch of these shapes."""
        return self._signatures[action.microbatch], min(action.stage, action.peer_stage)

    def _use(self, action: Action) -> str:
        own, peer = (self._program.stage_ranks[stage] for stage in (action.stage, action.peer_stage))
        use = link_use(action.carries, *((own, peer) if action.kind == "send" else (peer, own)))
        return _host_use(use) if self._through_host else use

    @property
    def _device(self) -> torch.device:
        """Where messages of this step lie."""
        return HOST if self._through_host else self._collectives.device

    def _header(self, action: Action, forms: Sequence[_Form]) -> Tensor:
        numbers = [len(forms)]
        for form in forms:
            numbers += [DTYPES.index(form.dtype), int(form.differentiable), len(form.shape), *form.shape]
        assert len(numbers) <= HEADER_SIZE, f"{action}: {len(forms)} tensors cross, more than a header can describe"
        numbers += [0] * (HEADER_SIZE - len(numbers))
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _read_header(self, action: Action) -> tuple[_Form, ...]:
        header = torch.empty(HEADER_SIZE, dtype=torch.int64, device=self._device)
        handle = self._start_receive(action, [header], tag="shapes of activations")
        with self._telling(f"waiting for shapes at {action}"):
            handle.wait()
        numbers = iter(header.tolist())
        forms = []
        for _ in range(next(numbers)):
            dtype, differentiable = DTYPES[next(numbers)], bool(next(numbers))
            num_dims = next(numbers)
            forms.append(_Form(tuple(next(numbers) for _ in range(num_dims)), dtype, differentiable))
        return tuple(forms)

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Names the stage and the action in a failure of communication."""
        try:
            yield
        except CommunicationError as error:
            rank = self._collectives.rank
            stages = ", ".join(map(str, self._program.stages_of(self._collectives.mesh.coordinate(rank)["pp"])))
            raise CommunicationError(
                f"rank {rank}, which holds stage {stages} of the pipeline, was {what}: {error}"
            ) from error


def _empty(form: _Form, device: torch.device) -> Tensor:
    return torch.empty(form.shape, dtype=form.dtype, device=device)


def _host_use(use: str) -> str:
    return f"{use} first"


def _moves(action: Action) -> bool:
    return action.kind in ("send", "receive")
