"""What kind of model an architecture is, where it is no decoder: named, so that nobody trains it by mistake."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from lisa_dist.config import UserError

# Encoders that transformers lends a causal head to; whether they are causal is for the configuration to say.
_ENCODERS = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
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


def check_is_decoder(path: str | None, architecture: PretrainedConfig) -> None:
    """Refuse what is no causal language model by the name of what it is.

    Args:
        path: ``model.path``, for the message.
        architecture: as the model's config.json says, whole.

    Raises:
        UserError: it is an encoder, an encoder-decoder, or a model of no text.
    """
    model_type = architecture.model_type
    key = f"model.path={path}: model_type={model_type} is"
    only = "only causal language models (decoders) can be trained"
    if architecture.is_encoder_decoder:
        raise UserError(f"{key} an encoder-decoder; {only}")
    if model_type in _ENCODERS and getattr(architecture, "is_decoder", None) is False:
        raise UserError(
            f"{key} an encoder, in which every token sees those after it; {only} (a decoder of this type says "
            "is_decoder=true in its config.json)"
        )
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in _own_code(architecture):
        return
    kind = next((kind for kind, names in _KINDS if model_type in names), None)
    if kind is not None:
        raise UserError(f"{key} {kind}; {only}")


def _own_code(architecture: PretrainedConfig) -> dict[str, str]:
    return getattr(architecture, "auto_map", None) or {}
