"""Weights can be drawn a second time: a model that was built without memory becomes the one built with it."""

import pytest
import torch
from mixer_cases import CASES, mixer_of
from torch import nn

from deltaproduct.errors import UsageError
from deltaproduct.layers import MIXERS, get_mixer
from deltaproduct.layers.initialization import draw_time_steps, draw_weights
from deltaproduct.models import ModelConfig, SequenceModel

SIZES = {"hidden_size": 32, "num_heads": 2, "head_dim": 16}  # so large that PyTorch draws in blocks, too


def poison(module: nn.Module) -> nn.Module:
    """`to_empty`, and no value left that could be taken for a drawn one."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan)
    return module


def assert_equal(got: nn.Module, want: nn.Module) -> None:
    there, wanted = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (got, want))
    assert there.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(there[name], x), name
        assert x.isfinite().all(), name


def config(name: str, **options) -> ModelConfig:
    wanted = {"use_forget_gate": True, "use_output_gate": True, "beta_bias_init": 0.5}
    sizes = {"vocab_size": 9, "num_labels": 9, "num_hidden_layers": 2, "intermediate_size": 32}
    return ModelConfig.build(mixer=name, defaults=SIZES | wanted, **sizes | options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_mixer_is_drawn_again_as_its_constructor_draws_it(name, options):
    def build():
        return mixer_of(name, SIZES["hidden_size"], SIZES | options)

    torch.manual_seed(3)
    want = build()
    then = torch.get_rng_state()
    with torch.device("meta"):
        mixer = build()
    poison(mixer)
    torch.manual_seed(3)
    draw_weights(mixer)
    assert_equal(mixer, want)
    assert torch.equal(torch.get_rng_state(), then)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("std", [None, 0.05])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_without_memory_gets_the_weights_of_one_with_it(name, std, tied):
    sizes = {"vocab_size": 9, "num_labels": 9, "initializer_range": std, "tie_word_embeddings": tied}
    torch.manual_seed(5)
    want = SequenceModel(config(name, **sizes))
    with torch.device("meta"):
        model = SequenceModel(config(name, **sizes))
    poison(model)
    torch.manual_seed(5)
    assert model.init_weights() is model
    assert_equal(model, want)
    assert (model.head.weight is model.embedding.weight) == tied
    # A second time, from the same random state, on a model that has weights already.
    torch.manual_seed(5)
    assert_equal(model.init_weights(), want)


@pytest.mark.parametrize("name", MIXERS)
def test_every_module_draws_its_own_parameters_and_no_others(name):
    """PyTorch's convention, by which FSDP and others call `reset_parameters` on module after module, in any order."""
    model = SequenceModel(config(name, vocab_size=9, num_labels=9))
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        reset = getattr(module, "reset_parameters", None)
        assert reset is not None or not own, module_name
        if reset is None:
            continue
        before = {n: x.clone() for n, x in model.named_parameters()}
        with torch.no_grad():
            for x in own.values():
                x.fill_(torch.nan)
        reset()
        prefix = f"{module_name}." if module_name else ""
        for n, x in model.named_parameters():
            if n.removeprefix(prefix) in own and n.startswith(prefix):
                assert x.isfinite().all(), n
            else:
                assert torch.equal(x, before[n]), n


# What constructors have drawn since the first release, in this order. Committed results began from these numbers.
ORDERS = {
    "gated_deltanet": "q_proj k_proj v_proj b_proj q_conv1d k_conv1d v_conv1d a_proj A_log dt_bias g_proj o_proj",
    "mamba": "in_proj conv1d x_proj dt_proj out_proj",
    "mamba2": "in_proj conv1d dt_bias A_log out_proj",
    "slstm": "zo_proj if_proj recurrent conv1d o_proj",
    "ttt_linear": "q_proj k_proj v_proj lr_proj first_weight conv1d o_proj",
    "titans": "qkv_proj gate_proj conv1d g_proj o_proj",
    "gla": "q_proj k_proj v_proj gk_proj.0 gk_proj.1 g_proj o_proj",
}


def time_steps(count: int) -> torch.Tensor:
    dt = torch.empty(count).uniform_(-6.907755, -2.302585).exp()
    return dt + torch.log(-torch.expm1(-dt))


@pytest.mark.parametrize("name", ORDERS)
def test_a_seed_gives_the_weights_that_it_always_gave(name):
    torch.manual_seed(3)
    mixer = mixer_of(name, SIZES["hidden_size"], SIZES)
    torch.manual_seed(3)
    for path in ORDERS[name].split():
        owner, _, last = path.rpartition(".")
        found = getattr(mixer.get_submodule(owner), last)
        if isinstance(found, nn.Linear):
            linear = nn.Linear(found.in_features, found.out_features, found.bias is not None)
            assert torch.equal(found.weight, linear.weight), path
            if path == "dt_proj":
                assert torch.equal(found.bias, time_steps(found.out_features))
        elif "conv1d" in path:
            assert torch.equal(found.weight, torch.empty_like(found.weight).uniform_(-0.5, 0.5)), path  # 1/√4
        elif path == "A_log":
            assert torch.equal(found, torch.empty(found.numel()).uniform_(1, 16).log())
        elif path == "dt_bias":
            assert torch.equal(found, time_steps(found.numel()))
        elif path == "recurrent":
            assert torch.equal(found, torch.empty_like(found).uniform_(-0.25, 0.25))  # 1/√16
        else:
            assert torch.equal(found, torch.empty_like(found).normal_(std=0.02))


