"""Data sets by name: digits, CIFAR, Fashion-MNIST, image folders, or a function of the user's own.

Images lie in memory as bytes; a batch is cropped, flipped and normalised in one go. What epoch ``e`` yields depends on
the seed and on ``e`` alone, so a resumed run sees the batches that an uninterrupted one would have seen.
"""

import gzip
import hashlib
import importlib
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hwprune.errors import InvalidInput
from hwprune.models import call, split_spec

Batch = tuple[Any, Any]  # inputs: a tensor or a tuple of tensors; targets: whatever the loss takes

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of pixels in 0..1
HELD_OUT = 0.1  # of the training images, where a search wants some and nobody says how many
_SUBSET_SEED = 0  # a constant: the same N images whatever the seed of the run, so that runs can be compared


@dataclass(frozen=True)
class Augmentation:
    """Random shift by up to ``padding`` pixels, the border filled with black, and a mirror image half of the time."""

    padding: int
    flip: bool


class ImageLoader:
    """Batches of normalised images from bytes in memory.

    Args:
        images: [N, H, W, C] uint8.
        labels: [N] int64.
        batch_size: images per batch, over all processes.
        mean, std: of pixels in 0..1, one per channel.
        augmentation: None leaves the images as they are.
        shuffle: a new order each epoch, the last incomplete batch left out; otherwise in order and complete.
        seed: with the epoch it decides order and augmentation.

    Yields ``(inputs, targets)``: [B, C, H, W] float32 and [B] int64, on the images' device.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InvalidInput(f"batch_size is {batch_size}; it must be at least 1")
        self.images, self.labels = images, labels
        self.batch_size = min(batch_size, len(images))
        self.augmentation, self.shuffle, self.seed = augmentation, shuffle, seed
        self.epoch = 0
        self._rank, self._processes = 0, 1
        deviation = torch.tensor(std)  # [C]
        width = images.shape[2]
        self._scale = (1 / (255 * deviation)).repeat(width)  # [W * C]
        self._shift = (-torch.tensor(mean) / deviation).repeat(width)

    def __len__(self) -> int:
        batches = len(self.images) / self.batch_size
        return math.floor(batches) if self.shuffle else math.ceil(batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next iteration."""
        self.epoch = epoch

    def shard(self, rank: int, processes: int) -> None:
        """Yield only every ``processes``-th image of each batch, from the ``rank``-th on: this process's share."""
        if self.batch_size % processes:
            raise InvalidInput(f"a batch of {self.batch_size} cannot be shared evenly by {processes} processes")
        self._rank, self._processes = rank, processes

    def to(self, device: torch.device | str) -> Self:
        """Move the images to ``device``, where the batches are then made."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Random numbers are drawn on the CPU whatever the device, for the whole batch whatever the share: the batches
        # of an epoch are the same everywhere.
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        count = len(self.images)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            draws = None if self.augmentation is None else self._draw(len(index), generator)
            share = slice(self._rank, None, self._processes)
            index = index[share].to(self.images.device)
            images = self.images[index]  # [B, H, W, C]
            if draws is not None:
                images = self._augment(images, draws[share].to(images.device))
            rows = images.flatten(2).float()  # [B, H, W * C]: long inner loops
            pixels = torch.addcmul(self._shift, rows, self._scale).view(images.shape)
            yield pixels.permute(0, 3, 1, 2).contiguous(), self.labels[index]

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        assert self.augmentation is not None
        shifts = torch.randint(0, 2 * self.augmentation.padding + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 2, (count, 1), generator=generator) * self.augmentation.flip
        return torch.cat((shifts, flips), dim=1)  # [B, 3]: shift down, shift right, flip

    def _augment(self, images: Tensor, draws: Tensor) -> Tensor:
        assert self.augmentation is not None
        count, height, width, channels = images.shape
        padding = self.augmentation.padding
        padded = images.new_zeros(count, height + 2 * padding, width + 2 * padding, channels)
        padded[:, padding : padding + height, padding : padding + width] = images
        rows = torch.arange(height, device=images.device) + draws[:, :1]  # [B, H]
        columns = torch.arange(width, device=images.device).expand(count, -1)
        columns = torch.where(draws[:, 2:] == 1, width - 1 - columns, columns) + draws[:, 1:2]  # [B, W]
        first = torch.arange(count, device=images.device) * padded.shape[1]
        pixels = (first[:, None] + rows)[:, :, None] * padded.shape[2] + columns[:, None, :]  # [B, H, W]
        # One gather of whole pixels; indexing by three tensors takes six times as long.
        return padded.view(-1, channels).index_select(0, pixels.view(-1)).view(count, height, width, channels)


def _mix(seed: int, epoch: int) -> int:
    # A hash, not seed + epoch: epoch 1 of seed 0 must not be epoch 0 of seed 1.
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class Data:
    """What a training run reads. Loaders are iterables of ``(inputs, targets)`` batches with a length.

    ``validation`` is held out of the training images, for searches that learn on other images than the weights do.
    ``calibration`` yields training images without augmentation, for batch-norm statistics and importances. ``shape``
    is that of one input, such as (3, 32, 32). ``classes`` is 0 where the targets are not class indices.
    """

    name: str
    train: Iterable[Batch]
    test: Iterable[Batch]
    calibration: Iterable[Batch]
    classes: int
    shape: tuple[int, ...]
    validation: Iterable[Batch] | None = None


@dataclass(frozen=True)
class _Images:
    """A data set as it comes from disk: [N, H, W, C] uint8 and [N] int64 for each split."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    classes: int
    augmentation: Augmentation
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]


