"""Guards of a replay: what a function reads besides its arguments, and whether it is unchanged.

`watched` runs a function and notes the Python code that it executes. The names in this code say
which attributes, globals and closures it can read. `Guards` finds their values, from the function
through objects, containers, modules and classes. While these values are the same, the function
takes the same path through its code. Code that may read anything else, such as a clock or a file,
is refused.
"""

from __future__ import annotations

import abc
import dataclasses
import dis
import enum
import functools
import gc
import sys
import types
import typing
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, call, is_, itemgetter
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

Globals = dict[str, Any]
View = tuple[Callable[[Any], Iterable[Any]], Any]
"""A function and its argument; the result has some of the values below an object."""
Views = Callable[[Any], list[View]]

_LIBRARIES = {"torch", *sys.stdlib_module_names}
"""Packages whose code is not watched."""
_PURE_MODULES = {
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
_MOST_VALUES = 20_000


class UnguardedError(Exception):
    """A function depends on something that cannot be compared between calls."""


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
            if not _is_library(module):
                self.add(frame.f_code, frame.f_globals)
            elif frame.f_back and not _is_library(frame.f_back.f_globals.get("__name__")):
                self._note_library_call(frame, str(module))
        elif event == "c_call" and not _is_library(module) and not _is_pure(arg):
            self._refuse(f"it calls {arg.__qualname__}")

    def add(self, code: CodeType, scope: Globals) -> None:
        """Add the code of a function with the globals `scope`."""
        if (id(code), id(scope)) in self.codes:
            return
        self.codes[id(code), id(scope)] = code, scope
        names, attributes = _names(code)
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
        if top not in _PURE_MODULES or module.startswith(_IMPURE_TORCH):
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


class Guards:
    """Values that a function reads besides its arguments.

    Values that are found from the function itself are compared by structure, since most functions
    are defined anew for each call. A network, a module, a class, and everything below them is
    compared by identity first: all these values pass in a single chain of C functions.

    Args:
        function: Function whose calls are compared.
        net: Network that it receives. Its tensors are arguments.
        executed: Code that a call executes.

    Attributes:
        versions: Identity and version of each tensor that was found. They show whether the
            function changes a tensor.

    Raises:
        UnguardedError: A value cannot be compared.
    """

    def __init__(self, function: Any, net: nn.Module, executed: Executed) -> None:
        search = _Search(net, executed)
        try:
            self._root = search.start(function)
        except RecursionError as error:
            raise UnguardedError("its values are nested too deeply") from error
        # A value may be missing already, such as a slot without a value.
        except (AttributeError, KeyError) as error:
            raise UnguardedError(f"it may read a missing value: {error}") from error
        self._empty = search.empty
        self._tensors = search.tensors
        self._layouts = list(map(_layout, search.tensors))
        self._nodes = search.nodes
        self._gets = [get for get, _ in search.views]
        self._targets = [target for _, target in search.views]
        self._values = [*(node.value for nodes in search.nodes for node in nodes), _END]
        self.versions = search.versions

    def hold(self, function: Any) -> bool:
        """Return whether a function, which may be another object, would read the same values."""
        try:
            return self._same_below() and _match(self._root, function, {})
        # A value is missing.
        except (AttributeError, KeyError):
            return False

    def _same_below(self) -> bool:
        """Compare all values that are compared by identity first."""
        if any(self._empty) or list(map(_layout, self._tensors)) != self._layouts:
            return False
        now = chain.from_iterable(map(call, self._gets, self._targets))
        return all(map(is_, chain(now, (_END,)), self._values)) or self._equal_below()

    def _equal_below(self) -> bool:
        found: dict[_Node, Any] = {}
        values: list[Any] = []
        for get, target, nodes in zip(self._gets, self._targets, self._nodes, strict=True):
            now = list(get(target))
            if len(now) != len(nodes) or not all(map(_match, nodes, now, repeat(found))):
                return False
            # An equal number takes the place of the old one. Another object does not: what is
            # below it is not among the views.
            values += [
                value if node.views is None else node.value
                for node, value in zip(nodes, now, strict=True)
            ]
        self._values = [*values, _END]
        return True


class _Node:
    """A value that was found, and those below it.

    Attributes:
        value: The value, or `_FRESH` if it is compared by structure alone.
        kind: Its type.
        views: Function that gives the views of a value of this kind; None for a value without
            parts.
        parts: Nodes of the values that the views give.
    """

    __slots__ = ("kind", "parts", "value", "views")

    def __init__(self, value: Any, kind: type, views: Views | None) -> None:
        self.value = value
        self.kind = kind
        self.views = views
        self.parts: list[_Node] = []


_END, _FRESH, _MISSING = object(), object(), object()


def _match(node: _Node, value: Any, found: dict[_Node, Any]) -> bool:
    """Return whether a value is the one of a node, or has the same structure and equal numbers."""
    if value is node.value:
        return True
    if type(value) is not node.kind or isinstance(value, (type, ModuleType)):
        return False
    if node.views is None:
        return _equal(node.value, value)
    if node in found:
        return found[node] is value
    found[node] = value
    parts = _parts(node.views(value))
    return len(parts) == len(node.parts) and all(map(_match, node.parts, parts, repeat(found)))


def _equal(old: Any, new: Any) -> bool:
    if not isinstance(old, _PLAIN):
        return False
    # Operators tell zeros of different signs apart, which are equal; NaN is not equal to itself.
    return repr(old) == repr(new) if isinstance(old, (float, complex)) else bool(old == new)


def _parts(views: list[View]) -> list[Any]:
    return [part for get, target in views for part in get(target)]


class _Search:
    """Search for the values that code can read.

    Attributes:
        views, nodes: What is compared by identity first: views, and the nodes of their values.
        empty: Containers that are empty.
        tensors: Tensors whose layouts are compared.
        versions: See `Guards`.
    """

    def __init__(self, net: nn.Module, executed: Executed) -> None:
        self.views: list[View] = []
        self.nodes: list[list[_Node]] = []
        self.empty: list[Any] = []
        self.tensors: list[Tensor] = []
        self.versions: list[tuple[int, int]] = []
        self._net = net
        self._executed = executed
        self._names = executed.attributes
        self._codes = {id(code) for code, _ in executed.codes.values()}
        self._arguments = {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
        self._known: dict[tuple[int, bool], _Node] = {}
        # Keeps the values alive, so that no other value gets the id of one.
        self._seen: list[Any] = []

    def start(self, function: Any) -> _Node:
        """Find all values, and return the node of the function."""
        for name, hooks in vars(torch_module).items():
            if name.startswith("_global_") and isinstance(hooks, dict):
                self._visit(hooks, kept=True)
        self._visit(self._net, kept=True)
        scopes: dict[int, tuple[Globals, set[str]]] = {}
        for code, scope in self._executed.codes.values():
            scopes.setdefault(id(scope), (scope, set()))[1].update(_names(code)[0])
        for scope, names in scopes.values():
            # The names of builtins are those that a later global would replace.
            self._keep(_entries(names & scope.keys(), names - scope.keys())(scope))
        return self._visit(function, kept=False)

    def _visit(self, value: Any, *, kept: bool) -> _Node:
        """Return the node of a value; `kept` values are compared by identity first."""
        kept = kept or isinstance(value, (type, ModuleType, nn.Module))
        for key in ((id(value), True), (id(value), kept)):
            if key in self._known:
                return self._known[key]
        views = self._views_of(value)
        node = _Node(value if kept or views is None else _FRESH, type(value), views)
        if views is None:
            return node
        self._known[id(value), kept] = node
        self._seen.append(value)
        if len(self._seen) > _MOST_VALUES:
            raise UnguardedError("it depends on too many values")
        if isinstance(value, Tensor):
            self.versions.append((id(value), 0 if value.is_inference() else value._version))
            if kept and id(value) not in self._arguments:
                self.tensors.append(value)
        elif not _is_library(type(value).__module__):
            self._visit(type(value), kept=True)
            if kept:
                self._pin(value)
        if not kept or isinstance(value, _FIXED):
            node.parts = [self._visit(part, kept=kept) for part in _parts(views(value))]
        elif type(value) in _CONTAINERS and not value:
            self.empty.append(value)
        else:
            node.parts = self._keep(views(value))
        return node

    def _keep(self, views: list[View]) -> list[_Node]:
        """Find the values of views whose targets are the same objects in each call."""
        found = []
        for get, target in views:
            nodes = [self._visit(value, kept=True) for value in get(target)]
            self.views.append((get, target))
            self.nodes.append(nodes)
            found += nodes
        return found

    def _pin(self, value: Any) -> None:
        """Compare the class and the dictionary of an object, which can be replaced."""
        names = ["__class__", "__dict__"] if hasattr(value, "__dict__") else ["__class__"] * 2
        view = attrgetter(*names), value
        self.views.append(view)
        self.nodes.append([_Node(part, type(part), None) for part in _parts([view])])

    def _views_of(self, value: Any) -> Views | None:
        """Return the function that gives the views of a value; None if it has no parts.

        Raises:
            UnguardedError: The value cannot be compared.
        """
        kind = type(value)
        if value is _MISSING or isinstance(value, _LEAVES) or kind.__module__ in _LEAF_MODULES:
            return None
        if isinstance(value, dict) and "__builtins__" in value:
            # Globals of a module; those that code names are found by their names.
            return None
        if isinstance(value, types.BuiltinFunctionType):
            bound = not isinstance(value.__self__, (type, ModuleType, types.NoneType))
            return _attributes("__self__", "__name__") if bound else None
        for known, views in _VIEWS.items():
            if kind is known:
                return views
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, ModuleType):
            return self._module(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, Tensor):
            return _attributes(*_LAYOUT)
        return self._object(value)

    def _function(self, function: FunctionType) -> Views | None:
        if _is_library(function.__module__) and not function.__closure__:
            return None
        names = ["__code__", "__globals__"]
        if not _is_library(function.__module__) and id(function.__code__) not in self._codes:
            return _attributes(*names)
        names += ["__defaults__", "__kwdefaults__", *sorted(self._names & vars(function).keys())]
        if not function.__closure__:
            return _attributes(*names)
        get = attrgetter(*names)
        return lambda other: [(get, other), (_contents, other)]

    def _module(self, module: ModuleType) -> Views | None:
        top = module.__name__.partition(".")[0]
        if top in _PURE_MODULES or top == "builtins":
            return None
        entries = _entries(self._names & vars(module).keys(), ())
        return lambda other: entries(vars(other))

    def _class(self, kind: type) -> Views | None:
        if _is_library(kind.__module__) or issubclass(kind, enum.Enum):
            return None
        names = sorted(self._names & _class_names(kind))
        odd = [name for name in names if not _is_simple(_static(kind, name))]
        simple = [name for name in names if name not in odd]

        found: list[View] = [(attrgetter(*simple, simple[-1]), kind)] if simple else []
        found += [(_entries_of, (owner, tuple(odd))) for owner in kind.__mro__ if odd]
        # Another class is never the same.
        return lambda _: found

    def _object(self, value: Any) -> Views:
        kind = type(value)
        _check_comparable(kind)
        has_dict = hasattr(value, "__dict__")
        own = vars(value).keys() if has_dict else set()
        on_class = _class_names(kind)
        slots = sorted(
            name
            for name in self._names & on_class
            if isinstance(_static(kind, name), types.MemberDescriptorType)
        )
        names = self._names & own
        if any(base is not nn.Module and _is_torch(base) for base in kind.__mro__):
            # Code of torch reads attributes, too, and is not watched.
            names = own - _MODULE_INTERNALS
        if isinstance(value, nn.Module):
            names = names | _MODULE_STATE
        entries = _entries(names, (self._names & on_class) - own - set(slots))
        content = next((_VIEWS[base] for base in kind.__mro__ if base in _ITERABLES), None)
        get = attrgetter(*slots, slots[-1]) if slots else None

        def views(other: Any) -> list[View]:
            found = content(other) if content else []
            if get:
                found.append((get, other))
            return [*found, *entries(vars(other))] if has_dict else found

        return views


def _attributes(*names: str) -> Views:
    get = attrgetter(*names)
    return lambda value: [(get, value)]


def _entries(names: Iterable[str], missing: Iterable[str]) -> Views:
    """Return the views of some entries of a dictionary, and of some that it does not have."""
    names, missing = sorted(names), sorted(missing)
    get = itemgetter(*names, names[-1]) if names else None

    def views(values: dict[str, Any]) -> list[View]:
        found: list[View] = [(get, values)] if get else []
        if missing:
            found.append((partial(map, values.get, missing), repeat(_MISSING)))
        return found

    return views


def _entries_of(owner_and_names: tuple[type, tuple[str, ...]]) -> list[Any]:
    owner, names = owner_and_names
    return [vars(owner).get(name, _MISSING) for name in names]


def _contents(function: FunctionType) -> list[Any]:
    return [_content(cell) for cell in function.__closure__ or ()]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _static(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), _MISSING)


