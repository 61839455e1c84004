# SPDX-License-Identifier: BSD-3-Clause
"""The ``pywino`` command. Each sub-command imports what it needs when it runs."""

import importlib

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


def _from(module: str, attribute: str, text: str) -> None:
    """A sub-command of the module's name. Its options are the module's own, which is not imported
    before: `pywino --help` need not wait for torch and matplotlib."""

    @main.command(
        module,
        help=text,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    @click.pass_context
    def run(context: click.Context) -> None:
        command = getattr(importlib.import_module(f"pywino.cli.{module}"), attribute)
        command.main(args=context.args, prog_name=context.command_path)


_from("demo", "demo", "Swap the convolutions of whole models, and show what changed.")
_from("train", "train", "Train a reference model.")
_from("derain", "command", "Take the rain out of pictures and videos.")
_from("deblur", "command", "Take motion blur out of pictures and videos.")
_from("detect", "command", "Find objects in pictures and videos.")
