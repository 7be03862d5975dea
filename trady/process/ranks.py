"""The processes that train together: how many they are, what they must agree on, and one way to average over them.

Nothing here depends on what a process finds in its memory: whoever calls gives the tensors in an order that is the same
in every process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from trady.errors import StateError, TradyError, TrainingError

#: Tensors up to this size are reduced together, in buffers of up to this size; a larger one is reduced where it is.
BUFFER_BYTES = 4 << 20

#: Buffers that are under way at a time: one is filled while another one is reduced.
_UNDER_WAY = 2


@dataclass(frozen=True)
class Traffic:
    """What a process has handed to collectives that average.

    A ring of n processes sends and receives ``2 (n - 1) / n`` times these bytes.

    Attributes:
        nbytes: Bytes of the tensors.
        calls: Collectives.
    """

    nbytes: int = 0
    calls: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.nbytes + other.nbytes, self.calls + other.calls)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.nbytes - other.nbytes, self.calls - other.calls)


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Own:
    """The group for our collectives: a wrapper's own, in the default group, cannot come between them."""

    world: Any = None
    group: Any = None


def own_group() -> Any:
    """Return a group of all processes that nobody else uses; made when all of them first ask for it."""
    if _Own.world is not dist.group.WORLD:
        with telling_who_ended():
            dist.barrier()  # a new group waits for the address of one that has ended, for as long as its timeout
            _Own.world, _Own.group = dist.group.WORLD, dist.new_group()
    return _Own.group


class OtherProcessEndedError(TrainingError):
    """Another process has ended, or does not answer."""


@contextmanager
def telling_who_ended() -> Iterator[None]:
    """Say what it means when a collective fails.

    Raises:
        OtherProcessEndedError: It did: another process has ended, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (TradyError, torch.OutOfMemoryError)):
            raise
        raise _other_ended(error) from error


def _other_ended(error: BaseException) -> OtherProcessEndedError:
    return OtherProcessEndedError(
        f"another process of this run has ended or does not answer, so rank {dist.get_rank()} of "
        f"{dist.get_world_size()} stops too: {_reason() or 'what the others have printed last says why'} "
        f"({_first_line(error)}). Start all of them again; a run with checkpoints goes on from the last one"
    )


@contextmanager
def leaving_a_reason() -> Iterator[None]:
    """Context whose error is left where the other processes find it when their next collective fails.

    Raises:
        OtherProcessEndedError: A collective has failed, whoever called it: a loader, a barrier, an evaluation.
    """
    try:
        yield
    except BaseException as error:
        if processes() > 1 and not isinstance(error, OtherProcessEndedError):
            if _is_of_a_collective(error):
                raise _other_ended(error) from error
            with suppress(Exception):  # the store may be gone with the process that kept it
                told = f"rank {dist.get_rank()} has stopped with {type(error).__name__}: {_first_line(error)}"
                dist.distributed_c10d._get_default_store().compare_set(_REASON, "", told)
        raise


_REASON = "trady/reason"

#: What gloo says, without a class of its own, of a process that is gone.
_OF_GLOO = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Application timeout caused pair closure")


def _is_of_a_collective(error: BaseException) -> bool:
    kinds = (dist.DistError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, kinds) or (type(error) is RuntimeError and any(said in str(error) for said in _OF_GLOO))


def _reason() -> str:
    """What the first process that ended has left."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return str(store.get(_REASON).decode()) if store.check([_REASON]) else ""
    except Exception:
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def total(numbers: Sequence[float]) -> list[float]:
    """Return the sum of each number over the processes.

    Raises:
        OtherProcessEndedError: Another process has ended.
    """
    if processes() == 1:
        return list(numbers)
    with telling_who_ended():
        together = torch.tensor(numbers, dtype=torch.float64, device=_device_of(own_group()))
        dist.all_reduce(together, group=own_group())
        return [float(each) for each in together.tolist()]


def _device_of(group: Any) -> str:
    """Where a group's collectives take tensors."""
    return "cuda" if "nccl" in str(dist.get_backend(group)) else "cpu"


# -- averages ----------------------------------------------------------------------------------------------------


def average_(tensors: Sequence[Tensor], group: Any = None) -> Traffic:
    """Average tensors over the processes of a group, in place.

    Small ones go together, in buffers of one dtype; the next buffer is filled while one is reduced.

    Args:
        tensors: Dense; as many, of the same shapes and in the same order in every process.
        group: The group; :func:`own_group` by default.

    Raises:
        OtherProcessEndedError: Another process has ended.
    """
    group = own_group() if group is None else group
    share = 1.0 / dist.get_world_size(group)
    under_way: list[tuple[Any, Tensor, list[Tensor]]] = []
    traffic = Traffic()
    with torch.no_grad(), telling_who_ended():
        for bucket in _buckets(tensors):
            if len(under_way) == _UNDER_WAY:
                _take_out(*under_way.pop(0))
            flat = _flat(bucket)
            # Before the sum, as DistributedDataParallel does: a sum of many could leave the range of half precision.
            flat.mul_(share)
            under_way.append((dist.all_reduce(flat, group=group, async_op=True), flat, bucket))
            traffic += Traffic(flat.nbytes, 1)
        for entry in under_way:
            _take_out(*entry)
    return traffic


