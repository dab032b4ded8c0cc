"""Build flash-attn 2.8 for one architecture in the time that a GPU is lent for: 36 kernels in place of 72.

    python tools/gpu/build_flash2.py objects SOURCES BUILD --torch-include DIR [--arch 90] [--jobs 2]
    python tools/gpu/build_flash2.py link SOURCES BUILD

SOURCES is the unpacked source distribution, which isn't changed. `objects` compiles the kernels into BUILD: it needs
nvcc and torch's headers (a wheel's `torch/include`), and no GPU; an object that is there is kept. `link` runs where the
result will, with that torch: it compiles what is bound to Python and makes BUILD/package, which goes on PYTHONPATH.

Both half precisions, forward, split forward and backward; fewer with `--head-dims` and `--dtypes`, and `run.py --keep`
then names what was built. There are kernels for head_dim 64, 128 and 256, to which
others are rounded up, as the whole build rounds them to the next of 32, 64, 96, 128, 192 and 256; none for ALiBi; and
of the tiles that the backward chooses between by shared memory, those of an A100 or H100 alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROUNDED = {"32": "64", "96": "128", "192": "256"}
FLAGS = [
    *("-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"),
    *(f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")),
    *("-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-Xcompiler", "-fPIC"),
]
DEFINES = ["-DFLASHATTENTION_DISABLE_ALIBI", "-DTORCH_EXTENSION_NAME=flash_attn_2_cuda"]


def prepared(sources: Path, build: Path) -> Path:
    """Copy the extension's sources, with fewer head dims and tiles to choose from."""
    copy = build / "flash_attn"
    if copy.exists():
        return copy
    shutil.copytree(sources / "csrc" / "flash_attn", copy)
    edits = {
        "src/static_switch.h": [(rf"kHeadDim = {dim};", f"kHeadDim = {to};") for dim, to in ROUNDED.items()],
        "flash_api.cpp": [
            (
                re.escape("round_multiple(head_size, head_size <= 128 ? 32 : 64)"),
                "(head_size <= 64 ? 64 : head_size <= 128 ? 128 : 256)",
            )
        ],
        "src/flash_bwd_launch_template.h": [
            (r"if \(max_smem_per_block >= (?:144|176) \* 1024\)", "if constexpr (true)")
        ],
        "src/flash_fwd_launch_template.h": [(r"if \(is_sm8x\)", "if constexpr (false)")],
    }
    for name, pairs in edits.items():
        text = (copy / name).read_text()
        for pattern, new in pairs:
            text, count = re.subn(pattern, new, text)
            if not count:
                raise SystemExit(f"{name} has nothing like {pattern}: these aren't the sources this was written for")
        (copy / name).write_text(text)
    return copy


def includes(sources: Path, copy: Path, torch_include: Path) -> list[str]:
    """Give the folders that headers come from."""
    api = torch_include / "torch" / "csrc" / "api" / "include"
    folders = (copy, copy / "src", sources / "csrc" / "cutlass" / "include", torch_include, api)
    return [*(f"-I{folder}" for folder in folders), f"-I{sysconfig.get_path('include')}"]


def objects(
    sources: Path,
    build: Path,
    torch_include: Path,
    arch: int,
    jobs: int,
    dims: list[int],
    dtypes: list[str],
) -> None:
    """Compile the kernels; the smaller come first."""
    copy = prepared(sources, build)
    (build / "objects").mkdir(parents=True, exist_ok=True)
    names = [
        f"flash_{way}_hdim{dim}_{dtype}{causal}_sm80"
        for dim in dims
        for dtype in dtypes
        for way in ("fwd", "fwd_split", "bwd")
        for causal in ("", "_causal")
    ]

    def one(name: str) -> None:
        made = build / "objects" / f"{name}.o"
        if made.exists():
            return
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command = ["nvcc", "-c", str(copy / "src" / f"{name}.cu"), "-o", f"{made}.part", *target, *FLAGS, *DEFINES]
        subprocess.run([*command, *includes(sources, copy, torch_include)], check=True, capture_output=True)
        Path(f"{made}.part").rename(made)
        print(name, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, names))


def link(sources: Path, build: Path) -> None:
    """Compile what is bound to Python, and link it with the kernels into a package."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

    copy, package = prepared(sources, build), build / "package"
    bound = build / "objects" / "flash_api.o"
    headers = [f"-I{folder}" for folder in include_paths("cuda")]
    options = [
        "-O2",
        "-std=c++17",
        "-fPIC",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *DEFINES,
    ]
    here = includes(sources, copy, Path(torch.__file__).parent / "include")
    subprocess.run(["g++", "-c", str(copy / "flash_api.cpp"), "-o", str(bound), *options, *here, *headers], check=True)
    shutil.copytree(sources / "flash_attn", package / "flash_attn", dirs_exist_ok=True)
    # The old beta of FlashAttention-4 in it would shadow another.
    shutil.rmtree(package / "flash_attn" / "cute", ignore_errors=True)
    version = re.search(r"^Version: (\S+)", (sources / "PKG-INFO").read_text(), re.MULTILINE)
    assert version is not None
    facts = package / f"flash_attn-{version[1]}.dist-info"
    facts.mkdir(exist_ok=True)
    shutil.copy(sources / "PKG-INFO", facts / "METADATA")
    library = package / f"flash_attn_2_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [f"-L{folder}" for folder in library_paths("cuda")] + [f"-L{CUDA_HOME}/lib64"]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10_cuda", "-ltorch_cuda", "-lcudart"]
    kernels = sorted(str(path) for path in (build / "objects").glob("*.o"))
    subprocess.run(["g++", "-shared", "-o", str(library), *kernels, *folders, *libraries], check=True)
    print(package)


def main() -> None:
    """Compile the kernels, or link them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("objects", "link"))
    parser.add_argument("sources", type=Path)
    parser.add_argument("build", type=Path)
    parser.add_argument("--torch-include", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256], choices=(64, 128, 256))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp16"], choices=("bf16", "fp16"))
    options = parser.parse_args()
    if options.step == "link":
        link(options.sources, options.build)
    elif options.torch_include is None:
        sys.exit("objects needs --torch-include: the folder torch/include of the torch that the package is for")
    else:
        wanted = options.head_dims, options.dtypes
        objects(options.sources, options.build, options.torch_include, options.arch, options.jobs, *wanted)


if __name__ == "__main__":
    main()
