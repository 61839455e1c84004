# SPDX-License-Identifier: BSD-3-Clause
"""`pywino train`: a recipe from options, or from a TOML file, or from both."""

import contextlib
import dataclasses
import functools
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pywino import train as training
from pywino.train.recipe import DATA, MODELS, PATTERNS, Recipe, read_toml
from pywino.train.run import Listener

_DEFAULTS = Recipe().as_dict()


class _Bar(Listener):
    """A bar an epoch, and a line when it ends."""

    def __init__(self, console: Console, title: str, line: Callable[[dict], str]):
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.console, self.title, self.line = console, title, line
        self.progress = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, refresh_per_second=2
        )
        self.task = None

    def begin(self, epoch, epochs, samples, consumed):
        self.name = f"{self.title}, epoch {epoch + 1} of {epochs}"
        self.task = self.progress.add_task(self.name, total=samples, completed=consumed)
        self.progress.start()

    def step(self, samples, values):
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.progress.update(self.task, advance=samples, description=f"{self.name}: {text}")

    def end(self, row):
        self.progress.stop()
        self.progress.remove_task(self.task)
        self.console.print(
            f"{self.title}, epoch {row['epoch'] + 1}: {self.line(row)}, {row['seconds']:.1f} s",
            highlight=False,
        )

    def close(self):
        self.progress.stop()


class _Sparsities(click.ParamType):
    """.3,.6,.8 -> (0.3, 0.6, 0.8)"""

    name = "S,S,…"

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} must be numbers with commas, as in .3,.6,.8", param, context)


def _classified(row: dict) -> str:
    zeros = f"{row['sparsity']:.0%} zeros, " if "sparsity" in row else ""
    return (
        f"loss {row['loss']:.4f}, held out {row['held_out_accuracy']:.2%}, "
        f"test {row['test_accuracy']:.2%}, batch {row['batch_size']}, lr {row['lr']:.4g}, "
        f"momentum {row['momentum']:.4f}, {zeros}{row['phase']}"
    )


def _restored(row: dict) -> str:
    return (
        f"loss {row['loss']:.4f}, PSNR {row['psnr']:.2f} dB (input {row['input_psnr']:.2f}), "
        f"SSIM {row['ssim']:.4f} (input {row['input_ssim']:.4f}), lr {row['lr']:.4g}"
    )


