"""Files of weights: which are read, which are refused, and in which words."""

import argparse
import builtins
import collections
import io
import json
import os
import pathlib
import pickle
import re
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import authors_file, refuses, same, state, tiny
from werkzeug import Response

from t2t_ref import load_checkpoint, load_model, save_checkpoint
from t2t_ref.weights import files


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_authors_file_gives_its_averaged_weights(trained, tmp_path, legacy):
    path = authors_file(state(trained), tmp_path / "model_best.pth.tar", legacy)
    model = tiny()
    report = load_checkpoint(model, path)
    assert same(state(model), state(trained))
    assert str(report).splitlines()[0] == f"{path}, entry 'state_dict_ema'"
    assert len(report.loaded) == len(state(model)) and not report.adapted and not report.skipped
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(image), trained(image))

    load_checkpoint(model, str(path), use_ema=False)
    torch.testing.assert_close(model.head.bias, trained.head.bias + 1)


def test_only_averaged_weights(trained, tmp_path):
    torch.save({"state_dict_ema": state(trained)}, tmp_path / "81.5.pth.tar")  # as the released files are
    refuses(tiny(), tmp_path / "81.5.pth.tar", ValueError, "averaged weights only.*use_ema is False", use_ema=False)
    load_checkpoint(tiny(), tmp_path / "81.5.pth.tar")


def test_a_cifar_file(trained, tmp_path):
    """transfer_learning.py writes net, acc and epoch; the authors' own loader cannot read it."""
    net = {f"module.{name}": entry for name, entry in state(trained).items()}
    torch.save({"net": net, "acc": 98.3, "epoch": 59}, tmp_path / "cifar10.pth")
    model = tiny()
    assert "entry 'net'" in str(load_checkpoint(model, tmp_path / "cifar10.pth"))
    assert same(state(model), state(trained))


def test_safetensors_of_anybody(trained, tmp_path):
    from safetensors.torch import save_file

    model = tiny()
    save_file(state(trained), tmp_path / "model.safetensors", {"format": "pt", "arguments": "none of ours"})
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert same(state(model), state(trained))
    os.rename(tmp_path / "model.safetensors", tmp_path / "weights.bin")  # known by its bytes, not by its name
    load_checkpoint(tiny(), tmp_path / "weights.bin")


@pytest.mark.parametrize("content", [{}, {"epoch": 3, "acc": 98.3}, {"state_dict": {}, "epoch": 3}, {"net": {"a": 1}}])
def test_a_dict_without_weights_is_refused(content, tmp_path):
    refuses(tiny(), content, ValueError, "the mapping holds no weights: found")
    torch.save(content, tmp_path / "a.pth")
    refuses(tiny(), tmp_path / "a.pth", ValueError, "a.pth holds no weights: found")


def test_content_that_is_no_dict_is_refused(trained, tmp_path):
    for content, kind in ((list(state(trained).values()), "list"), (trained.cls_token.detach(), "Tensor"), (3, "int")):
        torch.save(content, tmp_path / "a.pth")
        refuses(tiny(), tmp_path / "a.pth", ValueError, f"holds a {kind}; expected a dict of weights")


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "in the arguments", "as the weights"])
def test_nothing_in_a_file_is_run(trained, tmp_path, legacy, place):
    trace = tmp_path / "was-run"
    hostile = Hostile(os.mkdir, str(trace))
    content = {
        "beside": {"state_dict": state(trained), "extra": hostile},
        "in the arguments": {"state_dict": state(trained), "args": argparse.Namespace(lr=hostile)},
        "as the weights": hostile,
    }[place]
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    refuses(tiny(), tmp_path / "a.pth", ValueError, "asks for (posix|nt).mkdir, which is code.*Nothing of it was run")
    assert not trace.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)  # the trap is a real one
    assert trace.exists()


