"""The tests that other packages could change, with some of them beside ours and with some left out:

    python tests/neighbours.py [arguments of pytest]
    python tests/neighbours.py --beside torchvision==0.28.0 --without "" [arguments of pytest]

What else is installed must change no result: transformers, for one, takes flash-linear-attention's kernels wherever it
finds them. Each run has a new environment, which links to the packages of this one, so that this one stays as it is.
Packages beside are installed without what they ask for: all of that is here, or has to be named.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints" / "cpu.txt"
BESIDE = "flash-linear-attention,fla-core,peft,tensorboard"
WITHOUT = "accelerate,datasets,tensorboardX"
# pytest, with Triton as a program finds it: conftest.py would have its library interpreted, with which flash-linear-
# attention cannot be imported, so that nobody would take its kernels.
PROGRAM = """
import contextlib, sys, pytest
with contextlib.suppress(ImportError):
    import triton.language
sys.exit(pytest.main(sys.argv[1:]))
"""


def entries_of(package: str) -> set[str]:
    """The names in site-packages that belong to an installed distribution; none if it is not installed."""
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        return set()
    return {file.parts[0] for file in files} - {".."}


def build(folder: Path, beside: list[str], without: list[str]) -> Path:
    """An environment in `folder` with this one's packages, less some and with others; returns its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    hidden = set().union(*map(entries_of, without))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name not in hidden:
            (site / entry.name).symlink_to(entry)
    for script in Path(sysconfig.get_path("scripts")).iterdir():
        # The first line of an installed program names the Python that it runs with.
        ours = f"#!{sys.executable}\n".encode()
        if script.is_file() and not script.is_symlink() and (text := script.read_bytes()).startswith(ours):
            (folder / "bin" / script.name).write_bytes(f"#!{python}\n".encode() + text.removeprefix(ours))
            (folder / "bin" / script.name).chmod(0o755)
    if beside:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "-c", str(CONSTRAINTS), "--target", str(site), *beside], check=True)
    return python


def run(beside: list[str], without: list[str], arguments: list[str]) -> int:
    """The exit status of the tests in such an environment."""
    print(f"beside: {', '.join(beside) or 'nothing'}; without: {', '.join(without) or 'nothing'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        python = build(Path(folder), beside, without)
        command = [str(python), "-c", PROGRAM, "-p", "no:cacheprovider", "-m", "neighbours and not slow", *arguments]
        return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def main() -> int:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description="Run tests in environments with other packages.", allow_abbrev=False)
    parser.add_argument("--beside", type=names, help=f"packages to install; {BESIDE} if neither option is given")
    parser.add_argument("--without", type=names, help=f"packages to leave out; {WITHOUT} if neither option is given")
    asked, arguments = parser.parse_known_args()
    if asked.beside is None and asked.without is None:
        return max(run(names(BESIDE), [], arguments), run([], names(WITHOUT), arguments))
    return run(asked.beside or [], asked.without or [], arguments)


if __name__ == "__main__":
    sys.exit(main())