def load_data(
    spec: str,
    *,
    batch_size: int = 128,
    subset: int | None = None,
    validation: float | None = 0.0,
    seed: int = 0,
) -> Data:
    """Load the data set that ``spec`` names.

    Args:
        spec: ``digits`` (scikit-learn's 1,797 images of 1x8x8), ``cifar10:PATH`` and ``cifar100:PATH`` (the official
            binary or python files), ``fashion-mnist:PATH`` (the four idx files, packed or not), ``folder:PATH`` (an
            image folder: ``train/CLASS/*`` and ``test/CLASS/*``, or ``CLASS/*`` of which a fifth, chosen by a hash of
            the file's path, is the test split; ``?size=64`` scales and crops to squares), or
            ``package.module:function``. The function returns ``train, test`` (data sets or loaders of ``(inputs,
            targets)``), a dict with these names and optionally validation, calibration, classes, or a :class:`Data`;
            it is given ``batch_size`` and ``seed`` if it has such parameters.
        batch_size: images per step, over all processes; the test split is read in batches of at least 250.
        subset: train on this many images only, the same ones whatever the seed; stratified by class, unless the data
            set is the user's own.
        validation: fraction of the training images held out, stratified likewise, and not augmented unless the data set
            is the user's own. None: a tenth, where they can be split and bring no validation images of their own.
        seed: decides order and augmentation.

    Raises:
        InvalidInput: the name is unknown or the files are not what it says.
    """
    if validation is not None and not 0 <= validation < 1:
        raise InvalidInput(f"validation is {validation}; it is the fraction of training images held out: 0 <= x < 1")
    if subset is not None and subset < 1:
        raise InvalidInput(f"subset is {subset}; it is the number of training images to use: at least 1")
    name, _, path = spec.partition(":")
    if spec == "digits":
        images = _digits()
    elif name in _READERS:
        if not path:
            raise InvalidInput(f"{spec!r} names no folder; write {name}:PATH")
        images = _READERS[name](path)
    elif path:
        return _users_own(spec, batch_size, subset, validation, seed)
    else:
        known = ", ".join(("digits", *(f"{reader}:PATH" for reader in _READERS), "package.module:function"))
        raise InvalidInput(f"no data set is called {spec!r}; there are {known}")
    return _in_memory(spec, images, batch_size, subset, HELD_OUT if validation is None else validation, seed)


