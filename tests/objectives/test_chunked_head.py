"""The chunked loss equals the plain loss of every family, in value and in gradients."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lisa_dist.config import ModelConfig, UserError
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.loading import restore_buffers
from lisa_dist.objectives import chunked_cross_entropy
from lisa_dist.objectives.chunked_cross_entropy import ChunkedCrossEntropy, LogitTransform
from lisa_dist.objectives.chunked_head import install_loss_head
from tests.support.families import FAMILIES, meta_model, tiny_config

LLAMA_SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
GPTJ_SHAPE = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
OPT_SHAPE = {"hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CASES = {name: tiny_config(name) for name in FAMILIES} | {
    "cohere": AutoConfig.for_model("cohere", **LLAMA_SHAPE, **TOKENS, logit_scale=0.0625),
    "granite": AutoConfig.for_model("granite", **LLAMA_SHAPE, **TOKENS, logits_scaling=8.0),
    "gptj": AutoConfig.for_model("gptj", **GPTJ_SHAPE, **TOKENS),
    "opt": AutoConfig.for_model("opt", **OPT_SHAPE, **TOKENS, word_embed_proj_dim=48),
    "opt with projections": AutoConfig.for_model("opt", **OPT_SHAPE, **TOKENS, word_embed_proj_dim=32),
}


def _model(config: PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms away from their neutral start
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 128, (2, 11), generator=generator)
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[1, 7:] = -100
    return input_ids, labels


@pytest.mark.parametrize("name", CASES)
def test_equals_the_models_own_loss(name: str) -> None:
    plain = _model(copy.deepcopy(CASES[name]))
    chunked = copy.deepcopy(plain)
    transform = install_loss_head(
        chunked, find_layers(chunked), chunk_tokens=5
    )  # 22 tokens: chunks of 5, the last of 2
    assert transform is not None, "fell back to the plain loss"
    input_ids, labels = _batch()
    count = int((labels[:, 1:] != -100).sum())
    expected = plain(input_ids=input_ids, labels=labels).loss * count  # Hugging Face's loss is the mean
    expected.backward()
    loss = chunked(input_ids=input_ids, labels=labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    for (parameter_name, ours), theirs in zip(chunked.named_parameters(), plain.parameters()):
        if theirs.grad is None:  # an expert that no token chose
            assert ours.grad is None or not ours.grad.any()
            continue
        scale = theirs.grad.abs().max()
        assert (ours.grad - theirs.grad).abs().max() <= 2e-5 * scale + 1e-7, parameter_name


def test_hidden_states_in_float32_are_cast_to_a_head_in_bfloat16_as_the_model_does() -> None:
    plain = _model(AutoConfig.for_model("mamba", vocab_size=128, hidden_size=16, num_hidden_layers=1))
    chunked, (input_ids, labels) = copy.deepcopy(plain), _batch()
    assert install_loss_head(chunked, find_layers(chunked), chunk_tokens=5) is not None
    plain.bfloat16(), chunked.bfloat16()  # as weights are stored once the model is built
    expected = plain(input_ids=input_ids, labels=labels).loss * (labels[:, 1:] != -100).sum()
    loss = chunked(input_ids=input_ids, labels=labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_finds_on_meta_what_it_finds_with_weights(name: str) -> None:
    model, on_meta = _model(copy.deepcopy(CASES[name])), build_meta_model(ModelConfig(), copy.deepcopy(CASES[name]))
    assert install_loss_head(on_meta, find_layers(on_meta), 16) == install_loss_head(model, find_layers(model), 16)


def test_transforms_are_those_of_the_configuration() -> None:
    expected = {
        "llama": LogitTransform(),
        "gemma2": LogitTransform(cap=3.0),
        "cohere": LogitTransform(scale=0.0625),
        "granite": LogitTransform(scale=1 / 8),
    }
    for name, transform in expected.items():
        model = _model(copy.deepcopy(CASES[name]))
        assert install_loss_head(model, find_layers(model), 16) == transform


def test_whole_model_runs_under_fake_tensors() -> None:
    """As the planner does: built and installed on meta, then run without memory."""
    model = meta_model("gemma2")
    install_loss_head(model, find_layers(model), 4)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        restore_buffers(model)
        tokens = torch.zeros(2, 6, dtype=torch.long)
        model(input_ids=tokens, labels=tokens).backward()
    assert all(isinstance(parameter.grad, FakeTensor) for parameter in model.parameters() if parameter.grad is not None)
    assert isinstance(model.lm_head.weight.grad, FakeTensor)


def test_unknown_head_falls_back_to_the_models_own() -> None:
    plain = _model(tiny_config("llama"))
    plain.lm_head.register_forward_hook(lambda module, inputs, output: output)
    model = copy.deepcopy(plain)

    class Squared(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states).square()

    model.lm_head.__class__ = Squared
    assert install_loss_head(model, find_layers(model), 4) is None
    input_ids, labels = _batch()
    logits = plain(input_ids=input_ids).logits.square()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model(input_ids=input_ids, labels=labels), expected)


def test_without_labels_the_model_answers_and_generates_as_before() -> None:
    plain = _model(tiny_config("gemma2"))
    model = copy.deepcopy(plain)
    install_loss_head(model, find_layers(model), 4)
    input_ids, _ = _batch()
    with torch.no_grad():
        assert torch.equal(model(input_ids=input_ids).logits, plain(input_ids=input_ids).logits)
        answers = [m.generate(input_ids, max_new_tokens=5, do_sample=False, use_cache=True) for m in (plain, model)]
    assert torch.equal(answers[0], answers[1])


def test_frozen_head_gets_no_gradient_and_no_grad_computes_none() -> None:
    model = _model(tiny_config("llama"))
    install_loss_head(model, find_layers(model), 4)
    model.lm_head.requires_grad_(False)
    input_ids, labels = _batch()
    model(input_ids=input_ids, labels=labels).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is not None
    with torch.no_grad():
        assert not model(input_ids=input_ids, labels=labels).requires_grad


def test_incoming_gradient_multiplies() -> None:
    grads = []
    for factor in (1.0, 0.125):
        model = _model(tiny_config("llama"))
        install_loss_head(model, find_layers(model), 4)
        input_ids, labels = _batch()
        (model(input_ids=input_ids, labels=labels) * factor).backward()
        grads.append(model.lm_head.weight.grad)
    torch.testing.assert_close(grads[1], grads[0] / 8)


def test_no_label_tokens_gives_zero_loss_and_zero_gradients() -> None:
    model = _model(tiny_config("llama"))
    install_loss_head(model, find_layers(model), 4)
    input_ids, labels = _batch()
    loss = model(input_ids=input_ids, labels=torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_bfloat16_loss_and_weight_gradient_are_summed_in_float32() -> None:
    """1500 rows: a bfloat16 running sum would be off by percents, for one ulp of 8192 is 64."""
    torch.manual_seed(0)
    hidden = torch.randn(1500, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 64, (1500,))
    loss = ChunkedCrossEntropy.apply(hidden, weight, None, targets, LogitTransform(), 8, False, True)
    loss.backward()
    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    expected = F.cross_entropy(hidden64 @ weight64.T, targets, reduction="sum")
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-3 * expected.item()
    assert (weight.grad.double() - weight64.grad).norm() < 5e-3 * weight64.grad.norm()
    assert (hidden.grad.double() - hidden64.grad).norm() < 1e-2 * hidden64.grad.norm()


ROWS, CHUNK, VOCABULARY, WIDTH = 64, 8, 1000, 64  # all logits are as many as the weight has elements


class Made(TorchDispatchMode):
    """The operators that make or change a tensor, with the tensor's dtype and number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            name = operator.overloadpacket.__name__
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.seen += [(name, tensor.dtype, tensor.numel()) for tensor in tensors]
        return result

    def of(self, elements: int) -> Counter[tuple[str, torch.dtype]]:
        return Counter((name, dtype) for name, dtype, count in self.seen if count == elements)


