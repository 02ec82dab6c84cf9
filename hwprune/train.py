"""The one training loop: training from scratch, searching with hooks, fine-tuning with the dense model as teacher.

A run that writes checkpoints can be killed at any moment; resumed, it ends with the very weights that it would have
had uninterrupted. For that the checkpoint holds, beside model and optimiser, the position in the data and the states
of all random generators, now and at the start of the epoch.
"""

import atexit
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hwprune.errors import CorruptArtifact, InvalidInput, TrainingDiverged
from hwprune.files import replacing
from hwprune.latency.turns import together

Loader = Iterable[tuple[Any, Any]]  # batches of (inputs, targets); inputs: a tensor, or a tuple of them
LossFn = Callable[[Any, Any], Tensor]  # (model output, targets) -> scalar

_CHECKPOINT_VERSION = 1
_NEVER = 2**62


@dataclass(frozen=True)
class Recipe:
    """How to train.

    The learning rate rises linearly for ``warmup_epochs`` and then falls to zero along a cosine (Loshchilov and
    Hutter, arXiv 1608.03983, without restarts). ``distill`` is the teacher's share of the loss, at ``temperature``
    (Hinton et al., arXiv 1503.02531, equation 4); it counts only where a teacher is given. ``clip_norm`` bounds the
    norm of the whole gradient. ``amp="auto"`` is bfloat16 on accelerators that have it, float16 with loss scaling on
    those that have not, and full precision on the processor. ``memory_format="auto"`` is channels last for
    convolutional networks whose forward pass runs so (a ``view`` may not): CIFAR ResNets train in four fifths of the
    time. ``momentum`` is β₁ for AdamW.
    """

    epochs: int = 30
    lr: float = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    amp: Literal["auto", "off", "float16", "bfloat16"] = "auto"
    distill: float = 0.5
    temperature: float = 4.0
    batch_size: int = 128
    seed: int = 0
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"

    def __post_init__(self) -> None:
        allowed = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "lr": (0 < self.lr < math.inf, "positive"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            "momentum": (0 <= self.momentum < 1, "0 or more and below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup_epochs": (0 <= self.warmup_epochs < math.inf, "0 or more"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 or more and below 1"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "positive, or None"),
            "amp": (self.amp in ("auto", "off", "float16", "bfloat16"), "auto, off, float16 or bfloat16"),
            "distill": (0 <= self.distill <= 1, "between 0 and 1"),
            "temperature": (self.temperature > 0, "positive"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "memory_format": (
                self.memory_format in ("auto", "contiguous", "channels_last"),
                "auto, contiguous or channels_last",
            ),
        }
        for name, (good, text) in allowed.items():
            if not good:
                raise InvalidInput(f"{name} is {getattr(self, name)!r}; it must be {text}")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of ``step`` (from 0) of ``steps``."""
        warmup = min(steps, round(self.warmup_epochs * steps / max(1, self.epochs)))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class StepHooks(Protocol):
    """What a search adds to each step. Steps are counted from 0 over the whole run, resumed or not.

    An object that also has ``log() -> dict`` adds these entries to the rows of the history.
    """

    def before_step(self, step: int) -> None:
        """Before the forward pass: set masks."""

    def after_backward(self, step: int) -> None:
        """Gradients are complete, unscaled and unclipped; the weights have not moved yet."""

    def after_step(self, step: int) -> None:
        """The optimiser has moved the weights."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of these: what ``torch.load(weights_only=True)`` reads back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""


@dataclass
class History:
    """``rows``: epoch, step (steps done), loss, accuracy (0..1, on training batches), lr, and the hooks' entries."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float = 0.0


@dataclass(frozen=True)
class Metrics:
    """Means over ``count`` items. ``accuracy`` is a fraction in 0..1, NaN where targets are not class indices."""

    accuracy: float
    loss: float
    count: int


def fit(
    model: nn.Module,
    loader: Loader,
    recipe: Recipe,
    *,
    loss_fn: LossFn | None = None,
    teacher: nn.Module | None = None,
    hooks: StepHooks | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    log_every: int | None = None,
    progress: bool = True,
    description: str = "training",
) -> History:
    """Train ``model`` in place, where its parameters lie; its modules are back in their modes afterwards.

    Seeds the generators of torch, numpy and random. Started by torchrun, the processes train one model together: each
    takes its share of every batch of a :class:`hwprune.data.ImageLoader`; other loaders have to share by themselves.

    Args:
        loader: yields ``(inputs, targets)`` and has a length; ``set_epoch(epoch)`` is called where it exists.
        loss_fn: ``(output, targets) -> scalar``; cross entropy by default.
        teacher: a network whose softened logits the model imitates beside the targets.
        hooks: called at the four points of each step.
        checkpoint: file written at the start, every ``checkpoint_seconds`` and after each epoch, never half written.
        resume: continue from ``checkpoint`` if it exists.
        log_every: steps between rows of the history; None is once an epoch.

    Raises:
        TrainingDiverged: the loss or a weight became infinite or NaN; the checkpoint is the last good one.
        InvalidInput: the loader is empty, the checkpoint belongs to another run or cannot be written.
        CorruptArtifact: the checkpoint cannot be read.
    """
    run = _Run(model, loader, recipe, loss_fn, teacher, hooks, checkpoint)
    if resume and checkpoint is not None and checkpoint.exists():
        run.load()
    else:
        run.seed()
        run.save(verify=True)
    started = saved = time.monotonic()
    before_s = run.history.wall_s
    with run, _modes(model, True), _modes(teacher, False), _progress(progress and run.rank == 0) as bar:
        task = bar.add_task(description, total=run.steps, completed=run.step, status=run.status())
        while run.epoch < recipe.epochs:
            for inputs, targets in run.batches():
                # Processes that wait for each other inside a step would deadlock with one that waits to measure.
                with together() if run.processes == 1 else nullcontext():
                    run.train_step(inputs, targets)
                last = run.batch == run.steps_per_epoch
                if last or (log_every and run.step % log_every == 0):
                    run.log()
                if last:
                    run.epoch, run.batch = run.epoch + 1, 0
                now = time.monotonic()
                run.history.wall_s = before_s + now - started
                # Processes must agree on when to save, and their clocks do not.
                if last or (run.processes == 1 and now - saved >= checkpoint_seconds):
                    run.save()
                    saved = now
                bar.update(task, completed=run.step, status=run.status())
        run.finish()
    return run.history


class _Run:
    """The state of one call of :func:`fit`: all that a checkpoint holds, and what it takes to make a step."""

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        recipe: Recipe,
        loss_fn: LossFn | None,
        teacher: nn.Module | None,
        hooks: StepHooks | None,
        checkpoint: Path | None,
    ) -> None:
        self.recipe, self.hooks, self.checkpoint, self.teacher = recipe, hooks, checkpoint, teacher
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise InvalidInput(
                f"{type(model).__name__} has no parameters that require a gradient; nothing can be trained"
            )
        self.device = self.parameters[0].device
        self.rank, self.processes = _processes(self.device)
        if self.processes > 1 and hooks is not None:
            raise InvalidInput(f"a search runs in one process, not in {self.processes}; fine-tuning may use torchrun")
        self.loader = loader = _to_device(loader, self.device)
        if self.processes > 1 and hasattr(loader, "shard"):
            loader.shard(self.rank, self.processes)
        self.steps_per_epoch = epoch_length(loader)
        self.steps = self.steps_per_epoch * recipe.epochs
        self.loss_fn = loss_fn or _cross_entropy(recipe.label_smoothing)
        self.model = self.forward = model
        self.memory_format: torch.memory_format | None = None  # chosen when the first batch is there
        self.optimizer = _optimizer(self.parameters, recipe)
        self.amp_dtype = _amp_dtype(recipe, self.device, hooks)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        # Reading a number off an accelerator waits for it: look only now and then there.
        self.check_every = 16 if _accelerated(self.device) else 1
        self.epoch = self.batch = self.step = self.saved_step = 0
        self.history = History()
        self.totals = self._zeros()
        self.shown = (math.nan, math.nan)
        self.first_bad = torch.full((), _NEVER, device=self.device)  # first step whose loss was not finite
        self.epoch_rng: dict[str, Any] = {}

    def _zeros(self) -> Tensor:
        return torch.zeros(3, device=self.device)  # loss · items, correct, items

    def seed(self) -> None:
        seed = self.recipe.seed + self.rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The batches of this epoch that are still to come."""
        resumed_rng = _rng_state(self.device) if self.batch else None
        if resumed_rng is None:
            self.epoch_rng = _rng_state(self.device)
        else:
            _set_rng_state(self.epoch_rng, self.device)
        begin_epoch(self.loader, self.epoch)
        iterator = itertools.islice(self.loader, self.steps_per_epoch)
        if resumed_rng is not None:
            # Loaders draw from the global generators: let them draw for the batches that are already done, too.
            for _ in range(self.batch):
                next(iterator, None)
            _set_rng_state(resumed_rng, self.device)
        done = self.batch
        for batch in iterator:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise InvalidInput(f"a batch must be (inputs, targets), not {type(batch).__name__}; change the loader")
            yield batch[0], batch[1]
            done += 1
        if done < self.steps_per_epoch:
            raise InvalidInput(
                f"the loader promised {self.steps_per_epoch} batches and epoch {self.epoch + 1} ended after {done}; "
                "its length must be the number of batches"
            )

    def train_step(self, inputs: Any, targets: Any) -> None:
        recipe, step, hooks = self.recipe, self.step, self.hooks
        if self.memory_format is None:
            self.memory_format = self._choose_memory_format(inputs)
            self._format(self.memory_format)
            if self.processes > 1:
                self.forward = nn.parallel.DistributedDataParallel(self.model)
        inputs = _move(inputs, self.device, self.memory_format)
        targets = _move(targets, self.device, torch.preserve_format)
        lr = recipe.lr_at(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if hooks is not None:
            hooks.before_step(step)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            output = _apply(self.forward, inputs)
            loss = self.loss_fn(output, targets)
            if self.teacher is not None and recipe.distill > 0:
                with torch.no_grad():
                    logits = _apply(self.teacher, inputs)
                loss = (1 - recipe.distill) * loss + recipe.distill * distillation(output, logits, recipe.temperature)
        self._watch(loss, step)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        if hooks is not None:
            hooks.after_backward(step)
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if hooks is not None:
            hooks.after_step(step)
        self.totals += _totals(loss.detach(), output, targets, self.device)
        self.step, self.batch = step + 1, self.batch + 1

    def _choose_memory_format(self, inputs: Any) -> torch.memory_format:
        wanted = self.recipe.memory_format
        if wanted == "auto" and not any(parameter.ndim == 4 for parameter in self.parameters):
            wanted = "contiguous"
        if wanted != "auto":
            return torch.channels_last if wanted == "channels_last" else torch.contiguous_format
        rng = _rng_state(self.device)
        try:
            with _modes(self.model, False), torch.no_grad():
                for model in filter(None, (self.model, self.teacher)):
                    _apply(model, _move(inputs, self.device, torch.channels_last))
        except RuntimeError:  # mostly "view size is not compatible"; any other comes again in the step itself
            return torch.contiguous_format
        finally:
            _set_rng_state(rng, self.device)
        return torch.channels_last

    def _format(self, memory_format: torch.memory_format) -> None:
        self.model.to(memory_format=memory_format)  # type: ignore[call-overload]

    def _watch(self, loss: Tensor, step: int) -> None:
        if loss.ndim:
            raise InvalidInput(f"loss_fn returned a tensor of shape {tuple(loss.shape)}; it must return a scalar")
        bad = torch.where(torch.isfinite(loss.detach()), _NEVER, step)
        self.first_bad = torch.minimum(self.first_bad, bad)
        if step % self.check_every == 0:
            self._check_loss()

    def _check_loss(self) -> None:
        if self.processes > 1:
            dist.all_reduce(self.first_bad, dist.ReduceOp.MIN)
        step = int(self.first_bad)
        if step < _NEVER:
            self._diverged("the loss became infinite or NaN", step)

    def _diverged(self, what: str, step: int) -> None:
        good = (
            "no checkpoint was kept"
            if self.checkpoint is None
            else f"{self.checkpoint} holds the last good state, after {self.saved_step} steps"
        )
        raise TrainingDiverged(
            f"{what} at step {step} of {self.steps} (epoch {step // self.steps_per_epoch + 1} of {self.recipe.epochs}, "
            f"learning rate {self.recipe.lr_at(step, self.steps):.3g}); {good}; lower lr, set clip_norm, or look for "
            "NaN in the data"
        )

    def log(self) -> None:
        if self.processes > 1:
            dist.all_reduce(self.totals)
        loss, correct, count = self.totals.tolist()
        self.totals = self._zeros()
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "loss": loss / count,
            "accuracy": correct / count,
            "lr": self.recipe.lr_at(self.step - 1, self.steps),
        }
        log = getattr(self.hooks, "log", None)
        self.history.rows.append(row | (log() if log is not None else {}))
        self.shown = (row["loss"], row["accuracy"])

    def status(self) -> str:
        loss, accuracy = self.shown
        epoch = f"epoch {min(self.epoch + 1, self.recipe.epochs)}/{self.recipe.epochs}"
        if math.isnan(loss):
            return epoch
        return f"{epoch}  loss {loss:.3f}" + ("" if math.isnan(accuracy) else f"  train acc {100 * accuracy:.1f} %")

    def finish(self) -> None:
        self._check_loss()
        if self.processes > 1:
            # Each process has normalised other images: the statistics of the first are for all.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
            dist.barrier()  # one that left for good while another still talks to it would take it down

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.memory_format is torch.channels_last:
            self._format(torch.contiguous_format)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        return asdict(self.recipe) | {"steps_per_epoch": self.steps_per_epoch, "processes": self.processes}

    def save(self, verify: bool = False) -> None:
        """Replace the checkpoint by the present state, unless that is not finite."""
        self._check_loss()
        state = self.model.state_dict()
        floats = [value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
        if not bool(torch.stack([value.isfinite().all() for value in floats]).all()):
            self._diverged("a weight became infinite or NaN", max(0, self.step - 1))
        if self.checkpoint is None:
            return
        rng: list[Any] = [_rng_state(self.device)] * self.processes
        if self.processes > 1:
            dist.all_gather_object(rng, _rng_state(self.device))
        if self.rank == 0:
            content = {
                "version": _CHECKPOINT_VERSION,
                "run": self._identity(),
                "model": state,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "hooks": None if self.hooks is None else self.hooks.state_dict(),
                "epoch": self.epoch,
                "batch": self.batch,
                "step": self.step,
                "rng": rng,
                "epoch_rng": self.epoch_rng,
                "totals": self.totals,
                "history": asdict(self.history),
            }
            with replacing(self.checkpoint) as file:
                torch.save(content, file)
            if verify:  # a state that cannot be read back should be known now, not after the night
                _read(self.checkpoint, self.device)
        self.saved_step = self.step

    def load(self) -> None:
        assert self.checkpoint is not None
        content = _read(self.checkpoint, self.device)
        differing = [
            f"{name} {content['run'].get(name)!r} there and {value!r} here"
            for name, value in self._identity().items()
            if content["run"].get(name) != value
        ]
        if differing:
            raise InvalidInput(
                f"{self.checkpoint} belongs to another run ({', '.join(differing)}); resume with the same settings, or "
                "start anew with another checkpoint file"
            )
        if (content["hooks"] is None) != (self.hooks is None):
            raise InvalidInput(f"{self.checkpoint} belongs to another phase (search or training); name another file")
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise InvalidInput(
                f"{self.checkpoint} holds another network than the {type(self.model).__name__} given: "
                f"{' '.join(str(error).split())}"
            ) from error
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        if self.hooks is not None:
            self.hooks.load_state_dict(content["hooks"])
        self.epoch, self.batch, self.step = content["epoch"], content["batch"], content["step"]
        self.saved_step = self.step
        self.totals = content["totals"]
        self.history = History(**content["history"])
        self.epoch_rng = content["epoch_rng"]
        _set_rng_state(content["rng"][self.rank], self.device)


def epoch_length(loader: Loader) -> int:
    """Batches in an epoch.

    Raises:
        InvalidInput: the loader has no length, or is empty.
    """
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise InvalidInput(
            "the loader has no length, and the schedule needs the number of batches in an epoch; give it __len__"
        ) from error
    if not length:
        raise InvalidInput("the training loader is empty; is the batch larger than the data set?")
    return length


def begin_epoch(loader: Loader, epoch: int) -> None:
    """Tell a loader, or its sampler, which epoch it is iterated for next; those that do not ask are left alone."""
    set_epoch = getattr(loader, "set_epoch", None) or getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


def evaluate(model: nn.Module, loader: Loader, loss_fn: LossFn | None = None) -> Metrics:
    """Accuracy and mean loss of ``model`` in inference mode; the modes of its modules are restored.

    Raises:
        InvalidInput: the loader is empty.
    """
    device = _device(model)
    loss_fn = loss_fn or _cross_entropy(0.0)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with _modes(model, False), torch.no_grad():
        for inputs, targets in _to_device(loader, device):
            with together():
                targets = _move(targets, device, torch.preserve_format)
                output = _apply(model, _move(inputs, device, torch.preserve_format))
                totals += _totals(loss_fn(output, targets), output, targets, device)
    loss, correct, count = totals.tolist()
    if not count:
        raise InvalidInput("the loader to evaluate on is empty")
    return Metrics(accuracy=correct / count, loss=loss / count, count=int(count))


def recalibrate(model: nn.Module, loader: Loader, batches: int = 16) -> None:
    """Measure the batch-norm statistics anew: plain averages over at most ``batches`` batches; weights stay.

    Needed after channels were masked or removed, because the statistics behind them have changed. Dropout and the like
    stay in inference mode.

    Raises:
        InvalidInput: the loader is empty.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    device = _device(model)
    momenta = [norm.momentum for norm in norms]
    iterator = iter(itertools.islice(_to_device(loader, device), batches))
    first = next(iterator, None)
    if first is None:
        raise InvalidInput("the loader to calibrate on is empty")
    with _modes(model, False), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's cumulative average
            norm.train()
        try:
            for inputs, _ in itertools.chain([first], iterator):
                with together():
                    _apply(model, _move(inputs, device, torch.preserve_format))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of logits softened by T, the mean over the batch (arXiv 1503.02531, equation 4).

    Args:
        student, teacher: [N, classes] logits.
    """
    soft_student = F.log_softmax(student.float() / temperature, dim=-1)
    soft_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True) * temperature**2


def _cross_entropy(label_smoothing: float) -> LossFn:
    def loss(output: Any, targets: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise InvalidInput(f"the model returns {type(output).__name__}, not logits; give a loss_fn that takes it")
        return F.cross_entropy(output, targets, label_smoothing=label_smoothing)

    return loss


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, recipe.lr, betas=(recipe.momentum, 0.999), weight_decay=recipe.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov and recipe.momentum > 0,
    )


def _accelerated(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


def _amp_dtype(recipe: Recipe, device: torch.device, hooks: StepHooks | None) -> torch.dtype | None:
    if recipe.amp == "auto":
        if not _accelerated(device):
            return None
        supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        if supported is None or supported(including_emulation=False):
            return torch.bfloat16
        # Loss scaling would multiply the gradients that the hooks read at the masks.
        return torch.float16 if hooks is None else None
    if recipe.amp == "float16" and hooks is not None:
        raise InvalidInput("amp float16 scales the gradients that a search reads; use bfloat16 or off for the search")
    return {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}[recipe.amp]


def _processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of the processes that torchrun started, joined on first use."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group(dist.get_default_backend_for_device(device))
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def _device(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.get_default_device() if tensor is None else tensor.device


def _to_device(loader: Any, device: torch.device) -> Any:
    # Images in memory are augmented where the model lies; other loaders yield batches that are moved one by one.
    return loader.to(device) if hasattr(loader, "to") else loader


def _move(value: Any, device: torch.device, memory_format: torch.memory_format) -> Any:
    if isinstance(value, Tensor):
        if value.ndim != 4:
            memory_format = torch.preserve_format
        return value.to(device, non_blocking=True, memory_format=memory_format)
    if isinstance(value, tuple | list):
        return type(value)(_move(item, device, memory_format) for item in value)
    if isinstance(value, Mapping):
        return {key: _move(item, device, memory_format) for key, item in value.items()}
    return value


def _apply(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _totals(loss: Tensor, output: Any, targets: Any, device: torch.device) -> Tensor:
    """[3]: loss · items, correct, items; correct is NaN where targets are not class indices."""
    classified = isinstance(output, Tensor) and isinstance(targets, Tensor) and output.ndim == 2 and targets.ndim == 1
    if classified and not targets.is_floating_point():
        count, correct = len(targets), (output.argmax(1) == targets).sum()
    else:
        count = len(targets) if getattr(targets, "ndim", 0) else 1
        correct = torch.tensor(math.nan, device=device)
    return torch.stack((loss.float() * count, correct.float(), torch.tensor(float(count), device=device)))


@contextmanager
def _modes(model: nn.Module | None, training: bool) -> Generator[None]:
    """Switch ``model`` to training or inference, and every module back to its own mode afterwards."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    if model is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def _rng_state(device: torch.device) -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    key = torch.from_numpy(state["state"]["key"].astype(np.int64))
    own = getattr(torch.get_device_module(device), "get_rng_state", None)
    return {
        "torch": torch.get_rng_state(),
        "device": None if own is None else own(device),
        "random": random.getstate(),
        "numpy": (state["bit_generator"], key, state["state"]["pos"], state["has_gauss"], state["gauss"]),
    }


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    # The checkpoint was loaded to the device; generators take their states from main memory.
    torch.set_rng_state(state["torch"].cpu())
    if state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)
    random.setstate(state["random"])
    name, key, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, key.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own
        reason = str(error).partition("\n")[0]
        raise CorruptArtifact(f"{path} cannot be read as a checkpoint ({reason}); remove it to start anew") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != _CHECKPOINT_VERSION or "optimizer" not in content:
        raise CorruptArtifact(
            f"{path} is no checkpoint of version {_CHECKPOINT_VERSION} (it says {version}); remove it to start anew"
        )
    return content