def _in_memory(name: str, source: _Images, batch_size: int, subset: int | None, validation: float, seed: int) -> Data:
    mean, std = source.normalisation
    images, labels = torch.from_numpy(source.train), torch.from_numpy(source.train_labels)
    order = stratified_order(labels, _SUBSET_SEED)
    if subset is not None:
        if subset > len(order):
            raise InvalidInput(f"subset is {subset} and {name} has {len(order)} training images; ask for no more")
        order = order[:subset]
    held_out = round(len(order) * validation)
    parts = {"validation": order[:held_out], "train": order[held_out:]}
    # One permutation serves all: its prefixes are stratified, and so are what follows them.
    calibration = parts["train"][: max(2048, 2 * batch_size)]

    def loader(index: Tensor, size: int, augmentation: Augmentation | None, shuffle: bool) -> ImageLoader:
        return ImageLoader(
            images[index],
            labels[index],
            size,
            mean=mean,
            std=std,
            augmentation=augmentation,
            shuffle=shuffle,
            seed=seed,
        )

    test = ImageLoader(
        torch.from_numpy(source.test),
        torch.from_numpy(source.test_labels),
        max(batch_size, 250),
        mean=mean,
        std=std,
    )
    height, width, channels = source.train.shape[1:]
    return Data(
        name=name,
        train=loader(parts["train"], batch_size, source.augmentation, True),
        test=test,
        calibration=loader(calibration, batch_size, None, False),
        classes=source.classes,
        shape=(channels, height, width),
        validation=loader(parts["validation"], batch_size, None, True) if held_out else None,
    )


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A permutation of which every prefix holds the classes in their proportions, as nearly as whole images allow.

    Args:
        labels: [N] int64.

    Returns:
        [N] int64 indices.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)  # [classes]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    position = (rank + 0.5) / counts[labels[by_class]]  # of the image among those of its class, in 0..1
    return by_class[torch.argsort(position, stable=True)]


def _digits() -> _Images:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise InvalidInput("the digits ship inside scikit-learn: pip install scikit-learn") from error
    source = datasets.load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]; pixels are 0..16
    labels = source.target.astype(np.int64)
    order = stratified_order(torch.from_numpy(labels), _SUBSET_SEED).numpy()
    test, train = order[:360], order[360:]
    return _Images(
        images[train], labels[train], images[test], labels[test], 10, Augmentation(1, False), ((0.3058,), (0.3759,))
    )


