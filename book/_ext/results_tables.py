"""The files of results/ as tables, made anew at each build.

    ```{results} tokenisers
    three convolutions against hard split
    ```

shows results/tokenisers.json: the command that made it, what it ran on, what came out, and its numbers. Each line of
the body names two arms that are compared seed by seed, or two forms of a model whose speeds are compared. ``{results}
weights`` shows the folder results/weights. A file that no directive shows is a warning, and so a failed build.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from t2t_ref.experiments import accuracies, mean_interval, paired_interval, summary

MINUS = "\N{MINUS SIGN}"
NARROW = "\N{NO-BREAK SPACE}"  # numbers stay on one line
Found = tuple[list[str], str, list[str]]  # what it ran on, one thing an entry; what came out; tables in Markdown


# words and tables


def interval(mean: float, half: float, sign: str = "") -> str:
    return f"{mean:{sign}.1f} ± {half:.1f}".replace("-", MINUS)


def plain(values: Iterable) -> str:
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes of one core"


def shell(command: str) -> list[str]:
    """A command in lines that fit the page."""
    lines = textwrap.wrap(command, 68, break_on_hyphens=False, break_long_words=False)
    return ["```bash", *(line + " \\" for line in lines[:-1]), lines[-1], "```"]


def table(head: list[str], rows: Iterable[Iterable], words: int = 1) -> list[str]:
    """A Markdown table, whose first ``words`` columns stand left and all others right."""
    ruler = ["---"] * words + ["---:"] * (len(head) - words)
    rows = [[*row[:words], *(str(cell).replace(" ", NARROW) for cell in row[words:])] for row in map(list, rows)]
    return ["", *("| " + " | ".join(map(str, row)) + " |" for row in (head, ruler, *rows)), ""]


def spread(row: dict) -> str:
    return f"{row['speed_low']:.2f} to {row['speed_high']:.2f}"


# one function for each form of file


def verdict(arms: dict, pair: str) -> tuple[str, str, str]:
    """A line of the directive's body, the difference, and whether it is resolved."""
    label, found, base = pair.partition(" against ")
    if not (found and label in arms and base in arms):
        raise ValueError(f"{pair!r} does not name two arms as 'one against other'; the arms are {'; '.join(arms)}")
    mean, half = paired_interval(arms[label], arms[base])
    words = "not resolved" if abs(mean) <= half else "ahead" if mean > 0 else "behind"
    return pair, words, interval(mean, half, "+")


def ran_with(result: dict) -> list[str]:
    seeds = dict.fromkeys(plain(accuracies(arm)) for arm in result["arms"].values())
    found = [f"{name} {version}" for name, version in result["versions"].items()]
    return [*found, f"seeds {' or '.join(seeds)}"]


