"""The memory of a distillation, predicted from shapes alone: no weights are read, nothing is computed.

A step of the method runs on fake tensors, which have shapes, dtypes and lifetimes and no memory. All that
is alive is counted, so that whatever a method, an optimizer or a network does is in the prediction.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distmatch.base.errors import UserError, cause
from distmatch.data.batches import Batch, Pool
from distmatch.diffusion.conditioning import Conditioning, null_conditioning, spec_of
from distmatch.divergences import divergence
from distmatch.methods.construct import build_method
from distmatch.methods.context import Context
from distmatch.methods.initialization import frozen, has_network
from distmatch.methods.matching.settings import DMDSettings
from distmatch.methods.settings import FakeScoreSettings, NetworkSettings, RoleSettings
from distmatch.methods.state import DistillState
from distmatch.methods.table import resolve_method
from distmatch.nets.sizes import RoleSize, role_sizes
from distmatch.training.options import DistillOptions
from distmatch.training.prepare import check_steps

LARGE = 5_000_000
"""Parameters of a teacher, or bytes of a pipeline, from which on memory is predicted; others are run."""
_ITEM = torch.ops.aten._local_scalar_dense.default
_NONZERO = torch.ops.aten.nonzero.default
_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Memory:
    """Bytes at the time of a distillation at which it takes most.

    Attributes:
        sizes: What each network owns; those of gradients are the sum over all steps.
        passes: Gradients, activations and all else that is alive at the peak.
        parts: Parts of a pipeline beside its network, by name; they are on the CPU and count apart.
        offload: Whether moments are on the device for the step of their network alone.
        needs_data: Whether the method compares with real samples, with its settings.
    """

    sizes: dict[str, RoleSize]
    passes: int
    parts: dict[str, int]
    offload: bool = False
    needs_data: bool = False

    @property
    def weights(self) -> int:
        """Weights of all networks, and what the average keeps against rounding."""
        return sum(size.weights for size in self.sizes.values())

    @property
    def optimizer(self) -> int:
        """Adam's moments."""
        return sum(size.optimizer for size in self.sizes.values())

    @property
    def peak(self) -> int:
        """All but the parts of a pipeline beside its network."""
        if self.offload:
            steps = (size.optimizer + size.gradients for size in self.sizes.values())
            return self.weights + max(self.passes, *steps)
        return self.weights + self.optimizer + self.passes


