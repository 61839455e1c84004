# SPDX-License-Identifier: BSD-3-Clause
"""What each CUDA kernel takes: registers, shared memory, matrix and copy instructions, from its
machine code, which needs nvcc and Triton's cuobjdump, and no GPU. (On sm_90 static_shared has the
1 KB that the system keeps for itself in every block.)

    python -m emulator.resources --update       rewrites resources.json from the sources
"""

import argparse
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from emulator.build import CACHE, CSRC, HERE, ROOT, contents, digest, is_for_sm90a, make

TABLE = HERE / "resources.json"
FLAGS = ["-std=c++20", f"-I{CSRC}", f"-I{CSRC / 'core'}", "--expt-relaxed-constexpr"]
REGISTERS = 65536  # of a multiprocessor: the most that a block's threads can have together

# In the table where a kernel has them.
INSTRUCTIONS = {
    "HMMA": "mma.sync",
    "HGMMA": "wgmma",
    "LDSM": "ldmatrix",
    "LDGSTS": "cp.async",
    "UTMALDG": "TMA load",
    "UTMASTG": "TMA store",
}


def sources():
    """The project's kernels, and the two whole ones among the emulator's own."""
    return [*sorted(CSRC.glob("core/**/*.cu")), *sorted((HERE / "kernels").glob("gemm_*.cu"))]


def architectures(source):
    return ["90a"] if is_for_sm90a(source) else ["80", "90a"]


def missing():
    """Why no table can be made here, or None."""
    if not shutil.which("nvcc"):
        return "the resource table needs nvcc"
    if not cuobjdump():
        return "the resource table needs cuobjdump, which Triton's package has"
    return None


@functools.cache
def cuobjdump():
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    found = (shutil.which("cuobjdump", path=str(folder)) for folder in folders)
    return next(filter(None, found), None) or shutil.which("cuobjdump")


@functools.cache
def nvcc_release():
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", told)[1]


def cubin(source, architecture):
    headers = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh")]
    headers += source.parent.glob("*.h")
    key = digest(nvcc_release(), FLAGS, source.read_bytes(), *contents(headers))
    target = CACHE / f"{source.stem}-sm_{architecture}-{key}.cubin"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return make(target, ["nvcc", *FLAGS, code, "-cubin", source, "-o", f"{{}}/{target.name}"])


def dump(*options):
    command = [cuobjdump(), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(name):
    told = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    return re.sub(r"\(anonymous namespace\)::|\([^()]*\)$|^void ", "", told.strip())


def times(word, text):
    """How often a word stands in megabytes of text, most of which do not have it."""
    return len(re.findall(rf"\b{word}\b", text)) if word in text else 0


def parts(heading, text):
    """{name in a heading: what stands between it and the next}"""
    _, *found = re.split(heading, text, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2]))


def kernels(path):
    """name: row, for the kernels of a cubin."""
    usage = r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    most_threads = r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s*(0x\w+) (0x\w+) (0x\w+)"
    code = parts(r"^\s*Function : (\S+)$", dump("-sass", path))
    info = parts(r"^\.(\w\S*).*$", dump("-elf", path))
    rows = {}
    for name, registers, stack, shared, local in re.findall(usage, dump("-res-usage", path)):
        bounds = re.search(most_threads, info[f"nv.info.{name}"])
        x, y, z = (int(n, 16) for n in bounds.groups()) if bounds else (1024, 1, 1)
        row = {"registers": int(registers), "threads": x * y * z, "static_shared": int(shared)}
        found = {i: times(i, code[name]) for i in INSTRUCTIONS}
        local_accesses = times("LDL", code[name]) + times("STL", code[name])
        row["local"] = int(stack) + int(local) + local_accesses
        rows[demangled(name)] = row | {i: count for i, count in found.items() if count}
    return dict(sorted(rows.items()))


def table():
    """The table of all sources: file, architecture, kernel, row."""
    return {
        str(source.relative_to(ROOT)): {
            f"sm_{a}": kernels(cubin(source, a)) for a in architectures(source)
        }
        for source in sources()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"rewrite {TABLE.name}")
    if reason := missing():
        parser.error(reason)
    text = json.dumps({"nvcc": nvcc_release(), "kernels": table()}, indent=1) + "\n"
    # One line a kernel.
    row = re.compile(r'\{\s*("registers"[^}]*?)\s*\}')
    text = row.sub(lambda match: f"{{{' '.join(match[1].split())}}}", text)
    if parser.parse_args().update:
        TABLE.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
