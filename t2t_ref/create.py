"""One table of variants, and the two functions that read it (chapter 9; paper, Tables 1, 6 and 7)."""

from dataclasses import asdict, dataclass

from t2t_ref.arguments import check_known
from t2t_ref.models.cnn_designs import DenseT2TViT, DenseViT, GhostT2TViT, GhostViT, SET2TViT, SEViT
from t2t_ref.models.t2t_vit import T2TViT
from t2t_ref.models.vit import ViT


@dataclass(frozen=True)
class Variant:
    """The sizes that tell one T2T-ViT from another. Field names are arguments of :class:`T2TViT`."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    tokens_type: str = "performer"


@dataclass(frozen=True)
class ViTVariant:
    """The same for plain vision transformers. Field names are arguments of :class:`ViT`."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool = True


@dataclass(frozen=True)
class DenseVariant:
    """The same for the dense design. Field names are arguments of :class:`DenseT2TViT`."""

    embed_dim: int
    depths: tuple[int, ...]
    growth_rate: int
    num_heads: int
    mlp_ratio: float
    tokens_type: str = "performer"


@dataclass(frozen=True)
class DenseViTVariant:
    """The same for plain vision transformers of the dense design: arguments of :class:`DenseViT`."""

    embed_dim: int
    depths: tuple[int, ...]
    growth_rate: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool = False


VARIANTS: dict[str, Variant | ViTVariant | DenseVariant | DenseViTVariant] = {
    # paper, Table 1 and Table 4; the paper prints depth 8 for T2T-ViT-7, code and weights have 7
    "t2t_vit_7": Variant(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_10": Variant(embed_dim=256, depth=10, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_12": Variant(embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_14": Variant(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0),
    "t2t_vit_19": Variant(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0),
    "t2t_vit_24": Variant(embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0),
    # exact attention in the T2T layers: the paper's T2T-ViT_t
    "t2t_vit_t_14": Variant(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, tokens_type="transformer"),
    "t2t_vit_t_19": Variant(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0, tokens_type="transformer"),
    "t2t_vit_t_24": Variant(embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0, tokens_type="transformer"),
    # three convolutions instead of the T2T module: T2T-ViT_c of Table 7; the name is ours
    "t2t_vit_c_14": Variant(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, tokens_type="convolution"),
    # Table 6: more heads; shallow and wide (depth 4 by its parameter count, where the table prints 14)
    "t2t_vit_14_resnext": Variant(embed_dim=384, depth=14, num_heads=32, mlp_ratio=3.0),
    "t2t_vit_14_wide": Variant(embed_dim=768, depth=4, num_heads=12, mlp_ratio=3.0),
    # Table 6: squeeze-and-excitation, dense, ghost (16 blocks in the authors' code, where the table prints 14)
    "t2t_vit_14_se": Variant(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0),
    "t2t_vit_dense": DenseVariant(embed_dim=128, depths=(3, 6, 6, 4), growth_rate=64, num_heads=8, mlp_ratio=2.0),
    "t2t_vit_16_ghost": Variant(embed_dim=384, depth=16, num_heads=6, mlp_ratio=3.0),
    # the ViTs of Tables 1 and 2; the paper prints width 786 for ViT-S/16, its parameter count is that of 768
    "vit_small_patch16": ViTVariant(embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False),
    "vit_base_patch16": ViTVariant(embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0),
    "vit_large_patch16": ViTVariant(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0),
    "deit_small_patch16": ViTVariant(embed_dim=384, depth=12, num_heads=6, mlp_ratio=4.0),
    # Table 6 on the side of ViT: the authors left no code, the names are ours. Deep-narrow, shallow-wide, SE, ResNeXt
    # and ghost are ViT-S/16 with what the table prints; the MLP ratio of shallow-wide is the simple one next to its
    # parameter count, and so are stages, growth and MLP ratio of dense (chapter 13)
    "vit_small_patch16_dn": ViTVariant(embed_dim=384, depth=16, num_heads=6, mlp_ratio=3.0, qkv_bias=False),
    "vit_small_patch16_sw": ViTVariant(embed_dim=1024, depth=4, num_heads=16, mlp_ratio=3.5, qkv_bias=False),
    "vit_small_patch16_dense": DenseViTVariant(
        embed_dim=128, depths=(6, 7, 6), growth_rate=64, num_heads=8, mlp_ratio=4.0
    ),
    "vit_small_patch16_se": ViTVariant(embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False),
    "vit_small_patch16_resnext": ViTVariant(embed_dim=768, depth=8, num_heads=32, mlp_ratio=3.0, qkv_bias=False),
    "vit_small_patch16_ghost": ViTVariant(embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0, qkv_bias=False),
}

# blocks of another design (chapter 13); the other models are T2TViT or ViT
DESIGNS = {
    "t2t_vit_14_se": SET2TViT,
    "t2t_vit_dense": DenseT2TViT,
    "t2t_vit_16_ghost": GhostT2TViT,
    "vit_small_patch16_dense": DenseViT,
    "vit_small_patch16_se": SEViT,
    "vit_small_patch16_ghost": GhostViT,
}


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return list(VARIANTS)


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    qk_scale: float | None = None,
    dynamic_img_size: bool = False,
    **overrides,
) -> T2TViT | ViT:
    """Build a variant by name, with fresh weights or with the released ones.

    With ``pretrained=True`` the file of :func:`released_weights` is downloaded once, into torch.hub's cache, and read
    by :func:`load_checkpoint`: with another number of classes the head stays fresh, for another image size the
    position table is resized. For t2t_vit_14 at 384 pixels it is the file trained at 384.

    Units:   ``overrides`` are further arguments of :class:`T2TViT` or :class:`ViT`, such as depth
    Raises:  ValueError for an unknown name, with the nearest ones; TypeError for an argument that the model does not
             have; with pretrained=True, ValueError for a variant without released weights and for arguments that they
             do not fit, ConnectionError without a network, which says where to put the file
    Source:  names are the authors'
    """
    check_known("model", name, list_models())
    if pretrained:
        # not at the top: that module reads VARIANTS
        from t2t_ref.weights.loading import load_checkpoint
        from t2t_ref.weights.released import released_file

        released = released_file(name, img_size)
        # these two change the function and no shape, so that load_checkpoint could not notice
        if qk_scale is not None or overrides.get("num_heads", VARIANTS[name].num_heads) != VARIANTS[name].num_heads:
            raise ValueError(
                f"the released weights of {name!r} need qk_scale=None, which is head_dim ** -0.5, and "
                f"num_heads={VARIANTS[name].num_heads}; found qk_scale={qk_scale}, "
                f"num_heads={overrides.get('num_heads', VARIANTS[name].num_heads)}"
            )
    arguments = asdict(VARIANTS[name]) | dict(
        num_classes=num_classes,
        img_size=img_size,
        in_chans=in_chans,
        drop_rate=drop_rate,
        attn_drop_rate=attn_drop_rate,
        drop_path_rate=drop_path_rate,
        qk_scale=qk_scale,
        dynamic_img_size=dynamic_img_size,
    )
    model_class = DESIGNS.get(name, ViT if isinstance(VARIANTS[name], ViTVariant) else T2TViT)
    model = model_class(**(arguments | overrides))
    if pretrained:
        load_checkpoint(model, released.url)
    return model
