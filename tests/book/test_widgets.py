"""Explorer and viewer: what Python puts into the frame, and the numbers that their JavaScript computes."""

import base64
import json
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser

import pytest
import torch
from einops import rearrange, reduce

from t2t_ref import grid_size, restructure, soft_split, token_grid
from t2t_ref.book.widgets import LARGEST_VIEWER, drawn_picture, feature_viewer, soft_split_explorer, template
from t2t_ref.models.tokens_to_token import SPLITS

CRCS = [3186054998, 1306037766]  # of the drawn pictures
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not on PATH, so the JavaScript cannot be run")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def frame(widget):
    (_, _), (tag, attributes) = Tags(widget._repr_html_()).found  # a div, and nothing but the frame in it
    assert tag == "iframe"
    return attributes


def start_of(widget):
    page = frame(widget)["srcdoc"]
    return json.loads(re.search(r'<script type="application/json" id="start">(.*?)</script>', page)[1])


def javascript(name="soft_split_explorer.html"):
    return re.findall(r"<script>\n(.*?)</script>", template(name), re.S)[0]


def run(calls, name="soft_split_explorer.html"):
    """The answers of the page's own functions to ``[name, *arguments]``."""
    arithmetic = re.search(r"/\* arithmetic: begin.*?/\* arithmetic: end \*/", template(name), re.S)[0]
    program = (
        f"'use strict';\n{arithmetic}\nconst known = {{{', '.join(sorted({call[0] for call in calls}))}}};\n"
        "const calls = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n"
        "console.log(JSON.stringify(calls.map(([name, ...rest]) => known[name](...rest))));"
    )
    done = subprocess.run([NODE, "-e", program], input=json.dumps(calls), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# what Python puts into the frame


def test_a_frame_of_its_own():
    attributes = frame(soft_split_explorer())
    assert attributes["title"] == "Soft-split explorer: move a token over a picture"
    assert (attributes["sandbox"], attributes["loading"], attributes["width"]) == ("allow-scripts", "lazy", "100%")
    assert attributes["srcdoc"].startswith("<!doctype html>") and attributes["srcdoc"].rstrip().endswith("</html>")
    # Sphinx strips tags with this pattern before it indexes the words of a page
    assert re.sub(r"<[^<]+?>", "", soft_split_explorer()._repr_html_()) == ""


@pytest.mark.parametrize("name", ["soft_split_explorer.html", "feature_viewer.html"])
def test_nothing_is_loaded(name):
    page = template(name)
    assert "Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; style-src" in page
    for word in ("//", "url(", "@import", "src=", "href=", "fetch(", "XMLHttpRequest", "import(", "WebSocket"):
        assert word not in page, word


def test_small():
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    for widget in (soft_split_explorer(), soft_split_explorer(noise, mode="three")):
        assert len(widget._repr_html_().encode()) < 60_000


def test_the_same_every_time():
    assert soft_split_explorer()._repr_html_() == soft_split_explorer()._repr_html_()
    assert [zlib.crc32(bytes((drawn_picture(n) * 255).round().byte().flatten().tolist())) for n in (32, 64)] == CRCS


def test_start_values_arrive():
    start = start_of(soft_split_explorer(kernel=5, stride=3, padding=1, token=17))
    assert [start[name] for name in ("mode", "kernel", "stride", "padding", "token")] == ["one", 5, 3, 1, 17]
    assert tuple(map(tuple, start["splits"])) == SPLITS
    assert [(p["height"], p["width"]) for p in start["pictures"]] == [(32, 32), (64, 64)]
    start = start_of(soft_split_explorer(mode="three"))
    assert (start["mode"], start["token"]) == ("three", 5)


@pytest.mark.parametrize("batch", [False, True])
def test_a_picture_of_ones_own(batch):
    image = torch.rand(3, 9, 20, generator=torch.Generator().manual_seed(0))
    widget = soft_split_explorer(rearrange(image, "c h w -> 1 c h w") if batch else image)
    (picture,) = start_of(widget)["pictures"]
    pixels = torch.tensor(list(base64.b64decode(picture["bytes"])))
    pixels = rearrange(pixels, "(h w c) -> c h w", h=picture["height"], w=picture["width"])
    torch.testing.assert_close(pixels / 255, image, atol=0.51 / 255, rtol=0)


def test_in_words():
    assert repr(soft_split_explorer()) == (
        "Soft-split explorer: 32 x 32 pixels, kernel 7, stride 4, padding 2: 8 x 8 = 64 tokens; "
        "token 27 (row 3, column 3) is made of pixel rows 10 to 16 and columns 10 to 16"
    )
    assert repr(soft_split_explorer(mode="three", token=3)) == (
        "Soft-split explorer: 64 x 64 pixels, the model's three splits: 4 x 4 = 16 tokens; "
        "token 3 (row 0, column 3) is made of pixel rows 0 to 16 and columns 34 to 63"
    )
    too_large = soft_split_explorer(kernel=36, padding=0)  # can be reached with the sliders, so it is no error
    assert "a 36x36 window does not fit in an image of 32x32 pixels" in repr(too_large)
    only_zeros = soft_split_explorer(kernel=3, stride=1, padding=8, token=0)
    assert repr(only_zeros).endswith("pixel rows of padding only and columns of padding only")
    assert f"<noscript><p>{soft_split_explorer()!r}</p></noscript>" in soft_split_explorer().page


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ([[0.5]], "found list"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "found values of type torch.uint8"),
        (torch.zeros(16, 16), r"found an image of shape \(16, 16\)"),
        (torch.zeros(1, 16, 16), r"found an image of shape \(1, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16), r"found an image of shape \(2, 3, 16, 16\)"),
        (torch.zeros(3, 7, 16), "found an image of 7x16 pixels, expected 8 to 64 a side"),
        (torch.zeros(3, 16, 65), "found an image of 16x65 pixels, expected 8 to 64 a side"),
        (torch.full((3, 8, 8), 2.0), "found values from 2 to 2"),
        (torch.full((3, 8, 8), -0.1), "between 0 and 1; is the picture normalised"),
        (torch.full((3, 8, 8), float("nan")), "found values from nan"),
    ],
)
def test_pictures_that_are_refused(image, found):
    with pytest.raises(ValueError, match=found) as error:
        soft_split_explorer(image)
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"mode": "two"}, "unknown mode 'two': known are one, three"),
        ({"kernel": 0}, "kernel is 0, expected 1 to 36"),
        ({"kernel": 37}, "kernel is 37, expected 1 to 36"),
        ({"stride": 0}, "stride is 0, expected 1 to 16"),
        ({"padding": 9}, "padding is 9, expected 0 to 8"),
        ({"token": 64}, "token is 64, expected 0 to 63"),
        ({"token": -1}, "token is -1, expected 0 to 63"),
        ({"mode": "three", "token": 16}, "token is 16, expected 0 to 15"),
    ],
)
def test_start_values_that_are_refused(start, message):
    with pytest.raises(ValueError, match=message):
        soft_split_explorer(**start)


