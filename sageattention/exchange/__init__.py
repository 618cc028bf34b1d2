"""How processes of a group send each other parts of one attention: by copies into each other's memory where all are cards of one host that
can map it, else by the group's own messages. Chosen once per group."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from .. import settings
from ..device.libcuda import NoDriver
from ..errors import CudaError
from .boxes import Box, Exchange, Form
from .card import Card
from .copies import Copies, Memory, gather
from .messages import Messages

LOG = logging.getLogger("sageattention")
BOOT = Path("/proc/sys/kernel/random/boot_id")  # one host's, until it starts again

_copies: weakref.WeakKeyDictionary[dist.ProcessGroup, Copies | None] = weakref.WeakKeyDictionary()  # None: messages


@contextlib.contextmanager
def opened(like: torch.Tensor, group: dist.ProcessGroup | None, *forms: Form) -> Iterator[tuple[Exchange, list[list[Box]]]]:
    """An exchange for one call, with boxes of each form for tensors of `like`'s dtype and device; closed at the end."""
    group = _known(group)
    device = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with device:
        link: Exchange = _copies_of(like, group, forms) or Messages(group)
        boxes = link.boxes(like, forms)
        try:
            yield link, boxes
        finally:
            link.close()


def release(group: dist.ProcessGroup | None) -> None:
    """Give back the memory of a group's copies; all its processes do. The next call chooses anew."""
    link = _copies.pop(_known(group), None)
    if link is not None:
        link.release()


def _known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    found = group or dist.group.WORLD
    if found is None:
        raise ValueError("torch.distributed has no process group; call init_process_group first")
    return found


def memory_of(like: torch.Tensor) -> Memory | None:
    """What copies of such tensors work on; None where the user or the device wants messages."""
    return Card(like.device.index) if like.is_cuda and settings.read("SAGEATTENTION_PEER_COPIES") != "0" else None


def _copies_of(like: torch.Tensor, group: dist.ProcessGroup, forms: tuple[Form, ...]) -> Copies | None:
    """The group's copies, with memory for the forms; None where it has none."""
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # replayed, the copies' words would count no further
    if group not in _copies:
        _copies[group] = _choose(like, group)
    link = _copies[group]
    if link is not None:
        reason = link.reserve(link.bytes_of(like, forms))
        if reason:
            LOG.info("sageattention.distributed: messages instead of copies: %s", reason)
            link = _copies[group] = None
    return link


def _choose(like: torch.Tensor, group: dist.ProcessGroup) -> Copies | None:
    """Copies where every process could; all answer alike."""
    try:
        memory = memory_of(like)
    except (CudaError, NoDriver) as error:
        LOG.info("sageattention.distributed: messages instead of copies: %s", error)
        memory = None
    host = BOOT.read_text(encoding="ascii") if memory is not None and BOOT.exists() else ""
    hosts = gather(host, group)
    return Copies(memory, group) if memory is not None and host and len(hosts) > 1 and set(hosts) == {host} else None
