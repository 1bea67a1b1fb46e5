"""Float64 throughout: lifts every narrower float that a model asks for, so that two runs can be compared to 1e-12.

Models cast to float32 inside (norms, eager softmax, rotary angles, their own loss) whatever dtype their weights have. Each such cast
rounds at 6e-8, and two meshes that add in another order then differ by that much. The mode changes what is asked for, not the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

_LIFTED = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}

_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

_BACKWARD = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)

# Here a dtype says how bytes are read, not what a number is rounded to.
_REINTERPRETS = (torch.Tensor.view, torch.frombuffer, torch.Tensor.set_)

# Experts' products: their kernels know no float64.
_GROUPED_PRODUCTS = (torch.nn.functional.grouped_mm, torch._grouped_mm)

_TYPES_BY_NAME = {
    "FloatTensor": torch.float64,
    "HalfTensor": torch.float64,
    "BFloat16Tensor": torch.float64,
}


class Float64Throughout(TorchFunctionMode):
    """A context in which no cast, dtype argument, default or created tensor is narrower than float64.

    Enter it for the construction of the model, the forward pass and the backward pass (recomputation happens there; autograd's device
    threads inherit the mode from the thread that called `backward`). What is lifted: `float()`, `half()`, `bfloat16()`, `to`, `type`,
    `type_as`, every dtype argument of every torch function, the default dtype, and the result of any function that makes a narrow float
    out of none. What is not: tensors that were narrow before (cast the model and floating inputs of the batch first), bytes read as
    numbers (load weights outside), and `torch.autocast` regions, which round below the level of functions.

    The default dtype is one for the whole process in torch: while any thread is inside, it is float64 in all of them.
    """

    # They mirror torch's process-wide default dtype, which ranks simulated by threads would otherwise restore under each other's feet.
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _num_inside: ClassVar[int] = 0
    _outside: ClassVar[torch.dtype] = torch.float32

    def __enter__(self) -> Self:
        kind = type(self)
        with kind._lock:
            if kind._num_inside == 0:
                kind._outside = torch.get_default_dtype()
                torch.set_default_dtype(torch.float64)
            kind._num_inside += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        mode = type(self)
        with mode._lock:
            mode._num_inside -= 1
            if mode._num_inside == 0:
                torch.set_default_dtype(mode._outside)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REINTERPRETS:
            return func(*args, **kwargs)
        if (
            torch.get_default_dtype() != torch.float64
        ):  # model code sets it around constructors, from the dtype in its config
            torch.set_default_dtype(torch.float64)
        if func in _CASTS:
            return args[0].to(torch.float64)
        if func in _BACKWARD:
            return self._backward(func, args, kwargs)
        args, kwargs = _with_lifted_dtypes(func, args, kwargs)
        if func in _GROUPED_PRODUCTS and _is_grouped_in_float64(*args, **kwargs):
            return _grouped_product(*args, **kwargs)
        result = func(*args, **kwargs)
        if _any_narrow(result) and not _any_narrow((args, kwargs)):
            return _lifted(result)
        return result

    def _backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs the engine with the mode on, which torch takes off while it handles a function: recomputation runs model code.

        Gradient edges in place of tensors, or torch would hand the call back here: only tensors are looked at by function modes.
        """
        if func is torch.Tensor.backward:
            func, kwargs = torch.autograd.backward, dict(kwargs)
            kwargs["grad_tensors"] = kwargs.pop("gradient", None)
        ends = (*args, kwargs.get("inputs"))
        if kwargs.get("is_grads_batched") or not all(_requires_grad(end) for end in ends):
            return func(*args, **kwargs)  # torch says what is wrong, or maps over a batch of gradients
        inputs = {"inputs": _edges(kwargs["inputs"])} if "inputs" in kwargs else {}
        with self:
            return func(*(_edges(end) for end in args), **{**kwargs, **inputs})


def _is_grouped_in_float64(a_ND: torch.Tensor, b_EDF: torch.Tensor, **options: Any) -> bool:
    """Whether it is the product that experts make: rows in order of their expert, by that expert's matrix."""
    return a_ND.dtype == torch.float64 and a_ND.dim() == 2 and b_EDF.dim() == 3 and options.get("offs") is not None


def _grouped_product(
    a_ND: torch.Tensor,
    b_EDF: torch.Tensor,
    *,
    offs: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Expert e's rows [offs[e-1], offs[e]) of a, times its matrix: [N, F]. Rows after the last expert's are zero. Waits for the device."""
    assert bias is None and out_dtype in (None, torch.float64), "no kernel of torch's takes a bias or widens either"
    stops = [int(stop) for stop in offs.tolist()]
    parts = [a_ND[start:stop] @ b_EDF[e] for e, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True))]
    return torch.cat([*parts, a_ND.new_zeros(a_ND.shape[0] - stops[-1], b_EDF.shape[-1])])


def _requires_grad(ends: Any) -> bool:
    if isinstance(ends, torch.Tensor):
        return ends.requires_grad
    if isinstance(ends, GradientEdge) or ends is None:
        return True
    return all(_requires_grad(end) for end in ends)


def _edges(ends: Any) -> Any:
    if isinstance(ends, torch.Tensor):
        return get_gradient_edge(ends)
    if isinstance(ends, GradientEdge) or ends is None:
        return ends
    return tuple(_edges(end) for end in ends)


def _with_lifted_dtypes(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(_lift_dtype(value) for value in args)
    kwargs = {key: _lift_dtype(value) for key, value in kwargs.items()}
    if func is torch.Tensor.type and len(args) > 1:
        args = (args[0], _lift_type(args[1]), *args[2:])
    if func in (torch.Tensor.to, torch.Tensor.type_as):
        args = (args[0], *(_stand_in(value) for value in args[1:]))
        kwargs = {key: _stand_in(value) for key, value in kwargs.items()}
    return args, kwargs


def _lift_dtype(value: Any) -> Any:
    return _LIFTED.get(value, value) if isinstance(value, torch.dtype) else value


def _lift_type(wanted: Any) -> Any:
    """`Tensor.type` also takes a tensor type or its name, `torch.cuda.HalfTensor`: its place is kept."""
    name = (
        wanted
        if isinstance(wanted, str)
        else f"{wanted.__module__}.{wanted.__name__}"
        if isinstance(wanted, type)
        else ""
    )
    place, _, last = name.rpartition(".")
    return f"{place}.DoubleTensor" if last in _TYPES_BY_NAME else wanted


def _stand_in(value: Any) -> Any:
    """In place of a narrow tensor whose dtype and device are asked for: an empty one of the lifted dtype on the same device."""
    if isinstance(value, torch.Tensor) and value.dtype in _LIFTED:
        return torch.empty(0, dtype=_LIFTED[value.dtype], device=value.device)
    return value


def _any_narrow(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in _LIFTED
    if isinstance(value, Mapping):
        return any(_any_narrow(item) for item in value.values())
    return isinstance(value, (tuple, list)) and any(_any_narrow(item) for item in value)


def _lifted(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.to(_LIFTED.get(result.dtype, result.dtype))
    if type(result) in (tuple, list):
        return type(result)(_lifted(item) for item in result)
    return result
