import argparse
import collections
import datetime
import enum
import fractions
import functools
import io
import logging
import os
import pathlib
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvq_jax.interop import torch_pickle
from fvq_jax.interop.torch_file import load_torch_file, read_tensors, require
from fvq_jax.interop.torch_pickle import MOST_KINDS, stood_for
from fvq_jax.runtime.errors import InputError

ZIP = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def save(value, path, is_zip):
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def as_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(actual, tensor):
    expected = as_numpy(tensor)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


@ZIP
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, is_zip, dtype):
    tensor = torch.tensor([[0, 1, 2], [3, 0, 5]]).to(dtype)
    assert_same(load_torch_file(save(tensor, tmp_path / "x.pt", is_zip)), tensor)


@ZIP
def test_views_of_one_storage_share_memory(tmp_path, is_zip):
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "base": base,
        "transposed": base.T,
        "strided": base[1:, ::2],
        "expanded": base[0].expand(3, 6),
        "number": base[2, 3],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[1]),
    }
    loaded = load_torch_file(save(views, tmp_path / "x.pt", is_zip))
    assert list(loaded) == list(views)
    for name, tensor in views.items():
        assert_same(loaded[name], tensor)
        assert name == "empty" or np.may_share_memory(loaded[name], loaded["base"])


@ZIP
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_view_equals_what_torch_loads(tmp_path_factory, is_zip, data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    start = data.draw(st.integers(0, 2))
    dtype = data.draw(st.sampled_from(DTYPES))
    count = int(np.prod(shape))
    tensor = (torch.arange(count + start) % 100).to(dtype)[start:].reshape(shape).permute(order)
    path = save([tensor], tmp_path_factory.mktemp("any") / "x.pt", is_zip)
    assert_same(load_torch_file(path)[0], torch.load(path)[0])


@ZIP
def test_a_training_checkpoint(tmp_path, is_zip):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "steps": 12,
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), name="fvq", seen={1, 2}, resume=None),
        "shape": torch.Size([2, 3]),
    }
    path = save(checkpoint, tmp_path / "x.pt", is_zip)
    loaded = load_torch_file(path)
    assert isinstance(loaded["model"], collections.OrderedDict)
    assert loaded["steps"] == 12
    assert loaded["shape"] == (2, 3)
    assert isinstance(loaded["args"], types.SimpleNamespace)
    assert vars(loaded["args"]) == vars(checkpoint["args"])
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)

    tensors = read_tensors(path)
    assert_same(tensors["model.0.weight"], network[0].weight)
    assert_same(tensors["model.1.num_batches_tracked"], network[1].num_batches_tracked)
    assert_same(tensors["optimizer.state.0.exp_avg"], optimizer.state[network[0].weight]["exp_avg"])
    assert len(tensors) == 7 + 4 * 3  # the network's tensors; step and both moments of every parameter


