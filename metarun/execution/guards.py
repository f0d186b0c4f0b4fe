"""Guards of a replay: what a function reads besides its arguments, and whether it is unchanged.

The code that the function executes (see `watching`) names what it can read. `Guards` finds these
values, from the function through objects, containers, modules and classes. While they are the
same, the function takes the same path through its code.
"""

from __future__ import annotations

import abc
import enum
import functools
import types
import typing
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, call, is_, itemgetter
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from metarun.execution.watching import (
    PURE_MODULES,
    Executed,
    Globals,
    is_library,
    is_of_c,
    names_in,
)

View = tuple[Callable[[Any], Iterable[Any]], Any]
"""A function and its argument; the result has some of the values below an object."""
Views = Callable[[Any], list[View]]

_MOST_VALUES = 20_000


class UnguardedError(Exception):
    """A function depends on something that cannot be compared between calls."""


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

    def hold_for(self, function: Any) -> bool:
        """Return what `hold` does, if only the function can have changed since they held."""
        try:
            return _match(self._root, function, {})
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
            scopes.setdefault(id(scope), (scope, set()))[1].update(names_in(code)[0])
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
        elif not is_library(type(value).__module__):
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
        if is_library(function.__module__) and not function.__closure__:
            return None
        names = ["__code__", "__globals__"]
        if not is_library(function.__module__) and id(function.__code__) not in self._codes:
            return _attributes(*names)
        names += ["__defaults__", "__kwdefaults__", *sorted(self._names & vars(function).keys())]
        if not function.__closure__:
            return _attributes(*names)
        get = attrgetter(*names)
        return lambda other: [(get, other), (_contents, other)]

    def _module(self, module: ModuleType) -> Views | None:
        top = module.__name__.partition(".")[0]
        if top in PURE_MODULES or top == "builtins":
            return None
        entries = _entries(self._names & vars(module).keys(), ())
        return lambda other: entries(vars(other))

    def _class(self, kind: type) -> Views | None:
        if is_library(kind.__module__) or issubclass(kind, enum.Enum):
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
        library = is_library(base.__module__) and not _is_torch(base)
        if base not in _STATELESS and base not in _VIEWS and (library or is_of_c(base)):
            raise UnguardedError(f"it depends on a {kind.__module__}.{kind.__qualname__}")


def _is_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


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
