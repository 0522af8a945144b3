"""Keys of ``model.*``: which network is trained and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lisa_dist.config.errors import UserError, check_auto_or_count, check_choices
from lisa_dist.config.paths import BUILTIN_PREFIX


@dataclass
class ModelConfig:
    name: str = "custom"  # the preset's name, for records
    path: str | None = None  # a Hugging Face directory, a hub id, or builtin:demo
    tokenizer: str | None = None  # directory or hub id of the tokenizer; null: model.path
    init: str | None = None  # pretrained or random; null: random for builtin: models, else pretrained
    architecture: dict[str, Any] = field(
        default_factory=dict
    )  # fields of the Hugging Face config; lets plan run without weights
    blocks: str | None = None  # dotted path of the stack of blocks where it is not found by structure
    quantization: str = "none"  # storage of the frozen base under adapters: none, int8, nf4
    trust_remote_code: bool = False  # run Python code that comes with the model
    attention: str = "auto"  # auto (packed rows without a mask), sdpa, eager, varlen, flash_attention_2, flex_attention
    loss_chunk: str = "auto"  # tokens whose logits the loss head holds at a time; auto: 4096 in place on a GPU, or 1024
    kernels: str = "auto"  # what runs blocks and loss: eager, liger, compile; auto: on a GPU the faster, on a CPU eager
    router_aux_loss: bool = False  # in training add a mixture-of-experts model's router loss

    def __post_init__(self) -> None:
        attention = ["auto", "sdpa", "eager", "varlen", "flash_attention_2", "flex_attention"]
        check_choices("model", self, init=["pretrained", "random"], quantization=["none", "int8", "nf4"])
        check_choices("model", self, attention=attention, kernels=["auto", "eager", "liger", "compile"])
        check_auto_or_count("model.loss_chunk", self.loss_chunk)

    @property
    def named(self) -> str:
        """What says which model it is, for the begin of a sentence."""
        return "model.architecture" if self.path is None else f"model.path={self.path}"

    def check_is_named(self) -> None:
        """Raise :class:`UserError` where neither a path nor the fields of an architecture say which model."""
        if self.path is None and not self.architecture:
            raise UserError(
                "model.path=null: name a Hugging Face directory, a hub id or builtin:demo, or choose a preset"
            )

    def chunk_tokens(self, in_place: bool) -> int:
        """Return ``loss_chunk``, with the default resolved: as much memory whether or not logits become gradients."""
        if self.loss_chunk != "auto":
            return int(self.loss_chunk)
        return 4096 if in_place else 1024  # 2 bytes a logit and 8

    @property
    def own_attention(self) -> str | None:
        """The kernel of transformers that is to be used throughout; None: the model's own choice."""
        return None if self.attention in ("auto", "varlen") else self.attention

    @property
    def initialization(self) -> str:
        """``pretrained`` or ``random``, with the default resolved."""
        if self.init is not None:
            return self.init
        return "random" if self.path is not None and self.path.startswith(BUILTIN_PREFIX) else "pretrained"
