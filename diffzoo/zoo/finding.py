"""A network's weights among all that a training checkpoint holds, raw or EMA.

A checkpoint holds several sets of weights under names of its framework: raw ones and EMAs, wrapped by DataParallel
(`module.`) or compile (`_orig_mod.`), below the attribute of a LightningModule (`model.`, `network.`), or as a list in
the order of the parameters. A *complete set* has every tensor of the network, and nothing else below its prefix. A
complete set beside another one is an EMA if the words of its place say so (`params_ema`, `model_ema1`, `ema_0.9999`,
`shadow_params`); two sets that no word tells apart are not chosen between. What an optimizer holds is a moment of the
gradients, whatever its shape, unless it is called an EMA there (NeMo).
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from diffzoo.errors import UserError, did_you_mean
from diffzoo.formats import Tensors

__all__ = ["Convert", "NothingFits", "emas_in", "find_weights", "state_dicts"]

Convert = Callable[[Tensors], Tensors | None]

WRAPPERS = ("module", "_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
EMA_WORDS = ("ema", "average", "averaged", "averages", "avg", "shadow", "swa", "polyak", "target")
OURS = ("diffzoo", "diffzoo_averages")  # where our training keeps its EMAs, by label
OPTIMIZER = re.compile(r"opts?|optim|opt_state.*|.*optimi[sz]er.*|exp_avg.*", re.IGNORECASE)


class NothingFits(UserError):
    """A file holds no set of weights with the names of this network."""


def emas_in(checkpoint: Mapping[str, object]) -> dict[str, Tensors]:
    """The EMAs that our training stores, by label; empty for other files."""
    for key in OURS:
        held = checkpoint.get(key)
        emas = held.get("averages") if isinstance(held, Mapping) else None
        if emas:
            return {str(label): _tensors(tensors) for label, tensors in emas.items()}
    return {}


def find_weights(
    data: Mapping[str, object],
    names: Mapping[str, Tensor],
    what: str,
    weights: str = "ema",
    convert: Convert = lambda tensors: None,
) -> tuple[Tensors, str]:
    """The tensors called `names`, from wherever in a checkpoint they lie.

    Args:
        data: a state dict or a training checkpoint.
        names: the network's state dict; parameters on the meta device where its buffers are not.
        what: the file, for messages.
        weights: "ema" (an EMA if there is one, else the raw weights), "raw", or the label or place of a set.
        convert: from another layout to the network's names; None for what is not in that layout.

    Returns:
        The tensors by the network's names, and what they are: "raw" (and the place, if it was named), or the label or
        place of the EMA.

    Raises:
        NothingFits: if no set of weights has exactly these names.
        UserError: if several have and no word tells which is the EMA, or there is no such set.
    """
    raw, emas = _sets(data, names, convert)
    base = next(iter(raw.values()), {})
    for label, tensors in emas_in(data).items():
        whole = {k: v for k, v in (base | tensors).items() if k in names}  # frozen weights have no EMA
        if whole.keys() == names.keys():
            emas[label] = whole
    if not raw and not emas:
        raise NothingFits(_nothing(data, names, what))
    if weights in raw or weights in emas:
        return (emas | raw)[weights], weights if weights in emas else f"raw {weights}"
    if weights not in ("ema", "raw"):
        raise UserError(f"{what} holds no EMA {weights!r}{did_you_mean(weights, emas)}")
    if weights == "raw" and not raw:
        raise UserError(f"{what} holds no raw weights, only the EMA {next(iter(emas))!r}")
    if emas and weights == "ema":
        label = next((label for label in emas_in(data) if label in emas), next(iter(emas)))
        _remark_on_ema_pytorch(data, label, what)
        return emas[label], label
    if weights == "ema" and (partial := _partial_ema(data, names)):
        raise UserError(
            f"{what} holds an EMA, {partial!r}, which is no complete set of these weights: weights='raw' takes the raw "
            "ones"
        )
    _only_one(raw, what)
    return base, "raw"


def _only_one(sets: Mapping[str, Tensors], what: str) -> None:
    first, *rest = sets.items()
    for place, tensors in rest:
        if any(tensors[k].data_ptr() != v.data_ptr() for k, v in first[1].items() if v.numel()):
            raise UserError(
                f"{what} holds two complete sets of these weights, {first[0]!r} and {place!r}, and nothing says which "
                f"of them is an EMA: name the one that is meant, weights={place!r}"
            )


def _remark_on_ema_pytorch(data: Mapping[str, object], label: str, what: str) -> None:
    """Warn about the decay of an EMA of ema-pytorch, whose file does not say what it counts in."""
    place, _, inner = label.rpartition("ema_model")
    held = _at(data, place.rstrip(".")) if not inner else None
    if isinstance(held, Mapping) and {"initted", "step"} <= held.keys():
        warnings.warn(
            f"the EMA in {what} is ema-pytorch's, which averages every `update_every`-th step only: by default every "
            "10th, so that a decay of 0.9999 is one of 0.99999 per step; in its post-hoc EMA every 100th, so that a "
            "width of 0.05 has its centre at 0.15 of the run, not at 0.95. With update_every=1 it is what it says",
            stacklevel=2,
        )


def _at(data: Mapping[str, object], place: str) -> object:
    """What lies at a place such as `state.ema`; None if nothing does."""
    return next((held for path, held in _nested(data) if path == place), None)


# -- complete sets


def _sets(
    data: Mapping[str, object], names: Mapping[str, Tensor], convert: Convert
) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """The complete sets of a network's tensors by their place: raw ones, and EMAs."""
    found: dict[str, Tensors] = {}
    for path, tensors in state_dicts(data):
        if (converted := convert(tensors)) is not None:
            found[path] = converted
        for prefix in _prefixes(tensors, names):
            found[f"{path}.{prefix}".strip(".")] = {name: tensors[prefix + name] for name in names}
        if squeezed := _without_dots(tensors, names):
            found[f"{path}.ema without dots".strip(".")] = squeezed
    fitting = {p: t for p, t in found.items() if all(t[k].shape == v.shape for k, v in names.items())}
    found = {place: t for place, t in (fitting or found).items() if not _is_moment(place)}
    raw = {place: t for place, t in found.items() if not _is_ema(place, data)}
    emas = {place: t for place, t in found.items() if place not in raw}
    for path, values in _lists(data):
        if named := _in_order(values, names, next(iter(raw.values()), {})):
            (emas if _is_ema(path, data) else raw)[path] = named
    return raw, emas