@pytest.mark.parametrize(
    "thing, name",
    [
        (pathlib.PurePosixPath("/"), r"pathlib(\._local)?\.PurePosixPath"),  # Python 3.13 has it in a module of its own
        (np.random.RandomState(0), "numpy.random.*"),
        (collections.deque([1]), "collections.deque"),
        (Hostile(builtins.eval, "1 + 1"), r"(builtins\.)?eval"),
    ],
)
def test_other_objects_are_refused(trained, tmp_path, thing, name):
    torch.save({"state_dict": state(trained), "thing": thing}, tmp_path / "a.pth")
    message = refuses(tiny(), tmp_path / "a.pth", ValueError, f"asks for {name}, which is code or an object")
    assert "weights_only" not in message
    with pytest.raises(pickle.UnpicklingError):  # allowed inside load_checkpoint alone
        torch.save({"args": argparse.Namespace()}, tmp_path / "b.pth")
        torch.load(tmp_path / "b.pth", weights_only=True)


def test_without_torchs_context_the_list_of_allowed_classes_comes_back(trained, tmp_path, monkeypatch):
    """torch 2.4 has a list in the place of safe_globals."""
    monkeypatch.delattr(torch.serialization, "safe_globals", raising=False)
    path = authors_file(state(trained), tmp_path / "a.pth.tar")
    whole = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([collections.Counter])  # somebody else's
    try:
        before = set(torch.serialization.get_safe_globals())
        load_checkpoint(tiny(), path)
        assert set(torch.serialization.get_safe_globals()) == before
        torch.save({"thing": Hostile(os.mkdir, str(tmp_path / "was-run"))}, tmp_path / "b.pth")
        refuses(tiny(), tmp_path / "b.pth", ValueError, "which is code")
        assert set(torch.serialization.get_safe_globals()) == before and not (tmp_path / "was-run").exists()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(whole)


def test_a_program_never_reaches_torch(tmp_path, monkeypatch):
    """torch 2.4 loads a TorchScript archive in spite of weights_only."""
    with warnings.catch_warnings(action="ignore"):  # TorchScript is on its way out
        script(tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("torch.load was asked"))
    refuses(tiny(), tmp_path / "a.pth", ValueError, "is a TorchScript program")


def test_a_whole_pickled_model_is_refused(trained, tmp_path):
    torch.save(trained, tmp_path / "a.pth")
    refuses(tiny(), tmp_path / "a.pth", ValueError, "asks for t2t_ref.models.t2t_vit.T2TViT")


