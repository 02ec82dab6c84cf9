"""Channel masks inside a user's own network, and convolutions over :mod:`hwprune.ops`.

:func:`mask_` makes a network obey one flat mask ``m`` over the channels of all its groups. Masks are multiplied into
*parameters*, never into activations: a channel that a batch norm follows needs no pass of its own, because
``m·(γ·x̂ + β) = (m·γ)·x̂ + m·β``.

The parameters themselves are not touched. A masked module keeps its parameters under their own names and only *reads*
them as ``parameter · mask``, through a property of a subclass made for it. So ``state_dict``, ``named_parameters``, the
optimiser and checkpoints see the same tensors under the same keys, masked or not, and :func:`unmask_` has nothing to
copy back.

Where it is known how the sizes in the network follow, channels whose mask is exactly 0 can be *skipped*: every
parameter that has them is then read without them, so that the network computes on smaller tensors from end to end, as
it will once it is cut. No activation is gathered or scattered.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from hwprune import ops
from hwprune.errors import InvalidInput, UnsupportedModel

Conv = TypeVar("Conv", bound=nn.Conv2d)


class _Slot(Protocol):
    @property
    def parameter(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def positions(self) -> Any: ...  # [width, r] int64
    @property
    def role(self) -> str: ...
    @property
    def folded(self) -> bool: ...


class _Group(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def slots(self) -> Any: ...  # iterable of slots


class GroupsLike(Protocol):
    """What masking needs of ``hwprune.graph.Groups``."""

    @property
    def offsets(self) -> Any: ...  # [G+1] int64

    def __iter__(self) -> Iterator[Any]: ...


Sizes = Callable[[np.ndarray], Iterable[tuple[nn.Module, str, Any]]]


class _Parts:
    """The mask of the current step, cut into one vector per distinct channel layout; ``None``: nothing is masked.

    kept: per layout the positions that are computed, ``None`` for all of them.
    """

    def __init__(self) -> None:
        self.vectors: tuple[Tensor, ...] | None = None
        self.kept: list[Tensor | None] | None = None
        self.straight_through = False


_SITES = "_hwprune_sites"  # attribute of a masked module: {parameter name: [(dim, part), ...]}
_PARTS = "_hwprune_parts"
_CUTS = "_hwprune_cuts"  # like _SITES, for every dim along which a parameter or buffer has channels
_HELD = "_hwprune_held"  # statistics of the kept channels, while a norm updates them
_OUTPUT = ""  # the key in sites of a mask that acts on the module's output, for want of a parameter

_subclasses: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


class _MaskedModule(nn.Module):
    """Marks the subclasses made by :func:`mask_`; the wrapped class is the second base."""


class Masked:
    """The handle of a masked network, made by :func:`mask_`.

    Attributes:
        model: the network, masked in place.
        total: number of channels over all groups, ΣC.
    """

    def __init__(
        self,
        model: nn.Module,
        offsets: np.ndarray,
        parts: _Parts,
        layouts: list[np.ndarray],
        sizes: Sizes | None = None,
    ) -> None:
        self.model = model
        self.total = int(offsets[-1])
        self._offsets = offsets
        self._parts = parts
        self._layouts = layouts
        self._follow = sizes
        self._dense: list[tuple[nn.Module, str, Any]] = []  # sizes to be put back
        self._sizes = [len(layout) for layout in layouts]
        flat = np.concatenate(layouts) if layouts else np.empty(0, np.int64)
        self._index = torch.from_numpy(flat)  # [Σ sizes]; the value `total` points at a constant one
        self._has_free = bool((flat == self.total).any())

    def set(self, mask: Tensor | None, *, straight_through: bool = False, skip: bool = False) -> None:
        """Mask the channels from the next forward on.

        Args:
            mask: flat ``[ΣC]``, real; gradients reach it. ``None``: every channel counts fully.
            straight_through: masked parameters get the gradient that they would have with a mask of ones, so that
                those of a channel that is off still learn. What was computed before them does not.
            skip: channels whose mask is exactly 0 are not computed; a group that has no other keeps its first. Results
                and gradients are those of multiplied masks, but neither these channels' masks nor what makes them gets
                any gradient, and their running statistics stay. Looks at the mask, hence waits for a device.

        Raises:
            InvalidInput: the mask has another shape, or skip without the ``sizes`` of :func:`mask_`.
        """
        self._parts.straight_through = straight_through
        self._restore()
        if mask is None:
            self._parts.vectors = None
            return
        if mask.shape != (self.total,):
            raise InvalidInput(f"the mask has shape {tuple(mask.shape)}; this network's groups need ({self.total},)")
        if self._index.device != mask.device:
            self._index = self._index.to(mask.device)
        if self._has_free:
            mask = torch.cat([mask, mask.new_ones(1)])
        index, sizes = self._skip(mask) if skip else (self._index, self._sizes)
        self._parts.vectors = torch.split(mask.index_select(0, index), sizes)

    def _skip(self, mask: Tensor) -> tuple[Tensor, list[int]]:
        """Leave out the channels whose mask [ΣC] (and one) is 0; what is left of ``_index`` and ``_sizes``."""
        if self._follow is None:
            raise InvalidInput("channels cannot be skipped without knowing how sizes follow; give mask_ its sizes")
        active = np.append(mask.detach()[: self.total].cpu().numpy() != 0, True)  # [ΣC + 1]
        starts = self._offsets[:-1]
        if len(starts):
            active[starts[~np.logical_or.reduceat(active[:-1], starts)]] = True
        if active.all():
            return self._index, self._sizes
        for module, name, value in self._follow(active[:-1]):
            self._dense.append((module, name, getattr(module, name)))
            setattr(module, name, value)
        alive = [active[layout] for layout in self._layouts]
        left = [layout[here] for layout, here in zip(self._layouts, alive, strict=True)]
        device = mask.device
        self._parts.kept = [None if here.all() else torch.from_numpy(np.flatnonzero(here)).to(device) for here in alive]
        return torch.from_numpy(np.concatenate(left)).to(device), [len(layout) for layout in left]

    def _restore(self) -> None:
        """Compute every channel again."""
        self._parts.kept = None
        for module, name, value in self._dense:
            setattr(module, name, value)
        self._dense = []

    @torch.no_grad()
    def absorb_(self, mask: Tensor) -> None:
        """Multiply a flat mask ``[ΣC]`` into the stored parameters for good, and let every channel count fully.

        The network computes the same as it did under the mask: exact, wherever the mask acts. Tied parameters are
        multiplied once.
        """
        self.set(mask)
        done: set[int] = set()
        for module in self.model.modules():
            for name in module.__dict__.get(_SITES, {}):
                if name == _OUTPUT:
                    raise UnsupportedModel(
                        f"a {type(module).__bases__[1].__name__} without weight and bias has nothing that could absorb "
                        "its mask; give it affine=True"
                    )
                stored = module._parameters[name] if name in module._parameters else module._buffers[name]
                if stored is not None and id(stored) not in done:
                    stored.copy_(getattr(module, name))
                    done.add(id(stored))
        self.set(None)

    def unmask_(self) -> nn.Module:
        """Take the masks out again; returns the network as it was, with its current weights."""
        self._restore()
        return unmask_(self.model)


def mask_(model: nn.Module, groups: GroupsLike, sizes: Sizes | None = None) -> Masked:
    """Make ``model`` obey a flat channel mask, in place.

    The mask acts where a channel is *made*: on the weight and bias of the norm that follows (role ``norm``), on
    producers that no norm folds (role ``out``), and on parameters that enter the data (role ``data``). Positions of a
    parameter that belong to no group are never masked. Parameters that several modules share are masked in all of them.

    Args:
        model: any network; it must be the one that ``groups`` was traced from.
        groups: the coupled channels.
        sizes: what the network's modules must hold in attributes to compute with the channels ``keep`` [ΣC] alone, as
            (module, attribute, value); asked at every step that skips. None: nothing can be skipped.

    Returns:
        A handle whose :meth:`Masked.set` sets the mask. Until then nothing is masked.

    Raises:
        InvalidInput: the network is masked already, or a slot names a parameter it does not have.
        UnsupportedModel: a norm without parameters leaves no place for the mask.
    """
    if any(isinstance(module, _MaskedModule) for module in model.modules()):
        raise InvalidInput("the network is masked already; call unmask_ before masking it again")
    offsets = np.asarray(groups.offsets, np.int64)
    total = int(offsets[-1])
    owners = _owners(model)

    masked: dict[tuple[int, str, int], np.ndarray] = {}  # (module, name, dim) -> flat channel of each position
    cuttable: dict[tuple[int, str, int], np.ndarray] = {}  # the same, where channels may be left out
    modules: dict[int, nn.Module] = {}
    for group, offset in zip(groups, offsets[:-1], strict=True):
        for slot in group.slots:
            positions = np.asarray(slot.positions, np.int64)  # [width, r]
            flat = np.broadcast_to(offset + np.arange(len(positions))[:, None], positions.shape)
            if slot.role != "in" and not (slot.role == "out" and slot.folded):
                for module, name, size in _sites(model, owners, slot):
                    modules[id(module)] = module
                    channel = masked.setdefault((id(module), name, slot.dim), np.full(size, total))
                    channel[positions.ravel()] = flat.ravel()
            if sizes is not None:
                tensor = _tensor(model, slot.parameter)[1]
                for module, name in owners[id(tensor)]:
                    modules[id(module)] = module
                    channel = cuttable.setdefault((id(module), name, slot.dim), np.full(tensor.shape[slot.dim], total))
                    channel[positions.ravel()] = flat.ravel()

    parts = _Parts()
    numbers: dict[bytes, int] = {}
    layouts: list[np.ndarray] = []
    uses: tuple[dict[int, dict[str, list[tuple[int, int]]]], ...] = {}, {}
    for use, table in zip(uses, (masked, cuttable), strict=True):
        for (module_id, name, dim), channel in table.items():
            number = numbers.setdefault(channel.tobytes(), len(layouts))
            if number == len(layouts):
                layouts.append(channel)
            use.setdefault(module_id, {}).setdefault(name, []).append((dim, number))
    for module_id, module in modules.items():
        sites, cuts = (use.get(module_id, {}) for use in uses)
        module.__dict__[_SITES], module.__dict__[_CUTS], module.__dict__[_PARTS] = sites, cuts, parts
        module.__class__ = _masked_class(type(module), tuple(sorted({*sites, *cuts})))
    return Masked(model, offsets, parts, layouts, sizes)


def unmask_(model: nn.Module) -> nn.Module:
    """Take out what :func:`mask_` put in; parameters were never moved, so their values and identity stay.

    Returns:
        ``model``; unchanged if it was not masked.
    """
    for module in model.modules():
        if isinstance(module, _MaskedModule):
            del module.__dict__[_SITES], module.__dict__[_CUTS], module.__dict__[_PARTS]
            module.__class__ = type(module).__bases__[1]
    return model


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but batch norms normalise by the batch; running statistics stay as they are."""
    modes = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracked = [(norm, norm.track_running_stats, norm.running_mean, norm.running_var) for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    try:
        yield
    finally:
        for norm, tracks, mean, var in tracked:
            norm.track_running_stats, norm.running_mean, norm.running_var = tracks, mean, var
        for module, mode in modes:
            module.training = mode


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Tensor identity -> every (module, name) that holds it, so that tied parameters are masked in all places."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, name))
    return owners


def _tensor(model: nn.Module, parameter: str) -> tuple[nn.Module, Tensor]:
    """A parameter or buffer by its name, and the module that holds it."""
    path, _, name = parameter.rpartition(".")
    try:
        module = model.get_submodule(path)
        tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
    except (AttributeError, KeyError):
        tensor = None
    if tensor is None:
        raise InvalidInput(f"the network has no parameter {parameter!r}; were the groups traced from another one?")
    return module, tensor


def _sites(
    model: nn.Module, owners: dict[int, list[tuple[nn.Module, str]]], slot: _Slot
) -> Iterator[tuple[nn.Module, str, int]]:
    """Where the mask of a slot acts: (module, parameter name or ``_OUTPUT``, number of positions)."""
    module, tensor = _tensor(model, slot.parameter)
    size = tensor.shape[slot.dim]
    if slot.role != "norm" or isinstance(tensor, nn.Parameter):
        yield from ((owner, alias, size) for owner, alias in owners[id(tensor)])
    elif getattr(module, "weight", None) is None and getattr(module, "bias", None) is None:
        # Running statistics of a norm without γ and β: mask what it returns instead.
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedModel(
                f"{slot.parameter} belongs to a {type(module).__name__} without weight and bias, so that its channels "
                "cannot be masked; give it affine=True"
            )
        yield module, _OUTPUT, size


def _masked_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``base`` that reads the parameters ``names`` masked; one per (class, names)."""
    key = (base, names)
    if key not in _subclasses:
        members: dict[str, Any] = {name: _masked_parameter(name) for name in names if name != _OUTPUT}
        if _OUTPUT in names or "running_mean" in names or issubclass(base, nn.BatchNorm2d):
            members["forward"] = _masked_forward(base)
        members["__module__"] = __name__
        _subclasses[key] = cast(type[nn.Module], type(f"Masked{base.__name__}", (_MaskedModule, base), members))
    return _subclasses[key]


def _masked_parameter(name: str) -> property:
    def read(module: nn.Module) -> Any:
        held: dict[str, Tensor] = module.__dict__.get(_HELD, {})
        if name in held:
            return held[name]
        stored = module._parameters[name] if name in module._parameters else module._buffers[name]
        parts: _Parts = module.__dict__[_PARTS]
        if stored is None or parts.vectors is None:
            return stored
        value = _without_skipped(module, name, stored)
        for dim, part in module.__dict__[_SITES].get(name, ()):
            mask = parts.vectors[part].to(stored.dtype).view(-1, *(1,) * (stored.ndim - 1 - dim))
            if parts.straight_through:  # the difference is zero and has the gradient of a mask of one
                value = value.detach() * mask + (value - value.detach())
                continue
            value = value * mask
        return value

    return property(read)


def _without_skipped(module: nn.Module, name: str, value: Tensor) -> Tensor:
    kept = module.__dict__[_PARTS].kept
    if kept is None:
        return value
    for dim, part in module.__dict__[_CUTS].get(name, ()):
        if kept[part] is not None:
            value = value.index_select(dim, kept[part])
    return value


def _masked_forward(base: type[nn.Module]) -> Callable[..., Tensor]:
    """The forward of a norm: it may have no parameters to mask, statistics to write back, or an operator of ours."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        parts: _Parts = module.__dict__[_PARTS]
        statistics = {name: module._buffers.get(name) for name in ("running_mean", "running_var")}
        held = {
            name: small
            for name, stored in statistics.items()
            if stored is not None and (small := _without_skipped(module, name, stored)) is not stored
        }
        if held:
            module.__dict__[_HELD] = held
        try:
            ours = _trains_here(module, x)
            y = _trained_norm(cast(nn.BatchNorm2d, module), x) if ours else base.forward(module, x)  # [N, C, ...]
        finally:
            module.__dict__.pop(_HELD, None)
        if module.training:
            for name, small in held.items():
                ((_, part),) = module.__dict__[_CUTS][name]
                module._buffers[name].index_copy_(0, cast(Any, parts.kept)[part], small)  # type: ignore[union-attr]
        if parts.vectors is None or _OUTPUT not in module.__dict__[_SITES]:
            return y
        ((_, part),) = module.__dict__[_SITES][_OUTPUT]
        mask: Tensor = parts.vectors[part].to(y.dtype).view(-1, *(1,) * (y.ndim - 2))
        return y * mask

    return forward


def _trains_here(norm: nn.Module, x: Tensor) -> bool:
    """Whether our operator takes the norm's training: where torch's is slow, on the CPU.

    In NHWC torch takes 2 to 6 times as long as ours, unless channels fill vectors of 16, and two of them or more: then
    0.7 to 1 times.
    """
    if not isinstance(norm, nn.BatchNorm2d) or not norm.training or x.dim() != 4 or torch.compiler.is_compiling():
        return False
    slow = x.shape[1] % 16 != 0 or x.shape[1] == 16
    usual = x.dtype == torch.float32 and norm.affine and not torch.is_autocast_enabled(x.device.type)
    return slow and x.device.type == "cpu" and usual and x.numel() > x.shape[1]


def _trained_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A batch norm in training with the statistics of x [N, C, H, W]; running ones follow as in torch."""
    y, mean, var = ops.masked_bn_act(x, None, None, norm.weight, norm.bias, eps=norm.eps)
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            momentum = norm.momentum
            if momentum is None:  # a running average over all batches
                momentum = 1.0 / float(cast(Tensor, norm.num_batches_tracked))
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(var * (count / (count - 1)), momentum)
    return y


def _numeric_padding(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding_mode != "zeros":
        raise UnsupportedModel(f"padding_mode={conv.padding_mode!r} is not supported here; possible: 'zeros'")
    if not isinstance(conv.padding, str):
        return cast(tuple[int, int], conv.padding)
    if conv.padding == "valid":
        return 0, 0
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(r % 2 for r in reach):
        raise UnsupportedModel(f"padding='same' with kernel {conv.kernel_size} pads unevenly; give padding as numbers")
    return reach[0] // 2, reach[1] // 2


class MaskedConv2d(nn.Conv2d):
    """``nn.Conv2d`` that computes only the active channels: ``out_mask ⊙ (conv(in_mask ⊙ x) + bias)``.

    Attributes:
        in_mask: ``[Cin]`` in [0, 1] or ``None`` (all). Exact zeros are skipped.
        out_mask: ``[Cout]`` in [0, 1] or ``None`` (all). Exact zeros are skipped.

    Both are plain attributes, to be set before a forward; gradients reach them.
    """

    in_mask: Tensor | None = None
    out_mask: Tensor | None = None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """The same convolution, with the *same* parameters. Raises UnsupportedModel for padding other than zeros."""
        return _reinterpret(cls, conv)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, Cin, H, W]`` -> ``[N, Cout, H', W']``."""
        return cast(
            Tensor,
            ops.masked_conv2d(
                x,
                self.weight,
                in_mask=self.in_mask,
                out_mask=self.out_mask,
                shift=self.bias,
                stride=self.stride,
                padding=_numeric_padding(self),
                dilation=self.dilation,
                groups=self.groups,
            ),
        )


class ColumnPrunedConv2d(nn.Conv2d):
    """``nn.Conv2d`` of which only some (kh, kw, c) columns of the unfolded input take part.

    Attributes:
        columns: sorted ``[K]`` int64, flat ``(kh·kW + kw)·Cin + c``; a buffer, saved in the state dict.
    """

    columns: Tensor

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, columns: Tensor) -> Self:
        """The same convolution, with the *same* parameters, restricted to ``columns``.

        Raises:
            InvalidInput: columns not sorted, repeated or out of range.
            UnsupportedModel: a grouped convolution, or padding other than zeros.
        """
        if conv.groups != 1:
            raise UnsupportedModel(f"columns of a convolution with {conv.groups} groups cannot be pruned; possible: 1")
        count = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        columns = torch.as_tensor(columns, dtype=torch.int64, device=conv.weight.device)
        if columns.ndim != 1 or not (columns.diff() > 0).all() or not ((columns >= 0) & (columns < count)).all():
            raise InvalidInput(f"columns must be a strictly ascending list within [0, {count}), got {columns.tolist()}")
        pruned = _reinterpret(cls, conv)
        pruned.register_buffer("columns", columns)
        return pruned

    def forward(self, x: Tensor) -> Tensor:
        """``[N, Cin, H, W]`` -> ``[N, Cout, H', W']``."""
        return cast(
            Tensor,
            ops.masked_conv2d(
                x,
                self.weight,
                shift=self.bias,
                stride=self.stride,
                padding=_numeric_padding(self),
                dilation=self.dilation,
                columns=self.columns,
            ),
        )


