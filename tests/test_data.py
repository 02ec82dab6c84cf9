"""Data sets in the layouts their authors publish, and batches that depend on seed and epoch alone."""

import gzip
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwprune.data import Augmentation, Data, ImageLoader, load_data, stratified_order
from hwprune.errors import InvalidInput

RNG = np.random.default_rng(0)
TRAIN, TEST = 50, 20


def pixels(count):
    return RNG.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)  # planar, as CIFAR stores them


def cifar_parts(classes):
    """File name -> images, labels; labels cycle so that each class occurs."""
    if classes == 10:
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        sizes = [TRAIN // 5] * 5 + [TEST]
    else:
        names, sizes = ["train", "test"], [TRAIN, TEST]
    return {name: (pixels(size), np.arange(size) * 7 % classes) for name, size in zip(names, sizes, strict=True)}


def write_binary(folder, classes):
    parts = cifar_parts(classes)
    for name, (images, labels) in parts.items():
        header = [labels] if classes == 10 else [labels // 5, labels]  # CIFAR-100: coarse before fine
        records = np.column_stack([*header, images.reshape(len(images), -1)]).astype(np.uint8)
        records.tofile(folder / f"{name}.bin")
    return parts


def write_python(folder, classes):
    parts = cifar_parts(classes)
    key = b"labels" if classes == 10 else b"fine_labels"
    for name, (images, labels) in parts.items():
        content = {b"data": images.reshape(len(images), -1), key: labels.tolist(), b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return parts


CIFARS = {
    (10, "binary"): ("cifar-10-batches-bin", write_binary),
    (10, "python"): ("cifar-10-batches-py", write_python),
    (100, "binary"): ("cifar-100-binary", write_binary),
    (100, "python"): ("cifar-100-python", write_python),
}


@pytest.mark.parametrize("classes, layout", CIFARS)
@pytest.mark.parametrize("inside", [True, False])
def test_cifar(tmp_path, classes, layout, inside):
    name, write = CIFARS[classes, layout]
    folder = tmp_path / name
    folder.mkdir()
    parts = write(folder, classes)
    data = load_data(f"cifar{classes}:{folder if inside else tmp_path}", batch_size=10)
    images, labels = parts["test_batch" if classes == 10 else "test"]
    read = list(data.test)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (torch.from_numpy(images).float() / 255 - mean) / std
    assert torch.allclose(torch.cat([x for x, _ in read]), expected, atol=1e-5)
    assert torch.equal(torch.cat([y for _, y in read]), torch.from_numpy(labels))
    assert (data.classes, data.shape, len(data.train)) == (classes, (3, 32, 32), TRAIN // 10)


def python2_pickle(images, labels):
    """The very opcodes of the official files: Python 2 byte strings, numpy's old module, dtype('u1', 0, 1)."""
    raw, count = images.tobytes(), len(images)

    def text(value):  # SHORT_BINSTRING, BINSTRING
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + len(value).to_bytes(4, "little")) + value

    def integer(value):  # BININT
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + integer(1) + integer(count) + integer(3072) + b"\x86" + dtype + b"\x89" + text(raw) + b"tb"
    items = text(b"data") + array + text(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + items + b"u."


def test_cifar_as_python_2_wrote_it(tmp_path):
    parts = cifar_parts(10)
    for name, (images, labels) in parts.items():
        (tmp_path / name).write_bytes(python2_pickle(images, labels.tolist()))
    data = load_data(f"cifar10:{tmp_path}", batch_size=10)
    assert torch.equal(data.test.images.permute(0, 3, 1, 2), torch.from_numpy(parts["test_batch"][0]))
    assert data.test.labels.tolist() == parts["test_batch"][1].tolist()


class Attack:
    def __reduce__(self):
        return (print, ("code of the file has run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    write_python(tmp_path, 10)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Attack()}, protocol=2))
    with pytest.raises(InvalidInput, match=r"data_batch_3 is not a CIFAR batch: it names \w+.print, and only arrays"):
        load_data(f"cifar10:{tmp_path}")
    assert capsys.readouterr().out == ""


def test_wrong_cifar_folders_say_what_is_there_and_what_is_expected(tmp_path):
    with pytest.raises(InvalidInput, match=r"there is no folder .*absent; it should hold cifar-10-batches-bin/"):
        load_data(f"cifar10:{tmp_path / 'absent'}")
    with pytest.raises(InvalidInput, match=r"it holds nothing, and cifar-10-batches-bin/ \(data_batch_1.bin"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "cat.png").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"it holds cat.png, and cifar-100-binary/"):
        load_data(f"cifar100:{tmp_path}")
    with pytest.raises(InvalidInput, match=r"cat\.png is a file; unpack it"):
        load_data(f"cifar10:{tmp_path / 'cat.png'}")
    write_binary(tmp_path, 10)
    whole = (tmp_path / "data_batch_2.bin").read_bytes()
    (tmp_path / "data_batch_2.bin").write_bytes(whole[:-1])
    with pytest.raises(InvalidInput, match=r"data_batch_2.bin has 30729 bytes.* records of 3073 bytes"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "data_batch_2.bin").write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(InvalidInput, match=r"labels 1..11, and CIFAR-10 has 0..9"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "data_batch_2.bin").unlink()
    with pytest.raises(InvalidInput, match=r"lacks data_batch_2.bin; it holds"):
        load_data(f"cifar10:{tmp_path}")


def test_a_python_batch_of_the_other_cifar(tmp_path):
    write_python(tmp_path, 100)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes((tmp_path / "train").read_bytes())
    with pytest.raises(InvalidInput, match="has no 'labels' for its 50 images; is it another CIFAR"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": [1, 2]}, protocol=2))
    with pytest.raises(InvalidInput, match=r"no uint8 array 'data' of \[N, 3072\]; it has data"):
        load_data(f"cifar10:{tmp_path}")


def write_fashion(folder, packed):
    content = {}
    for split, count in (("train", 30), ("t10k", 12)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        content[split] = images, labels
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            raw = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            name = f"{split}-{kind}{'.gz' * packed}"
            (folder / name).write_bytes(gzip.compress(raw) if packed else raw)
    return content


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(tmp_path, packed):
    images, labels = write_fashion(tmp_path, packed)["t10k"]
    data = load_data(f"fashion-mnist:{tmp_path}", batch_size=10)
    [(x, y)] = data.test
    assert torch.allclose(x[:, 0], (torch.from_numpy(images).float() / 255 - 0.286) / 0.353, atol=1e-5)
    assert y.tolist() == labels.tolist() and data.shape == (1, 28, 28) and len(data.train) == 3


def test_wrong_idx_files(tmp_path):
    with pytest.raises(InvalidInput, match="lacks train-images-idx3-ubyte: it holds nothing, and"):
        load_data(f"fashion-mnist:{tmp_path}")
    write_fashion(tmp_path, packed=False)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    raw = path.read_bytes()
    for content, message in (
        (raw[:-1], "should hold 12 bytes after its header and has 11"),
        (b"\0\0\x0d\1" + raw[4:], "is not an idx file of 1-dimensional uint8 data; it begins with 00000d01"),
        (bytes((0, 0, 8, 1)) + np.array([11], ">i4").tobytes() + raw[8:-1], "t10k has 12 images and 11 labels"),
    ):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match=message):
            load_data(f"fashion-mnist:{tmp_path}")
    path.unlink()
    path.with_suffix(".gz").write_bytes(gzip.compress(raw)[:20])
    with pytest.raises(InvalidInput, match="cannot be unpacked"):
        load_data(f"fashion-mnist:{tmp_path}")


def paint(folder, classes, count, size=(12, 10)):
    """Images of one grey value each, the value telling the class."""
    image = pytest.importorskip("PIL.Image")
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            image.new("RGB", size, (40 * i, 40 * i, 40 * i)).save(folder / name / f"{k}.png")


def classes_seen(loader):
    grey = (loader.images.float().mean((1, 2, 3)) / 40).round().long()
    assert torch.equal(grey, loader.labels)
    return sorted(set(loader.labels.tolist()))


def test_image_folders_with_splits(tmp_path):
    paint(tmp_path / "train", ["ant", "bee", "cat"], 4)
    paint(tmp_path / "val", ["ant", "bee", "cat"], 2)
    data = load_data(f"folder:{tmp_path}", batch_size=4)
    assert (data.classes, data.shape) == (3, (3, 10, 12))
    assert classes_seen(data.train) == classes_seen(data.test) == [0, 1, 2]
    assert len(data.train.images) == 12 and len(data.test.images) == 6
    square = load_data(f"folder:{tmp_path}?size=8", batch_size=4)
    assert square.shape == (3, 8, 8) and classes_seen(square.test) == [0, 1, 2]


def test_image_folders_are_split_by_a_hash_that_more_images_do_not_change(tmp_path):
    paint(tmp_path, ["ant", "bee"], 40)
    first = load_data(f"folder:{tmp_path}")
    assert 8 <= len(first.test.images) <= 24 and len(first.train.images) + len(first.test.images) == 80
    (tmp_path / "bee" / "0.png").rename(tmp_path / "bee" / "another.png")
    second = load_data(f"folder:{tmp_path}")
    assert abs(len(second.test.images) - len(first.test.images)) <= 1


def test_wrong_image_folders(tmp_path):
    with pytest.raises(InvalidInput, match="gives no training images: it holds nothing, and train/CLASS/images"):
        load_data(f"folder:{tmp_path}")
    paint(tmp_path, ["ant"], 20)
    with pytest.raises(InvalidInput, match="has the one class 'ant'"):
        load_data(f"folder:{tmp_path}")
    paint(tmp_path, ["bee"], 20, size=(30, 20))
    with pytest.raises(InvalidInput, match=r"differ in size \(12x10 to 30x20\); write folder:.*\?size=64"):
        load_data(f"folder:{tmp_path}")
    with pytest.raises(InvalidInput, match=r"the one option is \?size=PIXELS"):
        load_data(f"folder:{tmp_path}?size=0")
    (tmp_path / "bee" / "3.png").write_bytes(b"no image")
    with pytest.raises(InvalidInput, match=r"3.png cannot be read as an image"):
        load_data(f"folder:{tmp_path}?size=8")
    paint(tmp_path / "train", ["ant", "bee"], 1)
    paint(tmp_path / "test", ["ant", "wasp"], 1)
    with pytest.raises(InvalidInput, match=r"test has classes that .*train lacks: wasp"):
        load_data(f"folder:{tmp_path}")


def test_digits_are_split_by_class_and_keep_every_grey_level():
    data = load_data("digits", batch_size=32)
    assert (data.classes, data.shape) == (10, (1, 8, 8))
    assert len(data.train.images) == 1437 and len(data.test.images) == 360
    for loader in (data.train, data.test):
        share = torch.bincount(loader.labels) / len(loader.labels)
        assert share.min() > 0.09 and share.max() < 0.11
    assert len(data.train.images.unique()) == 17
    x = torch.cat([x for x, _ in data.calibration])
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01


def loader(count=24, batch_size=8, augmentation=None, shuffle=True, seed=0):
    images = torch.arange(count * 5 * 6 * 2).mul(7).remainder(255).add(1).to(torch.uint8).view(count, 5, 6, 2)
    return ImageLoader(
        images,
        torch.arange(count),
        batch_size,
        mean=(0.0, 0.0),
        std=(1 / 255, 1 / 255),
        augmentation=augmentation,
        shuffle=shuffle,
        seed=seed,
    )


def test_augmented_images_are_shifts_and_mirrors_and_all_of_them_occur():
    source = loader(count=8, augmentation=Augmentation(padding=1, flip=True))
    padded = torch.nn.functional.pad(source.images.permute(0, 3, 1, 2).float(), (1, 1, 1, 1))
    seen = set()
    for epoch in range(40):
        source.set_epoch(epoch)
        for x, y in source:
            for image, label in zip(x, y.tolist(), strict=True):
                found = [
                    (down, right, flip)
                    for down in range(3)
                    for right in range(3)
                    for flip in (False, True)
                    for crop in [padded[label, :, down : down + 5, right : right + 6]]
                    if torch.allclose(image, crop.flip(2) if flip else crop, atol=1e-3)
                ]
                assert found
                seen.update(found)
    assert len(seen) == 18


def test_no_mirror_where_it_would_change_the_class():
    source = loader(count=8, augmentation=Augmentation(padding=0, flip=False))
    for x, y in source:
        assert torch.allclose(x, source.images[y].permute(0, 3, 1, 2).float(), atol=1e-3)


def test_batches_depend_on_seed_and_epoch_alone():
    def epoch(number, seed=0):
        source = loader(augmentation=Augmentation(1, True), seed=seed)
        source.set_epoch(number)
        torch.rand(3)  # the global generator plays no part
        return torch.cat([x for x, _ in source]), torch.cat([y for _, y in source])

    (x0, y0), (again, y_again), (x1, y1), (other, _) = epoch(0), epoch(0), epoch(1), epoch(0, seed=1)
    assert torch.equal(x0, again) and torch.equal(y0, y_again)
    assert not torch.equal(y0, y1) and sorted(y0.tolist()) == sorted(y1.tolist()) == list(range(24))
    assert not torch.equal(x0, other) and not torch.equal(x1, other)


def test_shares_of_processes_make_up_the_batch():
    whole = list(loader(augmentation=Augmentation(1, True)))
    shares = [loader(augmentation=Augmentation(1, True)) for _ in range(2)]
    for rank, share in enumerate(shares):
        share.shard(rank, 2)
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *shares, strict=True):
        assert torch.equal(x[0::2], x0) and torch.equal(x[1::2], x1) and torch.equal(y[0::2], y0) and len(y1) == 4
    with pytest.raises(InvalidInput, match="a batch of 8 cannot be shared evenly by 3 processes"):
        loader().shard(0, 3)


def test_only_evaluation_yields_the_incomplete_batch():
    assert [len(y) for _, y in loader(count=20)] == [8, 8] and len(loader(count=20)) == 2
    assert [len(y) for _, y in loader(count=20, shuffle=False)] == [8, 8, 4] and len(
        loader(count=20, shuffle=False)
    ) == 3
    assert [len(y) for _, y in loader(count=5)] == [5]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 3))
def test_prefixes_of_the_stratified_order_hold_the_classes_in_proportion(labels, seed):
    labels = torch.tensor(labels)
    order = stratified_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    share = torch.bincount(labels) / len(labels)
    for size in range(1, len(labels) + 1):
        drawn = torch.bincount(labels[order[:size]], minlength=len(share))
        # A class's place among the first t of every class is rounded, and so is the number that t stands for.
        assert ((drawn - share * size).abs() <= 0.5 + share * len(share) / 2 + 1e-4).all()


def test_subsets_are_the_same_for_every_seed_and_grow_from_each_other():
    small, other, large = (
        load_data("digits", subset=n, seed=seed).train.images for n, seed in ((100, 0), (100, 5), (200, 0))
    )
    assert torch.equal(small, other) and torch.equal(large[:100], small)
    assert torch.bincount(load_data("digits", subset=100).train.labels).min() >= 9


def test_validation_is_held_out_of_training():
    data = load_data("digits", subset=400, validation=0.25)
    everything = load_data("digits", subset=400).train
    assert len(data.validation.images) == 100 and len(data.train.images) == 300
    together = torch.cat((data.validation.images, data.train.images))
    assert torch.equal(together, everything.images)
    assert torch.bincount(data.validation.labels).min() >= 8
    assert load_data("digits").validation is None
    tenth = load_data("digits", subset=400, validation=None)
    assert len(tenth.validation.images) == 40 and len(tenth.train.images) == 360
    stored = {image.numpy().tobytes() for image in data.validation.images}
    shown = torch.cat([images for images, _ in data.validation])  # in another order, and not shifted
    mean, std = 0.3058, 0.3759
    pixels = ((shown * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert len(pixels) and {image.numpy().tobytes() for image in pixels} <= stored


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    """Writes a module into the current folder and returns its name, a new one for every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(code):
        name = "users_" + re.sub(r"\W", "_", tmp_path.name)
        head = "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        head += "def items(n): return TensorDataset(torch.arange(4.0 * n).view(n, 4), torch.arange(n) % 3)\n"
        (tmp_path / f"{name}.py").write_text(head + code)
        return name

    return write


def test_data_sets_of_the_users_own(users_module):
    name = users_module("def sets(size=40): return items(size), items(12)\n")
    data = load_data(f"{name}:sets?size=20", batch_size=6)
    assert (data.classes, data.shape, len(data.train), len(data.calibration)) == (3, (4,), 3, 4)
    first, again = (torch.cat([x for x, _ in data.train]) for _ in range(2))
    data.train.set_epoch(1)
    assert torch.equal(first, again) and not torch.equal(first, torch.cat([x for x, _ in data.train]))
    part = load_data(f"{name}:sets", batch_size=6, subset=20, validation=0.4)
    train, held_out = ({float(v) for x, _ in part for v in x[:, 0]} for part in (part.train, part.validation))
    assert len(train) == 12 and len(held_out) == 6 and not train & held_out  # whole batches of 12 and 8
    tenth = load_data(f"{name}:sets", batch_size=2, validation=None)
    assert (len(tenth.train), len(tenth.validation)) == (18, 2)
    with pytest.raises(InvalidInput, match="subset is 50 and the data set has 40 items"):
        load_data(f"{name}:sets", subset=50)


def test_loaders_of_the_users_own(users_module):
    name = users_module(
        "def loaders(batch_size): return {'train': DataLoader(items(20), batch_size), 'test': [(torch.ones(2, 4), "
        "torch.tensor([0, 6]))]}\n"
        "def regression(): return [(torch.ones(2, 4), torch.ones(2, 1))], []\n"
        "def broken(): return 3\n"
        "def halves(): return {'train': items(3), 'tset': items(3)}\n"
        "def batches(): return [torch.ones(2)], []\n"
        "def empty(): return [], []\n"
        "def own(): return {'train': items(20), 'test': items(4), 'validation': items(6)}\n"
    )
    data = load_data(f"{name}:loaders", batch_size=5)
    assert (data.classes, data.shape, len(data.train)) == (7, (4,), 4) and isinstance(data, Data)
    assert load_data(f"{name}:regression").classes == 0
    assert load_data(f"{name}:loaders", batch_size=5, validation=None).validation is None  # they cannot be split
    own = load_data(f"{name}:own", batch_size=2, validation=None)
    assert (len(own.train), len(own.validation)) == (10, 3)  # the user's own, and nothing held out beside them
    for spec, keywords, message in (
        ("loaders", {"subset": 3}, "returned a training loader; subset and validation need a data set"),
        ("broken", {}, r"returned int; return \(train, test\)"),
        ("halves", {}, "returned a dict of train, tset; return"),
        ("batches", {}, r"a batch must be \(inputs, targets\), not Tensor"),
        ("empty", {}, "the training loader is empty"),
    ):
        with pytest.raises(InvalidInput, match=message):
            load_data(f"{name}:{spec}", **keywords)


@pytest.mark.parametrize(
    "spec, keywords, message",
    [
        ("mnist", {}, r"no data set is called 'mnist'; there are digits, cifar10:PATH, .*package.module:function"),
        ("cifar10", {}, r"'cifar10' names no folder; write cifar10:PATH"),
        ("digits", {"subset": 0}, "subset is 0; it is the number of training images to use"),
        ("digits", {"subset": 5000}, "subset is 5000 and digits has 1437 training images"),
        ("digits", {"validation": 1.0}, "validation is 1.0; it is the fraction"),
        ("digits", {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ],
)
def test_wrong_requests(spec, keywords, message):
    with pytest.raises(InvalidInput, match=message):
        load_data(spec, **keywords)