def _is_simple(member: Any) -> bool:
    """Return whether a class gives a member itself, or always the same object for it."""
    return isinstance(member, _SIMPLE_MEMBERS) or not hasattr(type(member), "__get__")


def _class_names(kind: type) -> set[str]:
    return {name for base in kind.__mro__ if base is not object for name in vars(base)}


def _check_comparable(kind: type) -> None:
    """Raise `UnguardedError` for objects with values that no attribute shows."""
    for base in kind.__mro__:
        library = _is_library(base.__module__) and not _is_torch(base)
        if base not in _STATELESS and base not in _VIEWS and (library or _is_of_c(base)):
            raise UnguardedError(f"it depends on a {kind.__module__}.{kind.__qualname__}")


def _is_of_c(kind: type) -> bool:
    return "__slots__" not in vars(kind) and not any("__dict__" in vars(b) for b in kind.__mro__)


@functools.cache
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of globals and of attributes in code and in the functions inside it."""
    scope, attributes = set(), set()
    for step in dis.get_instructions(code):
        if "GLOBAL" in step.opname or step.opname == "LOAD_NAME":
            scope.add(step.argval)
        elif "ATTR" in step.opname or step.opname == "LOAD_METHOD":
            attributes.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            scope |= _names(inner)[0]
            attributes |= _names(inner)[1]
    return frozenset(scope), frozenset(attributes)


def _is_library(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _LIBRARIES


def _is_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _is_pure(function: Any) -> bool:
    """Return whether a C function depends on its arguments alone and changes nothing else."""
    owner = getattr(function, "__self__", None)
    if owner is None or isinstance(owner, ModuleType):
        module = function.__module__ or getattr(owner, "__name__", "")
        if module == "builtins":
            return function.__name__ in _PURE_BUILTINS
        return module.partition(".")[0] in _PURE_MODULES
    kind = owner if isinstance(owner, type) else type(owner)
    known = kind.__module__ == "builtins" or kind.__module__.partition(".")[0] in _PURE_MODULES
    return known or not (_is_library(kind.__module__) or _is_of_c(kind))


def _iterated(value: Any) -> list[View]:
    return [(iter, value)]


def _keys_and_values(kind: Any) -> Views:
    return lambda value: [(kind.keys, value), (kind.values, value)]


_PLAIN = (
    *(bool, int, float, complex, str, bytes, types.NoneType, types.EllipsisType, slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
"""Types of values that are compared as values."""
_LEAVES = (
    *_PLAIN,
    *(enum.Enum, CodeType, types.GenericAlias, types.UnionType, types.NotImplementedType),
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
    type(vars(namedtuple("_Pair", "first"))["first"]),
)
"""Types of values without parts."""
_LEAF_MODULES = ("typing", "torch._ops")
_CONTAINERS = (list, set, deque, dict, OrderedDict, defaultdict, Counter)
_ITERABLES = (*_CONTAINERS, tuple, frozenset)
_FIXED = (
    *(tuple, frozenset, types.MethodType, functools.partial, property, staticmethod, classmethod),
    *(functools.cached_property, Tensor),
)
"""Types of values that always have the same parts; a tensor's layout is compared by itself."""
_VIEWS: dict[Any, Views] = {
    **dict.fromkeys((list, set, deque, tuple, frozenset), _iterated),
    **{kind: _keys_and_values(kind) for kind in (dict, OrderedDict, defaultdict, Counter)},
    types.MappingProxyType: _keys_and_values(types.MappingProxyType),
    types.MethodType: _attributes("__func__", "__self__"),
    functools.partial: _attributes("func", "args", "keywords"),
    functools.cached_property: _attributes("func", "attrname"),
    property: _attributes("fget", "fset"),
    staticmethod: _attributes("__func__", "__isabstractmethod__"),
    classmethod: _attributes("__func__", "__isabstractmethod__"),
}
"""How the parts of a value are found, by its type."""
_STATELESS = (
    *(object, nn.Module, abc.ABC, typing.Generic, typing.Protocol, types.SimpleNamespace),
)
_SIMPLE_MEMBERS = (
    *(FunctionType, property, staticmethod, functools.cached_property, types.MemberDescriptorType),
    *(types.BuiltinFunctionType, types.GetSetDescriptorType, types.MethodDescriptorType),
    types.WrapperDescriptorType,
)
_MODULE_STATE = frozenset(
    {
        *("training", "_parameters", "_buffers", "_modules", "_forward_hooks"),
        *("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    }
)
_MODULE_INTERNALS = vars(nn.Module()).keys() - _MODULE_STATE
_LAYOUT = ("shape", "dtype", "device", "requires_grad")
_layout = attrgetter(*_LAYOUT)
