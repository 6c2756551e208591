"""DeiT: a teacher's answer reaches the student through a token of its own (chapter 18; Touvron et al. 2021)."""

from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from t2t_ref.arguments import check_known
from t2t_ref.models.classifier import init_weights
from t2t_ref.models.vit import ViT

Logits = Float[Tensor, "b classes"]
Pair = tuple[Logits, Logits]  # of the class head, of the distillation head


class DistilledViT(ViT):
    """ViT with a second learned token, the distillation token, and a second head on it. Arguments as :class:`ViT`.

    In training it returns the logits of both heads, (b classes, b classes), for :func:`distillation_loss`. In eval mode
    it returns their mean.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, or two of them; with num_classes=0 features, b d, in place of logits

    Raises:
        ValueError: as :class:`ViT`

    Source:
        paper, Sec. 4; ``DistilledVisionTransformer`` of the authors' code, with the same state-dict names. The paper
        adds the two softmaxes, the released code averages logits, and so do we
    """

    door_notes = ViT.door_notes | {"pos_drop": "both tokens, positions", "head_dist": "distillation token alone"}
    head_names = ("head", "head_dist")
    num_prefix_tokens = 2
    poolings = ("token",)

    @wraps(ViT.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dist_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, self.embed_dim), std=0.02))
        self.head_dist = self.make_head()
        init_weights(self.head_dist)

    def prefix_tokens(self) -> Float[Tensor, "1 p d"]:
        """The learned tokens in front: class token, distillation token. The paper's figure has that last."""
        return torch.cat([self.cls_token, self.dist_token], dim=1)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Logits | Pair:
        return self.forward_head(self.forward_features(image))

    def forward_head(self, features: Float[Tensor, "b n d"], pre_logits: bool = False) -> Logits | Pair:
        """Tokens after the last norm to logits: of both heads while training, their mean in eval mode.

        Shapes:
            features: ``b n d``
            return: b classes, or two of them; with pre_logits the mean of what enters the heads, b d
        """
        if pre_logits:
            return (features[:, 0] + features[:, 1]) / 2
        class_logits = self.head(features[:, 0])
        teacher_logits = self.head_dist(features[:, 1])
        if self.training:
            return class_logits, teacher_logits
        return (class_logits + teacher_logits) / 2

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The two last layers: of the class token, of the distillation token."""
        return self.head, self.head_dist

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone. The authors' code forgets ``dist_token``."""
        return super().no_weight_decay() | {"dist_token"}


def distillation_loss(
    logits: Logits,
    distillation_logits: Logits,
    labels: Int[Tensor, " b"] | Logits,
    teacher_logits: Logits,
    *,
    distillation_type: str = "none",
    alpha: float = 0.5,
    tau: float = 1.0,
) -> Float[Tensor, ""]:
    """The class head against the labels, and the distillation head against a teacher.

    ``"hard"`` takes the teacher's first choice for a label. ``"soft"`` is the Kullback-Leibler divergence of the two
    softmaxes at temperature tau, times tau squared, divided by the number of logits: a factor of 1 / classes below the
    paper's formula, as in the authors' code. ``"none"`` leaves the teacher out. No gradient reaches the teacher.

    Shapes:
        logits, distillation_logits, teacher_logits: ``b classes``
        labels: whole numbers b, or shares of each class b classes
        return: one number

    Args:
        alpha: the share of the distillation, from 0 to 1

    Raises:
        ValueError: for an unknown distillation_type

    Source:
        paper, Sec. 4; ``DistillationLoss`` of the authors' code
    """
    check_known("distillation_type", distillation_type, ("none", "soft", "hard"))
    loss = F.cross_entropy(logits, labels)
    if distillation_type == "none":
        return loss
    teacher_logits = teacher_logits.detach()
    if distillation_type == "hard":
        choice = teacher_logits.argmax(dim=-1)
        lesson = F.cross_entropy(distillation_logits, choice)
    else:
        both = (distillation_logits, teacher_logits)
        student, teacher = ((x / tau).log_softmax(dim=-1) for x in both)
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        lesson = divergence * tau**2 / distillation_logits.numel()
    return (1 - alpha) * loss + alpha * lesson


@dataclass(frozen=True)
class DeiTVariant:
    """The sizes that tell one DeiT from another: arguments of its class, ``model``."""

    embed_dim: int
    num_heads: int
    depth: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    img_size: int = 224
    model: type[ViT] = ViT


VARIANTS = {  # paper, Table 1
    "deit_tiny_patch16_224": DeiTVariant(embed_dim=192, num_heads=3),
    "deit_small_patch16_224": DeiTVariant(embed_dim=384, num_heads=6),
    "deit_base_patch16_224": DeiTVariant(embed_dim=768, num_heads=12),
    "deit_base_patch16_384": DeiTVariant(embed_dim=768, num_heads=12, img_size=384),
    "deit_tiny_distilled_patch16_224": DeiTVariant(embed_dim=192, num_heads=3, model=DistilledViT),
    "deit_small_distilled_patch16_224": DeiTVariant(embed_dim=384, num_heads=6, model=DistilledViT),
    "deit_base_distilled_patch16_224": DeiTVariant(embed_dim=768, num_heads=12, model=DistilledViT),
    "deit_base_distilled_patch16_384": DeiTVariant(embed_dim=768, num_heads=12, img_size=384, model=DistilledViT),
}
