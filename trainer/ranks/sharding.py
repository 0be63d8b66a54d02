"""Language models whose layers are cut into shards, one on each rank (FSDP2).

Only the decoder's layers are cut. Embeddings, the output layer, adapters, projectors and towers
stay whole on every rank, and their gradients are summed before a step, as without shards. So the
output layer's kernels and adapters that come and go never meet a shard.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from plait.errors import ConfigError


def shard_layers(language: Any, mesh: Any) -> Any:
    """Cut the decoder's layers over the mesh; gradients of shards are SUMS over ranks."""
    mesh = mesh["data_parallel"]
    decoder = language.get_decoder()
    layers = list(decoder.layers)
    adapters = {p for name, p in language.named_parameters() if ".lora_" in name}
    cut = {p for layer in layers for p in layer.parameters()} - adapters
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    whole = {p for p in language.parameters() if p not in cut}
    inside = {p for layer in layers for p in layer.parameters()}
    fully_shard(decoder, mesh=mesh, ignored_params=whole | inside)
    for module in (decoder, *layers):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return language


class Guard:
    """Lets the layers of a model go on where one has failed, so that no rank waits for another.

    A layer that fails gives its input back and the others after it do the same: they only take
    part in gathering their shards. `check` raises what went wrong once all of them are through.
    """

    def __init__(self, language: Any) -> None:
        self._error: Exception | None = None
        for layer in language.get_decoder().layers:
            layer.forward = self._guarded(layer.forward)

    def _guarded(self, forward: Any) -> Any:
        def guarded(hidden: Tensor, *args: Any, **options: Any) -> Any:
            if self._error is None:
                try:
                    return forward(hidden, *args, **options)
                except Exception as error:
                    self._error = error
            return hidden

        return guarded

    def check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def refuse_unsharded(spec: Any) -> None:
    """
    Raises:
        ConfigError: weights that cannot be cut, or adapters that need them whole.
    """
    if spec.quantize is not None:
        raise ConfigError(
            f"model.quantize {spec.quantize!r} needs whole weights, which strategy 'fsdp' cuts "
            "into shards: use 'ddp', or leave model.quantize out"
        )
    if spec.lora is not None and spec.lora.dora:
        raise ConfigError(
            "lora.dora needs whole weights, which strategy 'fsdp' cuts into shards: use 'ddp', or "
            "switch dora off"
        )


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, which shares the tensor's memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from all ranks where it is cut; collective then."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()
    return full


def whole_like(part: Tensor, like: Tensor) -> Tensor:
    """All of what is cut as `like` is, from each rank's part; collective where it is cut."""
    if not isinstance(like, DTensor) or part.shape != local(like).shape:
        return part
    made = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return whole(made)


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `full`, which all ranks have, cut as `like` is."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    return local(cut_like(full, like))


def cut_like(full: Tensor, like: Tensor) -> Tensor:
    """`full`, which all ranks have, as a tensor cut as `like` is."""
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    cut: Tensor = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return cut


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> None:
    """Copy `full` into a tensor that may be cut."""
    local(tensor).copy_(part_like(full, tensor))


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory as a parameter of its own, which any element-wise optimiser can step."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(local(parameter), requires_grad=parameter.requires_grad)
