"""Boxes filled by torch.distributed's messages: for every backend, device and host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from .boxes import Box, Exchange, Form


class Messages(Exchange):
    def __init__(self, group: dist.ProcessGroup):
        self._group, self._rank = group, dist.get_rank(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._under_way: dict[Box, tuple[list[dist.P2POp], list[dist.Work], list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def boxes(self, like: torch.Tensor, forms: Sequence[Form]) -> list[list[Box]]:
        return [[Box(i, form, [like.new_empty(shape) for shape in form.shapes]) for i in range(form.count)] for form in forms]

    def send(self, box: Box, parts: Mapping[int, Sequence[torch.Tensor]], idle: bool = False) -> None:
        if self._rank in parts:
            for place, part in zip(box.places, parts[self._rank], strict=True):
                place[self._rank].copy_(part)
        operations = [
            dist.P2POp(dist.isend, part.contiguous(), self._ranks[p], self._group) for p in box.form.receivers for part in parts[p]
        ]
        landings = []
        for process in box.form.senders:
            for place in (place[process] for place in box.places):
                landing = place if place.is_contiguous() else torch.empty(place.shape, dtype=place.dtype, device=place.device)
                landings.append((place, landing))
                operations.append(dist.P2POp(dist.irecv, landing, self._ranks[process], self._group))
        self._under_way[box] = operations, dist.batch_isend_irecv(operations) if operations else [], landings

    def wait(self, box: Box) -> None:
        _, requests, landings = self._under_way.pop(box)  # the operations hold the tensors that are read
        for request in requests:
            request.wait()
        for place, landing in landings:
            if landing is not place:
                place.copy_(landing)

    def done(self, box: Box) -> None:
        pass  # a later message into the box waits for the stream it is asked for on

    def collect(self, box: Box, targets: Mapping[int, Sequence[torch.Tensor]], idle: bool = False) -> None:
        self.wait(box)
        for process, tensors in targets.items():
            for place, target in zip(box.places, tensors, strict=True):
                target.copy_(place[process])

    def copy(self, target: torch.Tensor, source: torch.Tensor, idle: bool = False) -> None:
        target.copy_(source)

    def close(self) -> None:
        for box in list(self._under_way):
            self.wait(box)
