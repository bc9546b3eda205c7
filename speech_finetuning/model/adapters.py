"""Low-rank adapters: added, found, merged."""

from typing import Any

import torch
import transformers

from speech_finetuning.base.network import as_user_error


def add_adapters(
    model: transformers.WhisperForConditionalGeneration, rank: int, where: str
) -> None:
    """Low-rank adapters (Hu et al., ICLR 2022; by peft) on every linear layer of the blocks;
    nothing else is trained.
    The model stays a plain one, so that the Trainer saves, loads and continues it as ever. Raises:
    UserError."""
    with as_user_error(
        ImportError, where="--lora_rank needs peft", advice=" pip install -r requirements-lora.txt"
    ):
        import peft  # large, and only for this
    layers = where + r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=layers)
    peft.inject_adapter_in_model(config, model)


def adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers that have adapters, peft's LoraLayers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def merged_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of a plain model, adapters added to the layers that they belong
    to."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in adapted_layers(model).items():
        state[f"{name}.base_layer.weight"] = module.base_layer.weight + module.get_delta_weight(
            "default"
        )
    return {name.replace(".base_layer.", "."): tensor.detach() for name, tensor in state.items()}
