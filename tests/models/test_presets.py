"""The presets have the sizes of the published models."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lisa_dist.config import ModelConfig
from lisa_dist.models.architecture import build_meta_model, read_architecture
from lisa_dist.models.layer_map import find_layers

PRESETS = Path(__file__).parents[2] / "conf" / "model"

# Parameters to the last one: the safetensors figures of each model's page on the Hugging Face hub (of the language
# model alone, each shared weight once), and the figure in billions that the model's paper or card states.
PUBLISHED = {
    "llama2_7b": (6_738_415_616, 6.7),  # arXiv 2302.13971, table 2: the same shape
    "llama2_13b": (13_015_864_320, 13.0),  # ibid.
    "llama2_70b": (68_976_648_192, 69),  # card: 69B
    "llama3_8b": (8_030_261_248, 8.03),  # card: 8.03B
    "llama3_70b": (70_553_706_496, 70.6),  # card: 70.6B
    "llama3_1_8b": (8_030_261_248, 8.03),
    "llama3_1_70b": (70_553_706_496, 70.6),
    "llama3_1_405b": (405_853_388_800, 405),  # arXiv 2407.21783: 405B; the card 406B
    "mistral_7b": (7_248_023_552, 7.25),  # card: 7.25B
    "mixtral_8x7b": (46_702_792_704, 46.7),  # mistral.ai/news/mixtral-of-experts: 46.7B
    "qwen3_0_6b": (596_049_920, 0.6),  # cards of Qwen3: 0.6B, 1.7B, 4.0B, 8.2B, 14.8B, 32.8B, rounded
    "qwen3_1_7b": (1_720_574_976, 1.72),
    "qwen3_4b": (4_022_468_096, 4.0),
    "qwen3_8b": (8_190_735_360, 8.2),
    "qwen3_14b": (14_768_307_200, 14.8),
    "qwen3_32b": (32_762_123_264, 32.8),
    "gemma3_1b": (999_885_952, 1.00),  # arXiv 2503.19786, table 1: embeddings and the rest, 302M + 698M
    "gemma3_4b": (3_880_263_168, 3.88),  # 675M + 3209M
    "gemma3_12b": (11_766_034_176, 11.8),  # 1012M + 10759M
    "gemma3_27b": (27_009_346_304, 27.0),  # 1416M + 25600M
    "phi4": (14_659_507_200, 14.7),  # card: 14.7B
    "tinyllama": (1_100_048_384, 1.1),  # card: 1.1B
    "gpt2": (124_439_808, 0.124),  # card: 124M
}


def _preset(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))


def test_every_preset_with_an_architecture_is_compared() -> None:
    written = {file.stem for file in PRESETS.glob("*.yaml") if _preset(file.stem).architecture}
    assert written == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_count(name: str) -> None:
    config = _preset(name)
    assert config.name == name
    model = build_meta_model(config, read_architecture(config, without_weights=True))
    count = sum(parameter.numel() for parameter in model.parameters())
    exact, billions = PUBLISHED[name]
    assert count == exact
    assert count / 1e9 == pytest.approx(billions, rel=0.01)
    layers = find_layers(model)
    assert len(layers.blocks) == model.config.num_hidden_layers
    assert layers.tied == model.config.tie_word_embeddings


def test_llama2_70b_by_hand() -> None:
    """The figures of the memory law: 80 blocks of 0.856 billion, 69.0 billion in all."""
    hidden, inner, vocabulary, blocks, key_value = 8192, 28672, 32000, 80, 8 * 128
    attention = 2 * hidden * hidden + 2 * hidden * key_value
    block = attention + 3 * hidden * inner + 2 * hidden
    config = _preset("llama2_70b")
    layers = find_layers(build_meta_model(config, read_architecture(config, without_weights=True)))
    assert sum(parameter.numel() for parameter in layers.blocks[0].parameters()) == block == 855_654_400
    assert blocks * block + 2 * vocabulary * hidden + hidden == PUBLISHED["llama2_70b"][0]