def test_without_matplotlib():
    code = "import sys, t2t_ref.book.widgets as w; w.soft_split_explorer(); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# the numbers that its JavaScript computes

CASES = [
    (size, kernel, stride, padding)
    for size in (8, 13, 32)
    for kernel in (1, 2, 3, 7, 16)
    for stride in (1, 2, 4, 5, 9)
    for padding in (0, 1, 2, 8)
]


def windows(size, kernel, stride, padding):
    """Every window of one row of pixels, cut out by PyTorch: the numbers of its pixels, those of the padding too."""
    row = torch.arange(-padding, size + padding, dtype=torch.float64)
    return row.unfold(0, kernel, stride).long().tolist() if kernel <= len(row) else []


@needs_node
def test_the_script_can_be_read():
    subprocess.run([NODE, "--check", "-"], input=javascript(), text=True, check=True, capture_output=True)


@needs_node
def test_grid_size_agrees():
    cases = CASES + [(size, kernel, 4, padding) for size in (8, 9) for kernel in range(1, 30) for padding in (0, 3)]
    for case, side in zip(cases, run([["gridSide", *case] for case in cases]), strict=True):
        size, *split = case
        try:
            expected = grid_size((size, 40), *split)[0]
        except ValueError:
            expected = 0
        assert side == expected == len(windows(*case)), case
    sizes = range(8, 65)
    for size, sides in zip(sizes, run([["gridSides", size, SPLITS] for size in sizes]), strict=True):
        assert sides[0] == size and sides[-1] == token_grid(size)[0]


@needs_node
def test_window_ranges_agree():
    calls, expected = [], []
    for size, *split in CASES:
        for index, window in enumerate(windows(size, *split)):
            calls.append(["windowRange", index, *split])
            expected.append([window[0], window[-1]])
    assert run(calls) == expected


@needs_node
def test_pixels_that_no_window_reaches_agree():
    cases = [case for case in CASES if windows(*case)]
    lost = run([["unreached", *case] for case in cases])
    gaps = run([["gap", kernel, stride] for _, kernel, stride, _ in cases])
    for case, far, between in zip(cases, lost, gaps, strict=True):
        parts = windows(*case)
        assert far == sum(pixel > parts[-1][-1] for pixel in range(case[0])), case
        if len(parts) > 1:
            assert between == max(0, parts[1][0] - parts[0][-1] - 1), case


