"""Finds the engine's shared library and describes its C interface; without the library, says why it is not there.

Two environment variables are for tests and diagnosis: DELTAPRODUCT_ENGINE names another build of the library,
DELTAPRODUCT_KERNELS the kernels to start with (avx512, avx2 or portable) in place of the best that the processor has;
`deltaproduct doctor` shows which are in use.
"""

import ctypes
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaproduct.errors import UsageError

NOT_BUILT = "not_built.txt"  # setup.py's reason for building nothing
KERNELS_VARIABLE = "DELTAPRODUCT_KERNELS"
NAME = "_engine"  # setup.py builds deltaproduct/ops/native/_engine.<platform's suffix>
MAX_CHUNKS_PER_STATE, SCAN_TOKENS, SCAN_CHANNELS = 8, 16, 64  # as in interface.h
LARGE = 4 << 20  # bytes
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class TensorField(ctypes.Structure):
    """`Tensor` of interface.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )

    @classmethod
    def of(cls, x: Tensor, *, per_step: bool) -> "TensorField":
        """x [B,T,N,heads,…] where `per_step`, else [B,T,heads,…]; the last dimension of a vector must be contiguous."""
        strides = x.stride()
        step, head = (strides[2], strides[3]) if per_step else (0, strides[2])
        return cls(x.data_ptr(), strides[0], strides[1], step, head, DTYPE_CODES[x.dtype])


_SIZES = ("batch", "length", "steps", "heads", "value_heads", "key_dim", "value_dim", "sequences")
_CUTS = ("wide", "chunk_tokens", "chunks_per_state", "value_blocks", "segments", "threads")
_TENSORS = ("q", "k", "v", "beta", "g", "o", "d_o", "d_q", "d_k", "d_v", "d_beta", "d_g")
_STATES = ("initial_state", "final_state", "states", "d_final_state", "d_initial_state")


class EngineCall(ctypes.Structure):
    """`EngineCall` of interface.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("cu_seqlens", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        ("norm_eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in _CUTS),
        *((name, TensorField) for name in _TENSORS),
        *((name, ctypes.c_void_p) for name in _STATES),
    )


class Instruction(ctypes.Structure):
    """`Instruction` of interface.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("after", "batch", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("w", "x", "u", "y", "z")),
        ("call", ctypes.POINTER(EngineCall)),
        ("a", ctypes.c_double),
    )


class SelectiveScan(ctypes.Structure):
    """`SelectiveScan` of interface.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "state_size", "sequences")),
        ("cu_seqlens", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("allow_neg_eigval", "threads")),
        *((name, TensorField) for name in ("x", "dt", "b", "c", "y", "d_y", "d_x", "d_dt")),
        *((name, ctypes.c_void_p) for name in ("a", "initial_state", "final_state", "states", "d_final_state")),
        *((name, ctypes.c_void_p) for name in ("d_b", "d_c", "d_a", "d_initial_state")),
    )


class Empty(Protocol):
    """`torch.empty` for a result on the device of `like`, and of its dtype where none is named."""

    def __call__(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor: ...


class Engine:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name in ("deltaproduct_kernels", "deltaproduct_kernels_here"):
            getattr(self._library, name).restype = ctypes.c_char_p
        mirrors: dict[str, type[ctypes.Structure]] = {
            "problem": EngineCall,
            "instruction": Instruction,
            "selective_scan": SelectiveScan,
        }
        for name in mirrors:
            getattr(self._library, f"deltaproduct_{name}_bytes").restype = ctypes.c_int64
        self._library.deltaproduct_use_openmp.argtypes = [ctypes.c_void_p]
        self._library.deltaproduct_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._library.deltaproduct_play.argtypes = [ctypes.POINTER(Instruction), ctypes.c_int64, ctypes.c_int64]
        if any(getattr(self._library, f"deltaproduct_{n}_bytes")() != ctypes.sizeof(m) for n, m in mirrors.items()):
            raise OSError(f"{path} belongs to another version of this package")
        self.openmp = _openmp_of_process()
        if self.openmp is not None:
            function = ctypes.cast(self.openmp.GOMP_parallel, ctypes.c_void_p)
            self._library.deltaproduct_use_openmp(function)
        if kernels := os.environ.get(KERNELS_VARIABLE):
            try:
                self.use_kernels(kernels)
            except UsageError as e:
                raise UsageError(f"{e} Set {KERNELS_VARIABLE} to one of these, or unset it.") from None

    @property
    def kernels(self) -> str:
        """The kernels in use: avx512, avx2 or portable."""
        return self._library.deltaproduct_kernels().decode()

    def kernels_here(self) -> list[str]:
        """The kernels that this processor can run, best first."""
        found: list[str] = []
        while name := self._library.deltaproduct_kernels_here(ctypes.c_int32(len(found))):
            found.append(name.decode())
        return found

    def use_kernels(self, name: str) -> None:
        """Use other kernels than the best, for the whole process; `UsageError` if the processor cannot run them."""
        if self._library.deltaproduct_use_kernels(name.encode()) != 0:
            here = ", ".join(self.kernels_here())
            raise UsageError(f"There are no kernels {name!r} for this processor; there are {here}.")

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """torch.empty for a result. Where it is large, its first writing would otherwise be a fifth page faults."""
        x = like.new_empty(shape, dtype=dtype)
        if x.nbytes >= LARGE:
            self._library.deltaproduct_large_pages(x.data_ptr(), x.nbytes)
        return x

    def forward(self, call: EngineCall) -> None:
        self._call(self._library.deltaproduct_forward, ctypes.byref(call))

    def backward(self, call: EngineCall) -> None:
        self._call(self._library.deltaproduct_backward, ctypes.byref(call))

    def selective_scan(self, call: SelectiveScan, *, reverse: bool) -> None:
        """The forward pass, or with `reverse` the backward."""
        self._call(self._library.deltaproduct_selective_scan, ctypes.byref(call), ctypes.c_int32(reverse))

    def run_program(self, program: "ctypes.Array[Instruction]", threads: int) -> None:
        self._call(self._library.deltaproduct_play, program, len(program), threads)

    @staticmethod
    def _call(function: Any, *arguments: Any) -> None:
        if function(*arguments) != 0:
            raise MemoryError("the native CPU engine could not allocate its working memory")


def _openmp_of_process() -> ctypes.CDLL | None:
    """The OpenMP runtime that PyTorch has loaded, if it offers GOMP_parallel (GNU's and LLVM's do); nothing is loaded.

    The engine runs its work on that runtime's threads. Without one it starts threads of its own for each call.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return None
    files = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    runtimes = (path for path in files if "omp" in Path(path).name)
    torch_folder = str(Path(torch.__file__).parent)
    for path in sorted(runtimes, key=lambda p: not p.startswith(torch_folder)):
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


def _library_file() -> Path | None:
    if path := os.environ.get("DELTAPRODUCT_ENGINE"):
        return Path(path)
    built = sorted(Path(__file__).parent.glob(NAME + ".*"))
    return next((p for p in built if p.suffix in (".so", ".dylib")), None)


def _load() -> tuple[Engine | None, str]:
    path = _library_file()
    if path is None:
        not_built = Path(__file__).parent / NOT_BUILT
        why = not_built.read_text(encoding="utf-8").strip() if not_built.exists() else "it needs GCC or Clang"
        return None, f"the native CPU engine was not built when this package was installed ({why})"
    try:
        return Engine(path), ""
    except (OSError, AttributeError) as e:
        return None, f"the native CPU engine does not load: {e}"


# Once, on import: a compiled graph can read what is known, but cannot load a library.
ENGINE, WHY_NO_ENGINE = _load()