def _folder(path: str, expected: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_file():
        raise InvalidInput(f"{folder} is a file; unpack it and name the folder, which holds {expected}")
    if not folder.is_dir():
        raise InvalidInput(f"there is no folder {folder}; it should hold {expected}")
    return folder


def _found(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}" if names else "nothing"


@dataclass(frozen=True)
class _CifarLayout:
    folder: str
    train: tuple[str, ...]
    test: str


_CIFAR = {  # classes: binary layout, python layout
    10: (
        _CifarLayout("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
        _CifarLayout("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    ),
    100: (
        _CifarLayout("cifar-100-binary", ("train.bin",), "test.bin"),
        _CifarLayout("cifar-100-python", ("train",), "test"),
    ),
}


def _cifar(path: str, classes: int) -> _Images:
    layouts = _CIFAR[classes]
    expected = " or ".join(f"{layout.folder}/ ({', '.join((*layout.train, layout.test))})" for layout in layouts)
    folder = _folder(path, expected)
    for layout, read in zip(layouts, (_cifar_binary, _cifar_python), strict=True):
        for root in (folder / layout.folder, folder):
            if not (root / layout.test).is_file():
                continue
            absent = [name for name in layout.train if not (root / name).is_file()]
            if absent:
                raise InvalidInput(
                    f"{root} lacks {', '.join(absent)}; it holds {_found(root)}; unpack the archive again"
                )
            parts = [read(root / name, classes) for name in layout.train]
            images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            return _Images(
                images, labels, *read(root / layout.test, classes), classes, Augmentation(4, True), _IMAGENET
            )
    raise InvalidInput(f"{folder} is not CIFAR-{classes}: it holds {_found(folder)}, and {expected} is expected")


def _cifar_images(planar: np.ndarray) -> np.ndarray:  # [N, 3072] -> [N, 32, 32, 3]
    return np.ascontiguousarray(planar.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _cifar_labels(labels: np.ndarray, classes: int, path: Path) -> np.ndarray:
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise InvalidInput(
            f"{path} has labels {labels.min()}..{labels.max()}, and CIFAR-{classes} has 0..{classes - 1}"
        )
    return labels.astype(np.int64)


def _cifar_binary(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    header = 1 if classes == 10 else 2  # CIFAR-100: coarse label, fine label
    data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % (header + 3072):
        raise InvalidInput(
            f"{path} has {len(data)} bytes, which is not a whole number of CIFAR-{classes} records of "
            f"{header + 3072} bytes; unpack the archive again"
        )
    records = data.reshape(-1, header + 3072)
    return _cifar_images(records[:, header:]), _cifar_labels(records[:, header - 1], classes, path)


def _dtype(code: str | bytes, align: object = False, copy: object = False) -> np.dtype[Any]:
    # The official files say 0 and 1 where numpy wants truth values, and "u1" as Python 2 bytes.
    return np.dtype(code.decode() if isinstance(code, bytes) else code)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays; refuses every other class, and so runs no foreign code."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return _dtype
            case "_codecs", "encode":  # how protocol 2 writes bytes
                return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays are read")


def _cifar_python(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a broken pickle raises whatever its bytes happen to mean
        raise InvalidInput(f"{path} is not a CIFAR batch: {error}; unpack the archive again") from error
    entries = {
        key.decode() if isinstance(key, bytes) else key: value
        for key, value in (content.items() if isinstance(content, dict) else ())
    }
    label_key = "labels" if classes == 10 else "fine_labels"
    images, labels = entries.get("data"), entries.get(label_key)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise InvalidInput(
            f"{path} has no uint8 array 'data' of [N, 3072]; it has {', '.join(map(str, entries)) or 'nothing'}"
        )
    if not isinstance(labels, list | np.ndarray) or len(labels) != len(images):
        raise InvalidInput(f"{path} has no {label_key!r} for its {len(images)} images; is it another CIFAR?")
    return _cifar_images(images), _cifar_labels(np.asarray(labels), classes, path)


def _fashion_mnist(path: str) -> _Images:
    names = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    expected = f"{', '.join(names)} (with or without .gz)"
    folder = _folder(path, expected)
    arrays = []
    for name in names:
        file = next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
        if file is None:
            raise InvalidInput(f"{folder} lacks {name}: it holds {_found(folder)}, and {expected} are expected")
        arrays.append(_idx(file, 3 if "idx3" in name else 1))
    train, train_labels, test, test_labels = arrays
    for split, images, labels in (("train", train, train_labels), ("t10k", test, test_labels)):
        if len(images) != len(labels) or not len(images):
            raise InvalidInput(f"{folder}: {split} has {len(images)} images and {len(labels)} labels")
    return _Images(
        train[..., None],
        train_labels.astype(np.int64),
        test[..., None],
        test_labels.astype(np.int64),
        10,
        Augmentation(2, True),
        ((0.2860,), (0.3530,)),
    )


def _idx(path: Path, dims: int) -> np.ndarray:
    """Read the idx format: two zero bytes, the type (8: uint8), the number of dims, big-endian sizes, the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InvalidInput(f"{path} cannot be unpacked: {error}; download it again") from error
    header = 4 + 4 * dims
    if data[:4] != bytes((0, 0, 8, dims)) or len(data) < header:
        raise InvalidInput(
            f"{path} is not an idx file of {dims}-dimensional uint8 data; it begins with {data[:4].hex()}"
        )
    shape = np.frombuffer(data, ">i4", dims, 4)
    if len(data) != header + math.prod(shape.tolist()):
        raise InvalidInput(
            f"{path} should hold {'x'.join(map(str, shape))} bytes after its header and has {len(data) - header}; "
            "download it again"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=header).reshape(shape)


_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp"}


def _image_folder(spec: str) -> _Images:
    path, options = split_spec(spec)
    size = options.pop("size", None)
    if options or not (size is None or (isinstance(size, int) and size > 0)):
        raise InvalidInput(f"folder:{spec}: the one option is ?size=PIXELS, a positive whole number")
    expected = "train/CLASS/images and test/CLASS/images, or CLASS/images"
    folder = _folder(path, expected)
    test_folder = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and test_folder is not None:
        train, test = _image_files(folder / "train"), _image_files(test_folder)
        strangers = sorted({file.parent.name for file in test} - {file.parent.name for file in train})
        if strangers:
            raise InvalidInput(f"{test_folder} has classes that {folder / 'train'} lacks: {', '.join(strangers[:5])}")
    else:
        files = _image_files(folder)
        in_test = [_fifth(file.relative_to(folder)) for file in files]
        train = [file for file, chosen in zip(files, in_test, strict=True) if not chosen]
        test = [file for file, chosen in zip(files, in_test, strict=True) if chosen]
    for split, files in (("training", train), ("test", test)):
        if not files:
            raise InvalidInput(
                f"{folder} gives no {split} images: it holds {_found(folder)}, and {expected} are expected"
            )
    classes = sorted({file.parent.name for file in train})
    if len(classes) < 2:
        raise InvalidInput(f"{folder} has the one class {classes[0]!r}; each class is a folder of its own, two or more")
    number = {name: i for i, name in enumerate(classes)}
    images = _read_images([*train, *test], size, folder)
    labels = np.array([number[file.parent.name] for file in (*train, *test)], np.int64)
    at = len(train)
    return _Images(
        images[:at],
        labels[:at],
        images[at:],
        labels[at:],
        len(classes),
        Augmentation(images.shape[1] // 8, True),
        _IMAGENET,
    )


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*/*") if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file())


def _fifth(relative: Path) -> bool:
    # By the path alone: an image never moves to the other split when more are added.
    return hashlib.blake2b(relative.as_posix().encode(), digest_size=1).digest()[0] % 5 == 0


def _read_images(files: list[Path], size: int | None, folder: Path) -> np.ndarray:
    try:
        pillow = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise InvalidInput("image folders are read with Pillow: pip install pillow") from error

    def read(file: Path) -> np.ndarray:  # [H, W, 3]
        try:
            with pillow.open(file) as image:
                if size is not None:
                    image.draft("RGB", (size, size))  # lets the JPEG decoder skip detail that scaling would discard
                image = image.convert("RGB")
                if size is not None:
                    scale = size / min(image.size)
                    width, height = (max(size, round(side * scale)) for side in image.size)
                    left, top = (width - size) // 2, (height - size) // 2
                    image = image.resize((width, height), pillow.Resampling.BICUBIC)
                    image = image.crop((left, top, left + size, top + size))
                return np.asarray(image)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for broken files
            raise InvalidInput(f"{file} cannot be read as an image ({error}); replace or remove it") from error

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read, files))
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        small, large = (f"{width}x{height}" for height, width in (min(sizes), max(sizes)))
        raise InvalidInput(f"the images in {folder} differ in size ({small} to {large}); write folder:{folder}?size=64")
    return np.stack(images)


_READERS: dict[str, Callable[[str], _Images]] = {
    "cifar10": lambda path: _cifar(path, 10),
    "cifar100": lambda path: _cifar(path, 100),
    "fashion-mnist": _fashion_mnist,
    "folder": _image_folder,
}


def _users_own(spec: str, batch_size: int, subset: int | None, validation: float | None, seed: int) -> Data:
    source, options = split_spec(spec)
    result = call(source, {"batch_size": batch_size, "seed": seed}, options)
    if isinstance(result, Data):
        if subset is not None or validation:
            raise InvalidInput(f"{source} returned loaders; subset and validation need data sets, so choose there")
        return result
    names = ("train", "test", "validation", "calibration", "classes")
    if isinstance(result, tuple | list) and 2 <= len(result) <= 3:
        result = dict(zip(names, result, strict=False))
    if not isinstance(result, dict) or not {"train", "test"} <= result.keys() <= set(names):
        found = f"a dict of {', '.join(map(str, result))}" if isinstance(result, dict) else type(result).__name__
        raise InvalidInput(
            f"{source} returned {found}; return (train, test), or a dict with train and test and if you like "
            "validation, calibration, classes"
        )
    train, held_out = result["train"], result.get("validation")
    if _is_dataset(train):
        if validation is None:
            validation = HELD_OUT if held_out is None else 0.0
        train, split = _split(train, subset, validation)
        held_out = held_out if split is None else split
    elif subset is not None or validation:
        raise InvalidInput(
            f"{source} returned a training loader; subset and validation need a data set, so return that"
        )
    loader = _torch_loader(train, batch_size, True, seed)
    calibration = result.get("calibration")
    if calibration is None:
        calibration = _torch_loader(train, batch_size, False, seed)
    test = _torch_loader(result["test"], max(batch_size, 250), False, seed)
    inputs, targets = _first_batch(loader, source)
    shape = tuple((inputs[0] if isinstance(inputs, tuple | list) else inputs).shape[1:])
    classes = result.get("classes") or _count_classes(targets, test)
    return Data(
        name=spec,
        train=loader,
        test=test,
        calibration=calibration,
        classes=classes,
        shape=shape,
        validation=None if held_out is None else _torch_loader(held_out, batch_size, True, seed),
    )


def _is_dataset(source: Any) -> bool:
    # A list is taken for a loader: its items are batches.
    return hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, list | tuple)


def _split(dataset: Any, subset: int | None, validation: float) -> tuple[Any, Any]:
    from torch.utils.data import Subset

    if subset is None and not validation:
        return dataset, None
    if subset is not None and subset > len(dataset):
        raise InvalidInput(f"subset is {subset} and the data set has {len(dataset)} items; ask for no more")
    generator = torch.Generator().manual_seed(_SUBSET_SEED)
    order = torch.randperm(len(dataset), generator=generator)[:subset].tolist()
    held_out = round(len(order) * validation)
    return Subset(dataset, order[held_out:]), Subset(dataset, order[:held_out]) if held_out else None


class _EpochLoader:
    """A DataLoader whose order depends on seed and epoch alone, as :class:`ImageLoader`'s does."""

    def __init__(self, dataset: Any, batch_size: int, shuffle: bool, seed: int) -> None:
        from torch.utils.data import DataLoader

        self._generator = torch.Generator()
        self._seed, self._epoch = seed, 0
        drop_last = shuffle and len(dataset) >= batch_size
        self._loader: Iterable[Batch] = DataLoader(
            dataset, batch_size, shuffle=shuffle, drop_last=drop_last, generator=self._generator
        )
        self._length = len(dataset) // batch_size if drop_last else math.ceil(len(dataset) / batch_size)

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        self._generator.manual_seed(_mix(self._seed, self._epoch))
        return iter(self._loader)


def _torch_loader(source: Any, batch_size: int, shuffle: bool, seed: int) -> Any:
    return _EpochLoader(source, batch_size, shuffle, seed) if _is_dataset(source) else source


def _first_batch(loader: Any, source: str) -> Batch:
    batch = next(iter(loader), None)
    if batch is None:
        raise InvalidInput(f"{source}: the training loader is empty")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InvalidInput(f"{source}: a batch must be (inputs, targets), not {type(batch).__name__}")
    return batch[0], batch[1]


def _count_classes(targets: Any, test: Iterable[Batch]) -> int:
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        return 0
    return 1 + max([int(targets.max()), *(int(labels.max()) for _, labels in test)])
