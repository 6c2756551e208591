"""Files of our own: written whole, and built again from their content alone."""

import copy
import inspect
import json
import os
import pathlib
import pickle
import struct

import pytest
import torch
from small import TINY, same, state, tiny
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import t2t_ref
from t2t_ref import T2TViT, ViT, create_model, list_models, load_checkpoint, load_model, save_checkpoint
from t2t_ref.weights import read_weights
from t2t_ref.weights.saving import arguments_of

OVERRIDES = [
    dict(),
    dict(num_classes=0),
    dict(img_size=(48, 80), in_chans=1, num_classes=3),
    dict(qkv_bias=True, qk_scale=0.3, mlp_ratio=3.3),
    dict(drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3, performer_drop_rate=0.0, performer_epsilon=1e-4),
    dict(dynamic_img_size=True, depth=1, drop_path_rate=0.1),
    dict(tokens_type="transformer"),
    dict(tokens_type="convolution", token_dim=12),
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda overrides: "-".join(overrides) or "none")
def test_saved_models_come_back(tmp_path, overrides):
    model = tiny(**overrides)
    save_checkpoint(model, tmp_path / "m.safetensors")
    torch.manual_seed(9)
    random_state = torch.get_rng_state()
    again = load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), random_state)  # building it drew no random numbers
    assert type(again) is T2TViT and arguments_of(again) == arguments_of(model) and again.training
    assert repr(again) == repr(model) and same(state(again), state(model))
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    image = torch.randn(2, overrides.get("in_chans", 3), *model.img_size)
    assert torch.equal(again.eval()(image), model(image))
    torch.manual_seed(0)
    expected = model.train()(image)
    torch.manual_seed(0)
    assert torch.equal(again.train()(image), expected)  # the same rates of dropout


@pytest.mark.parametrize("name", list_models())
def test_every_variant_is_rebuilt_by_its_arguments(name):
    with torch.device("meta"):
        model = create_model(name, img_size=(224, 448), num_classes=7, drop_path_rate=0.1)
        written = json.loads(json.dumps(arguments_of(model)))
        again = type(model)(**{key: tuple(v) if isinstance(v, list) else v for key, v in written.items()})
    assert arguments_of(again) == arguments_of(model)
    assert repr(again) == repr(model)
    assert [(n, p.shape) for n, p in again.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]


