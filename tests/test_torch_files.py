"""Torch's files: their tensors come out as they went in, and nothing that is hidden in a file ever runs."""

import copy
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from interactdiff.checkpoint import AdapterError
from interactdiff.torch_files import MAX_PICKLE, torch_tensors


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path / "weights.pth", **options)
    return path / "weights.pth"


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A torch file made by hand."""
    with zipfile.ZipFile(path / "weights.pth", "w", **options) as made:
        made.writestr("weights/data.pkl", pickled)
        for name, content in (records or {}).items():
            made.writestr(name, content)
    return path / "weights.pth"


def refusal(file: Path) -> str:
    with pytest.raises(AdapterError, match=r"^expected torch weights at ") as raised:
        torch_tensors(file)
    message = str(raised.value)
    assert "\n" not in message
    return message.split(f"{file}, got ")[1]


# --- what comes out ---


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_come_out_as_they_went_in(tmp_path, protocol):
    whole = torch.randn(6, 5)
    tensors = {
        "float": whole,
        "transposed": torch.randn(4, 5).t(),
        "a view of another's storage": whole[1:4:2, 2:],
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(3).bfloat16(),
        "double": torch.randn(3).double(),
        "whole numbers": torch.arange(5),
        "yes and no": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.randn(2, 2)),
    }
    read = torch_tensors(saved(tmp_path, tensors, pickle_protocol=protocol))
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].shape == tuple(tensor.shape), name
        again = read[name].read()
        assert again.dtype == read[name].dtype == tensor.dtype
        assert torch.equal(again, tensor), name
        assert again.is_contiguous()
    assert read["float"].read(torch.float16).equal(whole.half())


def test_names_of_dicts_in_dicts_are_joined(tmp_path):
    module = nn.Sequential(
        nn.Linear(2, 2), nn.BatchNorm1d(2)
    )  # its state_dict is an OrderedDict with _metadata
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    content = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, 7: torch.ones(1)}
    names = list(torch_tensors(saved(tmp_path, content)))
    assert names == [f"model.{name}" for name in module.state_dict()]


def test_absurd_names_are_left_out(tmp_path):
    file = saved(
        tmp_path, {"a": torch.ones(1), "b" * 600: torch.ones(1), "c" * 300: {"d" * 300: torch.ones(1)}}
    )
    assert list(torch_tensors(file)) == ["a"]


def test_dicts_that_refer_to_each_other_come_to_an_end(tmp_path):
    content: dict[str, Any] = {"weight": torch.ones(1)}
    content["itself"] = content
    inner: dict[str, Any] = {"inner": torch.ones(1)}
    for _ in range(30):
        inner = {str(number): inner for number in range(30)}
    content["many"] = inner
    assert list(torch_tensors(saved(tmp_path, content))) == ["weight"]


def test_of_a_file_only_what_is_asked_for_is_read(tmp_path):
    file = saved(tmp_path, {"a": torch.ones(4), "b": torch.ones(1000)})
    read = torch_tensors(file)
    content = file.read_bytes()
    os.truncate(file, content.index(torch.ones(1000).numpy().tobytes()) + 2000)
    assert read["a"].read().equal(torch.ones(4))
    with pytest.raises(AdapterError, match="got some whose b is not whole"):
        read["b"].read()


# --- files that try ---


class Call:
    """Pickled as a call of a function: loading the pickle calls it."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Setter:
    """Does something when its state comes back."""

    def __init__(self, trace: str):
        self.trace = trace

    def __setstate__(self, state: dict[str, Any]) -> None:
        leave_a_trace(state["trace"])


def leave_a_trace(path: str) -> str:
    Path(path).touch()
    return path


def nested(trace: str) -> bytes:
    """getattr(__import__("os"), "system")("touch ..."), as opcodes."""
    imported = "cbuiltins\n__import__\n(S'os'\ntR"
    return f"cbuiltins\ngetattr\n({imported}S'system'\ntR(S'touch {trace}'\ntR.".encode()


