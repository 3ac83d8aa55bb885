"""Which implementation serves: the table, the variable that forces one, and what happens when it is missing."""

import pytest
import torch

import trace_fast
from trace_fast import _C, _backend, ops, reference
from trace_fast.testing import random_maps


def test_table(instruction_set):
    table = trace_fast.backends()
    assert table["step_kl_abdiv"] == {"cpu": f"native ({instruction_set})", "cuda": "reference"}
    assert set(table) == set(ops.__all__)
    assert str(table).splitlines()[0].split() == ["op", "cpu", "cuda"]


def test_native_serves_by_default(monkeypatch):
    monkeypatch.delenv("TRACE_FAST_BACKEND", raising=False)
    calls = []
    monkeypatch.setattr(_C, "abdiv", lambda *_: calls.append("abdiv"))
    ops.abdiv(random_maps(1, 6)[0], 2, 3)
    assert calls == ["abdiv"]


def test_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
    for name in ("accumulate_attention", "step_kl", "abdiv", "step_kl_abdiv"):
        monkeypatch.setattr(_C, name, None)
    previous, current = random_maps(1, 6)
    assert torch.equal(ops.step_kl(previous, current), reference.step_kl(previous, current))
    assert torch.equal(ops.abdiv(current, 2, 3), reference.abdiv(current, 2, 3))
    assert torch.equal(ops.step_kl_abdiv(previous, current, 2, 3)[1], reference.abdiv(current, 2, 3))
    features = torch.randn(2, 1, 2, 6, 4)
    assert torch.equal(ops.attention_map(*features), reference.attention_map(*features))
    assert {row["cpu"] for row in trace_fast.backends().values()} == {"reference"}


def test_forced_and_missing_raises(monkeypatch):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "native")
    with pytest.raises(RuntimeError, match="resize_attention: there is no native kernel on cpu; unset TRACE_FAST"):
        ops.resize_attention(random_maps(1, 6)[0], (2, 3), (4, 6))
    with pytest.raises(RuntimeError, match="abdiv: there is no native kernel on meta"):
        ops.abdiv(random_maps(1, 6)[0].to("meta"), 2, 3)
    assert trace_fast.backends()["abdiv"]["cuda"] == "unavailable"


def test_missing_build_raises_unless_the_reference_is_asked_for(monkeypatch):
    monkeypatch.setattr(_backend, "_build_error", ImportError("no _C"))
    current = random_maps(1, 6)[0]
    with pytest.raises(RuntimeError, match=r"abdiv: the native core is not built \(no _C\); run .*=reference"):
        ops.abdiv(current, 2, 3)
    assert trace_fast.backends()["abdiv"]["cpu"] == "unavailable"
    monkeypatch.setenv("TRACE_FAST_BACKEND", "reference")
    assert torch.equal(ops.abdiv(current, 2, 3), reference.abdiv(current, 2, 3))


def test_unknown_choice_raises(monkeypatch):
    monkeypatch.setenv("TRACE_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="abdiv: TRACE_FAST_BACKEND must be reference or native, got fastest"):
        ops.abdiv(random_maps(1, 6)[0], 2, 3)


def test_unknown_instruction_set_raises():
    with pytest.raises(ValueError, match=r"name must be one of instruction_sets\(\), got mmx"):
        _C.set_instruction_set("mmx")
