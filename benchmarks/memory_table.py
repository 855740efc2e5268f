"""The prediction table of docs/memory.md: networks of public pipelines, built on the meta device.

    python benchmarks/memory_table.py            # all rows
    python benchmarks/memory_table.py SDXL Flux  # rows whose names begin so

No weights are read and nothing is measured. Configs are those of the public ``config.json`` files, as far as
shapes depend on them; what is left out has the default of its class. A row is diff-instruct on one image or
video at the usual size, in full in float32, and with adapters of rank 8 on a base in bfloat16, both with
checkpointing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from torch import Tensor

import distmatch as dm
from distmatch.diffusion.conditioning import FieldSpec
from distmatch.training.memory import Memory, predict_memory
from distmatch.training.options import DistillOptions

GB = 1e9


@dataclass(frozen=True)
class Row:
    """A network, and the shapes of a call for one sample.

    Attributes:
        kind: Its class in diffusers.
        config: What differs from the defaults of the class.
        shape: Of a sample, as the scheduler has it.
        fields: Shapes of the conditioning.
        size: The images or videos of these shapes.
        published: The number of parameters that its authors state, in words.
        constants: Further arguments.
        nested: The argument that a field belongs to, where it is a dictionary.
    """

    kind: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    fields: dict[str, tuple[int, ...]]
    size: str
    published: str
    constants: dict[str, Any] = field(default_factory=dict)
    nested: str = ""


def _wan(heads: int, ffn: int, layers: int, published: str) -> Row:
    config = {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers}
    fields = {"encoder_hidden_states": (512, 4096)}
    return Row("WanTransformer3DModel", config, (16, 21, 60, 104), fields, "832x480, 81 frames", published)


ROWS: dict[str, Row] = {
    "SD 1.5": Row(
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        (4, 64, 64),
        {"encoder_hidden_states": (77, 768)},
        "512x512",
        "860 M",
    ),
    "SDXL": Row(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        "1024x1024",
        "2.6 B",
        nested="added_cond_kwargs",
    ),
    "SD 3.5 medium": Row(
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        (16, 128, 128),
        {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
        "1024x1024",
        "2.5 B, with 0.23 B of positions, a buffer",
    ),
    "Flux.1-dev": Row(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        (4096, 64),
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,), "guidance": ()},
        "1024x1024",
        "12 B",
        {"img_ids": (4096, 3), "txt_ids": (512, 3)},
    ),
    "Qwen-Image": Row(
        "QwenImageTransformer2DModel",
        {"in_channels": 64, "out_channels": 16, "num_layers": 60, "joint_attention_dim": 3584},
        (4096, 64),
        {"encoder_hidden_states": (512, 3584)},
        "1024x1024",
        "20 B",
        {"img_shapes": [[(1, 64, 64)]]},
    ),
    "Wan2.1 1.3B": _wan(12, 8960, 30, "1.3 B"),
    "Wan2.1 14B": _wan(40, 13824, 40, "14 B"),
}


def teacher_of(row: Row, dtype: torch.dtype) -> Any:
    """The network of a row as a denoiser, on the meta device."""
    with torch.device("meta"):
        net = getattr(diffusers, row.kind)(**row.config)
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype)

    def call(module: Any, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        first = "sample" if row.kind.startswith("UNet") else "hidden_states"
        named: dict[str, Any] = {first: x, "timestep": t, **conditions}
        if row.nested:
            inner = {name: named.pop(name) for name in ("text_embeds", "time_ids")}
            named[row.nested] = inner
        for name, shape in row.constants.items():
            named[name] = torch.zeros(shape) if isinstance(shape, tuple) else shape
        found: Tensor = module(**named, return_dict=False)[0]
        return found

    spec = {name: FieldSpec(shape) for name, shape in row.fields.items()}
    null = dm.Conditioning({name: torch.zeros(1, *shape) for name, shape in row.fields.items()})
    return dm.as_denoiser(net, "condot", "flow", shape=row.shape, call=call, conditioning=spec, null=null)


def predicted(row: Row, train: str) -> Memory:
    """The prediction for one sample."""
    options = DistillOptions.of("diff-instruct")
    settings: Any = replace(options.settings, train=train, checkpointing=True)
    if train == "lora":
        settings = replace(settings, base_dtype="bfloat16")
    run = replace(options.run, batch=1, steps=20, device="cpu")
    dtype = torch.bfloat16 if train == "lora" else torch.float32
    return predict_memory(replace(options, settings=settings, run=run), teacher_of(row, dtype))


def main() -> None:
    """Prints the table."""
    print("| network | parameters | published | sample | full: weights, Adam | peak | ", end="")
    print("LoRA: base, adapters and their Adam | peak |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        if len(sys.argv) > 1 and not name.startswith(tuple(sys.argv[1:])):
            continue
        began = time.perf_counter()
        full, lora = predicted(row, "full"), predicted(row, "lora")
        base = lora.sizes["teacher"].weights
        count = full.sizes["teacher"].parameters
        print(
            f"| {name} | {count:,} | {row.published} | {row.size} | {full.weights / GB:.1f}, "
            f"{full.optimizer / GB:.1f} GB | {full.peak / GB:.1f} GB | {base / GB:.1f}, "
            f"{(lora.weights + lora.optimizer - base) / GB:.2f} GB | {lora.peak / GB:.1f} GB |",
            flush=True,
        )
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
