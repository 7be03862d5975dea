"""The public face of trady as one JSON value: Python names and signatures, the command line, keys of what is written.

    python -m tests.public_face            # says what differs from tests/public_face.json
    python -m tests.public_face --write    # takes the present face for the agreed one

Writing is deliberate: whatever is in the file, somebody's code, script or saved run relies on.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import typer
from torch.nn.functional import cross_entropy

import trady
import trady.integrations.transformers
import trady.optim
import trady.policies
from tests.small_task import small_data, small_net
from trady.cli.app import app
from trady.compare.rows import Row
from trady.study.settings import StudySettings

SNAPSHOT = Path(__file__).with_name("public_face.json")
UPDATE = "python -m tests.public_face --write"

#: Made by functions of trady, never by a user: their constructors may change.
MADE_FOR_THE_USER = (trady.Tuner, trady.Predictor)


def _own_policies() -> list[str]:
    """The names that come with trady; tests and benchmarks register more."""
    names = trady.policies.policy_names()
    return [name for name in names if type(trady.policies.get_policy(name)).__module__.startswith("trady.")]


def public_face() -> dict[str, Any]:
    """Everything that somebody else's code may rely on."""
    return {
        "python": dict(_python()),
        "policies": _own_policies(),
        "command line": _command_line(),
        "files": _files(),
    }