def _detected(row: dict) -> str:
    classes = ", ".join(
        f"{name.removeprefix('ap50_')} {value:.3f}"
        for name, value in row.items()
        if name.startswith("ap50_")
    )
    shown = f" ({classes})" if classes.count(",") < 10 else ""
    return (
        f"loss {row['loss']:.3f}, mAP@.5 {row['map50']:.3f}{shown}, mAP {row['map']:.3f}, "
        f"batch {row['batch_size']}, lr {row['lr']:.4g}"
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def train() -> None:
    """Train a reference model."""


def _run_options(command):
    """The options that say where and how a run goes, not what it computes."""
    for option in reversed(
        (
            click.option(
                "--config",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="TOML file of values by their names with _; options on the line come first.",
            ),
            click.option(
                "--out",
                required=True,
                type=click.Path(file_okay=False, path_type=Path),
                help="Folder.",
            ),
            click.option(
                "--resume", is_flag=True, help="Go on where the run in --out was, if there is one."
            ),
            click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
            click.option("--threads", type=click.IntRange(min=1), help="Of torch."),
            click.option(
                "--checkpoint-seconds",
                default=60.0,
                show_default=True,
                help="Between two inside an epoch.",
            ),
        )
    ):
        command = option(command)
    return command


def _recipe(recipe_class: type, context: click.Context, config: Path | None, values: dict):
    """A recipe of the line, the file and the defaults, in this order."""
    if config is not None:
        given = {
            name
            for name in values
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT
        }
        of_file = read_toml(config, recipe_class)
        values = values | {name: v for name, v in of_file.items() if name not in given}
    return recipe_class(**values)


@contextlib.contextmanager
def _running(values: dict, line: Callable[[dict], str]) -> Iterator[tuple]:
    """Takes the options of `_run_options` out of `values`, and gives (out, console, a function
    title -> listener, arguments of the training function). Errors that pywino raises become
    messages."""
    out, threads = values.pop("out"), values.pop("threads")
    options = {name: values.pop(name) for name in ("device", "resume", "checkpoint_seconds")}
    if threads:
        torch.set_num_threads(threads)
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    if not console.is_terminal:
        console = Console(width=160, quiet=console.quiet)
    bars = []

    def listen(title):
        bars.append(_Bar(console, title, line))
        return bars[-1]

    try:
        yield out, console, listen, options
    except (ValueError, OSError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:
        if str(error).startswith(("pywino.", "load_weights: ", "load_darknet: ")):
            raise click.ClickException(str(error)) from error
        raise
    finally:
        for bar in bars:
            bar.close()
    console.print(f"Written to {out}", highlight=False)


def _fields(recipe_class: type) -> Callable:
    """An option for each field of a recipe's class, with its default and the help text in its
    metadata. Tuples are given one by one: --only a --only b."""
    types_of = get_type_hints(recipe_class)

    def decorate(command):
        for field in reversed(dataclasses.fields(recipe_class)):
            flag, kind = f"--{field.name.replace('_', '-')}", types_of[field.name]
            options = {"default": field.default, "help": field.metadata.get("help")}
            if kind is bool:
                flag = f"{flag}/--no-{field.name.replace('_', '-')}"
            elif get_origin(kind) is tuple:
                options |= {"type": get_args(kind)[0], "multiple": True}
            elif isinstance(kind, types.UnionType):  # X | None
                options["type"] = get_args(kind)[0]
            else:
                options["type"] = kind
            options["show_default"] = field.default not in ("", ())
            command = click.option(flag, field.name, **options)(command)
        return command

    return decorate


def _option(name, *flags, **options):
    """An option for a field of Recipe, with its default."""
    flags = flags or (f"--{name.replace('_', '-')}",)
    default = _DEFAULTS[name]
    return click.option(*flags, name, default=default, show_default=default != (), **options)


@train.command("classify")
@_option("data", type=click.Choice(DATA))
@_option("root", type=click.Path(), help="Folder or archive of the data.")
@_option("model", type=click.Choice(list(MODELS)))
@_option("conv", type=click.Choice(["dense", "winograd", "winograd_relu"]))
@_option("tile", type=int, help="m of Winograd-ReLU's F(m x m, 3 x 3).")
@_option("width", type=float, help="Of the channels of convpool_cnn_c and all_cnn_c.")
@_option("dropout", type=float)
@_option("epochs", type=int)
@_option("batch_size", type=int, help="Of all ranks together, at the start.")
@_option("lr", type=float)
@_option("momentum", type=float)
@_option("weight_decay", type=float)
@_option(
    "dynamic_batch",
    "--dynamic-batch/--fixed-batch",
    "--dbs/--no-dbs",
    help="Let lr, momentum and batch size grow.",
)
@_option("k", type=float, help="Of the momentum's law m'' = -k / m.")
@_option("every", type=int, help="Epochs between two doublings of lr.")
@_option("held_out", type=float, help="Part of the training images that steers.")
@_option("augment", "--augment/--no-augment", help="Random shifts and mirror images.")
@_option("limit", type=int, help="Training images to use.")
@_option("amp", "--amp/--no-amp", help="Forward passes in bfloat16.")
@_option("compile", "--compile/--no-compile", help="Training steps through torch.compile.")
@_option("micro_batch", type=int, help="Samples that are computed at once.")
@_option("init", help="Weights to start from; with --stack the folder of one.")
@_option("sparsity", type=_Sparsities(), help="Prune to these in turn, after --epochs.")
@_option("prune_epochs", type=int, help="Epochs after each pruning.")
@_option("pattern", type=click.Choice(list(PATTERNS)), help="Of the zeros.")
@_option("seed", type=int)
@click.option("--stack", is_flag=True, help="Also ConvPool-CNN-C and All-CNN-C, and their mean.")
@click.option("--plot-kernels", is_flag=True, help="Draw kernels, at each sparsity.")
@_run_options
@click.pass_context
def classify(
    context: click.Context, config: Path | None, stack: bool, plot_kernels: bool, **values
) -> None:
    """Train an image classifier into a folder, with log, curves and checkpoints.

    A run that was interrupted goes on exactly where it was: the same line with --resume. torchrun
    starts it on several ranks: `torchrun --nproc-per-node 2 -m pywino train classify …`.
    """
    with _running(values, _classified) as (out, console, listen, options):
        recipe = _recipe(Recipe, context, config, values)
        options["plot_kernels"] = plot_kernels
        if stack:
            result = training.classify_stack(recipe, out, listen=listen, **options)
            weights = ", ".join(
                f"{name} {weight:.2f}" for name, weight in zip(result["members"], result["weights"])
            )
            console.print(f"Stack of {weights}: test {result['test_accuracy']:.2%}")
        else:
            training.classify(recipe, out, listener=listen(recipe.model), **options)


def restoration_command(name: str, recipe_class: type) -> Callable:
    """A command of `pywino train` for a `RestorationRecipe`; the function below it is its text."""

    def decorate(function):
        @train.command(name, help=function.__doc__)
        @_fields(recipe_class)
        @_run_options
        @click.pass_context
        @functools.wraps(function)
        def command(context, config, **values):
            with _running(values, _restored) as (out, _, listen, options):
                recipe = _recipe(recipe_class, context, config, values)
                training.train_restoration(recipe, out, listener=listen(name), **options)

        return command

    return decorate


@restoration_command("derain", training.DerainRecipe)
def _derain():
    """Train SAPNet into a folder, with log, curves, sample pictures and checkpoints.

    On clean photos, on which rain falls as they are read, or on a paired folder. A run that was
    interrupted goes on exactly where it was: the same line with --resume. torchrun starts it on
    several ranks: `torchrun --nproc-per-node 2 -m pywino train derain …`.
    """


@train.command("detect")
@_fields(training.DetectRecipe)
@_run_options
@click.pass_context
def _detect(context: click.Context, config: Path | None, **values) -> None:
    """Train a detector into a folder, with log, curves, sample pictures and checkpoints.

    On a folder in YOLO's format, or with --stamps on scenes: cut-outs pasted on the photos of
    --data. A run that was interrupted goes on exactly where it was: the same line with --resume.
    torchrun starts it on several ranks: `torchrun --nproc-per-node 2 -m pywino train detect …`.
    """
    with _running(values, _detected) as (out, console, listen, options):
        recipe = _recipe(training.DetectRecipe, context, config, values)
        data = recipe.read_data()
        for problem in data[0].problems:
            console.print(problem, highlight=False, markup=False, soft_wrap=True)
        training.detect(recipe, out, data=data, listener=listen("detect"), **options)


@restoration_command("deblur", training.DeblurRecipe)
def _deblur():
    """Train Deblur-YOLO's generator into a folder, with log, curves, sample pictures, checkpoints.

    On clean photos, which random camera shake blurs as they are read, or on a paired folder. First
    with --encoder and --phase content, then with --init and --phase whole. A run that was
    interrupted goes on exactly where it was: the same line with --resume. torchrun starts it on
    several ranks: `torchrun --nproc-per-node 2 -m pywino train deblur …`.
    """
