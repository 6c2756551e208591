"""Two pictures for a folder of results: the curve of a run, and what is taken for what (chapters 11 and 14).

Drawn without pyplot: no figure is left open behind, and whatever backend the user has set stays as it is.
"""

import os

from einops import reduce

TOKEN, OTHER = "#D55E00", "#767676"  # as in the book: what is looked at, and all else
MOST_CLASSES = 40  # in a picture
STYLE = {
    "figure.figsize": (6.4, 3.2),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "cividis",
    "image.interpolation": "nearest",
}


def draw_curve(lines: list[dict], path: str | os.PathLike | None = None):
    """Loss and accuracy against epochs, as a figure in the style of the book, and as a file if there is a path."""
    import matplotlib
    from matplotlib.figure import Figure

    steps = [line for line in lines if line["kind"] == "step"]
    epochs = [line for line in lines if line["kind"] == "epoch" and "test_loss" in line]
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        left, right = figure.subplots(1, 2)
        left.plot([s["epoch"] for s in steps], [s["loss"] for s in steps], color=OTHER, label="training")
        left.plot(
            [e["epoch"] for e in epochs],
            [e["test_loss"] for e in epochs],
            color=TOKEN,
            marker=".",
            label="test",
        )
        left.set(xlabel="epochs", ylabel="loss (nats)")
        left.legend(frameon=False)
        right.plot([e["epoch"] for e in epochs], [100 * e["test_accuracy"] for e in epochs], color=TOKEN, marker=".")
        right.set(xlabel="epochs", ylabel="test accuracy (%)")
        if path is not None:
            figure.savefig(path, dpi=200, format="png")
    return figure


def draw_confusion(result, path: str | os.PathLike | None = None):
    """What each class is wrongly taken for, from an ``Evaluation``. A figure; a file too, if there is a path.

    What is right is left grey, for beside it nothing else could be seen: how much that is stands beside the class.

    Raises:
        ValueError: for more classes than can be seen
    """
    import matplotlib
    from matplotlib.figure import Figure

    k = len(result.confusion)
    if k > MOST_CLASSES:
        raise ValueError(f"{k} classes are too many for a picture, expected at most {MOST_CLASSES}")
    shares = 100 * result.confusion / reduce(result.confusion, "true taken -> true 1", "sum").clamp(min=1)
    names = [result.name(label) for label in range(k)]
    right = [f"{name}  ({share:.0f} %)" for name, share in zip(names, shares.diag().tolist(), strict=True)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.4))
        axes = figure.subplots()
        axes.set_facecolor("#CCCCCC")
        wrong = shares.fill_diagonal_(float("nan"))
        picture = axes.imshow(wrong.numpy(), vmin=0, vmax=max(1.0, float(wrong.nan_to_num().max())))
        axes.set_xticks(range(k), names, rotation=0 if max(map(len, names)) < 3 else 90)
        axes.set_yticks(range(k), right)
        axes.set(xlabel="wrongly taken for", ylabel="class (share of it that is right)")
        figure.colorbar(picture, label="share of the class (%)")
        if path is not None:
            figure.savefig(path, dpi=200, format="png")
    return figure