@ZIP
def test_what_lightning_keeps_beside_the_weights_is_not_looked_at(tmp_path, monkeypatch, is_zip):
    """Its packages need not be installed: here they are when the file is written, and not when it is read."""
    written = []
    for name in ("pytorch_lightning", "omegaconf"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        for kind in ("Callback", "Settings"):
            base = dict if kind == "Settings" else object
            made = type(kind, (base,), {"__module__": name, "__init__": lambda *_: written.append(1)})
            setattr(module, kind, made)
    callback = sys.modules["pytorch_lightning"].Callback
    settings = sys.modules["omegaconf"].Settings()
    settings["n_embed"], settings["ref_type"] = 5, dict
    checkpoint = {
        "state_dict": {"a": torch.ones(2)},
        "callbacks": {callback: {"best": torch.ones(1)}, "other": callback()},
        "hyper_parameters": settings,
        "loops": collections.defaultdict(list, {"epoch": [1]}),
    }
    path = save(checkpoint, tmp_path / "x.ckpt", is_zip)
    monkeypatch.undo()
    before = len(written)
    loaded = load_torch_file(path)
    assert len(written) == before
    assert_same(loaded["state_dict"]["a"], torch.ones(2))
    assert loaded["loops"] == {"epoch": [1]}
    assert "hyper_parameters" not in {name.partition(".")[0] for name in read_tensors(path)}


def test_large_arrays_are_mapped_not_read(tmp_path):
    loaded = load_torch_file(save({"a": torch.ones(1000)}, tmp_path / "x.pt", True))
    base = loaded["a"]
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not loaded["a"].flags.writeable


def test_compressed_entries_are_read_too(tmp_path):
    tensor = torch.arange(100.0)
    stored, packed = save(tensor, tmp_path / "x.pt", True), tmp_path / "y.pt"
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert_same(load_torch_file(packed), tensor)


class Global:
    """Pickles as a call of `module.name`, whatever that is; `state` as a second argument of BUILD."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce_ex__(self, protocol):
        return self.reduced


class Storage:
    """A storage of three floats, written under a persistent id as PyTorch does."""


def old_file(path, value, window=None, count=3):
    """Writes `value` in the layout of PyTorch 0.1: five pickles, then the storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, "7", "cpu", count, window) if isinstance(item, Storage) else None

    with open(path, "wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, ["7"]):
            Pickler(file, protocol=2).dump(part)
        file.write((3).to_bytes(8, "little") + np.array([1, 2, 3], "<f4").tobytes())
    return path


def test_the_oldest_tensors_parameters_and_storage_windows(tmp_path):
    tensor = Global(torch._utils._rebuild_tensor, Storage(), 0, (3,), (1,))
    parameter = Global(torch.nn.parameter.Parameter, tensor, state=(True, False, collections.OrderedDict()))
    loaded = load_torch_file(old_file(tmp_path / "x.pth", {"tensor": tensor, "parameter": parameter}))
    for name in ("tensor", "parameter"):
        np.testing.assert_array_equal(loaded[name], np.array([1, 2, 3], np.float32))
    window = Global(torch._utils._rebuild_tensor, Storage(), 0, (2,), (1,))
    loaded = load_torch_file(old_file(tmp_path / "y.pth", window, window=("8", 1, 2)))
    np.testing.assert_array_equal(loaded, np.array([2, 3], np.float32))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (4,), (1,)), (1, (3,), (1,)), (0, (2, 2), (2, 2)), (2, (2,), (-1,)), (-1, (1,), (1,))],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, offset, shape, strides):
    tensor = Global(torch._utils._rebuild_tensor, Storage(), offset, shape, strides)
    with pytest.raises(InputError, match="beyond its 3 stored values"):
        load_torch_file(old_file(tmp_path / "x.pth", tensor))


def test_a_storage_larger_than_the_file_is_refused_before_it_is_allocated(tmp_path):
    tensor = Global(torch._utils._rebuild_tensor, Storage(), 0, (3,), (1,))
    with pytest.raises(InputError, match="cannot be in"):
        load_torch_file(old_file(tmp_path / "x.pth", tensor, count=2**50))


class Kind(enum.Enum):
    ONE = 1


class Callback:
    """An object of a training program, with attributes of every kind."""

    def __init__(self):
        self.best, self.module, self.function = torch.ones(1), torch.nn.Linear(2, 2), named_function


class Settings(dict):
    pass


class Rows(list):
    pass


class Names(set):
    pass


class WithArguments:
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (1, "a"), {"key": torch.ones(1)}


def named_function():
    raise AssertionError


# What real checkpoints hold beside tensors, none of which is needed.
OTHERS = {
    "module": torch.nn.Linear(2, 2),
    "optimizer": torch.optim.Adam,
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "generator": np.random.default_rng(0),
    "array": np.arange(6.0).reshape(2, 3),
    "date64": np.datetime64("2024-01-02"),
    "date": datetime.datetime(2024, 1, 2),
    "partial": functools.partial(named_function, 1, key=2),
    "function": named_function,
    "enum": Kind.ONE,
    "counter": collections.Counter("aab"),
    "bytes": b"\x00\xff",
    "nothing": b"",
    "fraction": fractions.Fraction(1, 3),
    "callback": Callback(),
    "settings": Settings(a=1, b=2),
    "rows": Rows([1, 2]),
    "names": Names({"a"}),
    "arguments": WithArguments(),
    "deque": collections.deque([1, 2]),
    "method": [].append,
    "range": range(3),
    "complex": 1j,
}