def average_gradients_(parameters: Sequence[Tensor], group: Any = None, *, averaged: Sequence[Tensor] = ()) -> Traffic:
    """Average the gradients of parameters over the processes; one that some processes lack is zero there.

    Args:
        parameters: The same, in the same order, in every process. Those that have no gradient in any are left so.
        group: The group; :func:`own_group` by default.
        averaged: Parameters that had no gradient here, and have been given the mean of the others' already.

    Raises:
        StateError: A gradient is sparse.
        OtherProcessEndedError: Another process has ended.
    """
    here = [*(p.grad is not None for p in parameters), *(False for _ in averaged)]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            raise StateError(
                f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which is not averaged over "
                "processes: build its layer with sparse=False"
            )
    gradients = [p.grad for p in parameters if p.grad is not None]
    like = [*gradients, *averaged, torch.empty(0)][0]
    # It goes into a buffer with gradients: any share of a one stays more than zero.
    anywhere = torch.tensor(here, device=like.device).to(like.dtype)
    traffic = average_([*gradients, anywhere], group)
    if not all(here):  # an optimizer is not to decay what has no gradient in any process
        for parameter, there in zip((*parameters, *averaged), (anywhere > 0).tolist(), strict=True):
            if not there:
                parameter.grad = None
    return traffic


def buffer_bytes(sizes: Iterable[int]) -> int:
    """Bound what :func:`average_` takes for a moment, for tensors of these sizes in bytes, in any order."""
    small = sum(size for size in sizes if size <= BUFFER_BYTES)
    return min(small, _UNDER_WAY * BUFFER_BYTES)


def traffic_of(sizes: Sequence[tuple[Hashable, int]]) -> Traffic:
    """Tell what :func:`average_` hands to collectives, for tensors of these kinds and sizes in bytes."""
    buckets = list(_together(sizes))
    return Traffic(sum(sizes[place][1] for bucket in buckets for place in bucket), len(buckets))


def _together(sizes: Sequence[tuple[Hashable, int]]) -> Iterator[list[int]]:
    """Cut tensors, told by kind and size, into what is reduced together; nothing waits for what comes later."""
    kinds: dict[Hashable, list[int]] = {}
    for place, (kind, size) in enumerate(sizes):
        if not size:
            continue
        bucket = kinds.setdefault(kind, [])
        if bucket and sum(sizes[each][1] for each in bucket) + size > BUFFER_BYTES:
            yield kinds.pop(kind)
            bucket = kinds.setdefault(kind, [])
        bucket.append(place)
    yield from kinds.values()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    for places in _together([((tensor.dtype, tensor.device), tensor.nbytes) for tensor in tensors]):
        yield [tensors[place] for place in places]


def _flat(bucket: list[Tensor]) -> Tensor:
    """The tensors of a bucket in one; a single one as it is, if its memory has no gaps."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        return bucket[0]
    flat = torch.empty(sum(tensor.numel() for tensor in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
    start = 0
    for tensor in bucket:
        flat[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
        start += tensor.numel()
    return flat


def _take_out(work: Any, flat: Tensor, bucket: list[Tensor]) -> None:
    work.wait()
    if flat is bucket[0]:
        return
    start = 0
    for tensor in bucket:
        tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()


# -- what all must have in common --------------------------------------------------------------------------------


def agree(facts: Mapping[str, str], group: Any = None, *, beside: Mapping[str, str] | None = None) -> None:
    """Check that all processes say the same; all of them raise together where they do not.

    Args:
        facts: What each says, by name; causes before their effects.
        beside: What may differ, but is named as a cause where the facts differ.
        group: The group; :func:`own_group` by default.

    Raises:
        StateError: The message says what differs, and on which ranks.
        OtherProcessEndedError: Another process has ended.
    """
    group = own_group() if group is None else group
    digest = int.from_bytes(hashlib.sha256(json.dumps(list(facts.items())).encode()).digest()[:7], "big")
    mine = torch.tensor([digest, -digest], dtype=torch.int64, device=_device_of(group))
    with telling_who_ended():
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=group)
        highest, lowest = mine.tolist()
        if highest == -lowest:
            return
        said: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, {**(beside or {}), **facts}, group=group)
    raise StateError(
        f"the {len(said)} processes of this run would not train the same: {'; '.join(_differences(said))}. Start all "
        "of them from the same weights with the same settings, or nothing that they average would mean anything"
    )


#: So many differences are named: the first ones are the causes of the others.
_NAMED = 3


def _differences(said: Sequence[Mapping[str, str]]) -> list[str]:
    found = []
    for name in dict.fromkeys(name for facts in said for name in facts):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(said):
            ranks.setdefault(facts.get(name, "not known"), []).append(rank)
        if len(ranks) > 1:
            each = (
                f"{value if len(value) < 60 else f'{value[:57]}...'} on {_ranks(on)}" for value, on in ranks.items()
            )
            found.append(f"{name} is {', '.join(each)}")
    return found[:_NAMED]


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
