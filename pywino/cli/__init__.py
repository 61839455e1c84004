# SPDX-License-Identifier: BSD-3-Clause
"""The ``pywino`` command. Each sub-command imports what it needs when it runs."""

import click

import pywino


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pywino.__version__, prog_name="pywino")
def main() -> None:
    """Hand-written convolution kernels for PyTorch."""


@main.command("doctor")
def _doctor() -> None:
    """Say what runs on this machine, and why the rest does not."""
    from pywino.cli.doctor import report

    click.echo(report())


# The options are demo.py's own, so that `pywino --help` need not import torch and matplotlib.
@main.command(
    "demo",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def _demo(context: click.Context) -> None:
    """Swap the convolutions of whole models on photographs, and show what changed."""
    from pywino.cli.demo import demo

    demo.main(args=context.args, prog_name=context.command_path)


@main.command(
    "train",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def _train(context: click.Context) -> None:
    """Train a reference model."""
    from pywino.cli.train import train

    train.main(args=context.args, prog_name=context.command_path)


@main.command(
    "derain",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def _derain(context: click.Context) -> None:
    """Take the rain out of pictures and videos."""
    from pywino.cli.derain import command

    command.main(args=context.args, prog_name=context.command_path)


@main.command(
    "deblur",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def _deblur(context: click.Context) -> None:
    """Take motion blur out of pictures and videos."""
    from pywino.cli.deblur import command

    command.main(args=context.args, prog_name=context.command_path)


@main.command(
    "detect",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def _detect(context: click.Context) -> None:
    """Find objects in pictures and videos."""
    from pywino.cli.detect import command

    command.main(args=context.args, prog_name=context.command_path)