PAYLOADS = {
    "os.system": (lambda trace: Call(os.system, f"touch {trace}"), r"calls (posix|nt)\.system"),
    "eval": (
        lambda trace: Call(eval, f"open({trace!r}, 'w').close()"),
        r"calls (builtins|__builtin__)\.eval",
    ),
    "exec": (
        lambda trace: Call(exec, f"open({trace!r}, 'w').close()"),
        r"calls (builtins|__builtin__)\.exec",
    ),
    "subprocess": (
        lambda trace: Call(subprocess.call, ["touch", trace]),
        r"calls (subprocess|commands)\.call",
    ),
    "nested": (nested, r"calls builtins\.__import__"),
    "a function of any module": (lambda trace: Call(leave_a_trace, trace), None),
    "a call as an argument": (lambda trace: Call(str, Call(leave_a_trace, trace)), None),
    "a state": (Setter, None),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_call_in_a_pickle_is_made(tmp_path, payload, protocol):
    make, refused = PAYLOADS[payload]
    trace = tmp_path / "trace"
    made = make(str(trace))
    pickled = made if isinstance(made, bytes) else pickle.dumps(made, protocol)
    pickle.loads(pickled)
    assert trace.exists(), "the payload is a dud"
    trace.unlink()
    file = archive(tmp_path, pickled)
    if refused:
        assert re.match(f"a pickle that {refused}$", refusal(file))
    else:
        assert torch_tensors(file) == {}
    assert not trace.exists()


def test_what_is_no_tensor_leaves_the_tensors_alone(tmp_path):
    trace = tmp_path / "trace"
    content = {"payload": Call(leave_a_trace, str(trace)), "model": {"weight": torch.ones(2)}}
    read = torch_tensors(saved(tmp_path, content))
    assert list(read) == ["model.weight"]
    assert read["model.weight"].read().equal(torch.ones(2))
    assert not trace.exists()


def test_configurations_of_omegaconf_are_passed_over(tmp_path, monkeypatch):
    """As in the published files: the `vars()` of a DictConfig, whose classes need not be installed."""
    module: Any = ModuleType("omegaconf.dictconfig")

    def a_class(name: str, *bases: type, **content: Any) -> Any:
        made = type(name, bases, {"__module__": module.__name__, **content})
        setattr(module, name, made)
        return made

    dict_config, node, metadata = (a_class(name) for name in ("DictConfig", "AnyNode", "ContainerMetadata"))
    a_list = a_class("ListConfig", list)
    module.Kind = kind = Enum("Kind", {"A": 1}, module=module.__name__)
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inner, value, about = dict_config(), node(), metadata()
    about.__dict__.update(ref_type=Any, object_type=dict, flags=defaultdict(dict, a={"b": 1}), kind=kind.A)
    value.__dict__.update(_val=3, _parent=inner, _metadata=about)
    inner.__dict__.update(_content={"steps": value, kind.A: a_list([value, 2])}, _metadata=about)
    content = {"model": {"weight": torch.ones(2)}, "config_dict": vars(inner), "config": inner}
    file = saved(tmp_path, content)
    assert b"omegaconf" in file.read_bytes()
    monkeypatch.undo()
    assert list(torch_tensors(file)) == ["model.weight"]


SET_SHAPE = b"}X\x05\x00\x00\x00shapeK\x01s"


@pytest.mark.parametrize(
    "name", ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "x X"]
)
@pytest.mark.parametrize("state", [SET_SHAPE + b"b", b"N" + SET_SHAPE + b"\x86b"])
def test_a_pickle_cannot_change_what_reads_it(tmp_path, name, state):
    module, function = name.encode().split()
    (tmp_path / "bad").mkdir()
    bad = archive(tmp_path / "bad", b"\x80\x02c" + module + b"\n" + function + b"\n" + state + b".")
    assert "damaged" in refusal(bad)
    assert torch_tensors(saved(tmp_path, {"weight": torch.ones(2)}))["weight"].shape == (2,)


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02\x82\x01.", "a pickle that names objects of this program by their numbers"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "a pickle that asks for more memory than it can use"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "a file that is damaged"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00.", "a file that is damaged"),
        (b"\x80\x02(((((", "a file that is damaged"),
        (b"", "a file that is damaged"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "a file that is damaged"),
        (b"\x80\x02K\x01K\x02K\x03\x87Q.", "a pickle that refers to something else than storages"),
        # a list of two lists of two lists ...: to write it out would fill the memory
        (
            b"\x80\x02]q\x00"
            + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40))
            + b"K\x02K\x03\x87Q.",
            "a pickle that refers to something else than storages",
        ),
        (b"0" * (MAX_PICKLE + 1), f"a pickle of {MAX_PICKLE + 1} bytes, where {MAX_PICKLE} would do"),
    ],
)
def test_pickles_that_ask_for_too_much(tmp_path, pickled, message):
    assert refusal(archive(tmp_path, pickled)).startswith(message)


