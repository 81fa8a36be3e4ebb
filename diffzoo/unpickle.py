"""Pickles read without running anything in them: tensors and plain values come out, objects become their attributes.

A pickle is a program that names functions and classes and calls them. Here a name gives one of the few functions that
build tensors and plain values (`_PLAIN`), or an empty stand-in: an object of any class outside the standard library
becomes a `Held`, a dict of what was stored in it, and its class is never imported. Anything else in the standard
library could run code (`os.system`), so a file that names it is refused.

So training checkpoints with their arguments, whole modules, and NVIDIA's files, which carry the source code of their
classes, are read alike. A module gives the state dict that its own code would.
"""

import io
import pickle
import sys
import types
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

__all__ = ["Held", "NotPlainError", "load_pickle"]

Shape = tuple[int, ...]
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in a file that torch.save wrote before it wrote archives
# plain data of the standard library, whose content is kept in a stand-in
DATA = frozenset(
    {"argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict", "collections.deque"}
    | {"datetime.date", "datetime.datetime", "datetime.timedelta", "datetime.timezone", "decimal.Decimal"}
    | {"fractions.Fraction", "uuid.UUID", "copyreg._reconstructor", "functools.partial", "_operator.getitem"}
    | {
        f"builtins.{n}"
        for n in ("object", "int", "float", "str", "bool", "bytes", "list", "tuple", "dict", "slice", "range", "type")
    }
)


class NotPlainError(pickle.UnpicklingError):
    """The file names something that could run code; nothing was run."""


class Held(dict[str, Any]):
    """An object whose class was not loaded: its attributes and items; positional arguments lie under "args"."""

    def __init__(self, *args: object, **attributes: object):
        if len(args) == 1 and isinstance(args[0], Mapping):
            self.update(args[0])
        elif args:
            self["args"] = args
        self.update(attributes)

    def __new__(cls, *args: object, **attributes: object) -> "Held":
        return dict.__new__(cls)

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):  # a tuple holds a dict and one of slots
                self.update(part)
            elif part is not None:
                self["state"] = state

    def extend(self, items: object) -> None:
        """What a list, a deque or a set of its own holds."""
        self.setdefault("items", []).extend(items)

    def append(self, item: object) -> None:
        self.extend([item])

    add = append


def _tensor(storage: torch.TypedStorage, offset: int, size: Shape, stride: Shape, *rest: object) -> Tensor:
    """A tensor over a storage, as `torch._utils._rebuild_tensor_v2` makes it, without its hooks."""
    made: Tensor = torch._utils._rebuild_tensor(storage, offset, size, stride)
    return made


def _typed_tensor(storage: torch.TypedStorage, offset: int, size: Shape, stride: Shape, *rest: Any) -> Tensor:
    """As `torch._utils._rebuild_tensor_v3`: of a type that has no storage of its own, such as float8."""
    return torch.empty(0, dtype=rest[2]).set_(storage._untyped_storage, offset, size, stride)


def _first(value: object, *rest: object) -> object:
    """A parameter is its tensor."""
    return value


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


_PLAIN: dict[str, object] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.storage._load_from_bytes": lambda data: _load_torch(io.BytesIO(data)),
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.bytearray": bytearray,
    "_codecs.encode": _encode,
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib.WindowsPath": _path,
}


_Unpickler: Any = pickle._Unpickler  # Python's reader written in Python


class _Reader(_Unpickler):
    """Python's reader with two steps narrowed: what a name gives, and what may be filled."""

    dispatch: ClassVar[dict[int, object]] = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's, too
        full = f"{module.removesuffix('._local')}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] in sys.stdlib_module_names - {"typing"} and full not in DATA:
            raise NotPlainError(full.removeprefix("builtins."))
        return type(name, (Held,), {"__module__": module})

    def load_build(self) -> None:
        """Fill an object, never a class or a function: what this process uses stays as it is."""
        if not isinstance(self.stack[-2], Held | OrderedDict):
            raise NotPlainError(f"the state of {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _load_torch(source: Path | BinaryIO, mapped: bool = False) -> object:
    """What `torch.save` wrote, with the reader above in place of Python's."""
    reader = types.SimpleNamespace(
        __name__="diffzoo.unpickle", Unpickler=_Reader, load=lambda file, **options: _Reader(file, **options).load()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols and types of storages
        return torch.load(source, map_location="cpu", weights_only=False, pickle_module=reader, mmap=mapped)


def load_pickle(path: Path, archive: bool) -> object:
    """The content of a pickle, or of an archive that `torch.save` wrote.

    Args:
        path: of the file.
        archive: whether it is an archive, which is memory-mapped.

    Returns:
        tensors, numbers, strings and containers; objects as `Held`, modules as state dicts.

    Raises:
        NotPlainError: if it names something that could run code; nothing was run.
        Exception: of any kind, if it is damaged.
    """
    if archive:
        return _with_modules(_load_torch(path, mapped=True))
    with path.open("rb") as file:
        first = _Reader(file).load()
    return _with_modules(_load_torch(path) if first == TORCH_MAGIC else first)


def _with_modules(data: object) -> object:
    """The same with every module replaced by its state dict, in containers of any depth."""
    if isinstance(data, Mapping):
        module = _module(data)
        return _state(module) if module is not None else {k: _with_modules(v) for k, v in data.items()}
    return data


def _module(data: object) -> Mapping[str, Any] | None:
    """The attributes of a `torch.nn.Module`, which NVIDIA's files keep under "state"; None for anything else."""
    for found in (data, data.get("state") if isinstance(data, Held) else None):
        if isinstance(found, Mapping) and {"_parameters", "_buffers", "_modules"} <= found.keys():
            return found
    return None


def _state(module: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    passing = module.get("_non_persistent_buffers_set") or ()
    own = {**module["_parameters"], **{k: v for k, v in module["_buffers"].items() if k not in passing}}
    state = {prefix + name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name, child in module["_modules"].items():
        inner = _module(child) if child is not None else None
        if inner is not None:
            state |= _state(inner, f"{prefix}{name}.")
    return state
