"""The files of weights that the authors published (chapter 14)."""

import html
from dataclasses import dataclass

from t2t_ref.arguments import pair
from t2t_ref.inspection.tables import Table

RELEASE = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"


@dataclass(frozen=True)
class ReleasedFile:
    """One published file: the model it belongs to, how good that is, and where the file lies.

    Units:
        top1 and measured are per cent, pixels is the side of the image, size is bytes

    Note:
        top1 is as the authors print it; measured is (top-1, top-5) as somebody else measured them with this very file;
        size is None where nobody has written it down
    """

    model: str
    file: str
    top1: float
    measured: tuple[float, float] | None = None
    pixels: int = 224
    data: str = "ImageNet"
    size: int | None = None
    in_create_model: bool = True

    @property
    def url(self) -> str:
        """Where the file can be downloaded."""
        return RELEASE + self.file

    @property
    def cfg(self) -> dict:
        """The same in the words of timm's ``pretrained_cfg``: where it lies, whose it is, what images it wants."""
        found = f", {self.measured[0]:.2f} measured again" if self.measured else ""
        return dict(
            url=self.url,
            input_size=(3, self.pixels, self.pixels),
            crop_pct=0.9 if self.pixels == 224 else 1.0,  # as they were measured again
            license="bsd-3-clause-clear",  # of the authors' repository, The Clear BSD License
            description=f"trained by the authors on {self.data}: top-1 {self.top1}{found}",
            origin_url="https://github.com/yitu-opensource/T2T-ViT",
            paper_name="Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet",
            paper_ids="arXiv:2101.11986",
        )


RELEASED = (
    ReleasedFile("t2t_vit_7", "71.7_T2T_ViT_7.pth.tar", 71.7, (71.676, 90.886)),
    ReleasedFile("t2t_vit_10", "75.2_T2T_ViT_10.pth.tar", 75.2, (75.150, 92.806)),
    ReleasedFile("t2t_vit_12", "76.5_T2T_ViT_12.pth.tar", 76.5, (76.480, 93.484)),
    ReleasedFile("t2t_vit_14", "81.5_T2T_ViT_14.pth.tar", 81.5, (81.500, 95.666), size=86_212_823),
    ReleasedFile("t2t_vit_19", "81.9_T2T_ViT_19.pth.tar", 81.9, (81.932, 95.744)),
    ReleasedFile("t2t_vit_24", "82.3_T2T_ViT_24.pth.tar", 82.3, (82.276, 95.886)),
    ReleasedFile("t2t_vit_t_14", "81.7_T2T_ViTt_14.pth.tar", 81.7, (81.688, 95.852)),
    ReleasedFile("t2t_vit_t_19", "82.4_T2T_ViTt_19.pth.tar", 82.4, (82.442, 96.082)),
    ReleasedFile("t2t_vit_t_24", "82.6_T2T_ViTt_24.pth.tar", 82.6, (82.554, 96.064)),
    ReleasedFile("t2t_vit_14", "83.3_T2T_ViT_14.pth.tar", 83.3, (83.34, 96.50), pixels=384),
    # trained with token labelling, by other code: nobody has written down the names of its entries
    ReleasedFile("t2t_vit_24", "84.2_T2T_ViT_24.pth.tar", 84.2, in_create_model=False),
    # fine-tuned; accuracies as the authors' README has them
    ReleasedFile("t2t_vit_14", "cifar10_t2t-vit_14_98.3.pth", 98.3, data="CIFAR-10", in_create_model=False),
    ReleasedFile("t2t_vit_19", "cifar10_t2t-vit_19_98.4.pth", 98.4, data="CIFAR-10", in_create_model=False),
    ReleasedFile("t2t_vit_14", "cirfar100_t2t-vit-14_88.4.pth", 88.4, data="CIFAR-100", in_create_model=False),  # sic
    ReleasedFile("t2t_vit_19", "cifar100_t2t-vit-19_89.0.pth", 89.0, data="CIFAR-100", in_create_model=False),
)


class ReleasedTable(Table):
    """The rows of :func:`released_weights`. Prints as text; shows as an HTML table, with links, in a notebook."""

    HEADINGS = ("model", "data", "pixels", "file", "top-1", "measured again", "bytes")
    CODE = ("model",)
    NUMBERS = ("top-1", "measured again", "bytes")

    def texts(self, row: ReleasedFile) -> tuple[str, ...]:
        """The texts of a row, one for each heading."""
        measured = "{:.2f} / {:.2f}".format(*row.measured) if row.measured else ""
        size = f"{row.size:,}" if row.size else ""
        return row.model, row.data, str(row.pixels), row.file, f"{row.top1:.1f}", measured, size

    def html_of(self, row: ReleasedFile, heading: str, text: str) -> str:
        """What a cell shows in a notebook: the file's name is a link to it."""
        link = f'<a href="{html.escape(row.url)}">{text}</a>'
        return link if heading == "file" else super().html_of(row, heading, text)

    def __str__(self) -> str:
        return f"{super().__str__()}\nevery file is at {RELEASE}FILE"

    __repr__ = __str__


def released_weights() -> ReleasedTable:
    """Every file of weights that the authors published, and how it measures.

    Units:
        sizes are in bytes

    Note:
        top-1 is the authors' number; "measured again" is top-1 / top-5 as others found them with the same file: at 224
        pixels those of timm's pull request 2426, at 384 PaddleViT's (crop 1.0). Sizes stand where one is on record

    Source:
        README and releases of yitu-opensource/T2T-ViT; size by OpenVINO's model zoo, which measures 81.44 / 95.66 with
        81.5_T2T_ViT_14.pth.tar
    """
    return ReleasedTable(RELEASED)


def released_file(model: str, img_size: int | tuple[int, int] = 224) -> ReleasedFile:
    """The file that belongs to a variant: of those at several sizes the one of ``img_size``, else the one at 224.

    Raises:
        ValueError: if nothing was published for this variant, with the names for which something was
    """
    files = {pair(row.pixels): row for row in RELEASED if row.in_create_model and row.model == model}
    if not files:
        known = dict.fromkeys(row.model for row in RELEASED if row.in_create_model)
        raise ValueError(f"the authors published no weights for {model!r}; there are some for {', '.join(known)}")
    return files.get(pair(img_size), files[(224, 224)])