def _is_ema(place: str, data: Mapping[str, object]) -> bool:
    if "current_model_state" in data:
        return place.split(".")[0] == "state_dict"  # Lightning's WeightAveraging swaps: `state_dict` is the EMA
    return _says_ema(place)


def _says_ema(place: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", place)]
    if "online" in words:  # what an EMA of ema-pytorch keeps beside itself, below whatever name
        return False
    return any(word in EMA_WORDS or word.startswith("ema") for word in words)


def _plain(name: str) -> str:
    """A tensor's name without the wrappers of compile, DataParallel and the like."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _tensors(data: object) -> Tensors:
    if not isinstance(data, Mapping):
        return {}
    return {_plain(k): v for k, v in data.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _nested(data: Mapping[str, object] | Sequence[object], path: str = "") -> Iterator[tuple[str, object]]:
    """Every mapping, and every list of tensors, with its path, outermost first; not of optimizers or our own EMAs."""
    if not _is_moment(path) and (isinstance(data, Mapping) or all(isinstance(value, Tensor) for value in data)):
        yield path, data
    for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
        if isinstance(value, Mapping | list | tuple) and key not in OURS:
            yield from _nested(value, f"{path}.{key}" if path else str(key))


def _is_moment(place: str) -> bool:
    """Whether a place belongs to an optimizer, and to no EMA that this keeps."""
    inside = [i for i, part in enumerate(place.split(".")) if OPTIMIZER.fullmatch(part)]
    return bool(inside) and not _says_ema(".".join(place.split(".")[inside[-1] + 1 :]))


def state_dicts(data: Mapping[str, object]) -> Iterator[tuple[str, Tensors]]:
    """Every dict of tensors in a checkpoint with its place, outermost first."""
    for path, held in _nested(data):
        if isinstance(held, Mapping) and (tensors := _tensors(held)):
            yield path, tensors


def _lists(data: Mapping[str, object]) -> Iterator[tuple[str, Sequence[Tensor]]]:
    for path, held in _nested(data):
        if isinstance(held, list | tuple) and held:
            yield path, held


def _in_order(values: Sequence[Tensor], names: Mapping[str, Tensor], base: Tensors) -> Tensors:
    """Parameters that a file lists without names, as score_sde and diffusers keep EMAs; buffers are the raw ones."""
    meta = [k for k, v in names.items() if v.is_meta]
    parameters = list(names) if len(values) == len(names) else meta
    if len(parameters) != len(values) or not (base or len(parameters) == len(names)):
        return {}
    if any(names[k].shape != v.shape for k, v in zip(parameters, values, strict=True)):
        return {}
    return {k: base.get(k, names[k]) for k in names} | dict(zip(parameters, values, strict=True))


def _without_dots(tensors: Tensors, names: Mapping[str, object]) -> Tensors:
    """An EMA whose names lost their dots, as `LitEma` stores it beside the raw weights; else nothing."""
    squeezed = {name.replace(".", ""): name for name in names}
    for prefix in {k[: -len(s)] for k in tensors for s in squeezed if k.endswith(s) and "ema" in k[: -len(s)]}:
        if all(prefix + s in tensors for s in squeezed):
            return {name: tensors[prefix + s] for s, name in squeezed.items()}
    return {}


def _prefixes(tensors: Tensors, names: Mapping[str, object]) -> list[str]:
    """Prefixes behind which every one of `names` is found and nothing else."""
    first = next(iter(names))
    candidates = [k[: -len(first)] for k in tensors if k == first or k.endswith("." + first)]
    return [p for p in candidates if all(p + n in tensors for n in names) and not _left_over(tensors, names, p)]


def _left_over(tensors: Tensors, names: Mapping[str, object], prefix: str) -> list[str]:
    """Tensors below a prefix that the network has no place for: strict loading would be a lie.

    A scalar with a plain name, such as `n_averaged` of `AveragedModel`, is a counter and not a weight.
    """
    rest = [k for k in tensors if k.startswith(prefix) and k[len(prefix) :] not in names]
    return [k for k in rest if tensors[k].ndim or "." in k[len(prefix) :]]


def _closest(data: Mapping[str, object], names: Mapping[str, object]) -> Counter[tuple[str, str]]:
    """How many tensors have one of `names`, by path and prefix; all of a list, which has no names."""
    count = Counter({(path, ""): len(values) for path, values in _lists(data)})
    for path, tensors in state_dicts(data):
        for key in tensors:
            ends = [0, *(found.end() for found in re.finditer(r"\.", key))]
            prefix = next((key[:end] for end in ends if key[end:] in names), None)
            if prefix is not None:
                count[path, prefix] += 1
    return count


def _partial_ema(data: Mapping[str, object], names: Mapping[str, object]) -> str:
    """The place of an EMA that has most of the tensors, and not all or others too; "" if there is none."""
    places = ((f"{path}.{prefix}".strip("."), n) for (path, prefix), n in _closest(data, names).items())
    return next((place for place, n in places if 2 * n > len(names) and _is_ema(place, data)), "")


def _nothing(data: Mapping[str, object], names: Mapping[str, object], what: str) -> str:
    """What the closest set lacks, or what is left over in it, in words."""
    sets = dict(state_dicts(data))
    if lora := [k for tensors in sets.values() for k in tensors if "lora_" in k]:
        part = (
            f"it holds low-rank adapters, for example {lora[0]}: merge them into their weights where they were trained"
        )
        return f"{what} does not hold the weights of this network: {part}"
    path, prefix = next((place for place, _ in _closest(data, names).most_common() if place[0] in sets), ("", ""))
    best = sets.get(path, {})
    missing = [n for n in names if prefix + n not in best]
    if missing:
        part = f"{len(missing)} of the network's {len(names)} tensors are not in it, for example {missing[0]}"
    else:
        rest = _left_over(best, names, prefix)
        part = f"{len(rest)} of its tensors are not the network's, for example {rest[0]}"
    if re.search(r"-\d+-of-\d+\.\w+$", what):
        part += "; it is one of several shards, which their index, *.index.json, reads together"
    return f"{what} does not hold the weights of this network: {part}"
