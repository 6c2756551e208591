"""What every model shares, and the forward of those with a class token (chapters 9 and 14)."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from t2t_ref.arguments import check_known, pair
from t2t_ref.models.position import is_free, resize_position_table
from t2t_ref.models.timm_methods import Adaptable


def remember_arguments(init: Callable) -> Callable:
    """Decorate an ``__init__``: what it was called with, defaults included, stays as ``self.arguments``.

    Where a class and its parent are both decorated, the arguments are those of the class that was called. All models
    take ``global_pool`` besides, which is noted only where it is another than the class's own.
    """
    signature = inspect.signature(init)
    pooling = inspect.Parameter("global_pool", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)

    @functools.wraps(init)
    def remembering(self, *args, global_pool=None, **kwargs):
        init(self, *args, **kwargs)  # first, so that a wrong argument is refused in its own words
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.arguments = dict(list(bound.arguments.items())[1:])
        self.set_global_pool(global_pool)

    remembering.__signature__ = signature.replace(parameters=[*signature.parameters.values(), pooling])
    return remembering


def init_weights(module: nn.Module) -> None:
    """Linear layers: truncated normal of standard deviation 0.02, bias 0. Layer norms start as the identity.

    Source:
        authors' code
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_size(image: Tensor, img_size: tuple[int, int], dynamic_img_size: bool) -> None:
    """Refuse an image that a model for ``img_size`` cannot take, and say what it takes.

    Raises:
        ValueError: for another number of axes; for another size, unless dynamic_img_size
    """
    if image.ndim != 4:
        raise ValueError(f"expected an image of shape (b, c, h, w), found {tuple(image.shape)}")
    h, w = image.shape[-2:]
    expected = "x".join(map(str, img_size))
    if not dynamic_img_size and (isinstance(h, torch.SymInt) or isinstance(w, torch.SymInt)):
        raise ValueError(
            f"height and width cannot be left free: this model was built for img_size={expected}; "
            "build it with dynamic_img_size=True"
        )
    if not dynamic_img_size and (h, w) != img_size:
        raise ValueError(
            f"the image is {h}x{w} pixels, this model was built for img_size={expected}; "
            "resize the image, or build the model with dynamic_img_size=True"
        )


