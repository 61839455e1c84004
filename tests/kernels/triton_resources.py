# SPDX-License-Identifier: BSD-3-Clause
"""What the Triton kernels take of a GPU, without one: compiled ahead of time, read from
the machine code by the cuobjdump in Triton's package.

    python tests/kernels/triton_resources.py    writes resources_triton.json anew, in some minutes

Each row is one launch: registers of a thread, bytes of stack (spills), bytes of shared memory, and
how many matrix and copy instructions there are. HMMA is sm_80's matrix instruction, HGMMA sm_90's
for blocks of 64 rows and more, UTCHMMA sm_100's; LDGSTS copies to shared memory in the background.
"""

import json
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pywino.kernels import (
    channel_attention,
    conv_lstm,
    dilated_conv,
    masked_conv,
    sparse_conv,
    winograd,
)
from pywino.ops import _packed

TABLE = Path(__file__).with_name("resources_triton.json")
MODULES = (winograd, channel_attention, conv_lstm, dilated_conv, masked_conv, sparse_conv)
ARCHITECTURES = (90, 80, 100)
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")
INSTRUCTIONS = (*MATRIX_INSTRUCTIONS, "LDGSTS")
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


def launches(architecture=90):
    """{name: (kernel, arguments, constants, warps, stages)}: both products in every configuration;
    for sm_90 the transforms of every tile in both domains, with the gradients of F2 and F4, and the
    other rooms; for the others the forward pass of F4 in "f16", and the direct, the masked and the
    sparse convolution of channels_last tensors."""
    recorded = {}

    def record(kernel, grid, *arguments, warps=4, stages=1, **constants):
        name = " ".join(
            [kernel.__name__.strip("_")]
            + [f"{key}={value}".lower() for key, value in constants.items()]
            + sorted({TYPES[a.dtype][1:] for a in arguments if isinstance(a, torch.Tensor)})
        )
        recorded.setdefault(name, (kernel, arguments, constants, warps, stages))

    with record_launches(record):
        transforms(4, "f16", torch.bfloat16, True, gradients=architecture == 90)
        if architecture == 90:
            transforms(4, "f32", torch.float32, True)
            transforms(2, "f16", torch.bfloat16, True)
            transforms(2, "f32", torch.float32, True, gradients=False)
            transforms(6, "f16", torch.bfloat16, True, gradients=False)
            transforms(6, "f32", torch.float32, True, gradients=False)
            transforms(4, "f16", torch.bfloat16, False, gradients=False)
            transforms(4, "f16", torch.bfloat16, False, n=32)  # tiles for the wide NCHW block
        products, summed = winograd.configurations()
        for domain, block in products:
            tiles = winograd.FEW_TILES if block.tiles == winograd.FEW_TILES else 2**12
            v = torch.empty(36, 128, block.c, dtype=winograd.DOMAINS[domain], device="meta")
            u, m = v.new_empty(36, block.k, block.c), v.new_empty(36, 128, block.k)
            winograd._multiply(v, u, m, domain, tiles)
        for domain, block in summed:
            d = torch.empty(36, 128, block.k, dtype=winograd.DOMAINS[domain], device="meta")
            v, s = d.new_empty(36, 128, block.c), d.new_empty(2, 36, block.k, block.c).float()
            for accumulate in (False, True) if architecture == 90 else (False,):
                winograd._multiply_summed(d, v, s, domain, accumulate)
        if architecture == 90:
            for last in (True, False):
                attention(last)
            cell()
        direct(architecture == 90)
        masked(architecture == 90)
        sparse(architecture == 90)
    return recorded


class record_launches:
    def __init__(self, record):
        self.record = record

    def __enter__(self):
        self.launches = [module._launch for module in MODULES]
        self.check = winograd._check_tensor
        winograd._check_tensor = lambda *arguments: None
        for module in MODULES:
            module._launch = self.record

    def __exit__(self, *error):
        winograd._check_tensor = self.check
        for module, launch in zip(MODULES, self.launches):
            module._launch = launch


