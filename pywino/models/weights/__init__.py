# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints into models, tensors only: a file can never run code. The files beside this one are
weights of pywino's own, each with a card (.md): what they were trained on, how, and their scores.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

_OWN = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.safetensors"))}


def find_weights(weights: str | os.PathLike) -> Path:
    """The file of weights of pywino's own, by their name ("pywino-rain"), or the path itself."""
    return _OWN.get(os.fspath(weights), Path(weights))


def weights_metadata(weights: str | os.PathLike) -> dict[str, str]:
    """What a .safetensors file says beside its tensors: how the model is built that they are for.
    Empty for other files, and where there is none."""
    path = find_weights(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:  # load_weights says what is wrong
        return {}


def read_weights(weights: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or `torch.save` file, or of weights of pywino's own, by their
    names, without a `module.` in front of every name (DataParallel's). Pickled objects are
    refused."""
    path = find_weights(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"load_weights: there is no file {path}; weights in the package are {', '.join(_OWN)}"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"load_weights: {path} cannot be read as a file of tensors ({reason}); "
            "write it with torch.save(model.state_dict(), path) or as .safetensors"
        ) from error
    for key in ("state_dict", "model"):  # where trainers keep it beside other things
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise RuntimeError(
            f"load_weights: {path} must hold a state_dict (names to tensors), "
            f"got {type(content).__name__}"
        )
    if content and all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def load_weights(model: nn.Module, weights: str | os.PathLike) -> nn.Module:
    """Fill `model` from a `.safetensors` or `torch.save` file, or from weights of pywino's own by
    their name, and return it.

    Names and shapes must fit one to one, a `module.` in front of every name (DataParallel's) aside;
    otherwise a RuntimeError lists what does not and the model is left as it was. Pickled objects
    are refused.
    """
    return load_state(model, read_weights(weights), find_weights(weights))


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> nn.Module:
    """`load_weights` with what was read from `path`."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown to the model" for name in state if name not in expected]
    problems += [
        f"{name} must be {tuple(expected[name].shape)}, got {tuple(value.shape)}"
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RuntimeError(
            f"load_weights: {path} does not fit {type(model).__name__}: "
            f"{'; '.join(problems[:5])}{more}. "
            "Build the model with the arguments that the weights were trained with"
        )
    model.load_state_dict(state)
    return model
