"""A LLaVA with parts that transformers' own has no place for, trained with foveate.

It needs torch and transformers from 5.23 on, and timm where the encoder is timm's:

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER)

All but projector and head is LlavaForConditionalGeneration itself, so what works with a Llava works with it.

Shapes: I images, N features of an image, n visual tokens of an image, C width of the encoder, D of the LLM.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, __version__

if int(__version__.split(".")[0]) < 5:
    raise ImportError(f"transformers {__version__} names the weights of encoders otherwise: install 5.23 or newer")


class FoveateLlavaConfig(LlavaConfig):
    """A Llava's, and what is different.

    `projector_depth`: linear layers, GELU between them. `projector_factor`: squares of factor × factor neighbouring
    features are joined first. `projector_normalize`: visual tokens get L2 norm 1. `skipped_features`: leading features
    of an image that are no patches and are not used. `encoder_blocks`: how many blocks a timm encoder keeps.
    `logit_scale`, `head_bias`: of the LLM's head.
    """

    model_type = "foveate_llava"

    projector_depth: int = 2
    projector_factor: int = 1
    projector_normalize: bool = False
    skipped_features: int = 0
    encoder_blocks: int | None = None
    logit_scale: float = 1.0
    head_bias: bool = False


class FoveateProjector(nn.Module):
    """Encoder features `[I, N, C]`, or timm's `[I, C, h, w]`, to visual tokens `[I, n, D]`."""

    def __init__(self, config: FoveateLlavaConfig) -> None:
        super().__init__()
        self.factor, self.normalize = config.projector_factor, config.projector_normalize
        self.skipped = config.skipped_features
        vision: Any = config.vision_config
        text: Any = config.text_config
        width, bias = text.hidden_size, config.multimodal_projector_bias
        layers: list[nn.Module] = [nn.Linear(vision.hidden_size * self.factor**2, width, bias=bias)]
        for _ in range(config.projector_depth - 1):
            layers += [nn.GELU(), nn.Linear(width, width, bias=bias)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)
        features = features[:, self.skipped :]
        if self.factor > 1:
            side = math.isqrt(features.shape[1]) // self.factor
            squares = features.unflatten(1, (side, self.factor, side, self.factor)).transpose(2, 3)
            features = squares.flatten(3, 5).flatten(1, 2)
        tokens = self.layers(features)
        if self.normalize:
            # the sum of D squares would lose digits in half precision
            wide = tokens.float() if tokens.dtype.itemsize < 4 else tokens
            tokens = F.normalize(wide, dim=-1).to(tokens.dtype)
        return tokens


class FoveateHead(nn.Linear):
    """States to logits, times a constant."""

    def __init__(self, config: FoveateLlavaConfig) -> None:
        text: Any = config.text_config
        super().__init__(text.hidden_size, text.vocab_size, bias=config.head_bias)
        self.scale = config.logit_scale

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states * self.scale)


class FoveateLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with another projector, another head, and any encoder of transformers or timm."""

    config_class = FoveateLlavaConfig

    def __init__(self, config: FoveateLlavaConfig) -> None:
        super().__init__(config)
        if config.encoder_blocks is not None:
            timm_model = self.model.vision_tower.timm_model
            timm_model.prune_intermediate_layers([config.encoder_blocks - 1], prune_norm=True, prune_head=True)
        self.model.multi_modal_projector = FoveateProjector(config)
        self.lm_head = FoveateHead(config)
        self.post_init()