def test_time_steps_and_rates_are_spread_as_the_papers_say():
    torch.manual_seed(0)
    bias = torch.empty(20_000)
    draw_time_steps(bias)
    steps = torch.nn.functional.softplus(bias.double())
    assert steps.min() >= 0.99e-3 and steps.max() <= 0.101
    # Log-uniform: the mean of ln Δ is −4.605 and its deviation ln(100)/√12 = 1.33, over √20000: 0.0094.
    assert abs(steps.log().mean() + 4.605) <= 4 * 0.0094
    mixer = get_mixer("mamba2")(hidden_size=256, head_dim=1, expand=4)
    rates = mixer.A_log.exp()
    assert rates.min() >= 1 and rates.max() <= 16.001
    assert abs(rates.mean() - 8.5) <= 4 * 15 / 12**0.5 / 1024**0.5  # uniform: the mean of 1024 draws


def test_what_cannot_be_drawn_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(UsageError, match="Bare has parameters and no reset_parameters"):
        draw_weights(nn.Sequential(Bare()))
    with torch.device("meta"):
        model = SequenceModel(config("mamba", vocab_size=9, num_labels=9))
    with pytest.raises(UsageError, match=r"Embedding is on \"meta\".*to_empty") as refusal:
        model.init_weights()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("call", ["post_init", "initialize_weights"])
def test_transformers_draws_what_sequence_model_draws(name, call):
    """transformers goes from module to module in its own order: other numbers of the same distributions."""
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

    ours = config(name, vocab_size=60, num_labels=60, initializer_range=0.05)
    torch.manual_seed(5)
    seeded = [SequenceModel(ours) for _ in range(8)]
    torch.manual_seed(5)
    assert_equal(DeltaProductForCausalLM(DeltaProductConfig(**ours.to_dict())), seeded[0])  # not on "meta": the same
    with torch.device("meta"):
        model = DeltaProductForCausalLM(DeltaProductConfig(**ours.to_dict()))
    poison(model)
    getattr(model, call)()
    for parameter, x in model.named_parameters():
        drawn = torch.stack([m.get_parameter(parameter) for m in seeded]).detach()
        if torch.equal(drawn[0], drawn[1]):
            assert torch.equal(x, drawn[0]), parameter
            continue
        # A mean of n draws is off by 1/√n of their deviation; the deviation, of numbers without far tails, by less.
        known = 5 * (1 / x.numel() + 1 / drawn.numel()) ** 0.5 * drawn.std()
        assert x.isfinite().all() and not torch.equal(x, drawn[0]), parameter
        assert abs(x.mean() - drawn.mean()) <= known, parameter
        assert x.numel() < 30 or abs(x.std() - drawn.std()) <= known, parameter


def test_transformers_draws_anew_what_a_checkpoint_does_not_fill():
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

    ours = config("mamba2", vocab_size=60, num_labels=60).to_dict()
    with torch.device("meta"):
        model = DeltaProductForCausalLM(DeltaProductConfig(**ours))
    poison(model)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        mixer.A_log.fill_(7)
    mixer.A_log._is_hf_initialized = True  # as loading marks what it has filled
    model.initialize_weights()
    assert (mixer.A_log == 7).all()
    assert all(x.isfinite().all() for x in model.parameters())
    assert (model.blocks[1].mixer.A_log < 3).all()


def test_a_subclass_of_transformers_model_draws_its_own_additions_alone():
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

    class WithProbe(DeltaProductForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.probe = nn.Linear(32, 500)
            nn.init.constant_(self.probe.weight, 9)
            self.post_init()

    ours = config("gated_deltanet", vocab_size=9, num_labels=9, initializer_range=0.05).to_dict()
    torch.manual_seed(5)
    want = DeltaProductForCausalLM(DeltaProductConfig(**ours))
    torch.manual_seed(5)
    model = WithProbe(DeltaProductConfig(**ours))
    assert model.probe.weight.std().item() == pytest.approx(0.05, rel=0.05)  # 16,000 draws: 0.6%
    del model.probe
    assert_equal(model, want)


@pytest.mark.slow("ranks")
def test_fsdp_draws_divided_parameters():
    """FSDP's way to build a model that fits no process: "meta", divide, memory, draw."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        for name in ("gated_deltanet", "dense_linear_rnn", "mamba", "mamba2", "mlstm", "rwkv7", "slstm", "titans"):
            with torch.device("meta"):
                model = SequenceModel(config(name, vocab_size=9, num_labels=9))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            poison(model).init_weights()
            first, second = SequenceModel(model.config), SequenceModel(model.config)
            for parameter, x in model.named_parameters():
                x = x.full_tensor()
                assert x.isfinite().all(), (name, parameter)
                a, b = first.get_parameter(parameter), second.get_parameter(parameter)
                if torch.equal(a, b):
                    assert torch.equal(x, a), (name, parameter)
    finally:
        destroy_process_group()
