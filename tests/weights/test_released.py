"""The authors' files: the table, and create_model(pretrained=True)."""

import urllib.error

import pytest
import torch
from small import same, state

from t2t_ref import create_model, list_models, released_weights, resize_position_table


def test_the_table_of_released_files():
    table = released_weights()
    text, page = str(table), table._repr_html_()
    assert repr(table) == text and len(table) == 15 and len(text.splitlines()) == 17
    for row in table:
        assert row.url == f"https://github.com/yitu-opensource/T2T-ViT/releases/download/main/{row.file}"
        assert row.file in text and f'<a href="{row.url}">{row.file}</a>' in page
        assert row.model in list_models() and str(row.top1) in row.file
        assert row.measured is None or abs(row.measured[0] - row.top1) < 0.06 < row.measured[1] - row.measured[0]
    assert "t2t_vit_14    ImageNet   224     81.5_T2T_ViT_14.pth.tar        81.5   81.50 / 95.67   86,212,823" in text
    assert sum(row.in_create_model for row in table) == 10
    fourteen = next(row for row in table if row.size)
    with torch.device("meta"):
        tensors = sum(4 * entry.numel() for entry in create_model(fourteen.model).state_dict().values())
    assert 0 < fourteen.size - tensors < 50_000  # one copy in float32, and little else


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub's, and no network: torch.hub's urlopen serves what ``pages`` holds."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: (_ for _ in ()).throw(urllib.error.URLError("no route")))
    return tmp_path / "hub" / "checkpoints"


def test_pretrained_takes_the_released_file_from_the_cache(hub):
    trained = create_model("t2t_vit_7")
    hub.mkdir(parents=True)
    torch.save({"state_dict_ema": trained.state_dict()}, hub / "71.7_T2T_ViT_7.pth.tar")
    assert same(state(create_model("t2t_vit_7", pretrained=True)), state(trained))
    model = create_model("t2t_vit_7", pretrained=True, num_classes=10, img_size=(64, 96), drop_path_rate=0.1)
    assert torch.equal(model.blocks[3].attn.qkv.weight, trained.blocks[3].attn.qkv.weight)
    torch.testing.assert_close(model.pos_embed, resize_position_table(trained.pos_embed, (14, 14), (4, 6)))
    assert {block.attn.scale for block in model.blocks} == {64**-0.5}
    for wrong, match in (
        (dict(qk_scale=256**-0.5), "need qk_scale=None.*num_heads=4; found qk_scale=0.0625"),
        (dict(num_heads=8), "found qk_scale=None, num_heads=8"),
        (dict(in_chans=1), "24 x 147|192 x 147 in the file"),
        (dict(depth=3), r"not in the model: 44 entries\n  blocks.\{3,4,5,6\}"),
    ):
        with pytest.raises(ValueError, match=match):
            create_model("t2t_vit_7", pretrained=True, **wrong)
    (hub / "71.7_T2T_ViT_7.pth.tar").write_bytes(b"half")
    with pytest.raises(ValueError, match="in torch.hub's cache: delete it to download it again"):
        create_model("t2t_vit_7", pretrained=True)


def test_pretrained_at_384_pixels_has_a_file_of_its_own(hub):
    for img_size, file in (
        (384, "83.3_"),
        ((384, 384), "83.3_"),
        (224, "81.5_"),
        (448, "81.5_"),
        ((384, 224), "81.5_"),
    ):
        with pytest.raises(ConnectionError, match=f"{file}T2T_ViT_14.pth.tar"):
            create_model("t2t_vit_14", pretrained=True, img_size=img_size, depth=1)


@pytest.mark.parametrize("name", ["t2t_vit_c_14", "t2t_vit_14_wide", "vit_base_patch16"])
def test_pretrained_without_released_weights(name):
    with pytest.raises(ValueError, match=f"no weights for '{name}'; there are some for t2t_vit_7, .*, t2t_vit_t_24$"):
        create_model(name, pretrained=True)
