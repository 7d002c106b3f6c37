"""
A virtual accelerator, in pure Python: its tensors compute on the CPU, and it notes where the host waits for them.

    with virtual_device() as log:
        pipeline.to(DEVICE)
        log.clear()
        pipeline([1, 2])
    print(log.syncs)

The host waits for a GPU where it reads a number, where a shape depends on numbers, and where it copies, unless the
copy is `non_blocking` from pinned memory. Operations on tensors of several devices raise an error, as on a GPU. The
device is registered with PyTorch for the rest of the process: only a process of its own may import this module.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Backend:
    """What PyTorch asks of the module of a device."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def is_bf16_supported(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def set_device(self, device: int) -> None:
        pass

    def synchronize(self, device: object = None) -> None:
        LOG.note("synchronize")

    def empty_cache(self) -> None:
        pass


_setup_privateuseone_for_python_backend("virtual", backend_module=_Backend())
# `Module.to` cannot set the `data` of a weight to a tensor of another class.
torch.__future__.set_swap_module_params_on_conversion(True)

DEVICE = torch.device("virtual", 0)
aten = torch.ops.aten
SOURCES = Path(__file__).parents[1] / "src"
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
# Their results have shapes that depend on numbers, or are numbers.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")


class Log:
    """Where the host has waited for the device, and how many operations have been launched there."""

    def __init__(self):
        #: What was waited for and the line of this package, or of another, that waited.
        self.syncs: list[str] = []
        self.num_launches = 0

    def note(self, kind: str) -> None:
        """Adds a wait of the host."""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        frames = [frame for frame in frames if frame.filename != __file__]
        own = [frame for frame in frames if frame.filename.startswith(str(SOURCES))] or frames
        self.syncs.append(f"{kind} at {own[-1].filename.removeprefix(str(SOURCES))}:{own[-1].lineno}")

    def clear(self) -> None:
        """Forgets everything."""
        self.syncs.clear()
        self.num_launches = 0

    def table(self) -> str:
        """The waits with their numbers, a line each."""
        return "\n".join(f"{number:4d} {sync}" for sync, number in Counter(self.syncs).most_common())


LOG = Log()
_pinned: set[int] = set()  # storages that count as pinned


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on the virtual device, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner!r})"

    def tolist(self) -> list:
        LOG.note("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Virtual(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def virtual_device() -> Iterator[Log]:
    """The context in which tensors are made on the device; its log starts empty."""
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(..., device=)` copies by an operation
    LOG.clear()
    try:
        with _Virtual():
            yield LOG
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)


def _unwrap(value: object) -> object:
    return value.inner if isinstance(value, DeviceTensor) else value


def _wrap(value: object) -> object:
    return DeviceTensor(value) if type(value) is torch.Tensor else value


def _note_copy(source: torch.Tensor, is_non_blocking: bool) -> None:
    """A copy between the CPU and the device."""
    is_pinned = not isinstance(source, DeviceTensor) and source.untyped_storage()._cdata in _pinned
    if not (is_pinned and is_non_blocking):
        LOG.note(f"copy of {tuple(source.shape)} {'from' if isinstance(source, DeviceTensor) else 'to'} the device")


def _check_operands(func: torch._ops.OpOverload, name: str, args: tuple, on_cpu: list[torch.Tensor]) -> None:
    """Notes what an operation on the device waits for, and raises an error where devices are mixed."""
    if name in WAITING or (name == "repeat_interleave" and len(args) == 1):
        LOG.note(name)
    if func in INDEXING:
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                LOG.note("a mask as index")
            elif isinstance(index, torch.Tensor) and not isinstance(index, DeviceTensor):
                _note_copy(index, is_non_blocking=False)
        on_cpu = [tensor for tensor in on_cpu if all(tensor is not index for index in args[1])]
    if any(tensor.ndim > 0 for tensor in on_cpu) and name != "_foreach_copy_":
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu, in {func}.")


def _run(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> object:
    """Runs an operation on the CPU, and notes what it would be on a GPU."""
    name = func._schema.name.split("::")[1]
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if func.namespace == "c10d":  # collectives: those of GPUs line up behind what computes their operands
        return args[0], func(*tree_map(_unwrap, args), **kwargs)[1]
    if name == "is_pinned":
        return tensors[0].untyped_storage()._cdata in _pinned
    if name == "_pin_memory":
        pinned = tensors[0].clone()
        _pinned.add(pinned.untyped_storage()._cdata)
        return pinned
    if func is aten._to_copy.default and ((on_device and target == "cpu") or (on_cpu and target == DEVICE.type)):
        _note_copy(tensors[0], kwargs.get("non_blocking", False))
    elif func is aten.copy_.default and on_device and on_cpu:
        _note_copy(args[1], len(args) > 2 and args[2])
    elif on_device:
        _check_operands(func, name, args, on_cpu)
    is_launched = bool(on_device) or target == DEVICE.type
    if is_launched and not func.is_view:
        LOG.num_launches += 1
    inner = {key: _unwrap(value) for key, value in kwargs.items() if key != "pin_memory"}
    if target is not None:
        inner["device"] = torch.device("cpu")
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, inner))
    written = [value for value, entry in zip(args, func._schema.arguments, strict=False) if entry.is_write]
    written += [kwargs[entry.name] for entry in func._schema.arguments if entry.is_write and entry.name in kwargs]
    if written:  # operations in place return what they have written
        return None if result is None else written[0] if isinstance(result, torch.Tensor) else tuple(written)
    if func is aten._to_copy.default and target is not None:
        is_launched = target == DEVICE.type
        result = result.clone() if is_launched else result
    return tree_map(_wrap, result) if is_launched and name not in WAITING[:1] else result
