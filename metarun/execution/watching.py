"""Python code that a function executes, and the names in it.

`watched` runs a function and notes the Python code outside the libraries that it executes. The
names in this code say which attributes, globals and closures it can read. Code that may read
anything else, such as a clock or a file, is refused.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

Globals = dict[str, Any]

_LIBRARIES = {"torch", *sys.stdlib_module_names}
"""Packages whose code is not watched."""
PURE_MODULES = {
    *("_abc", "_collections", "_collections_abc", "_functools", "_operator", "abc", "cmath"),
    *("collections", "contextlib", "copy", "dataclasses", "enum", "functools", "itertools", "math"),
    *("numbers", "operator", "torch", "types", "typing"),
}
"""Modules whose functions depend on their arguments alone, with the exceptions below."""
_IMPURE_TORCH = (
    *("torch.cuda", "torch.distributed", "torch.hub", "torch.package", "torch.profiler"),
    *("torch.random", "torch.serialization", "torch.utils.data"),
)
_PURE_BUILTINS = {
    *("__build_class__", "abs", "all", "any", "ascii", "bin", "callable", "chr", "divmod"),
    *("format", "hex", "isinstance", "issubclass", "iter", "len", "max", "min", "next", "oct"),
    *("ord", "pow", "repr", "round", "sorted", "sum"),
}
_HIDING = {
    *("AttributeError", "BaseException", "Exception", "NameError", "attrgetter", "methodcaller"),
    *("__builtins__", "__closure__", "__code__", "__defaults__", "__delattr__", "__dict__"),
    *("__getattribute__", "__globals__", "__setattr__", "backends", "f_globals", "f_locals"),
}
"""Names by which code reads attributes that it does not name, or notices missing ones."""


@dataclass
class Executed:
    """User-level Python code that was executed, and what it may read.

    Attributes:
        codes: Code objects and the globals of their functions, by the ids of both.
        attributes: Names of attributes in the code.
        refused: Reason why calls of this code cannot be compared; None where they can.
    """

    codes: dict[tuple[int, int], tuple[CodeType, Globals]] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    refused: str | None = None

    def note(self, frame: FrameType, event: str, arg: Any) -> None:
        """Note an event of `sys.setprofile`."""
        module = frame.f_globals.get("__name__")
        if frame.f_globals is globals():
            return
        if event == "call":
            if not is_library(module):
                self.add(frame.f_code, frame.f_globals)
            elif frame.f_back and not is_library(frame.f_back.f_globals.get("__name__")):
                self._note_library_call(frame, str(module))
        elif event == "c_call" and not is_library(module) and not _is_pure(arg):
            self._refuse(f"it calls {arg.__qualname__}")

    def add(self, code: CodeType, scope: Globals) -> None:
        """Add the code of a function with the globals `scope`."""
        if (id(code), id(scope)) in self.codes:
            return
        self.codes[id(code), id(scope)] = code, scope
        names, attributes = names_in(code)
        self.attributes |= {*attributes, code.co_name}
        # The constructor of a frozen dataclass is generated.
        if code.co_filename != "<string>":
            for name in _HIDING & {*names, *attributes}:
                self._refuse(f"{code.co_qualname} names {name}")
        if any(step.opname == "IMPORT_NAME" for step in dis.get_instructions(code)):
            self._refuse(f"{code.co_qualname} imports a module")
        for name in names:
            value = scope.get(name)
            if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                # Backward passes on a GPU run in threads of torch, which are not watched.
                for member in vars(value).values():
                    function = getattr(member, "__func__", member)
                    if isinstance(function, FunctionType):
                        self.add(function.__code__, function.__globals__)

    def covers(self, other: Executed) -> bool:
        """Return whether all code of another call is known."""
        return self.codes.keys() >= other.codes.keys()

    def join(self, other: Executed) -> None:
        """Add the code of another call."""
        self.codes |= other.codes
        self.attributes |= other.attributes
        self.refused = self.refused or other.refused

    def _note_library_call(self, frame: FrameType, module: str) -> None:
        top = module.partition(".")[0]
        if top not in PURE_MODULES or module.startswith(_IMPURE_TORCH):
            self._refuse(f"it calls {module}.{frame.f_code.co_qualname}")
        elif top == "dataclasses":
            # Functions such as `replace` read all fields of their first argument.
            first = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
            if dataclasses.is_dataclass(first):
                self.attributes |= {entry.name for entry in dataclasses.fields(first)}

    def _refuse(self, reason: str) -> None:
        self.refused = self.refused or reason


def watched(function: Callable[..., Any], args: Iterable[Any]) -> tuple[Any, Executed]:
    """Return the result of a function and the code that it executed in this thread."""
    executed = Executed()
    before, collects = sys.getprofile(), gc.isenabled()
    # A collection would run the code of others: finalizers, and callbacks of `gc`.
    gc.disable()
    sys.setprofile(executed.note)
    try:
        return function(*args), executed
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


@contextmanager
def unwatched() -> Iterator[None]:
    """Leave out code in a watched function that does not belong to it."""
    before = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(before)


@functools.cache
def names_in(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of globals and of attributes in code and in the functions inside it."""
    scope, attributes = set(), set()
    for step in dis.get_instructions(code):
        if "GLOBAL" in step.opname or step.opname == "LOAD_NAME":
            scope.add(step.argval)
        elif "ATTR" in step.opname or step.opname == "LOAD_METHOD":
            attributes.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            scope |= names_in(inner)[0]
            attributes |= names_in(inner)[1]
    return frozenset(scope), frozenset(attributes)


def is_library(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _LIBRARIES


def is_of_c(kind: type) -> bool:
    return "__slots__" not in vars(kind) and not any("__dict__" in vars(b) for b in kind.__mro__)


def _is_pure(function: Any) -> bool:
    """Return whether a C function depends on its arguments alone and changes nothing else."""
    owner = getattr(function, "__self__", None)
    if owner is None or isinstance(owner, ModuleType):
        module = function.__module__ or getattr(owner, "__name__", "")
        if module == "builtins":
            return function.__name__ in _PURE_BUILTINS
        return module.partition(".")[0] in PURE_MODULES
    kind = owner if isinstance(owner, type) else type(owner)
    known = kind.__module__ == "builtins" or kind.__module__.partition(".")[0] in PURE_MODULES
    return known or not (is_library(kind.__module__) or is_of_c(kind))