@ZIP
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_are_read_whatever_lies_beside_them(tmp_path, is_zip, protocol):
    content = {"first": torch.ones(2), "others": OTHERS, "kinds": {Callback: 1, "plain": [Kind, dict, np.ndarray]}}
    content["last"] = torch.arange(3.0)
    path = tmp_path / "x.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    tensors = read_tensors(path)
    assert set(tensors) == {"first", "last"}
    for name, tensor in tensors.items():
        assert_same(tensor, content[name])
    loaded = load_torch_file(path)["others"]
    assert stood_for(loaded["callback"]).endswith(".Callback")
    assert stood_for(loaded["optimizer"]) == "torch.optim.adam.Adam"
    assert stood_for(loaded["dtype"]) == "torch.bfloat16"
    assert stood_for(1) == stood_for(dict) == ""
    assert not hasattr(loaded["callback"], "__dict__"), "it keeps nothing of the object"


@ZIP
def test_paths_and_numbers_of_numpy_become_plain_values(tmp_path, is_zip):
    numbers = [np.float64(1.5), np.float32(0.25), np.float16(-2), np.int64(-7), np.uint8(255), np.bool_(True)]
    numbers += [np.complex64(1 + 2j), np.str_("Ä")]
    paths = [pathlib.PurePosixPath("/data/x.png"), pathlib.PosixPath("a/b"), pathlib.PureWindowsPath("c:/d/e")]
    loaded = load_torch_file(save({"args": argparse.Namespace(n=numbers, p=paths)}, tmp_path / "x.pt", is_zip))
    expected = [number.item() for number in numbers]
    assert loaded["args"].n == expected
    assert [type(value) for value in loaded["args"].n] == [type(value) for value in expected]
    assert loaded["args"].p == ["/data/x.png", "a/b", r"c:\d\e"]


@ZIP
def test_parameters_and_tensors_with_attributes_are_read(tmp_path, is_zip):
    parameter, tensor = torch.nn.Parameter(torch.ones(2)), torch.arange(3.0)
    parameter.partition_dim, tensor.note = 1, Callback()
    loaded = load_torch_file(save({"parameter": parameter, "tensor": tensor}, tmp_path / "x.pt", is_zip))
    assert_same(loaded["parameter"], parameter)
    assert_same(loaded["tensor"], tensor)


@ZIP
@pytest.mark.parametrize(
    "harmful",
    [
        Global(os.system, "echo harm > harmed"),
        Global(eval, "open('harmed', 'w')"),
        Global(exec, "open('harmed', 'w')"),
        Global(getattr, pathlib.Path("harmed"), "touch"),
        Global(open, "harmed", "w"),
        Global(functools.partial(open, "harmed", "w")),
    ],
    ids=["os.system", "eval", "exec", "getattr", "open", "called"],
)
def test_nothing_in_a_file_is_ever_run(tmp_path, monkeypatch, is_zip, harmful):
    """The tensors are read all the same: what is not looked at can do no harm, and no list of names is complete."""
    monkeypatch.chdir(tmp_path)
    path = save({"x": harmful, "weights": torch.ones(2)}, tmp_path / "x.pt", is_zip)
    assert list(read_tensors(path)) == ["weights"]
    assert not (tmp_path / "harmed").exists()


def test_what_is_left_out_is_named_in_the_log(tmp_path, caplog):
    path = save({"a": torch.ones(2), "b": datetime.timedelta(1)}, tmp_path / "x.pt", True)
    with caplog.at_level(logging.INFO):
        read_tensors(path)
    assert f"{path}: left out is what is no tensor: datetime.timedelta" in caplog.text


@ZIP
def test_a_file_with_nothing_but_objects_is_refused_with_their_names(tmp_path, is_zip):
    path = save({"model": torch.nn.Linear(2, 2), "kind": torch.float32}, tmp_path / "x.pt", is_zip)
    with pytest.raises(
        InputError, match=r"no tensors, only objects .*\(torch\.nn\.modules\.linear\.Linear, torch\.float32"
    ):
        read_tensors(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 2).to_sparse(), r"form that is not read \(torch\._utils\._rebuild_sparse_tensor\)"),
        (torch.ones(2).to(torch.float8_e5m2), r"form that is not read \(torch\._utils\._rebuild_tensor_v3\)"),
    ],
    ids=["sparse", "float8"],
)
def test_tensors_in_another_form_are_not_taken_for_missing(tmp_path, tensor, message):
    with pytest.raises(InputError, match=message):
        load_torch_file(save({"a": torch.ones(2), "b": tensor}, tmp_path / "x.pt", True))