# --- archives that are none of torch's ---


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "weights/../../outside", "C:/x", "weights\\data"]
)
def test_names_that_point_out_of_the_archive(tmp_path, name):
    file = archive(tmp_path, pickle.dumps({}, 2), {"x" * len(name): b"content"})
    file.write_bytes(file.read_bytes().replace(b"x" * len(name), name.encode()))  # zipfile would clean it
    assert refusal(file) == f"a zip archive with {name!r}, which points out of it"
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_compressed_archives(tmp_path):
    bomb = archive(
        tmp_path, pickle.dumps({}, 2), {"weights/data/0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 20_000
    assert refusal(bomb).endswith("is compressed: torch writes it as it is")


def test_records_that_overlap(tmp_path):
    file = tmp_path / "weights.pth"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("weights/data.pkl", pickle.dumps({}, 2))
        made.writestr("weights/data/0", bytes(1000))
        for number in range(1, 100):
            again = copy.copy(made.infolist()[1])
            again.filename = f"weights/data/{number}"
            made.filelist.append(again)
    assert refusal(file) == "a zip archive whose records overlap"


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as made:
        made.writestr("readme.txt", "hello")
    assert refusal(tmp_path / "a.pth") == "a zip archive with 0 records data.pkl"
    file = archive(tmp_path, b"", {"weights/constants.pkl": b""})
    assert refusal(file) == "a TorchScript program: save its state_dict() instead"
    other = "big" if sys.byteorder == "little" else "little"
    file = archive(tmp_path, b"", {"weights/byteorder": other.encode()})
    assert refusal(file) == f"one of another byte order than this computer's, {sys.byteorder}"


def test_truncated_files(tmp_path):
    file = saved(tmp_path, {"weight": torch.ones(1000)})
    content = file.read_bytes()
    for length in (0, 3, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        assert refusal(file) in ("something else", "a zip archive that is not whole")
    file.write_bytes(content.replace(b"weight", b"weighs"))
    assert "damaged" in refusal(file)  # its checksum


def test_the_format_from_before_torch_1_6(tmp_path):
    file = saved(tmp_path, {"weight": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert refusal(file).startswith(
        "the format from before torch 1.6: read it with torch.load(file, weights_on"
    )
    file.write_bytes(pickle.dumps({"weight": [1, 2]}))
    assert refusal(file) == "a pickle outside of any archive"


def test_files_that_are_not_there(tmp_path):
    assert refusal(tmp_path / "nothing.pth") == "No such file or directory"
    assert refusal(tmp_path) == "Is a directory"


# --- tensors that are none ---


class Lie:
    """A tensor that says it is another."""

    def __init__(self, tensor: torch.Tensor, *claimed: Any):
        self.tensor, self.claimed = tensor, claimed

    def __reduce__(self) -> Any:
        rebuild: Any = torch._utils._rebuild_tensor_v2
        return rebuild, (self.tensor.storage(), *self.claimed, False, OrderedDict())


@pytest.mark.parametrize(
    ("claimed", "message"),
    [
        ((0, (5,), (1,)), "some whose weight reaches out of its record"),
        ((3, (2,), (1,)), "some whose weight reaches out of its record"),
        ((0, (2, 2), (3, 1)), "some whose weight reaches out of its record"),
        ((-1, (2,), (1,)), "some whose weight is damaged"),
        ((0, (-2,), (1,)), "some whose weight is damaged"),
        ((0, (2,), (-1,)), "some whose weight is damaged"),
        ((0, (2,), (1, 1)), "some whose weight is damaged"),
        ((0, (2.0,), (1,)), "some whose weight is damaged"),
        ((0, 2, 1), "some whose weight is damaged"),
        ((0, (10**30,), (1,)), "some whose weight reaches out of its record"),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_that_are_not_where_they_say(tmp_path, claimed, message):
    assert refusal(saved(tmp_path, {"weight": Lie(torch.ones(4), *claimed)})) == message
