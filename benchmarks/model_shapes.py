"""Models of real shapes with random weights, built from configurations: nothing is downloaded.

Dropout is off, so that a step costs the same whatever is drawn, and the frozen model is as cheap as it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH, LLAMA_TOKENS, LLAMA_HIDDEN, LLAMA_VOCABULARY = 2, 512, 768, 1000


class ModelShape(NamedTuple):
    """A model and a batch for it.

    Attributes:
        name: as in the tables. build: makes the model, float32, with random weights.
        inputs: makes the keyword arguments of a training step, float32 where they are floating; those get gradients,
            so that a frozen model runs its backward pass too.
        loss: the scalar to differentiate, from what the model returns.
        tokens: positions in the batch (of an image model: patches, of the UNet: latent pixels).
        targets: by name, which layers are adapted, as PEFT's `target_modules`.
        decode: makes the keyword arguments of one inference call for one token, if the model generates.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    loss: Callable[[Any], Tensor]
    tokens: int
    targets: Mapping[str, list[str]]
    decode: Callable[[], dict[str, Any]] | None = None


def _hidden_loss(output: Any) -> Tensor:
    return output.last_hidden_state.float().square().mean()


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    # A small vocabulary: the head, which nothing adapts, would hide what the adapters cost.
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=LLAMA_HIDDEN,
            intermediate_size=2048,
            num_hidden_layers=6,
            num_attention_heads=12,
            num_key_value_heads=12,
            vocab_size=LLAMA_VOCABULARY,
        )
    )


def _llama_inputs() -> dict[str, Tensor]:
    return {
        "inputs_embeds": 0.02 * torch.randn(BATCH, LLAMA_TOKENS, LLAMA_HIDDEN),
        "labels": torch.randint(0, LLAMA_VOCABULARY, (BATCH, LLAMA_TOKENS)),
    }


LLAMA = ModelShape(
    name="llama",
    build=_llama,
    inputs=_llama_inputs,
    loss=lambda output: output.loss,
    tokens=BATCH * LLAMA_TOKENS,
    targets={
        "qv": ["q_proj", "v_proj"],
        "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    decode=lambda: {"input_ids": torch.tensor([[1]]), "use_cache": False},
)


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=1000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


MINILM = ModelShape(
    name="minilm",
    build=_minilm,
    inputs=lambda: {"inputs_embeds": 0.02 * torch.randn(8, 128, 384)},
    loss=_hidden_loss,
    tokens=8 * 128,
    targets={"qv": ["query", "value"], "all": ["query", "key", "value", "dense"]},
)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        attn_implementation="eager",
    )
    return ViTModel(config, add_pooling_layer=False)


VIT = ModelShape(
    name="vit",
    build=_vit,
    inputs=lambda: {"pixel_values": torch.randn(8, 3, 224, 224)},
    loss=_hidden_loss,
    tokens=8 * 197,
    targets={"qv": ["q_proj", "v_proj"], "all": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]},
)


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(320, 640),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
    )


UNET = ModelShape(
    name="unet",
    build=_unet,
    inputs=lambda: {
        "sample": torch.randn(1, 4, 32, 32),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    },
    loss=lambda output: output.sample.float().square().mean(),
    tokens=32 * 32,
    targets={"qv": ["to_q", "to_v"], "attention": ["to_q", "to_k", "to_v", "to_out.0"]},
)


SHAPES = (LLAMA, MINILM, VIT, UNET)
