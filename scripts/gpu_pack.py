"""Packs the tree, and as wheels what the server needs beside torch, for a GPU without a network.

    bash scripts/gpu_pack.sh [--python-version 3.12] [--output gpu_pack.tar.gz] [--limit 60MiB]
    bash scripts/gpu_pack.sh --wheels wheels    # no archive: the tree goes there some other way

The other machine's Python has torch, triton, transformers, tokenizers and safetensors. Everything
else that a server imports is downloaded for its version and packed beside the committed tree;
unpack it there and run `bash scripts/gpu_check.sh`. Wheels that are only wished for are left out,
largest first, when the limit would be passed; exits 1 when what is needed does not fit.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sglang.srt.utils.sizes import format_bytes, parse_bytes

ROOT = Path(__file__).resolve().parents[1]

# What `import sglang.launch_server` and its children load, with what those load.
NEEDED = (
    "anyio",
    "click",
    "gguf",
    "h11",
    "httptools",
    "idna",
    "jinja2",
    "llguidance",
    "markupsafe",
    "msgspec",
    "orjson",
    "prometheus-client",
    "psutil",
    "pyyaml",
    "pyzmq",
    "setproctitle",
    "sniffio",
    "starlette",
    "tqdm",
    "typing-extensions",
    "uvicorn",
    "uvloop",
)
# Used where they are there: the driver's calls (torch for CUDA brings them, too), tokenizer files.
# Version 12 of the bindings talks to drivers of CUDA 12 and 13.
WISHED = ("cuda-bindings<13", "cuda-pathfinder", "sentencepiece", "protobuf", "pillow")
_PLATFORMS = (
    "manylinux_2_31_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_17_x86_64",
)


def choose(needed: Mapping[str, int], wished: Mapping[str, int], limit: int) -> list[str]:
    """Names of files, from their sizes in bytes: all needed ones, and wished ones while they fit.

    The smallest wishes come first. Raises ValueError, naming the largest, when the needed ones
    alone pass the limit.
    """
    used = sum(needed.values())
    if used > limit:
        largest = max(needed, key=lambda name: needed[name])
        raise ValueError(
            f"what is needed takes {format_bytes(used)}, the limit is {format_bytes(limit)}; "
            f"the largest is {largest} with {format_bytes(needed[largest])}"
        )
    chosen = list(needed)
    for name in sorted(wished, key=lambda name: (wished[name], name)):
        if used + wished[name] > limit:
            break
        chosen.append(name)
        used += wished[name]
    return chosen


def download_command(names: Sequence[str], version: str, folder: Path) -> list[str]:
    """pip's command line that fetches wheels of `names`, and nothing that they depend on."""
    platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)),
        *("--only-binary=:all:", "--python-version", version, *platforms),
        *names,
    ]


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of the wheels in a folder, by name of the file."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}


def fetch(folder: Path, version: str, others: Mapping[str, int], limit: int) -> list[Path]:
    """Wheels in `folder`: those that are needed, and wished ones that fit beside `others`.

    Raises ValueError when what is needed does not fit.
    """
    needed, wished = folder / "needed", folder / "wished"
    subprocess.run(download_command(NEEDED, version, needed), check=True)
    for wish in WISHED:  # one by one: what does not exist for a version stops no other
        if subprocess.run(download_command([wish], version, wished), check=False).returncode != 0:
            print(f"gpu_pack: no wheel of {wish} for Python {version}", file=sys.stderr)
    chosen = choose({**sizes_of(needed), **others}, sizes_of(wished), limit)
    places = [place / name for name in chosen for place in (needed, wished)]
    return [place for place in places if place.exists()]


def pack(output: Path, version: str, limit: int) -> list[str]:
    """Write the archive; the wheels that it holds. Raises ValueError when it gets too large."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name, "tree.tar")
        archive = ["git", "-C", str(ROOT), "archive", "--format=tar", "-o", str(tree), "HEAD"]
        subprocess.run(archive, check=True)
        wheels = fetch(Path(name), version, {"the tree": tree.stat().st_size}, limit)
        with tarfile.open(tree, "a") as file:
            for wheel in wheels:
                file.add(wheel, f"wheels/{wheel.name}")
        with tarfile.open(output, "w:gz") as packed, tarfile.open(tree) as file:
            for member in file:
                packed.addfile(member, file.extractfile(member) if member.isfile() else None)
    return [wheel.name for wheel in wheels]


def fill(target: Path, version: str, limit: int) -> list[str]:
    """Put the wheels, and nothing else, into a folder; their names. Raises ValueError as `pack`."""
    with tempfile.TemporaryDirectory() as name:
        wheels = fetch(Path(name), version, {}, limit)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for wheel in wheels:
            shutil.copy(wheel, target)
    return [wheel.name for wheel in wheels]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="gpu_pack", description=__doc__)
    parser.add_argument("--python-version", default="3.12", help="of the other machine")
    parser.add_argument("--output", type=Path, default=Path("gpu_pack.tar.gz"))
    parser.add_argument("--wheels", type=Path, help="fill this folder, make no archive")
    parser.add_argument("--limit", type=parse_bytes, default=60 << 20)
    args = parser.parse_args(argv)
    try:
        if args.wheels is not None:
            wheels = fill(args.wheels, args.python_version, args.limit)
            print(f"{args.wheels}: {len(wheels)} wheels")
            return 0
        wheels = pack(args.output, args.python_version, args.limit)
    except ValueError as error:
        print(f"gpu_pack: {error}", file=sys.stderr)
        return 1
    size = format_bytes(args.output.stat().st_size)
    print(f"{args.output}: the tree and {len(wheels)} wheels, {size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