def pickled(tmp_path, content):
    """A file of torch.save whose pickle has this content."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", content)
    return tmp_path / "x.pt"


def test_a_pickle_cannot_name_any_number_of_kinds(tmp_path):
    names = b"".join(b"cmodule\nname%d\n0" % number for number in range(MOST_KINDS + 1))
    with pytest.raises(InputError, match="names more than 1000 kinds of Python objects"):
        load_torch_file(pickled(tmp_path, b"\x80\x02" + names + b"N."))


def test_a_pickle_cannot_change_what_reads_it(tmp_path):
    """Without care this would set the defaults of a function for every file that is read after it."""
    state = b"(N}X\x0c\x00\x00\x00__defaults__X\x01\x00\x00\x00a\x85stb"
    names = (b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_tensor\n", b"cpathlib\nPosixPath\n", b"cnumpy\ndtype\n")
    path = pickled(tmp_path, b"\x80\x02" + b"0".join(name + state for name in names) + b".")
    before = torch_pickle._encode.__defaults__
    with pytest.raises(InputError, match="holds no tensors"):
        read_tensors(path)
    assert torch_pickle._encode.__defaults__ == before


def test_names_of_any_form_are_one_short_line(tmp_path):
    name = b"\x8c\x05a\nb\xc3\xa4X\x10\x27\x00\x00" + b"n" * 10_000 + b"\x93"
    with pytest.raises(InputError, match=r"^[ -~]{30,400}$") as error:
        read_tensors(pickled(tmp_path, b"\x80\x04" + name + b"."))
    assert r"a\nb\xe4" in str(error.value)


def test_containers_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fvq_jax.interop.torch_file._MOST_VALUES", 1000)
    with pytest.raises(InputError, match="its containers hold themselves"):
        read_tensors(pickled(tmp_path, b"\x80\x02]q\x00h\x00a."))
    content = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40)) + b"."
    with pytest.raises(InputError, match="holds more than 1,000 values"):
        read_tensors(pickled(tmp_path, content))


@ZIP
@pytest.mark.parametrize("kept", [0, 3, 40, 300, -1])
def test_truncated_files_give_one_line(tmp_path, is_zip, kept):
    path = save({"a": torch.arange(500.0)}, tmp_path / "x.pt", is_zip)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"^[^\n]*x\.pt is damaged or not written by torch\.save[^\n]*$"):
        load_torch_file(path)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", pickle.dumps({"a": 1}, 2)])
def test_other_files_give_one_line(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"not written by torch\.save"):
        load_torch_file(tmp_path / "x.pth")


def test_a_pickle_cannot_ask_for_a_table_of_any_size(tmp_path):
    """Without the check this one takes gigabytes before anything of it is looked at."""
    bomb = b"\x80\x02]r" + (2**29).to_bytes(4, "little") + b"."
    (tmp_path / "x.pt").write_bytes(bomb)
    with pytest.raises(InputError, match="its object 2 has the number 536870912"):
        load_torch_file(tmp_path / "x.pt")


def test_another_zip_file_is_no_torch_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("photo.png", b"")
    with pytest.raises(InputError, match=r"no data\.pkl"):
        load_torch_file(tmp_path / "x.pt")


def test_big_endian_files_are_refused(tmp_path):
    stream = io.BytesIO()
    torch.save(torch.ones(2), stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(tmp_path / "x.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, b"big" if name.endswith("/byteorder") else source.read(name))
    with pytest.raises(InputError, match="big-endian"):
        load_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match=rf"cannot read .*{name}"):
        read_tensors(tmp_path / name)


def test_safetensors(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    loaded = read_tensors(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_file_without_tensors_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no tensors"):
        read_tensors(save({"steps": 3}, tmp_path / "x.pt", True))


def test_require_names_what_is_missing():
    require({"a": np.ones(1)}, ["a"], "x.pt")
    with pytest.raises(InputError, match=r"^x\.pt lacks b, c \(of 3 needed tensors\)$"):
        require({"a": np.ones(1)}, ["a", "b", "c"], "x.pt")
    with pytest.raises(InputError, match=r"^x\.pt lacks b, c, d, e and 1 more \(of 5 needed tensors\)$"):
        require({}, ["b", "c", "d", "e", "f"], "x.pt")