def predicted(options: Any, networks: Mapping[str, nn.Module]) -> Memory | None:
    """The prediction for a run; None for a small network, a teacher's training, or a method without one."""
    teacher = networks.get("teacher")
    if not isinstance(options, DistillOptions) or teacher is None:
        return None
    if sum(p.numel() for p in teacher.parameters()) < LARGE:
        return None
    try:
        return predict_memory(options, teacher)
    except UserError:
        return None


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors that are made while it is active, until they are freed.

    Numbers that fake tensors do not have are 0 and False where code asks for them; all elements are nonzero.

    Attributes:
        now: Bytes alive.
        peak: The most that was alive at a time.
        guessed: Whether code asked for a number that is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.guessed = False
        self._sizes: dict[int, int] = {}
        self._left_out: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # two of three calls, which the mode of fakes answers slowly
        if func is _ITEM:
            self.guessed = True
            return False if args[0].dtype == torch.bool else args[0].dtype.is_floating_point * 0.0
        if func is _NONZERO:
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.int64)
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return output

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Does not count the memory of some tensors any more."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._left_out[storage._cdata] = storage
            self.now -= self._sizes.pop(storage._cdata, 0)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes and key not in self._left_out:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def predict_memory(options: DistillOptions, teacher: Any) -> Memory:
    """The memory of a distillation.

    Nothing but the shapes of the teacher is read, and it may be on the meta device.

    Args:
        options: The options.
        teacher: The teacher.

    Raises:
        UserError: The method needs numbers to know its shapes, or options and teacher do not go together.
    """
    run, own = options.run, options.settings
    offload = isinstance(own, NetworkSettings) and own.offload
    if isinstance(own, NetworkSettings):
        own = replace(own, offload=False)  # which is refused on the CPU, where the steps run
    if isinstance(own, DMDSettings):
        own = replace(own, pairs=run.batch, pair_steps=1)  # no more at a time, and thousands would take long
    method, name = resolve_method(options.method, options.divergence)
    period, turns = 1, {0}
    if isinstance(own, FakeScoreSettings):
        period = own.fake_score_steps
        # A step on the same batch has a turn of either, and no other step takes more.
        turns = {period - 1} if own.order == "same-batch" else {0, period - 1}
    middle = period * (run.steps // (2 * period))
    rows = _rows(teacher, run.batch)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    teacher, parts = _faked(teacher, fake), _parts(teacher)
    with fake, LiveBytes() as live, _modules_of_fakes():
        try:
            base = frozen(teacher, _CPU, own if isinstance(own, RoleSettings) else None)
            copied = has_network(base)
            context = Context(
                teacher=base,
                method=method,
                divergence=divergence(name),
                settings=own,
                total_steps=run.steps,
                device=_CPU,
                bf16=run.precision == "bf16",
                net=None if copied else options.net.resolve(base.shape, "cpu"),
            )
            distiller = build_method(context)
            check_steps(distiller, run.steps)
            state = distiller.init(run.seed)
            networks = {"teacher": base, **state.modules()}
            told = Conditioning(rows)
            batch = Batch(torch.zeros(run.batch, *base.shape), told, pool=Pool(run.batch, told.index))
            modules = {key: part for key, part in networks.items() if isinstance(part, nn.Module)}
            if isinstance(teacher, nn.Module):  # the one that is handed in, of which the run has a copy
                live.leave_out((*teacher.parameters(), *teacher.buffers()))
            _make_moments(state.optimizers.values())
            live.leave_out(_kept(modules, state))
            live.peak = live.now
            for step in turns:
                state.step = middle + step
                distiller.step(state, batch)
            sizes = role_sizes(modules, state.optimizers.values(), state.ema)
        except (RuntimeError, UserError) as error:  # of fake tensors, or of numbers that they do not have
            if isinstance(error, UserError) and not live.guessed:
                raise
            raise UserError(
                f"the memory of {method.name} cannot be predicted from shapes",
                got=cause(error.__cause__ or error),
                fix="measure it: a run of a few steps shows the peak in its log",
            ) from error
    return Memory(sizes, live.peak, parts, offload, distiller.needs_data)


_CPU = torch.device("cpu")


def _make_moments(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Lets optimizers make their moments, which costs less than steps of the method that do."""
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def _kept(networks: Mapping[str, nn.Module], state: DistillState) -> Iterator[Tensor]:
    """What is in memory between steps."""
    for network in networks.values():
        yield from network.parameters()
        yield from network.buffers()
    yield from state.ema.rest.values()
    for optimizer in state.optimizers.values():
        for moments in optimizer.state.values():
            yield from (value for value in moments.values() if isinstance(value, Tensor))


def _rows(teacher: Any, n: int) -> Mapping[str, Tensor]:
    """A conditioning of the lengths that prompts have."""
    spec = spec_of(teacher)
    try:
        return null_conditioning(teacher, n)
    except UserError:  # it has none
        return {name: torch.zeros(n, *field.shape, dtype=field.dtype) for name, field in spec.items()}


def _faked(teacher: Any, fake: FakeTensorMode) -> Any:
    """A copy with fake tensors of the same shapes, dtypes and sharing."""
    if not isinstance(teacher, nn.Module):
        return teacher
    memo: dict[int, Any] = {}
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        with fake:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
        learns = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if learns else made
    return copy.deepcopy(teacher, memo)


@contextmanager
def _modules_of_fakes() -> Iterator[None]:
    """Lets modules with fake tensors be converted and copied.

    torch converts parameters in place, which fakes refuse, and copies the mode of a fake with it to another
    one. Tensors that are no fakes, such as tables of a path, are shared by copies here.
    """

    def apply(self: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
        for child in self.children():
            child._apply(change)
        for held in (self._parameters, self._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                new = change(old.detach())
                if (new.dtype, new.device) != (old.dtype, old.device):
                    learns = isinstance(old, nn.Parameter)
                    held[name] = nn.Parameter(new, old.requires_grad) if learns else new
        return self

    def deepcopy(self: Tensor, memo: dict[int, Any]) -> Any:
        if id(self) not in memo and isinstance(self, FakeTensor):
            made = torch.empty_like(self.detach())
            learns = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(made, self.requires_grad) if learns else made
        return memo.get(id(self), self)

    applying, copying = nn.Module._apply, Tensor.__deepcopy__
    nn.Module._apply, Tensor.__deepcopy__ = apply, deepcopy  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply, Tensor.__deepcopy__ = applying, copying  # type: ignore[method-assign]


def _parts(teacher: Any) -> dict[str, int]:
    """Bytes of the text encoders and the autoencoder of a pipeline."""
    pipeline = getattr(teacher, "pipeline", None)
    if pipeline is None:
        return {}
    tracer = pipeline.tracer
    parts = {k: v for k, v in tracer.pipeline.components.items() if isinstance(v, nn.Module)}
    return {
        name: sum(t.nbytes for t in (*part.parameters(), *part.buffers()))
        for name, part in parts.items()
        if name != tracer.network_name
    }
