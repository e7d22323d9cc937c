"""Builds the native CPU engine; all else about the package is in pyproject.toml.

The engine is a plain shared library that is loaded through ctypes: it includes no header of Python's or PyTorch's, so
one build serves every version of both. Where it cannot be built, the package installs all the same and computes with
PyTorch; the reason is kept beside the sources, for `deltaproduct doctor`.
"""

import os
import platform
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

FOLDER = "deltaproduct/ops/native"
REASON = "not_built.txt"  # read by deltaproduct/ops/native/library.py
COMMON = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
X86_KERNELS = {
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
}


class BuildEngine(build_ext):
    """Compiles every set of kernels with flags of its own, and survives a machine that has no compiler."""

    def build_extension(self, ext):
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = path.parent / REASON
        try:
            self._build(path)
            reason.unlink(missing_ok=True)
        except (BaseError, CompileError, LinkError, OSError) as e:
            why = " ".join(str(e).split()) or type(e).__name__
            reason.write_text(why + "\n", encoding="utf-8")
            self.warn(f"the native CPU engine was not built ({why}); the package works without it, more slowly")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        built, target = Path(self.build_lib) / FOLDER / REASON, Path(FOLDER) / REASON
        target.unlink(missing_ok=True)
        if built.exists():
            target.write_bytes(built.read_bytes())

    def _build(self, path):
        if self.compiler.compiler_type == "msvc":
            raise OSError("it needs GCC or Clang, and this is Microsoft's compiler")
        flags = COMMON + shlex.split(os.environ.get("DELTAPRODUCT_CXXFLAGS", ""))  # of `make sanitize`, for one
        sources = {"engine.cpp": [], "kernels_portable.cpp": []}
        both = "arm64" in os.environ.get("ARCHFLAGS", "") or "arm64" in " ".join(self.compiler.compiler_so)
        if platform.machine().lower() in ("x86_64", "amd64") and not both:
            sources |= X86_KERNELS
            flags.append("-DDELTAPRODUCT_X86")

        def compiled(source):
            arguments = flags + sources[source]
            return self.compiler.compile([f"{FOLDER}/{source}"], output_dir=self.build_temp, extra_postargs=arguments)

        Path(self.build_temp, FOLDER).mkdir(parents=True, exist_ok=True)  # or two would want to make it at once
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compiled, sources) for name in names]
        self.compiler.link_shared_object(
            objects, str(path), target_lang="c++", build_temp=self.build_temp, extra_postargs=["-pthread", *flags]
        )


engine = Extension(
    "deltaproduct.ops.native._engine",
    sources=[f"{FOLDER}/{name}" for name in ("engine.cpp", "kernels_portable.cpp", *X86_KERNELS)],
    depends=[str(p) for p in Path(FOLDER).glob("*.h")],
    optional=True,
)
setup(ext_modules=[engine], cmdclass={"build_ext": BuildEngine})
