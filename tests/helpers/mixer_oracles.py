"""What the tests of mixers against loops have in common: inputs, mixers all of whose parameters show, and nearness.

And other people's code as it is in plain PyTorch, whatever else is installed beside it.
"""

import functools
import importlib
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch

D, H, K = 12, 2, 4  # hidden size, heads, size of a head


def noise(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(mixer, **options):
    """With weights of size 1/√D wherever initialisation leaves constants, so that every parameter shows."""
    torch.manual_seed(0)
    built = mixer(D, H, K, **options).double()
    for i, p in enumerate(built.parameters()):
        p.data += 0.2 * noise(*p.shape, seed=100 + i)
    return built


def assert_close(got, want, tolerance):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# Packages of kernels that transformers calls in place of its own PyTorch code where it can import them. Where there is
# no GPU, they can be imported and not called.
KERNELS = ("fla", "causal_conv1d", "mamba_ssm", "flash_attn", "xlstm", "mlstm_kernels")


@functools.cache
def plain_modeling(name: str) -> ModuleType:
    """transformers' models.NAME.modeling_NAME in PyTorch alone; the test skips where transformers has no such model.

    transformers chooses while that module is imported. So it is imported anew here, as if no kernels were installed,
    and nobody else finds this copy of it.
    """
    package = pytest.importorskip(f"transformers.models.{name}")
    import transformers.utils

    module = f"transformers.models.{name}.modeling_{name}"
    hidden = {*KERNELS, *(m for m in sys.modules if m.partition(".")[0] in KERNELS)}
    # (mock.patch.dict would also take back what else is imported meanwhile, and parts of PyTorch load only once.)
    before = {m: sys.modules.pop(m) for m in (module, *hidden) if m in sys.modules}
    sys.modules.update(dict.fromkeys(hidden))
    attribute = vars(package).get(f"modeling_{name}")
    try:
        with mock.patch.object(transformers.utils, "is_xlstm_available", bool):
            return importlib.import_module(module)
    finally:
        for m in (module, *hidden):
            sys.modules.pop(m, None)
        sys.modules.update(before)
        vars(package).pop(f"modeling_{name}", None)
        if attribute is not None:
            setattr(package, f"modeling_{name}", attribute)


@functools.cache
def importable(module: str) -> str | None:
    """Why a module that is installed cannot be imported here, in one line; None if it can.

    flash-linear-attention runs much code of Triton's when it is imported, and there are versions of both that do not
    go together, or not with a Triton that is interpreted (see conftest.py).
    """
    try:
        importlib.import_module(module)
    except Exception as e:
        return f"{module} cannot be imported: {type(e).__name__} {e}".strip()
    return None
