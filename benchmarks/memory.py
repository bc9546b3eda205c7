"""What a training step keeps in GPU memory, calculated without a GPU and without weights.

    python benchmarks/memory.py

torch's fake tensors run Whisper's forward pass under bfloat16 autocast (float16 takes as much) and
the bytes that it saves for the backward pass are counted, once for one and once for two rows of
30 s: the difference is a row's. Prints the table of docs/memory.md. Counted, in GB of
10^9 bytes:

- a parameter: 4 for its weight, 8 for AdamW's two averages (with --optim adafactor next to none);
  4 for its gradient, which the forward pass finds there only if gradients are accumulated;
- a row: what the forward pass saves, autocast's half-precision copies of the weights among it;
- a target token: 16 for each entry of the vocabulary (the logits in half precision, as float, and
  their gradients), when the forward pass is over;
- with gradient checkpointing also one layer of every row, which is computed again; by then the
  logits are gone and most gradients there;
- with --lora_rank a parameter takes its weight and the copy (6), one of the adapters 18; what the
  adapters save for the backward pass is left out, which checkpointing bounds to one layer's;
- 1 for CUDA itself and for what the allocator loses between blocks.

The peak is at the end of the forward pass or in the backward pass, whichever is larger. Without
CUDA's share it was within 5 % of what an H100 allocated in four cases (gpu_acceptance.md).
"""

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import WhisperConfig, WhisperForConditionalGeneration

VOCABULARY = 51_866
CUDA_IN_GB = 1  # CUDA itself, and what the allocator loses between blocks
LORA_RANK = 32
SIZES = {  # width, heads, encoder layers, decoder layers, mel bins
    "tiny": (384, 6, 4, 4, 80),
    "small": (768, 12, 12, 12, 80),
    "medium": (1024, 16, 24, 24, 80),
    "large-v3": (1280, 20, 32, 32, 128),
    "large-v3-turbo": (1280, 20, 32, 4, 128),
}
RECIPES = [  # card in GB, model, rows at a time, accumulation, checkpointing, optimiser
    (16, "small", 16, 2, True, "adamw"),
    (16, "medium", 8, 4, True, "adafactor"),
    (16, "large-v3", 2, 16, True, "lora"),
    (24, "medium", 8, 4, True, "adamw"),
    (24, "large-v3-turbo", 8, 4, True, "adamw"),
    (24, "large-v3", 4, 8, True, "adafactor"),
    (24, "large-v3", 8, 4, True, "lora"),
    (40, "small", 16, 2, False, "adamw"),
    (40, "medium", 16, 2, True, "adamw"),
    (40, "large-v3-turbo", 16, 2, True, "adamw"),
    (40, "large-v3", 8, 4, True, "adamw"),
    (80, "small", 32, 1, False, "adamw"),
    (80, "medium", 16, 2, False, "adamw"),
    (80, "large-v3-turbo", 16, 2, False, "adamw"),
    (80, "large-v3", 32, 1, True, "adamw"),
]


class SavedBytes(dict):
    """The tensors that autograd keeps, by their storage; parameters are there anyway."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage()._cdata) not in self.parameters:
            self[key] = tensor  # kept, so that no other storage gets its address
        return tensor

    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.values())


def unchanged(value: Any) -> Any:
    return value


@functools.cache
def saved_by_forward(
    name: str, num_rows: int, num_tokens: int, with_checkpointing: bool
) -> tuple[int, int]:
    """Parameters of the model, and the bytes that its forward pass saves for a batch."""
    width, heads, encoder_layers, decoder_layers, n_mels = SIZES[name]
    sides = {"attention_heads": heads, "ffn_dim": 4 * width}
    both = {
        f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()
    }
    layers = {
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "use_cache": False,
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = WhisperConfig(
            vocab_size=VOCABULARY, d_model=width, num_mel_bins=n_mels, **layers, **both
        )
        model = WhisperForConditionalGeneration(config).train()
        model.model.encoder.embed_positions.requires_grad_(False)  # as the script does
        if with_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        saved = SavedBytes(model)
        features = torch.zeros(num_rows, n_mels, 3000)
        ids = torch.zeros(num_rows, num_tokens, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.pack, unchanged),
            torch.autocast("cpu", torch.bfloat16),
        ):
            model(input_features=features, decoder_input_ids=ids)
        return model.num_parameters(), saved.total()


def saved_by_rows(name: str, num_tokens: int, with_checkpointing: bool) -> tuple[int, int]:
    """Bytes that the forward pass saves: for each row of 30 s, and once for all of them (copies of
    the weights in half precision)."""
    one = saved_by_forward(name, 1, num_tokens, with_checkpointing)[1]
    two = saved_by_forward(name, 2, num_tokens, with_checkpointing)[1]
    of_row = two - one
    return of_row, one - of_row


def adapter_parameters(name: str) -> int:
    """Of rank LORA_RANK on the attentions' four projections and the two feed-forward layers of
    every block."""
    width, _, encoder_layers, decoder_layers, _ = SIZES[name]
    attention, feed_forward = 4 * 2 * width, 2 * (width + 4 * width)
    blocks = encoder_layers * (attention + feed_forward) + decoder_layers * (
        2 * attention + feed_forward
    )
    return LORA_RANK * blocks


def peak_in_gb(
    name: str,
    num_rows: int,
    num_tokens: int,
    *,
    with_checkpointing: bool,
    optimiser: str,
    is_accumulated: bool,
) -> float:
    """The larger of what there is when the forward pass ends and when the last layers' backward
    pass does. is_accumulated: over several micro-batches."""
    num_parameters = saved_by_forward(name, 1, num_tokens, with_checkpointing)[0]
    if optimiser == "lora":
        num_adapted = adapter_parameters(name)
        standing = 4 * num_parameters + 12 * num_adapted
        gradients = 4 * num_adapted
        copies = 2 * (num_parameters + num_adapted)
    else:
        standing = (12 if optimiser == "adamw" else 4) * num_parameters
        gradients = 4 * num_parameters
        copies = 0
    of_row, copies_saved = saved_by_rows(name, num_tokens, with_checkpointing)
    logits = 16 * num_tokens * VOCABULARY
    forward = standing + max(copies, copies_saved) + num_rows * (of_row + logits)
    if is_accumulated:
        forward += gradients
    of_layer = saved_by_rows(name, num_tokens, False)[0] // SIZES[name][2]
    backward = standing + max(copies, copies_saved) + gradients + num_rows * of_layer
    return CUDA_IN_GB + max(forward, backward) / 1e9


def main() -> None:
    print("| card | model | batch | accumulation | and | 64 tokens a row | 448 tokens a row |")
    print("|---|---|---|---|---|---|---|")
    for card, name, rows, accumulation, checkpointing, optimiser in RECIPES:
        more = "" if checkpointing else "`--gradient_checkpointing False`"
        more += "`--optim adafactor`" if optimiser == "adafactor" else ""
        more += f"`--lora_rank {LORA_RANK}`" if optimiser == "lora" else ""
        peaks = [
            peak_in_gb(
                name,
                rows,
                tokens,
                with_checkpointing=checkpointing,
                optimiser=optimiser,
                is_accumulated=accumulation > 1,
            )
            for tokens in (64, 448)
        ]
        typical, longest = (f"{peak:.0f} GB" for peak in peaks)
        print(
            f"| {card} GB | {name} | {rows} | {accumulation} | {more} | {typical} | {longest} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