@torch.no_grad()
def match_scales_(module: nn.Module, reference: nn.Module, groups: GroupsLike) -> None:
    """Give weights whose outputs a norm normalises at least the scale that they have in ``reference``, in place.

    Nothing that the network computes with fresh statistics depends on that scale, but training does: a step changes a
    weight of a third of the size three times as much, and its direction nine times. Regularised searches leave such
    weights behind (resnet20 by SS-Auto: 62.8 % right after the cut, 52 % in the first epoch of training it on).
    Larger weights are left as they are: a refit makes them so, and takes long steps badly (78.8 % after four epochs
    with its own scale, and 63.4 % with the reference's). Running statistics have to be measured anew afterwards.

    Args:
        module: the network, or what cutting it left: parameters are matched by name, by the root mean square of what is
            not zero.
        groups: the coupled channels of ``reference``.
    """
    names = {slot.parameter for group in groups for slot in group.slots if slot.role == "out" and slot.folded}
    wanted, found = dict(reference.named_parameters()), dict(module.named_parameters())
    for name in names & wanted.keys() & found.keys():
        now, before = _root_mean_square(found[name]), _root_mean_square(wanted[name])
        if found[name].ndim > 1 and 0 < now < before:
            found[name].mul_(before / now)


def _root_mean_square(weight: Tensor) -> float:
    return math.sqrt(float(weight.square().sum()) / max(1, int(weight.count_nonzero())))