def made_by_the_head(dtype: torch.dtype, trained: bool) -> tuple[Made, torch.Tensor]:
    """What loss and gradients make, where the weight takes its gradient in float32, as one with a master does."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH, dtype=dtype), requires_grad=trained)
    weight.grad_dtype = torch.float32
    targets = torch.randint(0, VOCABULARY, (ROWS,))
    with Made() as made:
        ChunkedCrossEntropy.apply(hidden, weight, None, targets, LogitTransform(), CHUNK, False, True).backward()
    return made, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_in_full_and_products_are_added_where_the_gradient_is(dtype: torch.dtype) -> None:
    made, weight = made_by_the_head(dtype, trained=True)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    largest = VOCABULARY * WIDTH
    assert max(count for _, _, count in made.seen) == largest, "ROWS x VOCABULARY would be as many"
    expected = {("mul_", torch.float32): 1}
    if dtype == torch.float32:
        expected |= {("mm", dtype): 1, ("addmm_", dtype): ROWS // CHUNK - 1}
    else:
        expected["zeros", torch.float32] = 1
    assert made.of(largest) == expected, "no copy in another dtype, no product of the weight's size"
    others = max(count for _, _, count in made.seen if count < largest)
    assert others == CHUNK * VOCABULARY, "of a chunk's logits, or an eighth of the weight"


def test_a_frozen_head_costs_no_product_for_its_weight() -> None:
    made, weight = made_by_the_head(torch.bfloat16, trained=False)
    assert weight.grad is None
    assert not made.of(VOCABULARY * WIDTH)
    products = sum(name in ("mm", "addmm_", "addmm") for name, _, _ in made.seen)
    assert products == 2 * ROWS // CHUNK, "logits and the gradient of the hidden states"


def test_logits_are_passed_over_few_times() -> None:
    made, _ = made_by_the_head(torch.bfloat16, trained=False)
    chunks = ROWS // CHUNK
    assert made.of(CHUNK * VOCABULARY) == {
        ("mm", torch.bfloat16): chunks,
        ("_to_copy", torch.float32): chunks,
        ("_log_softmax", torch.float32): chunks,
        ("empty_like", torch.bfloat16): chunks,
        ("exp", torch.bfloat16): chunks,
        ("scatter_", torch.bfloat16): chunks,  # of one element a row
    }


@pytest.mark.parametrize("trained", [True, False])
def test_a_chunks_logits_and_gradient_are_gone_when_the_next_ones_are_made(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    for owner, name in ((chunked_cross_entropy.F, "linear"), (chunked_cross_entropy, "_gradient")):
        original = getattr(owner, name)

        def spy(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> torch.Tensor:
            if name == "linear":
                assert not any(reference() is not None for reference in made)
            result: torch.Tensor = original(*args, **kwargs)
            made.append(weakref.ref(result))
            return result

        monkeypatch.setattr(owner, name, spy)
    hidden, weight = torch.randn(ROWS, WIDTH, requires_grad=trained), torch.randn(VOCABULARY, WIDTH)
    inputs: Any = hidden, weight, None, torch.arange(ROWS), LogitTransform(), CHUNK, False, trained
    ChunkedCrossEntropy.apply(*inputs)
    assert len(made) == (2 if trained else 1) * ROWS // CHUNK


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_router_loss_is_added_for_each_label_token(name: str) -> None:
    plain = _model(tiny_config(name, router_aux_loss_coef=1.0))
    model = copy.deepcopy(plain)
    install_loss_head(model, find_layers(model), 4, router_aux_loss=True)
    input_ids, labels = _batch()
    count = int((labels[:, 1:] != -100).sum())
    padding_left_out = torch.ones_like(labels)
    padding_left_out[1, 7:] = 0
    given = {"input_ids": input_ids, "labels": labels}
    expected = plain(**given, output_router_logits=True, attention_mask=padding_left_out)
    torch.testing.assert_close(model.train()(**given), expected.loss * count)
    without = plain(**given).loss
    assert (expected.loss - without).abs() > 1e-3, "the router loss is too small to be seen"
    assert model(input_ids=input_ids, labels=torch.full_like(labels, -100)) == 0
    torch.testing.assert_close(model.eval()(**given), without * count)  # a held-out loss is the cross-entropy alone


@pytest.mark.parametrize("family", ["llama", "doge"])
def test_router_loss_of_a_dense_model_and_of_one_with_a_loss_of_its_own_kind_is_refused(family: str) -> None:
    doge = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "is_moe": True, "vocab_size": 64}
    model = _model(tiny_config("llama") if family == "llama" else AutoConfig.for_model("doge", **doge))
    with pytest.raises(UserError, match=r"model\.router_aux_loss"):
        install_loss_head(model, find_layers(model), 4, router_aux_loss=True)