def experiment(result: dict, pairs: list[str]) -> Found:
    rows, arms = summary(result), result["arms"]
    rates = result["training"]["rates"]
    at_an_end = sum(row["rate"] in (min(rates), max(rates)) for row in rows)
    about = [
        result["device"],
        *ran_with(result),
        f"learning rate: the best of {plain(rates)} for each arm, at an end of them for {at_an_end} of {len(rows)}",
        minutes(sum(row["seconds"] for row in rows)),
    ]
    size = [(f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}", row["rate"]) for row in rows]
    runs = [plain(round(score) for _, score in sorted(accuracies(arms[row["label"]]).items())) for row in rows]
    lines = table(
        ["arm", "accuracy, %", "each run, %", "parameters", "million MACs", "rate"],
        [
            (row["label"], interval(row["mean"], row["half"]), each, *sizes)
            for row, each, sizes in zip(rows, runs, size, strict=True)
        ],
    )
    verdicts = [verdict(arms, pair) for pair in pairs]
    link = {"ahead": "is ahead of", "behind": "is behind"}
    resolved = [pair.replace("against", link[words], 1) for pair, words, _ in verdicts if words in link]
    came_out = f"{len(resolved)} of {len(verdicts)} differences resolved" + (": " if resolved else "")
    came_out += "; ".join(resolved)
    return about, came_out, lines + table(["compared seed by seed", "the first is", "points"], verdicts, words=2)


def counted(words: Iterable[str]) -> str:
    """How often each verdict was given on a form that was timed against another."""
    return "against the first form, " + "; ".join(f"{word}: {count}" for word, count in Counter(words).items())


def machine_of(result: dict) -> list[str]:
    words = {"threads": "{} thread", "torch": "torch {}", "clock": "{} clock"}
    return [words.get(key, "{}" if key in ("cpu", "gpu") else key + "={}").format(value)
            for key, value in result["machine"].items()]  # fmt: skip


def medians(entry: dict, pair: str) -> tuple[str, str, str]:
    """Two forms that were both timed against the first one: are the middle halves of their speeds apart?"""
    rows = {row["implementation"]: row for row in entry["rows"]}
    one, other = (rows[name] for name in pair.split(" against "))
    apart = one["speed_low"] > other["speed_high"] or one["speed_high"] < other["speed_low"]
    words = "middle halves overlap" if not apart else "faster" if one["speed"] > other["speed"] else "slower"
    return f"{pair}, `{entry['case']['model']}`, {entry['case']['mode']}", words, f"{one['speed'] / other['speed']:.2f}"


def bench_models(result: dict, pairs: list[str]) -> Found:
    lines = []
    for entry in result["found"]:
        case, products = entry["case"], entry["products"]
        lines += [
            "",
            "**`{model}`, {mode}**: {batch} images of {img_size} pixels, {precision}".format(**case)
            + f", {entry['rounds']} rounds. The matrix products alone: {1e3 * products['seconds']:.0f} ms "
            f"for {products['macs'] / 1e9:.1f} billion MACs, all images of the batch together.",
        ]
        lines += table(
            ["form", "against the first", "speed", "middle half", "of bound", "ms", "images a second", "peak MB"],
            [
                (
                    row["implementation"],
                    row["verdict"] if row is not entry["rows"][0] else "",
                    f"{row['speed']:.2f}",
                    spread(row),
                    f"{row['of_bound']:.2f}",
                    f"{1e3 * row['seconds']:.0f}",
                    f"{row['images_per_second']:.1f}",
                    f"{row['peak_mb']:.0f}" if "peak_mb" in row else "",
                )
                for row in entry["rows"]
            ],
            words=2,
        )
        lines += entry["notes"]
    came_out = counted(row["verdict"] for entry in result["found"] for row in entry["rows"][1:])
    between = [medians(entry, pair) for pair in pairs for entry in result["found"]]
    if between:
        lines += table(["compared", "the first is", "ratio of the speeds"], between, words=2)
        for pair in pairs:
            words = Counter(words for what, words, _ in between if what.startswith(f"{pair},"))
            came_out += f"; {pair}, " + "; ".join(f"{word}: {n}" for word, n in words.items())
    return machine_of(result), came_out, lines


def bench_ratios(result: dict, pairs: list[str]) -> Found:
    """Groups of candidates: ``pieces`` and ``tokens``."""
    rows, verdicts = [], []
    for entry in result["found"]:
        what = f"{entry['group']}, {entry.get('mode') or str(entry['tokens']) + ' tokens'}"
        for place, (name, row) in enumerate(entry["rows"].items()):
            verdicts += [row["verdict"]] if place else []
            first = ("", row["verdict"]) if place else (what, "")
            seconds = row["us_per_image"] if "us_per_image" in row else 1e3 * row["seconds"]
            numbers = f"{row['speed']:.2f}", spread(row), f"{seconds:.1f}"
            rows.append((first[0], name, first[1], *numbers))
    unit = "µs an image" if "us_per_image" in row else "ms"
    head = ["what", "form", "against the first", "speed", "middle half", unit]
    return machine_of(result), counted(verdicts), table(head, rows, words=3)


def bench_kinds(result: dict, pairs: list[str]) -> Found:
    entries = result["found"]
    kinds = sorted(
        {kind for entry in entries for kind in entry["milliseconds"]},
        key=lambda kind: -max(entry["milliseconds"].get(kind, 0) for entry in entries),
    )
    head = ["milliseconds of", *(f"`{entry['case']['model']}`, {entry['implementation']}" for entry in entries)]
    rows = [(kind, *(f"{entry['milliseconds'].get(kind, 0):.0f}" for entry in entries)) for kind in kinds]
    shares = [
        sum(entry["milliseconds"].get(kind, 0) for kind in ("matrix products", "attention"))
        / sum(entry["milliseconds"].values())
        for entry in entries
    ]
    came_out = f"matrix products and attention take {min(shares):.0%} to {max(shares):.0%} of a forward pass"
    return machine_of(result), came_out, table(head, rows)


def bench_memory(result: dict, pairs: list[str]) -> Found:
    peaks = {(e["case"]["model"], e["case"]["mode"], e["case"]["img_size"]): e["peak_mb"] for e in result["found"]}
    models, columns = (list(dict.fromkeys(key[part] for key in peaks)) for part in (slice(0, 1), slice(1, 3)))
    rows = [(f"`{model}`", *(f"{peaks[model, *column]:,.0f}" for column in columns)) for (model,) in models]
    first, last = columns[0], columns[-1]
    growth = [peaks[model, *last] / peaks[model, *first] for (model,) in models]
    came_out = f"{min(growth):.0f} to {max(growth):.0f} times as much at {last[1]} pixels as at {first[1]}"
    return machine_of(result), came_out, table(["peak, MB", *(f"{mode}, {size}" for mode, size in columns)], rows)


def bench_roof(result: dict, pairs: list[str]) -> Found:
    rows = [
        (row["what"], *(f"{row[key] / 1e9:.1f} billion {row['unit']}" for key in ("per_second", "low", "high")))
        for row in result["found"]
    ]
    speed = {row["what"]: row["per_second"] for row in result["found"]}
    came_out = f"{speed['product'] / speed['copy']:.0f} FLOPs take as long as moving one byte"
    head = ["what", "a second", "a quarter below", "a quarter above"]
    return machine_of(result), came_out, table(head, rows)


def bench_start(result: dict, pairs: list[str]) -> Found:
    rows = [(row["what"], *(f"{row[key]:.2f}" for key in ("seconds", "low", "high"))) for row in result["found"]]
    came_out = "; ".join(f"{row['what']}: {row['seconds']:.2f} s" for row in result["found"])
    return machine_of(result), came_out, table(["what", "seconds", "a quarter below", "a quarter above"], rows)


def what_it_sees(result: dict) -> Found:
    names = {"t2t": "T2T-ViT", "vit": "ViT", "resnet": "ResNet"}
    models = [dict(name=names[kind], **arm) for kind, arm in result["arms"].items()]
    about = [
        result["device"],
        *ran_with(result),
        f"{result['training']['samples']:,} training images each",
        f"learning rate: the best of {plain(result['training']['rates'])} for each model",
        minutes(sum(run["seconds"] for model in models for run in model["runs"])),
    ]

    def channels(found: dict, what: str) -> int:
        return round(sum(layer[what] * layer["channels"] for layer in found["layers"].values()))

    rows = [
        (
            m["name"],
            interval(*mean_interval([run["accuracy"] for run in m["runs"]])),
            f"{m['parameters']:,}",
            m["rate"],
        )
        for m in models
    ]
    lines = table(["model", "accuracy, %", "parameters", "rate"], rows)
    seen = [(model, when, [run[when] for run in model["runs"]]) for model in models for when in ("before", "after")]
    lines += ["", "Channels that are dead, blind or saturated: one number for each seed."]
    lines += table(
        ["model", "training", "dead", "blind", "saturated", "of"],
        [
            (m["name"], when, *(plain(channels(run, what) for run in runs) for what in ("dead", "blind", "saturated")),
             sum(layer["channels"] for layer in runs[0]["layers"].values()))
            for m, when, runs in seen
        ],
        words=2,
    )  # fmt: skip
    lines += [
        "",
        "How much the last maps change when the image moves by some pixels: the mean squared change, relative to that "
        "between two unrelated images, mean of the seeds.",
    ]
    shifts = range(len(result["shifts"]))
    lines += table(
        ["model", "training", *(str(shift) for shift in result["shifts"])],
        [
            (m["name"], when, *(f"{sum(run['shift_response'][i] for run in runs) / len(runs):.2f}" for i in shifts))
            for m, when, runs in seen
        ],
        words=2,
    )
    dead = [channels(run, "dead") for _, when, runs in seen for run in runs if when == "after"]
    came_out = f"after training, the number of dead channels is {' to '.join(map(str, sorted({min(dead), max(dead)})))}"
    return about, came_out, lines


def precisions(result: dict) -> Found:
    versions = [f"{name} {version}" for name, version in result["versions"].items()]
    weights = result["weights"]
    about = [result["device"], *versions, f"`{weights['file']}`, SHA-256 {weights['sha256'][:12]}…"]
    lines = table(
        ["form", "precision", "accuracy, %", "digits named otherwise", "farthest logit", "MB"],
        [
            (row["form"], row["precision"], f"{row['accuracy']:.2f}", row["changed"], f"{row['difference']:.0e}",
             f"{row['bytes'] / 1e6:.2f}")
            for row in result["rows"]
        ],
        words=2,
    )  # fmt: skip
    came_out = f"the model in PyTorch names {result['accuracy']:.2f} % of {result['tested']:,} digits rightly; "
    came_out += "named otherwise by the graphs, " + "; ".join(
        f"{row['form']}, {row['precision']}: {row['changed']}" for row in result["rows"]
    )
    return about, came_out, lines


def weights(folder: Path) -> list[str]:
    rows = []
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        recipe, size = about["recipe"], path.with_suffix(".safetensors").stat().st_size
        images = recipe["epochs"] * recipe["epoch_samples"]
        name = f"`{path.stem}.safetensors`"
        rows.append((name, f"{size / 1e6:.1f}", f"{about['accuracy']:.1f}", f"{images:,}", about["seed"]))
    (command,) = {json.loads(path.read_text(encoding="utf-8"))["command"] for path in folder.glob("*.json")}
    head = ["file", "MB", "accuracy, %", "training images", "seed"]
    return [*shell(command), *table(head, rows)]


BENCHES: dict[str, Callable[[dict, list[str]], Found]] = {
    "models": bench_models,
    "pieces": bench_ratios,
    "tokens": bench_ratios,
    "kinds": bench_kinds,
    "memory": bench_memory,
    "roof": bench_roof,
    "start": bench_start,
}


def markdown(path: Path, pairs: list[str]) -> list[str]:
    """A file of results/ as lines of Markdown."""
    result = json.loads(path.read_text(encoding="utf-8"))
    command = result["command"]
    if "shifts" in result:
        about, came_out, lines = what_it_sees(result)
    elif result.get("experiment") == "precisions":
        about, came_out, lines = precisions(result)
    elif "arms" in result:
        about, came_out, lines = experiment(result, pairs)
    else:
        about, came_out, lines = BENCHES[command.split()[3]](result, pairs)  # python -m t2t_ref.bench NAME
    said = ["", f"**Ran on:** {'; '.join(about)}.", "", f"**Came out:** {came_out}."]
    return [*shell(command), *said, *lines]


# the directive, and what it must have shown in the end


def folder_of(env) -> Path:
    return Path(env.srcdir) / "results"


class Results(SphinxDirective):
    required_arguments = 1
    has_content = True

    def run(self):
        name = self.arguments[0]
        if not hasattr(self.env, "results_shown"):
            self.env.results_shown = {}
        self.env.results_shown[name] = self.env.docname
        path = folder_of(self.env) / name
        try:
            if path.is_dir():
                lines = weights(path)
                read = sorted(path.iterdir())
            else:
                read = [path.with_suffix(".json")]
                lines = markdown(read[0], [line for line in self.content if line.strip()])
        except (OSError, KeyError, ValueError) as error:
            raise self.error(f"results/{name} cannot be shown: {type(error).__name__}: {error}") from error
        for file in read:
            self.env.note_dependency(str(file))
        box = nodes.container(classes=["results"])
        self.state.nested_parse(StringList(lines, source=str(read[0])), self.content_offset, box)
        return [box]


def forget(app, env, docname):
    shown = getattr(env, "results_shown", {})
    env.results_shown = {name: where for name, where in shown.items() if where != docname}


def merge(app, env, docnames, other):
    env.results_shown = getattr(env, "results_shown", {}) | getattr(other, "results_shown", {})


def check(app, env):
    """Warn of what no page shows; a draft (.part) is not there yet."""
    there = {path.stem for path in folder_of(env).iterdir() if path.suffix != ".part"}
    for name in sorted(there - getattr(env, "results_shown", {}).keys()):
        logging.getLogger(__name__).warning(
            "results/%s is shown on no page: it needs a section in book/results.md", name
        )


def setup(app):
    app.add_directive("results", Results)
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