def prune_columns_(module: nn.Module, columns: Mapping[str, Tensor], groups: GroupsLike, keep: Any) -> int:
    """Make convolutions of a *cut* network compute only some columns of their unfolded input, in place.

    Args:
        module: what cutting by ``keep`` left. Its convolutions hold their own weights still, under their dense names.
        columns: weight name -> bool ``[kH·kW·Cin]``, the kept columns in (kh, kw, c) order with the ``Cin`` of the
            dense network. Columns of channels that were cut are gone anyway.
        groups: the coupled channels of the dense network. keep: ``[ΣC]`` bool, the channels that were kept.

    Returns:
        How many convolutions compute less than before; where every column is kept, the plain one stays. The output is
        the same if the weights of the dropped columns are zero.

    Raises:
        InvalidInput: a name is no weight of a two-dimensional convolution here, or the columns do not fit it.
        UnsupportedModel: see :meth:`ColumnPrunedConv2d.from_conv`.
    """
    cut_away: dict[str, list[np.ndarray]] = {name: [] for name in columns}  # input channels that are gone
    flags = np.asarray(keep, bool)
    for group, offset in zip(groups, np.asarray(groups.offsets, np.int64)[:-1], strict=True):
        for slot in group.slots:
            if slot.role == "in" and slot.dim == 1 and slot.parameter in columns:
                cut_away[slot.parameter].append(slot.positions[~flags[offset : offset + group.width]].ravel())
    smaller: dict[int, nn.Module] = {}
    for name, kept in columns.items():
        path, _, leaf = name.rpartition(".")
        conv = dict(module.named_modules()).get(path)
        if not isinstance(conv, nn.Conv2d) or leaf != "weight":
            raise InvalidInput(f"{name!r} is not the weight of a convolution of this {type(module).__name__}")
        area = conv.kernel_size[0] * conv.kernel_size[1]
        table = kept.cpu().view(area, -1) if kept.numel() % area == 0 else kept.new_empty(area, 0)  # [kH·kW, Cin]
        inside = np.setdiff1d(np.arange(table.shape[1]), np.concatenate([[], *cut_away[name]]))
        if len(inside) != conv.in_channels:
            raise InvalidInput(
                f"{name}: {kept.numel()} columns leave {len(inside)} input channels; the convolution has "
                f"{conv.in_channels} and {area} kernel positions. Give columns and groups of the dense network"
            )
        chosen = table[:, torch.from_numpy(inside)].flatten().nonzero().flatten()
        if len(chosen) < area * conv.in_channels:
            # A convolution has to read something; the weights of a column that was dropped are zero.
            chosen = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64)
            smaller[id(conv)] = ColumnPrunedConv2d.from_conv(conv, chosen)
    for parent in list(module.modules()):
        for child, conv in parent.named_children():
            if id(conv) in smaller:
                setattr(parent, child, smaller[id(conv)])
    return len(smaller)


def _reinterpret(cls: type[Conv], conv: nn.Conv2d) -> Conv:
    """A ``cls`` with the configuration of ``conv`` that holds the very same parameters."""
    _numeric_padding(conv)
    same = cls(
        conv.in_channels,
        conv.out_channels,
        cast(tuple[int, int], conv.kernel_size),
        stride=cast(tuple[int, int], conv.stride),
        padding=cast(Any, conv.padding),
        dilation=cast(tuple[int, int], conv.dilation),
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    same.weight, same.bias = conv.weight, conv.bias
    return same.train(conv.training)
