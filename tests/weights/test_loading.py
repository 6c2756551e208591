"""Weights into a model: names, heads, tables, shapes, and the report."""

import re

import pytest
import torch
from small import TINY, refuses, same, state, tiny

from t2t_ref import T2TViT, ViT, create_model, load_checkpoint, resize_position_table, save_checkpoint
from t2t_ref.models.classifier import remember_arguments
from t2t_ref.weights import Stored


def test_the_random_features_come_from_the_file(trained):
    """The frozen w belongs to the keys and queries that were trained with it."""
    model, weights = tiny(), state(trained)
    assert not torch.equal(model.tokens_to_token.attention1.w, trained.tokens_to_token.attention1.w)
    load_checkpoint(model, weights)
    for layer in ("attention1", "attention2"):
        assert torch.equal(getattr(model.tokens_to_token, layer).w, getattr(trained.tokens_to_token, layer).w)
        assert not getattr(model.tokens_to_token, layer).w.requires_grad
    del weights["tokens_to_token.attention2.w"]
    refuses(tiny(), weights, ValueError, "missing from the file: 1 entries\n  tokens_to_token.attention2.w: 4 x 8")
    refuses(tiny(), weights, ValueError, "no tokens_to_token.attention2.w that fits", strict=False)


def behind(prefix, weights):
    return {prefix + name: entry for name, entry in weights.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.", "encoder.", "anything.at.all."])
def test_what_all_names_have_in_front_is_left_out(trained, prefix):
    model = tiny()
    report = load_checkpoint(model, behind(prefix, state(trained)))
    assert same(state(model), state(trained))
    assert report.notes == [f"left out of the names: {prefix!r}"]  # one line, not one a name
    report = load_checkpoint(model, behind(f"module.{prefix}_orig_mod.", state(trained)), use_ema=False)
    assert same(state(model), state(trained)) and len(report.notes) == 1
    # of the rest, what stands elsewhere is still refused
    weights = behind(prefix, state(trained)) | {"criterion.weight": torch.ones(3)}
    refuses(model, weights, ValueError, "not in the model: 1 entries\n  criterion.weight: 3 in the file")
    load_checkpoint(model, weights, strict=False)


def test_wrappers_within_the_names(trained):
    """As sharding and recomputing write them."""
    parts = {"blocks.0.": "blocks.0._checkpoint_wrapped_module.", "blocks.1.attn.": "blocks.1.attn._orig_mod."}
    weights = behind("_fsdp_wrapped_module.", state(trained))
    for plain, wrapped in parts.items():
        weights = {name.replace(plain, wrapped): entry for name, entry in weights.items()}
    model = tiny()
    load_checkpoint(model, weights)
    assert same(state(model), state(trained))


def test_names_that_wrappers_leave_twice(trained):
    model = tiny()
    both = state(trained) | {"module.norm.bias": trained.norm.bias}
    refuses(model, both, ValueError, "two entries for 'norm.bias'")


def test_two_sets_behind_names_of_their_own(trained):
    """Lightning keeps the averaged weights in the same dict, under another name."""
    plain, averaged = state(tiny(seed=3)), state(trained)
    both = behind("model.", plain) | behind("model_ema.module.", averaged) | {"model_ema.n_averaged": torch.tensor(9)}
    for use_ema, expected, other in ((True, averaged, "model. (56"), (False, plain, "model_ema. (57")):
        model = tiny()
        report = load_checkpoint(model, both, use_ema=use_ema)
        assert same(state(model), expected)
        assert f"not taken: {other} entries)" in str(report)
    refuses(tiny(), behind("ema.", averaged), ValueError, r"averaged weights only \(ema\.\)", use_ema=False)
    student = behind("student.", plain) | behind("teacher.", averaged)
    refuses(tiny(), student, ValueError, "several sets of weights, 'student.' and 'teacher.'")
    load_checkpoint(tiny(), plain | behind("teacher.", averaged))  # these fit as they are


def test_the_counter_of_an_average_is_no_weight(trained):
    average = torch.optim.swa_utils.AveragedModel(trained)
    average.update_parameters(trained)
    report = load_checkpoint(tiny(), average.state_dict())
    assert "not taken: n_averaged (1 entries)" in report.notes
    refuses(tiny(), state(trained) | {"counter": torch.tensor(3)}, ValueError, "not in the model: 1 entries\n  counter")


def test_the_head_of_timms_pooling_models(trained):
    weights = {name.replace("head.", "head.fc."): entry for name, entry in state(trained).items()}
    model = tiny()
    load_checkpoint(model, weights)
    assert same(state(model), state(trained))
    report = load_checkpoint(tiny(num_classes=3), behind("module.", weights))
    assert [entry.name for entry in report.skipped] == ["head.weight", "head.bias"]


MMPRETRAIN = {  # ours, theirs
    "tokens_to_token.attention1.norm1.weight": "backbone.tokens_to_token.attention1.ln1.weight",
    "tokens_to_token.attention2.norm2.bias": "backbone.tokens_to_token.attention2.ln2.bias",
    "tokens_to_token.attention1.attn.qkv.weight": "backbone.tokens_to_token.attention1.attn.qkv.weight",
    "tokens_to_token.attention1.mlp.fc1.bias": "backbone.tokens_to_token.attention1.ffn.layers.0.0.bias",
    "tokens_to_token.attention2.mlp.fc2.weight": "backbone.tokens_to_token.attention2.ffn.layers.1.weight",
    "tokens_to_token.project.weight": "backbone.tokens_to_token.project.weight",
    "blocks.0.norm1.weight": "backbone.encoder.0.ln1.weight",
    "blocks.1.attn.proj.bias": "backbone.encoder.1.attn.proj.bias",
    "blocks.1.norm2.bias": "backbone.encoder.1.ln2.bias",
    "blocks.1.mlp.fc1.weight": "backbone.encoder.1.ffn.layers.0.0.weight",
    "blocks.0.mlp.fc2.bias": "backbone.encoder.0.ffn.layers.1.bias",
    "norm.weight": "backbone.norm.weight",
    "cls_token": "backbone.cls_token",
    "pos_embed": "backbone.pos_embed",
    "head.weight": "head.layers.head.weight",
    "head.bias": "head.layers.head.bias",
}


def mmpretrain_name(name):
    if name.startswith("head."):
        return f"head.layers.{name}"
    for ours, theirs in (
        ("mlp.fc1", "ffn.layers.0.0"),
        ("mlp.fc2", "ffn.layers.1"),
        (".norm1", ".ln1"),
        (".norm2", ".ln2"),
    ):
        name = name.replace(ours, theirs)
    return "backbone." + re.sub("^blocks", "encoder", name)


def test_mmpretrains_names(tmp_path):
    trained, model = tiny(seed=1, tokens_type="transformer"), tiny(tokens_type="transformer")
    weights = {mmpretrain_name(name): entry for name, entry in state(trained).items()}
    assert set(MMPRETRAIN.values()) <= set(weights)
    assert all(mmpretrain_name(ours) == theirs for ours, theirs in MMPRETRAIN.items())
    torch.save({"meta": {"epoch": 310}, "state_dict": weights}, tmp_path / "mm.pth")
    report = load_checkpoint(model, tmp_path / "mm.pth")
    assert same(state(model), state(trained))
    assert "note: mmpretrain's names." in str(report)
    assert "note" not in str(load_checkpoint(model, state(trained)))


def test_precision_is_that_of_the_model(trained):
    model = tiny().double()
    load_checkpoint(model, {name: entry.half() for name, entry in state(trained).items()})
    assert {entry.dtype for entry in state(model).values()} == {torch.float64}
    torch.testing.assert_close(model.norm.weight, trained.norm.weight.half().double())


@pytest.mark.parametrize("classes", [7, 0])
def test_another_number_of_classes_leaves_the_head_fresh(trained, classes):
    model = tiny(num_classes=classes)
    before = state(model)
    report = load_checkpoint(model, state(trained))
    after = state(model)
    for name in after:
        assert torch.equal(after[name], before[name] if name.startswith("head.") else state(trained)[name])
    assert [(entry.name, entry.stored) for entry in report.skipped] == [("head.weight", (5, 24)), ("head.bias", (5,))]
    in_the_model = "7 x 24 in the model; another number of classes: its head stays fresh"
    nowhere = "head.weight: 5 x 24 in the file; another number of classes: no head here"
    assert (in_the_model if classes else nowhere) in str(report)


def test_weights_without_a_head(trained):
    headless = {name: entry for name, entry in state(trained).items() if not name.startswith("head.")}
    model = tiny()
    before = model.head.weight.clone()
    report = load_checkpoint(model, headless)
    assert torch.equal(model.head.weight, before) and torch.equal(model.cls_token, trained.cls_token)
    assert "head.bias: 5 in the model; another number of classes" in str(report)
    del headless["norm.bias"]  # half a head, or anything else, is no number of classes
    refuses(model, headless, ValueError, "norm.bias")
    refuses(
        model, headless | {"norm.bias": trained.norm.bias, "head.bias": trained.head.bias}, ValueError, "head.weight"
    )


def test_another_image_size_resizes_the_table(trained):
    model = tiny(img_size=(96, 160))
    report = load_checkpoint(model, state(trained))
    expected = resize_position_table(trained.pos_embed, (4, 4), (6, 10))
    torch.testing.assert_close(model.pos_embed, expected)
    assert not model.pos_embed.requires_grad
    assert (
        "adapted: 1\n  pos_embed: 1 x 17 x 24 in the file, 1 x 61 x 24 in the model; grid 4x4 resized to 6x10"
        in str(report)
    )
    assert model(torch.randn(1, 3, 96, 160)).shape == (1, 5)


def test_as_many_tokens_in_another_grid(trained):
    """112 x 448 pixels leave 7 x 28 tokens, as many as 14 x 14: the table must be resized all the same."""
    square, wide = tiny(seed=1, img_size=224), tiny(img_size=(112, 448))
    assert square.pos_embed.shape == wide.pos_embed.shape
    report = load_checkpoint(wide, state(square))
    torch.testing.assert_close(wide.pos_embed, resize_position_table(square.pos_embed, (14, 14), (7, 28)))
    assert "grid 14x14 resized to 7x28" in str(report)

    again = tiny(img_size=(112, 448))
    load_checkpoint(again, state(wide), grid=(7, 28))
    assert same(state(again), state(wide))
    load_checkpoint(square, state(wide), grid=(7, 28))
    torch.testing.assert_close(square.pos_embed, resize_position_table(wide.pos_embed, (7, 28), (14, 14)))


def test_a_grid_that_nothing_tells_is_refused(tmp_path):
    trained, model = tiny(seed=1, img_size=(48, 80)), tiny(img_size=(80, 48))
    refuses(model, state(trained), ValueError, r"15 positions, which is no square: pass grid=.*own are 5x3 = 15")
    refuses(model, state(trained), ValueError, "grid is 3x4 = 12, the stored table has 15 positions", grid=(3, 4))
    load_checkpoint(model, state(trained), grid=(3, 5))
    expected = resize_position_table(trained.pos_embed, (3, 5), (5, 3))
    torch.testing.assert_close(model.pos_embed, expected)
    save_checkpoint(trained, tmp_path / "m.safetensors")  # writes the size down
    other = tiny(img_size=(80, 48))
    load_checkpoint(other, tmp_path / "m.safetensors")
    torch.testing.assert_close(other.pos_embed, expected)


def test_a_vit_is_adapted_too():
    arguments = dict(embed_dim=24, depth=2, num_heads=3)
    trained, model = ViT(img_size=64, num_classes=5, **arguments), ViT(img_size=(32, 96), num_classes=2, **arguments)
    load_checkpoint(model, state(trained))
    torch.testing.assert_close(model.pos_embed, resize_position_table(trained.pos_embed, (4, 4), (2, 6)))
    assert model.pos_embed.requires_grad


class TwoHeads(T2TViT):
    """As relatives are: two prefix tokens, two heads, and a second table on a grid of its own."""

    head_names = ("head", "head_dist")
    num_prefix_tokens = 2

    @remember_arguments
    def __init__(self, img_size=64, num_classes=5):
        super().__init__(**(TINY | dict(img_size=img_size, num_classes=num_classes)))
        self.head_dist = torch.nn.Linear(24, num_classes)
        rows, columns = self.grid
        self.pos_embed = torch.nn.Parameter(torch.rand(1, 2 + rows * columns, 24))
        self.pos_half = torch.nn.Parameter(torch.rand(1, rows * columns // 4, 24))

    def position_tables(self, size=None):
        rows, columns = self.grid_of(size) if size else self.grid
        return {"pos_embed": (rows, columns), "pos_half": (rows // 2, columns // 2)}

    def resize_table(self, name, table, grid, new_grid):
        return resize_position_table(table, grid, new_grid, num_prefix_tokens=2 if name == "pos_embed" else 0)


def test_a_model_of_several_tables_and_heads():
    trained, model = TwoHeads(), TwoHeads(img_size=(64, 128), num_classes=3)
    report = load_checkpoint(model, state(trained))
    torch.testing.assert_close(model.pos_embed[:, :2], trained.pos_embed[:, :2])
    torch.testing.assert_close(model.pos_half, trained.resize_table("pos_half", trained.pos_half, (2, 2), (2, 4)))
    assert [entry.note for entry in report.adapted] == ["grid 4x4 resized to 4x8", "grid 2x2 resized to 2x4"]
    assert {entry.name.partition(".")[0] for entry in report.skipped} == {"head", "head_dist"}
    one_head = {name: entry for name, entry in state(trained).items() if "head_dist" not in name}
    report = load_checkpoint(TwoHeads(), one_head)
    assert [entry.name for entry in report.skipped] == ["head_dist.weight", "head_dist.bias"]

    wide = TwoHeads(img_size=(64, 128))  # where the file says its size, no table need be square
    refuses(TwoHeads(), state(wide), ValueError, "32 positions, which is no square")
    stored = Stored(state(wide), "wide", arguments={"img_size": (64, 128)})
    report = load_checkpoint(TwoHeads(), stored)
    assert [entry.note for entry in report.adapted] == ["grid 4x8 resized to 4x4", "grid 2x4 resized to 2x2"]


def test_another_variant_is_refused_by_name():
    source = state(create_model("t2t_vit_7", num_classes=10))
    message = refuses(
        create_model("t2t_vit_14"), source, ValueError, "does not fit this model, which was left as it was"
    )
    assert "its shapes are those of t2t_vit_7: create_model('t2t_vit_7')" in message
    assert "missing from the file: 77 entries\n  blocks.{7,8,9,10,11,12,13}.norm1.weight: 384 in the model" in message
    assert "cls_token: 1 x 1 x 256 in the file, 1 x 1 x 384 in the model" in message
    assert "head.weight: 10 x 256 in the file, 1000 x 384 in the model\n" in message
    source = state(create_model("t2t_vit_t_14", depth=2))
    refuses(
        create_model("t2t_vit_14", depth=2), source, ValueError, "not in the model: .*\n.*attn.qkv.weight: 192 x 147"
    )
    refuses(tiny(in_chans=1), state(tiny()), ValueError, "attention1.kqv.weight: 24 x 147 in the file, 24 x 49 in the")


def test_heads_that_shapes_do_not_show(tmp_path):
    """T2T-ViT-14 with 32 heads has the very shapes of T2T-ViT-14 with 6."""
    resnext, model = create_model("t2t_vit_14_resnext", depth=1), create_model("t2t_vit_14", depth=1)
    note = "num_heads=32, the model has num_heads=6"
    torch.save({"arch": "t2t_vit_14_resnext", "state_dict": state(resnext)}, tmp_path / "a.pth.tar")
    refuses(model, tmp_path / "a.pth.tar", ValueError, note)
    save_checkpoint(resnext, tmp_path / "a.safetensors")
    refuses(model, tmp_path / "a.safetensors", ValueError, note)
    assert note in str(load_checkpoint(model, tmp_path / "a.safetensors", strict=False))
    load_checkpoint(create_model("t2t_vit_14_resnext", depth=1), tmp_path / "a.pth.tar")
    save_checkpoint(tiny(qk_scale=8**-0.5), tmp_path / "b.safetensors")  # the default, spelled out
    load_checkpoint(tiny(), tmp_path / "b.safetensors")
    save_checkpoint(tiny(qk_scale=24**-0.5), tmp_path / "b.safetensors")
    refuses(tiny(), tmp_path / "b.safetensors", ValueError, "qk_scale=0.204")


def test_strict_lists_every_entry_and_lenient_reports_them(trained):
    weights = state(trained)
    del weights["norm.bias"]
    weights["mask_token"] = torch.zeros(1, 1, 24)
    weights["epoch"] = 3
    weights["blocks.0.norm1.weight"] = torch.zeros(25)
    weights["blocks.1.norm1.bias"] = torch.zeros(24, dtype=torch.int64)
    model = tiny()
    message = refuses(model, weights, ValueError, "does not fit")
    for line in (
        "missing from the file: 1 entries\n  norm.bias: 24 in the model",
        "not in the model: 2 entries\n  mask_token: 1 x 1 x 24 in the file\n  epoch: one number in the file",
        "of another shape: 1 entries\n  blocks.0.norm1.weight: 25 in the file, 24 in the model",
        "of another kind: 1 entries\n  blocks.1.norm1.bias: 24 in the file, 24 in the model; torch.int64",
    ):
        assert line in message
    before = state(model)
    report = load_checkpoint(model, weights, strict=False)
    assert [entry.name for entry in report.skipped] == [
        *("norm.bias", "mask_token", "epoch", "blocks.0.norm1.weight", "blocks.1.norm1.bias")
    ]
    assert "skipped: 5\n  norm.bias: 24 in the model; missing from the file\n" in str(report)
    for name, entry in state(model).items():
        assert torch.equal(entry, (before if name in {e.name for e in report.skipped} else weights)[name])
    refuses(model, {"a": torch.zeros(1)}, ValueError, "does not fit", strict=False)  # nothing at all to load


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda entry: entry.to(torch.complex64),
        lambda entry: entry.to_sparse(),
        lambda entry: entry.to("meta"),
        lambda entry: entry.tolist(),
    ],
)
def test_entries_that_cannot_be_copied_leave_the_model_alone(trained, spoiled):
    weights = state(trained)
    weights["norm.weight"] = spoiled(weights["norm.weight"])
    refuses(tiny(), weights, ValueError, "of another kind: 1 entries\n  norm.weight")


def test_a_model_without_memory_is_refused(trained):
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_checkpoint(model, state(trained))
