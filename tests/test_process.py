"""The process: what it has in memory, what its allocator gives back, what it does not import."""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any

import numpy as np
import pytest

from benchmarks.process.hard_limit import run_limited
from tests.fresh_process import afresh, linux
from trady.errors import TrainingError
from trady.process import allocator
from trady.process.resident import reset_peak, resident, resident_bytes_of

glibc = pytest.mark.skipif(not allocator.is_glibc(), reason="the allocator is not glibc's")


# -- resident memory


@linux
def test_pages_count_when_they_are_written() -> None:
    """In a process of its own: what other tests have left may be given back to the system meanwhile."""
    program = """
import json
import numpy as np
from trady.process.resident import resident, resident_bytes_of
before = resident()
block = np.empty(64 << 20, dtype=np.uint8)
untouched = resident()
unwritten = resident_bytes_of(block.ctypes.data, block.nbytes)
block[:] = 1
now = resident()
reserved = untouched.resident_bytes - before.resident_bytes
written = now.resident_bytes - untouched.resident_bytes
anonymous = now.anonymous_bytes - untouched.anonymous_bytes
print(json.dumps([unwritten, reserved, written, anonymous, resident_bytes_of(block.ctypes.data, block.nbytes)]))
"""
    unwritten, reserved, written, anonymous, held = afresh(program)
    assert unwritten < 1 << 20
    assert reserved < 8 << 20
    assert written > 56 << 20
    assert anonymous > 56 << 20
    assert held > 63 << 20


@linux
def test_a_part_of_a_page_is_no_more_than_that_part() -> None:
    block = np.ones(8 * mmap.PAGESIZE, dtype=np.uint8)
    assert resident_bytes_of(block.ctypes.data, 100) == 100
    assert resident_bytes_of(block.ctypes.data, 0) == 0


@linux
def test_the_peak_is_counted_afresh() -> None:
    block = np.ones(64 << 20, dtype=np.uint8)
    del block
    high = resident()
    if not reset_peak():
        pytest.skip("the kernel does not count peaks afresh")
    low = resident()
    assert high is not None
    assert low is not None
    assert low.peak_bytes < high.peak_bytes
    assert low.peak_bytes - low.resident_bytes < 8 << 20


def test_a_system_that_does_not_tell_is_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("trady.process.resident._STATUS", tmp_path / "status")
    monkeypatch.setattr("trady.process.resident._REFERENCES", tmp_path / "no" / "clear_refs")
    monkeypatch.setattr("trady.process.resident._PAGES", tmp_path / "pagemap")
    assert resident() is None
    assert not reset_peak()
    assert resident_bytes_of(4096, 12345) == 12345


# -- the allocator

_FREED = """
import json, sys, torch
from trady.process.allocator import return_freed_memory
from trady.process.resident import resident
if sys.argv[1:] == ["back"]: assert return_freed_memory()
large = torch.ones(4 << 20); del large  # glibc takes its size for the threshold from here on
before = resident().resident_bytes
kept = [torch.ones(1 << 18) for _ in range(64)]
last = torch.ones(1 << 18)  # what lives above keeps a heap from shrinking
del kept
print(json.dumps((resident().resident_bytes - before) / 2**20))
"""


@linux
@glibc
def test_freed_tensors_go_back_to_the_kernel() -> None:
    programs = (_FREED, _FREED.replace("sys.argv[1:]", "['back']"))
    kept, given_back = (afresh(program) for program in programs)
    assert kept > 32  # of 64 MiB; if glibc gave them back by itself, the settings would be for nothing
    assert given_back < 4


def test_elsewhere_it_says_that_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.confstr", lambda name: None, raising=False)
    assert not allocator.return_freed_memory()
    allocator.trim()


# -- the compiler waits

_STEP = """
import json, sys, torch, trady
from torch import nn
from trady.process.compiler import wait_for_compiler, compiler_is_loaded
from trady.process.postponed import PostponedModule
waits = wait_for_compiler()
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
batch = torch.zeros(4, 3, 8, 8)
tuner = trady.prepare(model, batch, budget="1 MiB")
optimizer = tuner.attach(torch.optim.AdamW(tuner.parameters(), lr=0.1))
def step():
    model(batch).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
step()
tuner.ledger(step)
optimizer.load_state_dict(optimizer.state_dict())
NAMES = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy")
def waiting():
    return [name for name in NAMES if isinstance(sys.modules.get(name), PostponedModule)]
"""


def test_a_training_step_imports_no_compiler() -> None:
    found = afresh(_STEP + "print(json.dumps([waits, waiting(), compiler_is_loaded(), 'mpmath' in sys.modules]))")
    assert found == [True, ["torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"], False, False]


