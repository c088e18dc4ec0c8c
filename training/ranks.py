"""Small values between ranks. With one rank, or before accelerate has set the group up, each is the identity."""

from typing import Any, TypeVar

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime.exits import Plain

T = TypeVar("T")
SIGNS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo", "NCCL", "Broken pipe")


class RankLost(Plain):
    """Another rank died, or answered none of the group's calls in time."""


def together() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_every_rank(value: T) -> list[T]:
    """`value` of each rank, in their order, on every rank. All must call it."""
    if not together():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def from_first_rank(value: T) -> T:
    """Rank 0's `value`, on every rank. All must call it."""
    if not together():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def shard(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, cut as `like` is; a number, or beside a whole tensor, all of it."""
    if not isinstance(like, DTensor) or value.ndim == 0:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(value: Tensor) -> Tensor:
    """A tensor put together from its shards, on every rank; all ranks must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_lost_rank(error: BaseException) -> bool:
    """Whether `error` says that a collective call failed: gloo raises a bare RuntimeError."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and together() and any(sign in str(error) for sign in SIGNS)
