"""What the tests of peers against loops have in common: inputs, mixers all of whose parameters show, and nearness."""

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
