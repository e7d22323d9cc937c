"""flash-linear-attention's own models and operators beside ours, on a CPU, in Triton's interpreter.

A program of its own, because the interpreter has to be chosen before Triton is imported: `python fla_kernels.py FOLDER`
prints the largest difference of each comparison, relative to the largest number compared, as one JSON object.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn import functional as F
from triton.runtime import autotuner

SMALL = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_heads": 2,
         "initializer_range": 0.3}  # fmt: skip
HEADS = {"head_dim": 16, "expand_v": 2.0}
CASES = {
    "DeltaNet": {"model_type": "delta_net", "use_gate": True, "allow_neg_eigval": True},
    "Gated DeltaNet": HEADS | {"model_type": "gated_deltanet", "num_v_heads": 4, "allow_neg_eigval": True},
    "Gated DeltaNet, no output gate": HEADS | {"model_type": "gated_deltanet", "use_gate": False, "conv_size": 3},
    "Gated DeltaProduct": HEADS
    | {"model_type": "gated_deltaproduct", "num_householder": 3, "use_forget_gate": True, "allow_neg_eigval": True},
    "DeltaProduct": HEADS
    | {
        "model_type": "gated_deltaproduct", "num_householder": 2, "use_output_gate": False, "allow_neg_eigval": True,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def use_first_configuration() -> None:
    """Autotuning measures time on a GPU; without one, the first of a kernel's configurations is as right as any."""
    original = autotuner.Autotuner.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.configs = self.configs[:1]

    autotuner.Autotuner.__init__ = init


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def compare_models(folder: Path) -> dict[str, float]:
    """Logits of its model saved by transformers and read here, then of ours written here and read by its class."""
    import fla.models

    from deltaproduct.models.fla.checkpoint import from_fla_config, read_fla, to_fla_config, write_fla

    found = {}
    tokens = torch.randint(3, (1, 10))
    for name, case in CASES.items():
        written = to_fla_config(from_fla_config(SMALL | case))
        cls = getattr(fla.models, written["architectures"][0])
        its = cls(cls.config_class(**written)).eval()
        its.save_pretrained(folder / name)
        model = read_fla(folder / name)
        write_fla(model, folder / f"{name}, ours")
        back = cls.from_pretrained(folder / f"{name}, ours").eval()
        with torch.no_grad():
            want = its(input_ids=tokens, use_cache=False).logits
            found[f"{name}: read"] = difference(model(tokens)[0], want)
            found[f"{name}: written"] = difference(back(input_ids=tokens, use_cache=False).logits, want)
    return found


def compare_operators() -> dict[str, float]:
    """The recurrent kernels, which take float32, in the regime of state tracking: two directions of keys, β near 2."""
    from fla.ops.delta_rule import fused_recurrent_delta_rule
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    from deltaproduct.ops import fla_api

    tokens, heads, value_heads, size = 20, 2, 4, 16
    q = torch.randn(1, tokens, heads, size)
    k = torch.randn(2, size)[torch.randint(2, (1, tokens, heads))]
    v = torch.randn(1, tokens, value_heads, size)
    beta = 1.9 + 0.1 * torch.rand(1, tokens, value_heads)
    options = {"scale": 0.3, "output_final_state": True, "use_qk_l2norm_in_kernel": True,
               "cu_seqlens": torch.tensor([0, 7, tokens])}  # fmt: skip
    state = torch.randn(2, value_heads, size, size)
    gated = {"g": F.logsigmoid(5 + torch.randn(1, tokens, value_heads)), "initial_state": state}
    raw = {"g": torch.randn(1, tokens, value_heads), "initial_state": state, "A_log": torch.randn(value_heads),
           "dt_bias": torch.randn(value_heads), "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
           "allow_neg_eigval": True, "state_v_first": True}  # fmt: skip
    plain = {"q": q, "k": k, "v": v[:, :, :heads].contiguous(), "beta": beta[:, :, :heads].contiguous()}
    calls = {
        "delta rule": (fused_recurrent_delta_rule, fla_api.fused_recurrent_delta_rule, plain),
        "gated delta rule": (fused_recurrent_gated_delta_rule, fla_api.fused_recurrent_gated_delta_rule,
                             {"q": q, "k": k, "v": v, "beta": beta} | gated),
        "gates in the kernel": (fused_recurrent_gated_delta_rule, fla_api.fused_recurrent_gated_delta_rule,
                                {"q": q, "k": k, "v": v, "beta": beta} | raw),
    }  # fmt: skip
    found = {}
    for name, (its, ours, inputs) in calls.items():
        for part, want, got in zip(
            ("output", "state"), its(**inputs, **options), ours(**inputs, **options), strict=True
        ):
            assert got.shape == want.shape and got.dtype == want.dtype
            found[f"{name}: {part}"] = difference(got, want)
    return found


if __name__ == "__main__":
    use_first_configuration()
    torch.manual_seed(0)
    print(json.dumps(compare_models(Path(sys.argv[1])) | compare_operators()))