def transforms(tile, domain, dtype, last, n=2, channels=64, gradients=True):
    """Calls that launch every transform, with all that an epilogue can have."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(n, channels, 48, 48, dtype=dtype, device="meta", memory_format=layout)
    bias, geometry = torch.empty(channels, device="meta"), (tile, (1, 1), (1, 1))
    w = x.new_empty(channels, channels, 3, 3)
    u, scale = winograd.transform_filter(w, tile, domain)
    winograd.forward(x, u, scale, bias, x, channels, *geometry, True, False, domain)
    if not gradients:
        return
    winograd.weight_gradient(x, x, *geometry, False, domain)
    w = x.new_empty(channels, channels, tile + 2, tile + 2)
    u, scale = winograd.transform_filter(w, tile, domain, rotate=True, spatial=False)
    winograd.relu_input_gradient(x, x, u, scale, *geometry, domain)


def attention(last):
    """Both forms, forward and backward, with all that they can have."""
    for size in (8, 64):  # an image in one program, and in several
        layout = torch.channels_last if last else torch.contiguous_format
        like = {"dtype": torch.bfloat16, "device": "meta"}
        x = torch.empty(2, 64, size, size, memory_format=layout, **like)
        w1, w3, b1, b2 = (torch.empty(s, **like) for s in ((4, 64), (64, 64), (4,), (64,)))
        w2 = w1.T.contiguous()
        _, mean, gate = channel_attention.forward(x, w1, b1, w2, b2, w3, x, True, True)
        channel_attention.backward(x, x, mean, gate, w1, b1, w2, w3, True)


def cell():
    gates = torch.empty(2, 128, 48, 48, dtype=torch.bfloat16, device="meta")
    state = gates[:, :32].contiguous()
    conv_lstm.forward(gates, state)
    conv_lstm.backward(state, state, gates, state)


def blocks_of_pixels(everything):
    """(x, K, strict): each block of the product; both layouts of the widest, and TF32."""
    kinds = [(torch.bfloat16, k, True, True) for k in (32, 64, 128)]
    kinds += [(torch.float32, k, True, True) for k in (32, 64, 128)]
    if everything:
        kinds += [(torch.bfloat16, 128, False, True), (torch.float32, 128, False, True)]
        kinds += [(torch.float32, 128, True, False)]
    for dtype, k, last, strict in kinds:
        layout = torch.channels_last if last else torch.contiguous_format
        like = {"dtype": dtype, "device": "meta", "memory_format": layout}
        yield torch.empty(2, 64, 48, 48, **like), k, strict


def direct(everything):
    for x, k, strict in blocks_of_pixels(everything):
        filter, bias = x.new_empty(k, 3, 3, 64), torch.empty(k, device="meta")
        residual = torch.empty_like(x[:, :1]).expand(2, k, 48, 48)
        geometry = ((1, 1), (1, 1))
        dilated_conv.forward(x, filter, bias, residual, *geometry, True, strict)


def masked(everything):
    for x, k, strict in blocks_of_pixels(everything):
        mask = torch.empty(2, 1, 48, 48, dtype=torch.bool, device="meta")
        filter, bias = x.new_empty(k, 3, 3, 64), torch.empty(k, device="meta")
        masked_conv.forward(x, mask, filter, bias, (1, 1), (1, 1), strict)


def sparse(everything):
    """Each group of channels; both layouts of the wider, and TF32."""
    kinds = [(dtype, k, True, True) for dtype in (torch.bfloat16, torch.float32) for k in (64, 128)]
    if everything:
        kinds += [(torch.bfloat16, 128, False, True), (torch.float32, 128, False, True)]
        kinds += [(torch.float32, 128, True, False)]
    for dtype, k, last, strict in kinds:
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(2, 64, 48, 48, dtype=dtype, device="meta", memory_format=layout)
        values = x.new_empty(9, k, _packed.CHANNELS)
        entries, starts = (torch.empty(n, dtype=torch.int32, device="meta") for n in (9, 2))
        blocks, bias = (values, entries, starts), torch.empty(k, device="meta")
        sparse_conv.forward(x, *blocks, bias, k, (3, 3), (1, 1), (1, 1), (1, 1), strict)


def resources(launch, architecture):
    """One row of the table."""
    kernel, arguments, constants, warps, stages = launch
    signature, values, attributes = {}, dict(constants), {}
    for i, (parameter, argument) in enumerate(zip(kernel.params, arguments)):
        if isinstance(argument, torch.Tensor):
            signature[parameter.name] = TYPES[argument.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif argument is None or argument == 1:  # as Triton itself specialises them
            values[parameter.name] = argument
        else:
            signature[parameter.name] = "i32"
            if argument % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(values, "constexpr")
    signature = {p.name: signature[p.name] for p in kernel.params}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 speaks of a default of 3.10
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = cuobjdump("--dump-resource-usage", cubin.name)
        code = cuobjdump("-sass", cubin.name)
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "threads": 32 * warps,
        **{name: count for name, count in counts.items() if count},
    }


def cuobjdump(*arguments):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def write_table():
    table = {"triton": triton.__version__}
    for architecture in ARCHITECTURES:
        rows = table[f"sm_{architecture}"] = {}
        for name, launch in launches(architecture).items():
            rows[name] = resources(launch, architecture)
            print(f"sm_{architecture}", name, rows[name], flush=True)
        # A row a line: a change of a number shows as that.
        text = json.dumps(table, indent=1)
        text = re.sub(
            r"\{\s+(\"registers\".*?)\s+\}",
            lambda m: "{" + " ".join(m[1].split()) + "}",
            text,
            flags=re.DOTALL,
        )
        TABLE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_table()
