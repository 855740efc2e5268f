"""Tokenizers, text encoders and autoencoders of tiny pipelines, of random weights: nothing is downloaded."""

from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SIDE = 16  # height and width of images, in pixels
WORDS = ("a an the red blue green small large cat dog house tree river runs sleeps in on under").split()  # noqa: SIM905
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"


def tokenizer(length: int = 12) -> Any:
    """One id a word, with a token at the end, padded at the right."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
    )
    made.chat_template = CHAT
    return made


TEXT = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def clip(*, projection: bool = False, width: int = 16, act: str = "quick_gelu") -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=12,
        projection_dim=width,
        hidden_act=act,
        **TEXT,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5(width: int = 16, kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        d_model=width,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        **{**TEXT, "decoder_start_token_id": 0},
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def autoencoder(channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIDE,
        **options,
    )


def unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def decoder_only(kind: str, *, model: str = "Model", width: int = 16, **options: Any) -> Any:
    """A language model whose hidden states are the condition."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
        **TEXT,
        **options,
    )
    return getattr(transformers, f"{kind}{model}")(config)