class Classifier(Adaptable):
    """An image in, logits out: what the package asks of every model, and what it can then do with it.

    A subclass decorates its ``__init__`` with :func:`remember_arguments` and defines ``forward_features``, ``grid_of``,
    ``block_outputs`` and ``depth``. It states below what is otherwise with it than with a model of one class token, one
    position table and one head, or overrides the method that says so (``pool``, ``position_tables``, ``resize_table``).

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b d
    """

    head_names: tuple[str, ...] = ("head",)  # attributes, and so the first part of their state-dict names
    num_prefix_tokens: int = 1  # tokens that belong to no place of the image, in front of those that do
    computed: tuple[str, ...] = ()  # last parts of names that others' files have and this model computes: not loaded
    poolings: tuple[str, ...] = ("token", "avg", "")  # what global_pool may be
    global_pool: str = "token"  # what the head sees: the first token, the mean of those of places, or all ("")
    door_notes: dict[str, str] = {}  # for shape_table: what has happened to a tensor on its way into a child
    arguments: dict  # those it was built with, defaults included: save_checkpoint writes them down
    num_features: int  # width of the tokens after the last block
    depth: int  # how many blocks ``block_outputs`` goes through

    def __init__(self, img_size: int | tuple[int, int], num_classes: int, dynamic_img_size: bool = False):
        super().__init__()
        self.img_size = pair(img_size)
        self.num_classes = num_classes
        self.dynamic_img_size = dynamic_img_size

    # ---- the way of an image

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"] | Float[Tensor, "b n classes"]:
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to tokens after the last norm.

        Shapes:
            image: ``b c h w``
            return: ``b n d``, n counts the prefix tokens, which come first
        """
        raise NotImplementedError

    def pool(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """The class feature, by which the head decides: the first token, or what ``global_pool`` says.

        Shapes:
            features: ``b n d``
            return: ``b d``
        """
        if self.global_pool == "token":
            return features[:, 0]
        return reduce(features[:, self.num_prefix_tokens :], "b n d -> b d", "mean")

    def forward_head(
        self, features: Float[Tensor, "b n d"], pre_logits: bool = False
    ) -> Float[Tensor, "b classes"] | Float[Tensor, "b n classes"]:
        """Tokens after the last norm to logits.

        Shapes:
            features: ``b n d``
            return: b classes; the class feature, b d, if num_classes is 0 or with pre_logits. Where global_pool is "",
                that of every token
        """
        seen = self.pool(features) if self.global_pool else features
        return seen if pre_logits else self.head(seen)

    def check_image(self, image: Float[Tensor, "b c h w"]) -> None:
        """Refuse an image that this model cannot take, and say what it takes.

        Raises:
            ValueError: for another number of axes; for a size other than img_size, unless dynamic_img_size
        """
        check_size(image, self.img_size, self.dynamic_img_size)

    # ---- grids and tables of positions

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens that an image of (h, w) pixels ends as, prefix tokens not counted."""
        raise NotImplementedError

    def position_tables(self, size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """The tables that depend on the size of the image: state-dict name and (rows, columns).

        Rows of a table beyond rows * columns belong to prefix tokens. With ``size``, (h, w) in pixels, the grids are
        those of a model built for such images, else those of this model.
        """
        return {}

    def resize_table(self, name: str, table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
        """A stored table of positions, fitted to another grid as this model wants it.

        Raises:
            ValueError: if ``grid`` does not fit the table
        """
        return resize_position_table(table, grid, new_grid, num_prefix_tokens=self.num_prefix_tokens)

    # ---- heads

    def make_head(self) -> nn.Module:
        """A layer from the class feature to logits, or the identity if num_classes is 0; where the last weights are."""
        last = list(self.parameters())[-1]
        if self.num_classes > 0:
            return nn.Linear(self.num_features, self.num_classes, device=last.device, dtype=last.dtype)
        return nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The last layer: linear from d to classes, or the identity if num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh head for ``num_classes`` classes in place of every old one; 0 takes the head away.

        It comes on the device and in the dtype of the last layer, with weights as at the start of training.

        Args:
            global_pool: what the head shall see from now on, as :meth:`set_global_pool`
        """
        self.set_global_pool(global_pool)
        self.num_classes = num_classes
        for name in self.head_names:
            head = self.make_head()
            head.apply(init_weights)
            setattr(self, name, head.train(self.training))

    def set_global_pool(self, global_pool: str | None) -> None:
        """Choose what the head sees: "token", "avg" for the mean, "" for all tokens. None leaves it as it is.

        Raises:
            ValueError: for one that this model cannot have
        """
        if global_pool is not None:
            check_known(f"global_pool of {type(self).__name__}", global_pool, self.poolings)
            self.global_pool = global_pool

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside biases and norms."""
        return set()

    # ---- looking inside

    def finish(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """What turns the tokens of the last block into features: here the last norm."""
        return self.norm(tokens)

    def block_outputs(
        self, image: Float[Tensor, "b c h w"]
    ) -> Iterator[tuple[Float[Tensor, "b n d"], tuple[int, int]]]:
        """The tokens after each block in turn, prefix tokens first, and their grid, (rows, columns)."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        image: Float[Tensor, "b c h w"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list | tuple[Tensor, list] | dict[str, Tensor | list]:
        """The tokens after chosen blocks, as timm's models give them.

        Shapes:
            image: ``b c h w``
            return: ``(features, intermediates)``, features b n d after the last norm; one intermediate a block, as an
                image b d rows columns, or as tokens b n d without prefix tokens for output_fmt="NLC". With
                return_prefix_tokens each is (intermediate, prefix tokens b p d). With intermediates_only, the list
                alone.

        Args:
            indices: counts blocks from 0, or from the end if negative; an int n means the last n; None means all
            norm: apply the last norm to each
            stop_early: skip the blocks after the last one asked for; the features are then those of that block
            output_dict: return {"image_features": ..., "image_intermediates": [...]}, with the prefix tokens, where
                asked for, as a list of their own, "image_intermediates_prefix"

        Raises:
            ValueError: for an index that is not there, an unknown output_fmt, norm=True where a block is not as wide as
                the last norm (dense design)
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        wanted, intermediates = set(self.block_numbers(indices)), []
        for index, (tokens, (rows, columns)) in enumerate(self.block_outputs(image)):
            if index in wanted:
                if norm and tokens.shape[-1] != self.num_features:
                    raise ValueError(
                        f"the last norm is for {self.num_features} channels, block {index} puts out "
                        f"{tokens.shape[-1]}: pass norm=False, or indices of the last block alone"
                    )
                seen, num_prefix_tokens = self.norm(tokens) if norm else tokens, tokens.shape[1] - rows * columns
                prefix, seen = seen[:, :num_prefix_tokens], seen[:, num_prefix_tokens:]
                if output_fmt == "NCHW":
                    seen = rearrange(seen, "b (h w) d -> b d h w", h=rows)
                intermediates.append((seen, prefix) if return_prefix_tokens else seen)
            if stop_early and index == max(wanted):
                break
        if not output_dict:
            return intermediates if intermediates_only else (self.finish(tokens), intermediates)
        found = {"image_intermediates": intermediates}
        if return_prefix_tokens:
            found["image_intermediates"], found["image_intermediates_prefix"] = map(
                list, zip(*intermediates, strict=True)
            )
        return found if intermediates_only else found | {"image_features": self.finish(tokens)}

    def block_numbers(self, indices: int | Sequence[int] | None = None) -> list[int]:
        """The blocks that ``forward_intermediates`` understands by these indices, counted from 0.

        Raises:
            ValueError: for one that is not there
        """
        depth = self.depth
        if isinstance(indices, int):
            indices = range(depth - indices, depth)
        wanted = list(range(depth) if indices is None else indices)
        if any(not -depth <= index < depth for index in wanted) or not wanted:
            raise ValueError(f"indices {wanted} are not all blocks of this model, which has blocks 0 to {depth - 1}")
        return [index % depth for index in wanted]


class TokenClassifier(Classifier):
    """Tokens of one width, a class token in front, a position table, blocks, a norm: T2TViT, ViT and their like.

    A subclass makes ``cls_token``, ``pos_embed``, ``pos_drop``, ``blocks``, ``norm`` and ``head``, sets ``grid``, and
    defines ``tokens`` and ``grid_of``. The way of an image through all of them is here.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; with num_classes=0 the class feature, b d
    """

    door_notes = {"pos_drop": "class token, positions", "head": "class token alone"}
    grid: tuple[int, int]  # of the tokens, at img_size
    embed_dim: int  # width of the tokens before the first block

    def tokens(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to tokens, one for each place of the grid.

        Shapes:
            image: ``b c h w``
            return: ``b n d``
        """
        raise NotImplementedError

    def prefix_tokens(self) -> Float[Tensor, "1 p d"]:
        """The learned tokens that stand in front: here the class token alone."""
        return self.cls_token

    def position_table(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "1 n d"]:
        """The position table for the grid of this image: the trained one, resized if the image is not of img_size.

        Shapes:
            image: ``b c h w``
            return: ``1 n d``, n counts the class token, which is row 0
        """
        size = (image.shape[-2], image.shape[-1])
        if not self.dynamic_img_size or (not is_free(size) and size == self.img_size):
            return self.pos_embed
        return self.resize_table("pos_embed", self.pos_embed, self.grid, self.grid_of(size))

    def embed(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to the tokens that enter the first block.

        Shapes:
            image: ``b c h w``
            return: ``b n d``, n counts the class token, which is row 0
        """
        self.check_image(image)
        tokens = self.tokens(image)
        prefix = repeat(self.prefix_tokens(), "1 p d -> b p d", b=tokens.shape[0])
        tokens = torch.cat([prefix, tokens], dim=1)
        return self.pos_drop(tokens + self.position_table(image))

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Image to tokens after the last norm.

        Shapes:
            image: ``b c h w``
            return: ``b n d``, n counts the class token, which is row 0
        """
        tokens = self.embed(image)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def block_outputs(
        self, image: Float[Tensor, "b c h w"]
    ) -> Iterator[tuple[Float[Tensor, "b n d"], tuple[int, int]]]:
        """The tokens after each block in turn, prefix tokens first, and their grid, (rows, columns)."""
        tokens, grid = self.embed(image), self.grid_of((image.shape[-2], image.shape[-1]))
        for block in self.blocks:
            tokens = block(tokens)
            yield tokens, grid

    @property
    def depth(self) -> int:
        """How many blocks there are. Transitions count (dense design)."""
        return len(self.blocks)

    def make_blocks(self, block: Callable[..., nn.Module], depth: int, drop_path_rate: float) -> nn.ModuleList:
        """``depth`` blocks, with rates of drop path that climb from 0 to ``drop_path_rate``.

        ``block`` makes one, given its width and its rate. A design with other blocks at other places overrides this.
        """
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        return nn.ModuleList(block(self.embed_dim, drop_path_rate=rate) for rate in rates)

    def position_tables(self, size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """The one table, ``pos_embed``, and its (rows, columns): at this model's size, or at another."""
        return {"pos_embed": self.grid if size is None else self.grid_of(size)}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, beside biases and norms."""
        return {"cls_token", "pos_embed"} & self._parameters.keys()  # a fixed table is no parameter