def test_saving_knows_the_head_of_today_and_the_precision(tmp_path):
    model = ViT(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    model.reset_classifier(7)
    model.dynamic_img_size = True
    save_checkpoint(model.bfloat16(), tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert type(again) is ViT and again.num_classes == 7 and again.dynamic_img_size
    assert {entry.dtype for entry in again.state_dict().values()} == {torch.bfloat16}
    assert same(state(again), state(model))


def test_a_loaded_model_does_not_hang_on_its_file(trained, tmp_path):
    """Tensors that map the file would change with it, or end the process."""
    save_checkpoint(trained, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors")
    with (tmp_path / "m.safetensors").open("r+b") as file:
        file.write(bytes(5000))
        file.truncate(5000)
    assert same(state(model), state(trained))


def test_load_model_with_other_arguments(trained, tmp_path):
    save_checkpoint(trained, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors", num_classes=7, img_size=(32, 48), drop_path_rate=0.1)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 7)
    assert torch.equal(model.cls_token, trained.cls_token)
    with pytest.raises(ValueError, match="does not fit"):
        load_model(tmp_path / "m.safetensors", depth=3)


def test_a_model_changed_by_hand_is_not_saved(trained, tmp_path):
    trained.blocks[1].attn.scale = 0.5
    trained.head = torch.nn.Linear(24, 9)
    trained.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(ValueError, match="changed after it was built.*is ReLU, not GELU") as caught:
        save_checkpoint(trained, tmp_path / "m.safetensors")
    for change in ("blocks.1.attn.scale is 0.5, not 0.35", "head.out_features is 9, not 5", "shape of head.weight"):
        assert change in str(caught.value)
    with pytest.raises(TypeError, match="expected a model of t2t_ref or a module around one, found a Linear"):
        save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="how to build a Mine; expected T2TViT or ViT"):
        save_checkpoint(type("Mine", (T2TViT,), {})(**TINY), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_saving_is_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    path = tmp_path / "m.safetensors"
    save_checkpoint(trained, path)
    before = path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]

    def half(tensors, filename, metadata):
        pathlib.Path(filename).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="cannot write .*m.safetensors: .*No space left"):
        save_checkpoint(tiny(), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="no folder .*absent to write m.safetensors into"):
        save_checkpoint(trained, tmp_path / "absent" / "m.safetensors")


def rewritten(path, **changes):
    """The file with other metadata."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_load_model_refuses_what_it_cannot_rebuild(trained, tmp_path):
    path = tmp_path / "m.safetensors"
    torch.save(state(trained), path.with_suffix(".pth"))
    with pytest.raises(ValueError, match="does not say which model it holds.*load_checkpoint"):
        load_model(path.with_suffix(".pth"))
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        load_model(path)
    for changes, match in (
        ({"class": "os.system"}, "does not say which model"),
        ({"arguments": '{"depth": 3}'}, "its arguments and its weights disagree"),
        ({"arguments": '{"depth": "three"}'}, "its arguments and its weights disagree"),
        ({"arguments": '{"breadth": 3}'}, "its arguments and its weights disagree"),
        ({"arguments": "[1, 2]"}, "is no safetensors file, or not whole"),
        ({"arguments": "not json"}, "is no safetensors file, or not whole"),
    ):
        save_checkpoint(trained, path)
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=match):
            load_model(path)
    save_checkpoint(trained, path)
    rewritten(path, arguments='{"img_size": "huge", "num_heads": [], "qk_scale": {}}')
    load_checkpoint(tiny(), path)  # the weights are whole; what is written beside them is nonsense


def test_arguments_survive_copies(trained):

    for again in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained)), copy.copy(trained)):
        assert arguments_of(again) == arguments_of(trained) == TINY | arguments_of(trained)
    known = set(inspect.signature(T2TViT).parameters) - {"global_pool"}  # noted where it is not the usual one
    assert set(arguments_of(trained)) == known  # defaults too
    with pytest.raises(TypeError, match="unexpected keyword argument 'breadth'"):
        tiny(breadth=3)


# files of wrapped models, files of other people's folders


class Larger(torch.nn.Module):
    """As a class of Lightning, or anybody's: the model is a part of it, beside others."""

    def __init__(self, model):
        super().__init__()
        self.net = model
        self.loss = torch.nn.CrossEntropyLoss()


def compiled_in_part(model):
    model.blocks[0] = torch.compile(model.blocks[0])
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    return model


WRAPS = {
    "torch.compile": torch.compile,
    "DataParallel": torch.nn.DataParallel,
    "both": lambda model: torch.compile(torch.nn.DataParallel(model)),
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "in a larger module": Larger,
    "Sequential": lambda model: torch.nn.Sequential(torch.nn.Identity(), model),
    "in part": compiled_in_part,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models_are_loaded_and_saved_as_what_they_are(trained, tmp_path, wrap):
    wrapped = WRAPS[wrap](tiny())
    report = load_checkpoint(wrapped, state(trained))
    assert len(report.loaded) == len(state(trained)) and not report.notes
    save_checkpoint(wrapped, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert same(state(again), state(trained)) and repr(again) == repr(trained)

    report = load_checkpoint(tiny(), wrapped.state_dict())  # and what torch.save would write of it
    assert len(report.loaded) == len(state(trained))
    assert t2t_ref.count_parameters(wrapped) == t2t_ref.count_parameters(trained)
    image = torch.zeros(1, 3, 64, 64)
    if wrap in ("AveragedModel", "Sequential"):  # the others want a compiler, or processors of their own
        assert t2t_ref.count_macs(wrapped, image) == t2t_ref.count_macs(trained, image)


def test_what_is_no_model_of_ours_is_refused(trained, tmp_path):
    two = torch.nn.ModuleDict({"student": tiny(), "teacher": tiny()})
    with pytest.raises(TypeError, match=r"found a ModuleDict, one with 2 of them \(student, teacher\)"):
        load_checkpoint(two, state(trained))
    with pytest.raises(TypeError, match="found a Linear, one without any"):
        load_checkpoint(torch.nn.Linear(2, 2), state(trained))


def test_a_wrapped_model_that_was_changed_by_hand_is_not_saved(trained, tmp_path):
    trained.blocks[0].attn.scale = 0.5
    with pytest.raises(ValueError, match="blocks.0.attn.scale is 0.5"):
        save_checkpoint(compiled_in_part(trained), tmp_path / "m.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_files_have_the_usual_permissions(trained, tmp_path):
    path = tmp_path / "m.safetensors"
    for umask, permissions in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            save_checkpoint(trained, path)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == permissions
        path.unlink()
    save_checkpoint(trained, path)
    path.chmod(0o640)
    save_checkpoint(trained, path)  # over a file whose owner has said otherwise
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(trained, tmp_path):
    (tmp_path / "runs").mkdir()
    link = tmp_path / "latest.safetensors"
    try:
        link.symlink_to(tmp_path / "runs" / "3.safetensors")
    except OSError as error:
        pytest.skip(f"no links here: {error}")
    save_checkpoint(trained, link)
    assert link.is_symlink() and same(state(load_model(tmp_path / "runs" / "3.safetensors")), state(trained))


def test_models_built_from_what_was_read_once_share_nothing(trained, tmp_path):
    save_checkpoint(trained, tmp_path / "m.safetensors")
    stored = read_weights(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").unlink()
    first, second, wide = load_model(stored), load_model(stored), load_model(stored, img_size=(48, 80))
    with torch.no_grad():
        first.cls_token.fill_(3)
        wide.cls_token.fill_(4)
    assert same(state(second), state(trained)) and wide.grid == (3, 5)
    assert (stored.class_name, stored.arguments["embed_dim"]) == ("T2TViT", 24)


def test_a_file_is_read_once(trained, tmp_path, monkeypatch):
    save_checkpoint(trained, tmp_path / "m.safetensors")
    opened, read = [], pathlib.Path.read_bytes
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: opened.append(path) or read(path))
    load_model(tmp_path / "m.safetensors", num_classes=3, img_size=32)
    assert len(opened) == 1
