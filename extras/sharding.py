"""--shard: weights, gradients and optimizer state split over the ranks (FSDP2)."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from distributed import Ranks
from storage import UserError


def shard(model: PreTrainedModel, where: str, precision: str, ranks: Ranks) -> torch.nn.Module:
    """Split a student over the ranks, layer by layer; where: gpu, or cpu (main memory).

    Raises UserError without ranks, and with fp16, whose scaler does not know of shards.
    """
    if not dist.is_initialized() or precision == "fp16":
        raise UserError(
            "--shard splits the student over ranks: start it with torchrun, and not with "
            "--precision fp16 (bf16 works)"
        )
    mesh = dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world_size,))
    options: dict[str, Any] = {"mesh": mesh}
    if precision == "bf16":  # weights travel and compute in bf16, gradients sum in fp32
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if where == "cpu":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    layer_classes = model._no_split_modules or ()  # Hugging Face's names of them
    for module in model.modules():
        if type(module).__name__ in layer_classes:
            fully_shard(module, **options)
    return fully_shard(model, **options)