def as_text(face: Mapping[str, Any]) -> str:
    """One line a fact, in an order that does not change."""
    return json.dumps(face, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def differences(agreed: str, present: str) -> list[str]:
    """Return what was removed (``-``) and added (``+``), each after the thing that it belongs to."""
    return [
        f"{sign} {fact}"
        for sign, here, there in (("-", agreed, present), ("+", present, agreed))
        for fact in sorted(set(_facts(json.loads(here))) - set(_facts(json.loads(there))))
    ]


def _facts(value: Any, place: tuple[str, ...] = ()) -> Iterator[str]:
    """Every key, with its path and its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if (isinstance(inner, dict) and inner) or isinstance(inner, list):
                yield from _facts(inner, (*place, key))
            else:
                yield f"{', '.join(place)}: {json.dumps(key)}: {json.dumps(inner, ensure_ascii=False)}"
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict):
                yield from _facts(inner, place)
            else:
                yield f"{', '.join(place)}: {json.dumps(inner, ensure_ascii=False)}"


def _python() -> Iterator[tuple[str, Any]]:
    for module in (trady, trady.optim, trady.policies, trady.integrations.transformers):
        names = getattr(module, "__all__", None) or _defined_in(module)
        for name in sorted(names):
            value = getattr(module, name)
            if not inspect.ismodule(value):
                yield f"{module.__name__}.{name}", _describe(value)


def _defined_in(module: Any) -> list[str]:
    return [
        n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
    ]


def _describe(value: Any) -> Any:
    if inspect.isclass(value):
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        members = {name: _member(value, name) for name in dir(value) if _is_own(value, name)}
        own = "__init__" in vars(value) or is_dataclass(value)
        made = (
            {"()": _signature(value)}
            if own and not (issubclass(value, MADE_FOR_THE_USER) or getattr(value, "_is_protocol", False))
            else {}
        )
        return {"bases": bases, **made, **members}
    return _signature(value) if callable(value) else type(value).__name__


def _is_own(cls: type, name: str) -> bool:
    """Whether a class of trady's defines a public name, rather than a library that it inherits from."""
    owner = next(base for base in cls.__mro__ if name in vars(base))
    return not name.startswith("_") and owner.__module__.partition(".")[0] == "trady"


def _member(cls: type, name: str) -> str:
    value = inspect.getattr_static(cls, name)
    if inspect.isclass(value):
        return "class"
    if isinstance(value, (classmethod, staticmethod)):
        return f"{type(value).__name__} {_signature(value.__func__)}"
    if callable(value):
        return _signature(value)
    return "property" if hasattr(value, "__get__") else "attribute"


def _signature(value: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(value))
    except ValueError:
        return "(…)"


def _command_line() -> dict[str, Any]:
    """Commands with their arguments and flags."""
    group: Any = typer.main.get_command(app)
    written = {
        (info.name or info.callback.__name__): info.callback for info in app.registered_commands if info.callback
    }
    return {
        "trady": dict(_flags(group, {})),
        **{name: dict(_flags(group.commands[name], get_type_hints(written[name]))) for name in sorted(group.commands)},
    }


def _flags(command: Any, hints: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for option in command.params:
        if option.name in ("install_completion", "show_completion"):  # the library's own
            continue
        names = ", ".join([*option.opts, *option.secondary_opts])
        hint = hints.get(option.name, bool)
        kind = _type_name(hint)
        yield names, f"{kind}, required" if option.required else f"{kind}, default {option.default!r}"


def _type_name(hint: Any) -> str:
    """The same text on every version of Python."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join("None" if part is NoneType else _type_name(part) for part in get_args(hint))
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def _files() -> dict[str, Any]:
    """The keys of everything that is written, from a model of two convolutions that trains for an epoch."""
    model, example = small_net(), torch.randn(8, 3, 12, 12)
    names = {name for name, _ in model.named_modules() if name} | {name for name, _ in model.named_parameters()}
    batches = [(example, torch.arange(8) % 3)]

    def keys(value: Any) -> Any:
        return _keys(value, names)

    found = {
        "Plan": keys(trady.plan(small_net(), example, budget="peak:1 MiB").to_json()),
        "FitReport": keys(trady.fit(small_net(), example, methods=["full"], device="cpu").to_json()),
        "LayerRanking": keys(trady.rank(small_net(), batches, cross_entropy).to_json()),
        "a line of results.jsonl": keys(Row("m", "d", None, None, "head", 0, "done", "digest").to_json()),
        "settings of trady study": sorted(StudySettings.__dataclass_fields__),
    }
    for policy in ("trady", "velocity"):
        meta = _trained(policy, example, batches)
        found[f"meta of Tuner.state_dict(), {policy}"] = keys(meta["meta"])
        found["Ledger"] = keys(meta["ledger"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        trady.finetune(small_net(), small_data(24, 0), small_data(12, 1), budget="elements:400", epochs=1, out=out)
        found["run folder"] = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        found["run.json"] = keys(json.loads((out / "run.json").read_text(encoding="utf-8")))
        found["result.json"] = keys(json.loads((out / "result.json").read_text(encoding="utf-8")))
        checkpoint = json.loads((out / "checkpoint" / "checkpoint.json").read_text(encoding="utf-8"))
        del checkpoint["states"]["optimizer"]  # torch's own
        found["checkpoint.json"] = keys(checkpoint)
        found["a line of metrics.jsonl"] = keys(json.loads((out / "metrics.jsonl").read_text(encoding="utf-8")))
    return found


def _trained(policy: str, example: torch.Tensor, batches: list[Any]) -> dict[str, Any]:
    model = small_net()
    tuner = trady.prepare(model, example, budget="elements:4000", policy=policy)
    optimizer = tuner.attach(torch.optim.SGD(tuner.parameters(), lr=0.01))
    for epoch in range(2):
        if tuner.observation_due:
            tuner.observe(batches, cross_entropy)
        tuner.resample(epoch)

        def step() -> None:
            cross_entropy(model(example), batches[0][1]).backward()
            optimizer.step()
            optimizer.zero_grad()

        ledger = tuner.ledger(step)
    return {"meta": tuner.state_dict()["meta"], "ledger": ledger.to_json()}


def _keys(value: Any, names: set[str]) -> Any:
    """Keep keys and drop values; names of layers become one entry, and a list its elements' keys together."""
    if isinstance(value, Mapping):
        return {
            "a layer" if key in names else key: _keys(inner, names)
            for key, inner in sorted(value.items(), key=lambda item: item[0])
        }
    if isinstance(value, (list, tuple)):
        inner = [kept for element in value if (kept := _keys(element, names)) != "value"]
        merged = {key: kept for element in inner if isinstance(element, dict) for key, kept in element.items()}
        return [merged] if merged else "list"
    return "value"


def main() -> int:
    """Compare with the agreed face, or write it."""
    text = as_text(public_face())
    if "--write" in sys.argv[1:]:
        SNAPSHOT.write_text(text, encoding="utf-8")
        return 0
    found = differences(SNAPSHOT.read_text(encoding="utf-8"), text)
    sys.stdout.write("\n".join(found) + "\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
