"""What T2TViT and ViT share: a class token, blocks, a norm, a head, timm's methods (chapters 9 and 14)."""

import inspect
from collections.abc import Sequence
from contextlib import suppress

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.models.position import resize_position_table


def init_weights(module: nn.Module) -> None:
    """Linear layers: truncated normal of standard deviation 0.02, bias 0. Layer norms start as the identity.

    Source:  authors' code
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TokenClassifier(nn.Module):
    """A model that turns an image into tokens, the class token first, and classifies by the class token.

    A subclass makes ``cls_token``, ``pos_embed``, ``blocks``, ``norm`` and ``head``, sets the attributes below, and
    defines ``forward_features`` (image to tokens after the last norm), ``embed`` (image to the tokens that enter the
    first block) and ``token_grid`` ((h, w) to (rows, columns)).

    Shapes:  image   b c h w
             return  b classes    logits; with num_classes=0 the class feature, b d
    """

    img_size: tuple[int, int]
    grid: tuple[int, int]  # of the tokens, at img_size
    dynamic_img_size: bool
    embed_dim: int
    num_features: int  # width after the last block: embed_dim, but in a design that grows
    num_classes: int
    arguments: dict  # those it was built with, defaults included: save_checkpoint writes them down

    def __new__(cls, *args, **kwargs):
        model = super().__new__(cls)
        with suppress(TypeError):  # a wrong argument: __init__ says so, in its own words
            bound = inspect.signature(cls.__init__).bind(model, *args, **kwargs)
            bound.apply_defaults()
            model.arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        return model

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.forward_head(self.forward_features(image))

    def forward_head(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b classes"]:
        """Tokens after the last norm to logits, by the class token alone.

        Shapes:  features  b n d
                 return    b classes    the class feature, b d, if num_classes is 0
        """
        return self.head(features[:, 0])

    def forward_intermediates(
        self,
        image: Float[Tensor, "b c h w"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """The tokens after chosen blocks, as timm's models give them.

        Shapes:  image   b c h w
                 return  (features, intermediates)    features b n d after the last norm; one intermediate a block, as
                         an image b d rows columns, or as tokens b n d without the class token for output_fmt="NLC".
                         With return_prefix_tokens each is (intermediate, class token b 1 d). With intermediates_only,
                         the list alone.
        Units:   indices counts blocks from 0, or from the end if negative; an int n means the last n; None means all.
                 norm applies the last norm to each; stop_early skips the blocks after the last one asked for, so it
                 needs intermediates_only.
        Raises:  ValueError for an index that is not there, an unknown output_fmt, stop_early without
                 intermediates_only, norm=True where a block is not as wide as the last norm (dense design)
        """
        depth = len(self.blocks)
        if isinstance(indices, int):
            indices = range(depth - indices, depth)
        wanted = list(range(depth) if indices is None else indices)
        if any(not -depth <= index < depth for index in wanted) or not wanted:
            raise ValueError(f"indices {wanted} are not all blocks of this model, which has blocks 0 to {depth - 1}")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        if stop_early and not intermediates_only:
            raise ValueError("stop_early leaves no final features: pass intermediates_only=True with it")

        wanted = {index % depth for index in wanted}
        rows, _ = self.token_grid((image.shape[-2], image.shape[-1]))
        tokens, intermediates = self.embed(image), []
        for index, block in enumerate(self.blocks):
            if stop_early and index > max(wanted):
                break
            tokens = block(tokens)
            if index in wanted:
                if norm and tokens.shape[-1] != self.num_features:
                    raise ValueError(
                        f"the last norm is for {self.num_features} channels, block {index} puts out "
                        f"{tokens.shape[-1]}: pass norm=False, or indices of the last block alone"
                    )
                seen = self.norm(tokens) if norm else tokens
                prefix, seen = seen[:, :1], seen[:, 1:]
                if output_fmt == "NCHW":
                    seen = rearrange(seen, "b (h w) d -> b d h w", h=rows)
                intermediates.append((seen, prefix) if return_prefix_tokens else seen)
        return intermediates if intermediates_only else (self.norm(tokens), intermediates)

    def get_classifier(self) -> nn.Module:
        """The last layer: linear from d to classes, or the identity if num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh head for ``num_classes`` classes in place of the old one; 0 takes the head away.

        It comes on the device and in the dtype of the last norm, with weights as at the start of training.
        """
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            weight = self.norm.weight
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            init_weights(self.head)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside biases and norms."""
        return {"cls_token", "pos_embed"}

    def check_image(self, image: Float[Tensor, "b c h w"]) -> None:
        """Refuse an image that this model cannot take, and say what it takes.

        Raises:  ValueError for another number of axes; for a size other than img_size, unless dynamic_img_size
        """
        if image.ndim != 4:
            raise ValueError(f"expected an image of shape (b, c, h, w), found {tuple(image.shape)}")
        h, w = image.shape[-2:]
        if (h, w) != self.img_size and not self.dynamic_img_size:
            expected = "x".join(map(str, self.img_size))
            raise ValueError(
                f"the image is {h}x{w} pixels, this model was built for img_size={expected}; "
                "resize the image, or build the model with dynamic_img_size=True"
            )

    def position_table(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "1 n d"]:
        """The position table for the grid of this image: the trained one, resized if the image is not of img_size.

        Shapes:  image   b c h w
                 return  1 n d     n counts the class token, which is row 0
        """
        grid = self.token_grid((image.shape[-2], image.shape[-1]))
        return resize_position_table(self.pos_embed, self.grid, grid)

    @classmethod
    def from_pretrained(cls, source, **options) -> "TokenClassifier":
        """A model from the Hugging Face hub ("owner/name"), or from a folder that :meth:`save_pretrained` wrote.

        ``options`` are those of huggingface_hub's mixin (revision, token, ...) and arguments of the model that shall
        differ, such as num_classes.

        Raises:  ValueError if a model of another class is there; ImportError, with the remedy, without huggingface_hub
        """
        from t2t_ref.weights.loading import hub_form

        model = hub_form().from_pretrained(source, **options)
        if not isinstance(model, cls):
            raise ValueError(f"{source} holds a {type(model).__name__}, expected a {cls.__name__}")
        return model

    def save_pretrained(self, folder, **options) -> None:
        """Write model.safetensors, config.json and a model card into a folder, as huggingface_hub's mixin does."""
        from t2t_ref.weights.loading import arguments_of, hub_form

        hub_form()(self).save_pretrained(folder, config=arguments_of(self), **options)

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Upload what :meth:`save_pretrained` writes, by huggingface_hub's mixin and with its options. The address."""
        from t2t_ref.weights.loading import arguments_of, hub_form

        return hub_form()(self).push_to_hub(repo_id, config=arguments_of(self), **options)
