"""The stages of the pyramids as maps, beside those of timm's models with the same weights."""

import pytest
import torch
from test_goldens import fill, noise
from with_timm import import_timm

from t2t_ref.models.relatives import pvt_v2, swin

timm = import_timm()

SIZE = (64, 96)
SWIN = dict(
    patch_size=2, window_size=4, embed_dim=12, depths=(2, 2, 2), num_heads=(2, 3, 4), mlp_ratio=2.0, num_classes=10
)
PVT = dict(
    embed_dims=(8, 16, 24, 32),
    num_heads=(1, 2, 3, 4),
    mlp_ratios=(2, 2, 2, 2),
    qkv_bias=True,
    depths=(1, 2, 1, 1),
    num_classes=10,
)


def swin_name(name):
    """timm's name of a weight: the merging stands at the start of the stage that it leads to."""
    if ".downsample." in name:
        _, stage, rest = name.split(".", 2)
        return f"layers.{int(stage) + 1}.{rest}"
    return name.replace("head.", "head.fc.")


def pvt_name(name):
    """timm's name of a weight: an embedding but the first, blocks and a norm make a stage."""
    first, _, rest = name.partition(".")
    number = int(first[-1]) - 1 if first[-1].isdigit() else None
    stage = f"stages.{number}"
    rest = rest.replace("dwconv.dwconv", "dwconv")
    if first.startswith("patch_embed"):
        return f"{stage}.downsample.{rest}" if number else f"patch_embed.{rest}"
    kinds = {"block": f"{stage}.blocks", "norm": f"{stage}.norm"}
    return f"{kinds.get(first.rstrip('1234'), first)}.{rest}"


def swins():
    """Of a size where every grid is larger than the window: timm moves one of 4 x 8 sideways, the authors do not."""
    theirs = timm.models.swin_transformer.SwinTransformer(img_size=SIZE, **SWIN)
    return swin.Swin(img_size=SIZE, **SWIN), theirs, swin_name


def pvts(linear):
    theirs = timm.models.pvt_v2.PyramidVisionTransformerV2(linear=linear, **PVT)
    return pvt_v2.PVTv2(img_size=SIZE, linear=linear, **PVT), theirs, pvt_name


@pytest.mark.parametrize("pair", [swins, lambda: pvts(False), lambda: pvts(True)], ids=["swin", "pvt_v2", "pvt_v2_li"])
def test_maps_are_timms(pair):
    ours, theirs, name_of = pair()
    fill(ours)
    renamed = {name_of(name): tensor for name, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.double().eval().load_state_dict(renamed, strict=False)
    assert not unexpected and all("relative_position_index" in name or "attn_mask" in name for name in missing)

    image = noise(2, 3, *SIZE, seed=0)
    with torch.no_grad():
        maps = ours.forward_intermediates(image, intermediates_only=True)
        expected = theirs.forward_intermediates(image, intermediates_only=True)
        torch.testing.assert_close(ours(image), theirs(image), atol=1e-9, rtol=0)
    assert len(maps) == len(expected) == ours.depth
    for stage, (one, other) in enumerate(zip(maps, expected, strict=True)):
        assert one.shape == other.shape, stage
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)

    last = ours.forward_intermediates(image, 1, intermediates_only=True)
    torch.testing.assert_close(last[0], maps[-1])
    (early,) = ours.forward_intermediates(image, [1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, maps[1])