NUMBERS = {
    "best_acc": np.float64(81.5),
    "epoch": np.int64(3),
    "done": np.bool_(True),
    "name": np.str_("t2t"),
    "random": np.random.RandomState(0).get_state(),
    "confusion": np.zeros((3, 3)),
    "args": argparse.Namespace(lr=np.float32(5e-4)),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_numbers_of_numpys_beside_the_weights(trained, tmp_path, legacy):
    """Training scripts keep their best accuracy as numpy gave it to them."""
    content = {"state_dict": state(trained)} | NUMBERS
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    model = tiny()
    load_checkpoint(model, tmp_path / "a.pth")
    assert same(state(model), state(trained))


def test_numbers_of_another_numpy(trained, tmp_path):
    """numpy 2 calls numpy.core numpy._core; each has to read the files of the other, and who has no numpy all."""
    old_and_new = {b"numpy._core.multiarray": b"numpy.core.multiarray"}
    for written, other in (old_and_new | {new: old for old, new in old_and_new.items()}).items():
        torch.save(
            {"net": state(trained), "acc": np.float64(1)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False
        )
        (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes().replace(written, other))
        load_checkpoint(tiny(), tmp_path / "a.pth")


def test_what_stands_in_goes_by_both_names():
    """torch looks for a class by __qualname__, until 2.5 by __name__."""
    for thing in files.HARMLESS:
        assert thing.__name__ == thing.__qualname__ and thing.__module__.partition(".")[0] in (
            "numpy",
            "argparse",
            "_codecs",
        )


def test_what_stands_in_for_numpy_runs_nothing(trained, tmp_path):
    """A number that hides a call, and weights that are arrays."""
    trace = tmp_path / "was-run"

    class Number:
        def __reduce__(self):
            return np.dtype, (Hostile(os.mkdir, str(trace)),)

    torch.save({"net": state(trained), "acc": Number()}, tmp_path / "a.pth")
    refuses(tiny(), tmp_path / "a.pth", ValueError, "asks for (posix|nt).mkdir, which is code")
    assert not trace.exists()
    torch.save({name: entry.numpy() for name, entry in state(trained).items()}, tmp_path / "b.pth")
    refuses(tiny(), tmp_path / "b.pth", ValueError, r"holds no weights: found cls_token \(numpy.*_reconstruct\)")


AVERAGES = {
    "state_dict_ema": lambda average: average,  # timm
    "model_ema": lambda average: average,  # DeiT and those made after it
    "ema": lambda average: {"module": {f"module.{name}": entry for name, entry in average.items()}, "decay": 0.999},
    "ema_state_dict": lambda average: {"shadow": average, "num_updates": 7},
    "module_ema": lambda average: [average],
    "swa_model": lambda average: {f"module.{n}": e for n, e in average.items()} | {"n_averaged": torch.tensor(3)},
}


@pytest.mark.parametrize("key", AVERAGES)
def test_averaged_weights_by_any_name(trained, key):
    plain = state(tiny(seed=5))
    optimizer = {"state": {0: {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    for other in ("model", "state_dict", "something"):
        content = {"epoch": 3, other: plain, key: AVERAGES[key](state(trained)), "optimizer": optimizer}
        model = tiny()
        report = load_checkpoint(model, content)
        assert same(state(model), state(trained))
        assert f"entry '{key}" in report.origin
        assert report.notes[0] == f"the averaged weights were taken; also in the file: {other}"
        report = load_checkpoint(model, content, use_ema=False)
        assert same(state(model), plain) and report.origin == f"the mapping, entry '{other}'"


def test_sets_of_weights_that_nothing_tells_apart(trained):
    weights, copy = state(trained), state(tiny(seed=5))
    for content, match in (
        ({"student": copy, "teacher": weights}, "several sets of weights, 'student' and 'teacher'"),
        ({"model": copy, "model_ema": [weights, copy]}, "several sets of weights, 'model_ema.0' and 'model_ema.1'"),
        (
            {"model": copy, "ema": {"shadow_params": [*weights.values()]}},
            r"\(ema.shadow_params\) as a list without names",
        ),
        ({"ema": [*weights.values()]}, "as a list without names"),
    ):
        refuses(tiny(), content, ValueError, match)
    load_checkpoint(tiny(), {"model": weights, "ema": {"shadow_params": [*weights.values()]}}, use_ema=False)
    report = load_checkpoint(tiny(), {"discriminator": {"weight": torch.ones(3)}, "generator": weights})
    assert "entry 'generator'" in str(report) and "also in the file: discriminator" in str(report)
    for other in ([torch.ones(()), torch.ones(())], {"mean": torch.ones(3)}):  # a history, a statistic: no weights
        assert "entry 'model'" in str(load_checkpoint(tiny(), {"model": weights, "moving_avg": other}))


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.write(__file__, "weights/model.pth")


def tar(path, mode="w"):
    torch.save({"a": torch.ones(1)}, path.with_name("inner.pth"))
    with tarfile.open(path, mode) as file:
        file.add(path.with_name("inner.pth"), "inner.pth")


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def arrays(path):
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


def index(path):
    path.write_text(
        json.dumps({"metadata": {}, "weight_map": {"cls_token": "model-00001-of-00002.safetensors"}}), encoding="utf-8"
    )


OTHER_KINDS = {  # what people give in place of weights, and what they are told
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "page": (
        lambda path: path.write_bytes(b"\n\n<!DOCTYPE html>\n<html lang=en><title>GitHub</title></html>"),
        "is a web page, not weights",
    ),
    "old page": (
        lambda path: path.write_bytes(b"\xef\xbb\xbf<HTML><body>429</body></HTML>"),
        "is a web page, not weights",
    ),
    "lfs": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "is a Git LFS pointer.*git lfs pull",
    ),
    "text": (lambda path: path.write_bytes(b"hello"), "is no file of weights, or not whole"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=4)), "is a plain pickle.*not opened"),
    "array": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(99)), "is an array of numpy's"),
    "arrays": (
        lambda path: np.savez(path.open("wb"), a=np.ones(3)),
        r"is an archive of numpy arrays \(.npz\)",
    ),
    "zip": (archive, "is an archive: unpack it first; in it: weights/model.pth"),
    "tar": (tar, "is an archive: unpack it first; in it: inner.pth"),
    "tar.gz": (lambda path: tar(path, "w:gz"), "is a compressed archive: unpack it first"),
    "tar.xz": (lambda path: tar(path, "w:xz"), "is a compressed archive: unpack it first"),
    "index": (index, "is the index of a checkpoint in several files: read each, join their dicts"),
    "config": (
        lambda path: path.write_text('{"depth": 14}', encoding="utf-8"),
        "is a JSON text, such as a configuration",
    ),
    "keras": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "is an HDF5 file, such as Keras writes"),
    "onnx": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0"), "is an ONNX model"),
    "script": (script, "is a TorchScript program, which is code: save the state_dict"),
}