@needs_node
def test_shared_pixels_agree():
    ids = rearrange(torch.arange(40 * 40.0), "(b c h w) -> b c h w", b=1, c=1, h=40)
    calls, expected = [], []
    for kernel in (1, 2, 3, 7, 10):
        for stride in (1, 2, 4, 9):
            tokens = restructure(soft_split(ids, kernel, stride, 0), grid_size((40, 40), kernel, stride, 0))
            token = [[set(tokens[0, :, row, column].tolist()) for column in range(3)] for row in range(3)]
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    calls.append(["sharedPixels", kernel, stride, down, right])
                    expected.append(len(token[1][1] & token[1 + down][1 + right]))
    assert run(calls) == expected


@needs_node
def test_a_tap_picks_the_nearest_window():
    calls = [
        ["nearest", pixel, *split, len(windows(size, *split))]
        for size, *split in CASES
        if windows(size, *split)
        for pixel in range(-split[2], size + split[2])
    ]
    for (_, pixel, kernel, stride, padding, count), index in zip(calls, run(calls), strict=True):
        distances = [abs(i * stride - padding + (kernel - 1) / 2 - pixel) for i in range(count)]
        assert 0 <= index < count and distances[index] == min(distances)


def fields(h, w, row, column):
    """What a final token depends on, by the gradients: (row range, column range) of pixels, of tokens of split 1, 2."""
    levels = [torch.ones(1, 1, h, w, requires_grad=True)]
    for split in SPLITS:
        grid = grid_size(levels[-1].shape[-2:], *split)
        tokens = reduce(soft_split(levels[-1], *split), "b n d -> b n 1", "sum")
        levels.append(restructure(tokens, grid))
    gradients = torch.autograd.grad(levels[-1][0, 0, row, column], levels[:-1])
    seen = [[gradient.sum(dim=dim)[0, 0].nonzero() for dim in (3, 2)] for gradient in gradients]
    return [[[int(axis.min()), int(axis.max())] for axis in level] for level in seen]


@needs_node
@pytest.mark.parametrize(("h", "w"), [(64, 64), (32, 32), (8, 8), (50, 61), (37, 64)])
def test_fields_of_the_three_splits_agree(h, w):
    rows, columns = token_grid((h, w))
    places = [(row, column) for row in range(rows) for column in range(columns)]
    answers = run([["field", i, size, SPLITS] for place in places for i, size in zip(place, (h, w), strict=True)])
    for (row, column), down, right in zip(places, answers[::2], answers[1::2], strict=True):
        expected = fields(h, w, row, column)
        assert [list(pair) for pair in zip(down, right, strict=True)] == [*expected, [[row] * 2, [column] * 2]]
        (top, bottom), (left, end) = expected[0]
        widget = soft_split_explorer(torch.zeros(3, h, w), mode="three", token=row * columns + column)
        assert repr(widget).endswith(f"pixel rows {top} to {bottom} and columns {left} to {end}")


@needs_node
def test_three_splits_are_one_of_31_pixels():
    assert run([["composed", SPLITS[:depth]] for depth in (1, 2, 3)]) == [[7, 4, 2], [15, 8, 6], [31, 16, 14]]
    assert fields(64, 64, 1, 1)[0] == [[16 - 14, 16 - 14 + 30]] * 2  # away from the border


@needs_node
def test_ranges():
    assert run([["clip", [-2, 4], 32], ["clip", [28, 34], 32], ["clip", [3, 5], 32]]) == [[0, 4], [28, 31], [3, 5]]
    assert run([["shared", [0, 6], [4, 10]], ["span", [4, 6]], ["span", [7, 6]]]) == [[4, 6], 3, 0]


# the feature viewer


def some_views(c=40):
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(3, 10, 12, generator=generator)
    maps = {"first": torch.randn(c, 5, 6, generator=generator), "second": torch.randn(3, 2, 2, generator=generator) - 7}
    return {"A, one": (picture, maps), "B <two>": (1 - picture, {"only": maps["second"]})}


def shown_maps(layer):
    """The maps of a layer as the page gets them back."""
    pixels = torch.tensor(list(base64.b64decode(layer["bytes"])), dtype=torch.float64)
    pixels = rearrange(pixels, "(c h w) -> c h w", h=layer["height"], w=layer["width"])
    low, high = (rearrange(torch.tensor(layer[end]), "c -> c 1 1") for end in ("low", "high"))
    return low + (high - low) * pixels / 255


