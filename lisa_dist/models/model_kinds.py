"""What kind of model an architecture is, where it is no decoder: named, so that nobody trains it by mistake."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from lisa_dist.config import UserError

# Models that transformers gives a causal head, though by default every token sees all others: the field and the
# value that make them causal. Encoders not named here have is_decoder. None: nothing does.
_CAUSAL_BY: dict[str, tuple[str, object] | None] = {
    "bert-generation": ("is_decoder", True),
    "xlm": ("causal", True),
    "xlnet": ("attn_type", "uni"),
    "cpmant": None,
}
_KINDS = (  # the first table that holds a model names it
    ("a model of text and images", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ("an encoder-decoder", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("a speech model", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    ("a speech model", auto.MODEL_FOR_CTC_MAPPING_NAMES),
    ("a speech model", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
    ("an encoder", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ("an encoder", auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
    ("a model of text and images", auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ("a vision model", auto.MODEL_FOR_IMAGE_MAPPING_NAMES),
    ("a vision model", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ("a vision model", auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES),
    ("a vision model", auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
    ("an encoder", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
)


def check_is_decoder(named: str, architecture: PretrainedConfig) -> None:
    """Refuse what is no causal language model by the name of what it is.

    ``architecture`` is what the config.json, or the key, that ``named`` names says, whole.

    Raises:
        UserError: it is an encoder, an encoder-decoder, or a model of no text.
    """
    model_type = architecture.model_type
    key = f"{named}: model_type={model_type} is"
    only = "only causal language models (decoders) can be trained"
    if architecture.is_encoder_decoder:
        raise UserError(f"{key} an encoder-decoder; {only}")
    masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    field = _CAUSAL_BY.get(model_type, ("is_decoder", True) if masked else ("model_type", model_type))
    name, value = field or ("", None)
    if field is None or getattr(architecture, name, value) != value:
        decoder = f" (a decoder of this type says {name}={str(value).lower()} in its config.json)" if field else ""
        raise UserError(f"{key} an encoder, or like one, in which tokens see those after them; {only}{decoder}")
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in _own_code(architecture):
        return
    kind = next((kind for kind, names in _KINDS if model_type in names), None)
    if kind is not None:
        raise UserError(f"{key} {kind}; {only}")


def _own_code(architecture: PretrainedConfig) -> dict[str, str]:
    return getattr(architecture, "auto_map", None) or {}
