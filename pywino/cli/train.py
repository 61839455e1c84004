# SPDX-License-Identifier: BSD-3-Clause
"""`pywino train classify`: a recipe from options, or from a TOML file, or from both."""

import os
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pywino import train as training
from pywino.train.classify import Listener
from pywino.train.recipe import DATA, MODELS, Recipe, read_toml

_DEFAULTS = Recipe().as_dict()


class _Bar(Listener):
    """A bar an epoch, and a line when it ends."""

    def __init__(self, console: Console, title: str):
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.console = console
        self.title = title
        self.progress = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, refresh_per_second=2
        )
        self.task = None

    def begin(self, epoch, epochs, samples, consumed):
        self.name = f"{self.title}, epoch {epoch + 1} of {epochs}"
        self.task = self.progress.add_task(self.name, total=samples, completed=consumed)
        self.progress.start()

    def step(self, samples, batch_size, lr, momentum):
        text = f"{self.name}: batch {batch_size}, lr {lr:.4g}, momentum {momentum:.4f}"
        self.progress.update(self.task, advance=samples, description=text)

    def end(self, row):
        self.progress.stop()
        self.progress.remove_task(self.task)
        self.console.print(
            f"{self.title}, epoch {row['epoch'] + 1}: loss {row['loss']:.4f}, "
            f"held out {row['held_out_accuracy']:.2%}, test {row['test_accuracy']:.2%}, "
            f"batch {row['batch_size']}, lr {row['lr']:.4g}, momentum {row['momentum']:.4f}, "
            f"{row['phase']}, {row['seconds']:.1f} s",
            highlight=False,
        )

    def close(self):
        self.progress.stop()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def train() -> None:
    """Train a reference model."""


def _option(name, *flags, **options):
    """An option for a field of Recipe, with its default."""
    flags = flags or (f"--{name.replace('_', '-')}",)
    return click.option(*flags, name, default=_DEFAULTS[name], show_default=True, **options)


@train.command("classify")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file of these values, by their names with _; options on the line come first.",
)
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
@_option("micro_batch", type=int, help="Samples that are computed at once.")
@_option("seed", type=int)
@click.option("--stack", is_flag=True, help="Also ConvPool-CNN-C and All-CNN-C, and their mean.")
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder."
)
@click.option("--resume", is_flag=True, help="Go on where the run in --out was, if there is one.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch.")
@click.option(
    "--checkpoint-seconds", default=60.0, show_default=True, help="Between two inside an epoch."
)
@click.pass_context
def classify(
    context: click.Context,
    config: Path | None,
    stack: bool,
    out: Path,
    resume: bool,
    device: str,
    threads: int | None,
    checkpoint_seconds: float,
    **values,
) -> None:
    """Train an image classifier into a folder, with log, curves and checkpoints.

    A run that was interrupted goes on exactly where it was: the same line with --resume. torchrun
    starts it on several ranks: `torchrun --nproc-per-node 2 -m pywino train classify …`.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    if not console.is_terminal:
        console = Console(width=160, quiet=console.quiet)
    bars = []

    def listen(member):
        bars.append(_Bar(console, member))
        return bars[-1]

    options = {"device": device, "resume": resume, "checkpoint_seconds": checkpoint_seconds}
    try:
        if config is not None:
            given = {
                name
                for name in values
                if context.get_parameter_source(name) is not ParameterSource.DEFAULT
            }
            values |= {name: v for name, v in read_toml(config).items() if name not in given}
        recipe = Recipe(**values)
        if stack:
            result = training.classify_stack(recipe, out, listen=listen, **options)
            weights = ", ".join(
                f"{name} {weight:.2f}" for name, weight in zip(result["members"], result["weights"])
            )
            console.print(f"Stack of {weights}: test {result['test_accuracy']:.2%}")
        else:
            training.classify(recipe, out, listener=listen(recipe.model), **options)
    except (ValueError, OSError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:
        if str(error).startswith("pywino."):
            raise click.ClickException(str(error)) from error
        raise
    finally:
        for bar in bars:
            bar.close()
    console.print(f"Written to {out}", highlight=False)
