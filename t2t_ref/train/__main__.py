"""The command line of the training: ``python -m t2t_ref.train --help``."""

import argparse
import ast
import os
import re
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_origin

from t2t_ref.arguments import Parser
from t2t_ref.train.log import escape_unknown_letters
from t2t_ref.train.recipes import RECIPES, Options, Recipe, check_field, find_recipe
from t2t_ref.train.stopping import CannotStart, Interrupted, NotFinite

EXAMPLES = """
examples:
  python -m t2t_ref.train                                handwritten digits, about a minute on two cores
  python -m t2t_ref.train imagenet --print-recipe        the authors' recipe
  python -m t2t_ref.train digits --lr 1e-3 --seed 1 --output runs/mine
  python -m t2t_ref.train digits --model-options depth=3 embed_dim=64
  python -m t2t_ref.train digits --output runs/mine --resume
  torchrun --nproc-per-node 8 -m t2t_ref.train imagenet --data imagefolder:PATH
more of them, for several machines: python -c "import t2t_ref.train; help(t2t_ref.train)"
"""
FLAGS = ("output", "resume", "print_recipe", "evaluate", "cpu", "quiet", "help")


def value_of(text: str, kind: object) -> object:
    """A word of the command line as a value of this type.

    Raises:
        ValueError: if it is none
    """
    if kind is bool:
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise ValueError(f"expected true or false, found {text!r}")
        return text.lower() in ("true", "yes", "1")
    if kind in (str | None, float | None):
        return None if text.lower() == "none" else text if kind == str | None else float(text)
    return kind(text)


def option_of(word: str) -> tuple[str, object]:
    """name=value as a pair; a value with commas is several.

    Raises:
        ValueError: without an equals sign or a name
    """
    name, equals, text = word.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"expected name=value, found {word!r}")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, {"none": None, "true": True, "false": False}.get(text.lower(), text)


def make_parser() -> Parser:
    """The command line. Its options and their help are the fields of a recipe."""
    parser = Parser(
        "python -m t2t_ref.train",
        usage="%(prog)s [RECIPE] [--output DIR] [--resume] [--FIELD VALUE ...]",
        description="Train a T2T-ViT, or a ViT, by a recipe. With no argument: handwritten digits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", default="digits", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--output", metavar="DIR", help="for log, states, weights and curve; else runs/RECIPE-seedSEED")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output; start if there is none")
    parser.add_argument("--print-recipe", action="store_true", help="show the recipe as it would run, and leave")
    parser.add_argument("--evaluate", action="store_true", help="do not train: evaluate the weights in --output")
    parser.add_argument("--cpu", action="store_true", help="keep off any GPU")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    group = parser
    for field in fields(Recipe):
        if field.metadata["heading"]:
            group = parser.add_argument_group(field.metadata["heading"])
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar="name=value" if field.type == Options else "VALUE",
            nargs="*" if get_origin(field.type) is tuple else "?" if field.type is bool else None,
            const="true" if field.type is bool else None,
            help=field.metadata["help"].replace("%", "%%"),
        )
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """The options, and the recipe with the fields that were named.

    Raises:
        ValueError: for a recipe, a field or a value that is none, with the nearest names
    """
    # --batch_size is --batch-size
    argv = [re.sub(r"^--[\w-]+", lambda found: found[0].replace("_", "-"), word) for word in argv]
    options, unknown = make_parser().parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            check_field(word[2:].partition("=")[0].replace("-", "_"), also=FLAGS)
    if unknown:
        raise ValueError(f"do not know what to do with {' '.join(unknown)}")
    changes = {}
    for field in fields(Recipe):
        if not hasattr(options, field.name):
            continue
        given = getattr(options, field.name)
        try:
            if field.type == Options:
                changes[field.name] = tuple(option_of(word) for word in given)
            elif isinstance(given, list):
                changes[field.name] = tuple(float(word) for word in given)
                if field.type == tuple[float, float] and len(given) != 2:
                    raise ValueError(f"expected two numbers, found {' '.join(given)!r}")
            else:
                changes[field.name] = value_of(given, field.type)
        except ValueError as error:
            raise ValueError(f"--{field.name.replace('_', '-')}: {error}") from error
    named = {name: dict(changes.pop(name)) for name in ("model_options", "data_options") if changes.get(name)}
    recipe = find_recipe(options.recipe, changes)
    # options that are named are added to those of the recipe, or replace them; --model-options alone drops them all
    return options, replace(recipe, **{n: tuple((dict(getattr(recipe, n)) | new).items()) for n, new in named.items()})


def print_recipe(recipe: Recipe) -> None:
    """Print a recipe, one field a line, as the command line takes it."""
    for field in fields(recipe):
        if field.metadata["heading"]:
            print(f"{chr(10) * (field.name != fields(recipe)[0].name)}# {field.metadata['heading']}")
        value = getattr(recipe, field.name)
        if field.type == Options:
            shown = " ".join(f"{name}={item}" for name, item in value) or "none"
        else:
            shown = " ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value)
        print(f"{field.name.replace('_', '-'):20s} {shown}   # {field.metadata['help']}")


def evaluate_run(folder: Path, options: argparse.Namespace) -> int:
    """Hand the weights of a run over to t2t_ref.evaluate: their average if there is one."""
    from t2t_ref.train import evaluate
    from t2t_ref.train.loop import AVERAGED, WEIGHTS

    weights = folder / (AVERAGED if (folder / AVERAGED).exists() else WEIGHTS)
    words = [str(weights), "--output", str(folder)]
    words += ["--cpu"] if options.cpu else []
    words += ["--data", options.data] if hasattr(options, "data") else []
    return evaluate.main(words)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 1 if training failed, 2 if it could not start."""
    escape_unknown_letters()
    rank = int(os.environ.get("RANK", 0))
    who = f"t2t_ref.train: process {rank}: " if rank else "t2t_ref.train: "
    try:
        options, recipe = parse(sys.argv[1:] if argv is None else argv)
        if options.print_recipe:
            print_recipe(recipe)
            return 0
        from t2t_ref.train import loop
    except (ValueError, ImportError) as error:
        print(f"{who}{error}", file=sys.stderr)
        return 2
    output = options.output or f"runs/{options.recipe.replace('_', '-')}-seed{recipe.seed}"
    try:
        if options.evaluate:
            return evaluate_run(Path(output), options)
        loop.fit(recipe, output, resume=options.resume, quiet=options.quiet, cpu=options.cpu)
    except CannotStart as error:
        print(f"{who}{error}", file=sys.stderr)
        return 2
    except (NotFinite, OSError) as error:  # OSError: the disk, once training is under way
        print(f"{who}stopped: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        if rank == 0:
            print(f"{who}{error}", file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print(f"{who}interrupted before the first update", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        loop.leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
