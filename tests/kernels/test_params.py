"""Parameter structs packed in two steps have the bytes that ctypes gives the same values."""

from __future__ import annotations

import ctypes

import pytest

from sageattention.kernels.params import POINTER, AttendParams, QuantizeKParams, QuantizeVParams, packer


def leaves(struct: type[ctypes.Structure], prefix: tuple[str, ...] = ()):
    for name, kind in struct._fields_:
        if issubclass(kind, ctypes.Structure):
            yield from leaves(kind, (*prefix, name))
        else:
            yield (*prefix, name), kind


@pytest.mark.parametrize("struct", [QuantizeKParams, QuantizeVParams, AttendParams])
def test_both_steps_give_the_struct_s_bytes(struct):
    filled, pointers, constants, order = struct(), [], [], []
    for number, (path, kind) in enumerate(leaves(struct), 1):
        value = number + 0.5 if kind is ctypes.c_float else number << (40 if kind is POINTER else 3)
        target = filled
        for name in path[:-1]:
            target = getattr(target, name)
        setattr(target, path[-1], value)
        (pointers if kind is POINTER else constants).append(value)
        if kind is POINTER or not order or order[-1] == "pointer":
            order.append("pointer" if kind is POINTER else "run")
    pack, runs_of = packer(struct)
    runs, addresses = iter(runs_of(*constants)), iter(pointers)
    assert pack(*(next(addresses if what == "pointer" else runs) for what in order)) == bytes(filled)


def test_a_constant_too_few_is_refused():
    with pytest.raises(ValueError, match="QuantizeKParams has"):
        packer(QuantizeKParams)[1](1, 2, 3)