def test_the_compiler_comes_when_something_is_compiled() -> None:
    found = afresh(
        _STEP
        + """
seen = torch.optim.Optimizer.zero_grad.__wrapped__
stood_in = getattr(seen, "__dynamo_disable", None) is seen
tuner.finish()
twice = torch.compile(lambda x: x * 2, backend="eager")(torch.ones(1)).item()
free = torch.optim.SGD(model.parameters(), lr=0.1)
model(batch).sum().backward(); free.step(); free.zero_grad()
kept_out = getattr(seen, "__dynamo_disable", None)
print(json.dumps([stood_in, twice, waiting(), compiler_is_loaded(), kept_out is not None and kept_out is not seen]))
"""
    )
    assert found == [True, 2.0, [], True, True]


def test_what_a_person_keeps_from_the_compiler_is_kept_from_it() -> None:
    found = afresh(
        """
import json, torch
from trady.process.compiler import wait_for_compiler, compiler_is_loaded
wait_for_compiler()
@torch.compiler.disable
def plain(x):
    return torch.compiler.is_compiling()
def both(x):
    return torch.compiler.is_compiling(), plain(x)
print(json.dumps([compiler_is_loaded(), torch.compile(both, backend="eager")(torch.ones(1))]))
"""
    )
    assert found == [True, [True, False]]


def test_a_submodule_brings_its_package_once() -> None:
    found = afresh(
        """
import json, sys, torch
from trady.process.compiler import wait_for_compiler
wait_for_compiler()
held = sys.modules["torch._dynamo"]
import torch._dynamo.config as config
import torch._dynamo
import sympy.core.numbers
from torch._dynamo.eval_frame import OptimizedModule
import torch.fx.experimental.symbolic_shapes as shapes
print(json.dumps([
    config is sys.modules["torch._dynamo.config"] is torch._dynamo.config,
    type(config.__spec__.loader).__name__,
    held is not torch._dynamo, held.OptimizedModule is OptimizedModule is torch._dynamo.OptimizedModule,
    shapes is torch.fx.experimental.symbolic_shapes, bool(shapes.ShapeEnv),
    isinstance(sympy.core.numbers.Integer(2), sympy.Basic),
]))
"""
    )
    assert found == [True, "SourceFileLoader", True, True, True, True, True]


def test_answers_are_those_of_the_real_module() -> None:
    found = afresh(
        """
import json, sys, torch, warnings
from trady.process.compiler import wait_for_compiler
from trady.process.postponed import PostponedModule
warnings.simplefilter("ignore")
wait_for_compiler()
name = "torch.fx.experimental.symbolic_shapes"
early = sys.modules[name]
truths = [(True,), (False,)]
several = [(True, False), (True, True, True), (False, False), (False, True, False)]
sizes = [(2, 2), (2, 3), ((2, 3), (2, 3)), ([2, 3], (2, 4)), ((2,), (2, 3)), ((), ())]
cases = {
    **dict.fromkeys(("expect_true", "guard_bool", "guard_or_false", "guard_or_true", "statically_known_true",
                     "statically_known_false", "guard_size_oblivious"), truths),
    "guard_int": [(0,), (7,)], "sym_and": truths + several, "sym_or": truths + several, "sym_eq": sizes,
    "is_nested_int": [(1,), (2.5,), (True,)],
}
def ask(module):
    return {k: [getattr(module, k)(*given) for given in v] for k, v in cases.items()}
first = ask(early)
waited = isinstance(sys.modules[name], PostponedModule)
import importlib
early.ShapeEnv
real = importlib.import_module(name)
print(json.dumps([waited, isinstance(real, PostponedModule), first == ask(real), first == ask(early)]))
"""
    )
    assert found == [True, False, True, True]


def test_what_is_there_already_is_left_alone() -> None:
    found = afresh(
        """
import json, sys, torch._dynamo
from trady.process.compiler import wait_for_compiler, compiler_is_loaded
there = sys.modules["torch._dynamo"]
print(json.dumps([wait_for_compiler(), sys.modules["torch._dynamo"] is there, compiler_is_loaded()]))
"""
    )
    assert found == [False, True, True]


# -- the hard limit of benchmarks.process


def test_a_hard_limit_kills_what_exceeds_it_and_nothing_else() -> None:
    command = [sys.executable, "-c", "import sys; block = b'x' * (int(sys.argv[1]) << 20); print(len(block))"]
    try:
        within = run_limited([*command, "8"], 64 << 20, os.environ)
        above = run_limited([*command, "128"], 64 << 20, os.environ)
    except TrainingError as error:
        pytest.skip(str(error))
    assert (within.killed, within.code, within.output.strip()) == (False, 0, str(8 << 20))
    assert 8 << 20 < within.group_peak_bytes <= 64 << 20
    assert above.killed
    assert not above.output