def test_the_viewer_is_a_frame_of_its_own():
    views = some_views()
    widget = feature_viewer(views)
    attributes = frame(widget)
    assert attributes["title"] == "Feature viewer: leaf through layers and channels"
    assert (attributes["sandbox"], attributes["loading"]) == ("allow-scripts", "lazy")
    assert attributes["srcdoc"].rstrip().endswith("</html>")
    assert re.sub(r"<[^<]+?>", "", widget._repr_html_()) == ""
    assert widget._repr_html_() == feature_viewer(some_views())._repr_html_()
    low, high = views["A, one"][1]["first"][0].aminmax()
    first, _, ends = repr(widget).partition(" values from ")
    assert first == "Feature viewer: A, one, B <two>. First shown: A, one, layer first, channel 0, 5 x 6"
    assert list(map(float, ends.split(" to "))) == pytest.approx([low.item(), high.item()], rel=5e-3)
    assert "<noscript><p>Feature viewer: A, one, B &lt;two&gt;." in widget.page


def test_the_viewer_gets_the_maps():
    views = some_views()
    start = start_of(feature_viewer(views, view=1, channel=2, common=True))
    assert [start[name] for name in ("view", "layer", "channel", "common")] == [1, 0, 2, True]
    assert [view["name"] for view in start["views"]] == list(views)
    for view, (picture, layers) in zip(start["views"], views.values(), strict=True):
        pixels = torch.tensor(list(base64.b64decode(view["bytes"])))
        pixels = rearrange(pixels, "(h w c) -> c h w", h=view["height"], w=view["width"])
        torch.testing.assert_close(pixels / 255, picture, atol=0.51 / 255, rtol=0)
        for layer, (name, maps) in zip(view["layers"], layers.items(), strict=True):
            assert layer["name"] == name
            chosen = maps[layer["channels"]]
            torch.testing.assert_close(shown_maps(layer).float(), chosen, atol=0.02, rtol=0)
    many = start["views"][0]["layers"][0]["channels"]
    assert len(many) == 24 and many[:3] == [0, 1, 3] and many[-1] == 38  # evenly out of 40
    assert start["views"][1]["layers"][0]["channels"] == [0, 1, 2]


def test_the_viewer_shows_flat_maps():
    layer = start_of(feature_viewer({"flat": (torch.zeros(3, 4, 4), {"all": torch.full((2, 3, 3), -1.5)})}))
    (view,) = layer["views"]
    assert shown_maps(view["layers"][0]).tolist() == torch.full((2, 3, 3), -1.5).tolist()


def test_a_name_cannot_end_the_script():
    name = "</script><b>"
    widget = feature_viewer({name: some_views()["A, one"]})
    assert start_of(widget)["views"][0]["name"] == name
    assert name not in widget.page


def test_what_the_viewer_refuses():
    views = some_views()
    picture, maps = views["A, one"]
    for wrong in ({}, {"A": (picture, {})}):
        with pytest.raises(ValueError, match="at least one view, and at least one layer"):
            feature_viewer(wrong)
    with pytest.raises(ValueError, match="the picture of 'A' has values from 0.0.* to 2, expected 0 to 1"):
        feature_viewer({"A": (torch.where(picture > 0.9, 2.0, picture), maps)})
    with pytest.raises(ValueError, match="layer 'x' of 'A' has values that are not finite"):
        feature_viewer({"A": (picture, {"x": torch.full((1, 2, 2), float("nan"))})})
    for start, message in (
        ({"view": 2}, "view is 2, expected 0 to 1"),
        ({"view": 1, "layer": 1}, "layer is 1, expected 0 to 0"),
        ({"channel": 24}, "channel is 24, expected 0 to 23"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_viewer(views, **start)
    noise = {"large": torch.randn(24, 112, 112, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(ValueError, match=f"at most {LARGEST_VIEWER:,} are allowed: show fewer channels"):
        feature_viewer({"A": (picture, noise)})
    assert len(feature_viewer({"A": (picture, noise)}, channels=16)._repr_html_()) < LARGEST_VIEWER


@needs_node
def test_the_viewer_computes_what_it_shows():
    subprocess.run([NODE, "--check", "-"], input=javascript("feature_viewer.html"), text=True, check=True)
    calls = [["valueOf", 0, -2, 3], ["valueOf", 255, -2, 3], ["valueOf", 51, -2, 3]]
    calls += [["position", -2, -2, 3], ["position", 3, -2, 3], ["position", 0.5, -2, 3], ["position", 9, -2, 3]]
    calls += [["position", 7, 7, 7], ["colour", 0], ["colour", 1], ["colour", 0.5]]
    assert run(calls, "feature_viewer.html") == (
        [-2, 3, -1] + [0, 1, 0.5, 1] + [0.5, [0, 34, 78], [254, 232, 56], [125, 124, 120]]
    )
    # where the sheet is tapped
    calls = [["sheetColumns", 24, 690], ["sheetColumns", 24, 200], ["sheetColumns", 3, 690]]
    calls += [["squareAt", x, y, 70, 4, 10] for x, y in ((1, 1), (279, 1), (281, 1), (75, 145), (145, 145), (-1, 5))]
    assert run(calls, "feature_viewer.html") == [9, 4, 3] + [0, 3, -1, 9, -1, -1]