@pytest.mark.parametrize("source", [[1], None, 3, io.BytesIO(b"x")], ids=lambda source: type(source).__name__)
def test_what_is_no_source_is_refused(source):
    with pytest.raises(TypeError, match=f"type {type(source).__name__}, expected a path, a URL or a mapping"):
        files.check_source(source)
    with pytest.raises(TypeError, match=r"give state_dict\(\)"):
        files.check_source(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("ending", [".pth.tar", ".safetensors"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_files_of_another_kind_are_named(tmp_path, kind, ending):
    path = tmp_path / f"81.5_T2T_ViT_14{ending}"
    write, match = OTHER_KINDS[kind]
    with warnings.catch_warnings(action="ignore"):  # TorchScript is on its way out
        write(path)
    if (kind, ending) == ("text", ".safetensors"):
        match = "is no safetensors file, or not whole"
    with warnings.catch_warnings(action="error"):
        message = refuses(tiny(), path, ValueError, match)
    assert len(message.splitlines()) == 1
    assert "weights_only" not in message  # torch's own message tells people to switch the protection off


@pytest.mark.parametrize("ending, match", [(".pdparams", "is a Paddle file"), (".msgpack", "is a Flax file")])
def test_files_whose_ending_says_what_they_are(trained, tmp_path, ending, match):
    path = tmp_path / f"model{ending}"
    path.write_bytes(pickle.dumps({name: entry.numpy() for name, entry in state(trained).items()}, protocol=4))
    refuses(tiny(), path, ValueError, f"{match}: convert it to")
    torch.save(state(trained), path)  # but what is in it counts
    load_checkpoint(tiny(), path)


@pytest.mark.parametrize(
    "names, match",
    [
        (["config.json", "model.safetensors"], "it is a folder: expected a file of weights; in it: model.safetensors"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "it is a checkpoint in several files"),
        (["saved_model.pb", "fingerprint.pb"], "it is a TensorFlow or JAX checkpoint"),
        ([".metadata", "__0_0.distcp"], "it is a distributed checkpoint: join it"),
        (["data.pkl", "version"], "it is a torch file that something has unpacked"),
        ([], "it is a folder: expected a file of weights"),
    ],
)
def test_folders_are_named(tmp_path, names, match):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    refuses(tiny(), str(tmp_path), ValueError, f"is not a file; {match}")


def test_a_path_that_is_not_there(tmp_path):
    path = tmp_path / "81.5_T2T_ViT_14.pth.tar"
    refuses(tiny(), path, FileNotFoundError, f"no file of weights at {re.escape(str(path))}")


def test_a_plain_pickle_is_not_opened(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Hostile(os.mkdir, str(tmp_path / "was-run"))))
    refuses(tiny(), tmp_path / "a.pth", ValueError, "is a plain pickle")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("ending", [b".safetensors", b".pth"])
def test_names_that_are_not_utf8(trained, tmp_path, ending):
    """A disk from elsewhere: the bytes of a name are not always text."""
    path = os.fsencode(tmp_path) + b"/gew\xe4hlt" + ending
    try:
        open(path, "wb").close()
    except (OSError, UnicodeDecodeError) as error:  # the latter on Windows
        pytest.skip(f"this file system has no such names: {error}")
    if ending == b".pth":
        with open(path, "wb") as file:
            torch.save(state(trained), file)
    else:
        save_checkpoint(trained, path)
        assert same(state(load_model(path)), state(trained))
    for way in (path, os.fsdecode(path), pathlib.Path(os.fsdecode(path))):
        str(load_checkpoint(tiny(), way)).encode()  # the report can be printed
    os.unlink(path)
    refuses(tiny(), path, FileNotFoundError, r"gew\\xe4hlt").encode()


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(whole_file, share):
    content = whole_file.read_bytes()
    load_checkpoint(tiny(), whole_file)
    whole_file.write_bytes(content[: int(len(content) * share)])
    refuses(tiny(), whole_file, ValueError, "not whole|is empty")


def only_documented_errors(path, target, before):
    """Whatever the bytes: loaded, or one of the errors that the docstring names and the model as it was."""
    for read in (lambda: load_checkpoint(target, path), lambda: load_model(path)):
        try:
            read()
        except (ValueError, FileNotFoundError):
            assert same(state(target), before)
        target.load_state_dict(before)


fuzzed = settings(  # the same examples in every run; what a test writes may stay from one example to the next
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzzed
@given(
    content=st.binary(max_size=300),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x10" + 7 * b"\0" + b"{"]),
)
def test_random_bytes_give_the_documented_errors(tmp_path, content, start):
    target = tiny()
    (tmp_path / "a").write_bytes(start + content)
    before = state(target)
    with pytest.raises(ValueError):
        load_checkpoint(target, tmp_path / "a")
    with pytest.raises(ValueError):
        load_model(tmp_path / "a")
    assert same(state(target), before)


@fuzzed
@given(data=st.data())
def test_damaged_bytes_give_the_documented_errors(whole_file, data):
    """Bytes changed at random, most of them where the structure is: at the start and at the end."""
    content = bytearray(whole_file.read_bytes())
    last = len(content) - 1
    near_an_end = st.integers(0, min(2500, last)) | st.integers(max(0, last - 2500), last)
    for place in data.draw(st.lists(near_an_end | st.integers(0, last), min_size=1, max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    damaged = whole_file.with_name("damaged")
    damaged.write_bytes(bytes(content[: data.draw(st.just(last + 1) | st.integers(0, last))]))
    target = tiny()
    only_documented_errors(damaged, target, state(target))


@pytest.fixture
def server(httpserver, whole_file):
    """A server on this machine: /whole is right, /half breaks off in the middle, /page is a web page."""
    content = whole_file.read_bytes()
    httpserver.no_handler_status_code = 404
    httpserver.expect_request(re.compile("(/other)?/whole")).respond_with_data(content)
    length = {"Content-Length": str(len(content))}
    half = iter([content[: len(content) // 2]])  # of bytes in one piece werkzeug corrects the length
    httpserver.expect_request("/half").respond_with_handler(lambda request: Response(half, headers=length))
    httpserver.expect_request("/page").respond_with_data("<html>log in</html>")
    return httpserver.url_for("")[:-1], httpserver.log


def test_downloads_are_whole_or_not_there(server, trained, tmp_path, monkeypatch, capsys):
    address, asked = server
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "checkpoints"
    model = tiny()
    refuses(model, f"{address}/half", ValueError, "/half is no (safetensors file|file of weights), or not whole")
    refuses(model, f"{address}/page", ValueError, "/page is a web page, not weights")
    refuses(model, f"{address}/absent", ConnectionError, "cannot download .*/absent: NOT FOUND. Fetch it where there")
    assert list(cache.iterdir()) == []

    capsys.readouterr()
    load_checkpoint(model, f"{address}/whole?raw=1")
    assert "100%" in capsys.readouterr().err  # a progress bar
    assert same(state(model), state(trained))
    (stored,) = cache.iterdir()
    assert re.fullmatch(r"[0-9a-f]{8}-whole", stored.name)
    load_checkpoint(tiny(), f"{address}/whole?raw=1", progress=False)
    assert [request.full_path for request, _ in asked].count("/whole?raw=1") == 1  # the second time from the cache
    load_checkpoint(tiny(), f"{address}/other/whole", progress=False)  # of the same name, from elsewhere
    assert len(list(cache.iterdir())) == 2
    refuses(tiny(), "no-such-scheme://a/b", ConnectionError, "cannot download no-such-scheme://a/b: unknown url type")
