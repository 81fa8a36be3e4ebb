"""Frozen text encoders: captions to token embeddings and a mask.

    encoder = T5Encoder("google-t5/t5-large", max_tokens=128)
    text, mask = encoder.encode(["a cat", "a dog on a bench"])     # (2, 128, 1024) and (2, 128)
    nothing, mask = encoder.null(2)                                # the embedding of the empty caption

Embeddings of padding are zero, so that they are the same in every batch and compress well in a cache. Encoders hold
no trainable weights and stay in eval mode. Dropping captions for classifier-free guidance is the training step's
business. `CachedText` keeps what it has seen, in memory or on disk, under a hash of the encoder and the caption.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from diffzoo.errors import MissingExtraError, UserError
from diffzoo.files import atomic_path

__all__ = ["CLIPEncoder", "CachedText", "T5Encoder", "TextEncoder"]


@runtime_checkable
class TextEncoder(Protocol):
    """What a text-conditional model needs to know about a text encoder."""

    width: int
    """Channels of a token embedding."""
    max_tokens: int
    """Tokens per caption; longer captions are cut, shorter ones padded."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings `(b, max_tokens, width)` in float32, zero at padding, and the mask `(b, max_tokens)`, True at
        real tokens."""

    def null(self, count: int) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of `count` empty captions."""

    def fingerprint(self) -> str:
        """A hash of weights, vocabulary and settings: equal for encoders that agree on every caption."""

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "text", "encoding captions") from error
    return transformers


def _load(loader: Any, what: str, source: str, revision: str | None) -> Any:
    try:
        return loader.from_pretrained(source, revision=revision)
    except ImportError as error:
        raise MissingExtraError(str(error).split()[0], "text", f"the {what} of {source!r}") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load the {what} of {source!r}: {reason}; give a folder, or a name on the Hub that you can reach"
        ) from error


def _tensor_hash(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class _Transformer:
    """A frozen encoder of the transformers library and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int, width: int, keep_padding: bool):
        if max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {max_tokens}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.max_tokens, self.width = tokenizer, max_tokens, width
        self.keep_padding = keep_padding
        self._fingerprint = ""

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
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

    def null(self, count: int) -> tuple[Tensor, Tensor]:
        text, mask = self.encode([""])
        return text.expand(count, -1, -1), mask.expand(count, -1)

    def fingerprint(self) -> str:
        if not self._fingerprint:
            facts = {
                "class": type(self).__name__,
                "max_tokens": self.max_tokens,
                "keep_padding": self.keep_padding,
                "vocabulary": hashlib.sha256(
                    json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
                ).hexdigest(),
                "weights": _tensor_hash(dict(self.model.state_dict())),
            }
            self._fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._fingerprint


class CLIPEncoder(_Transformer):
    """The text tower of CLIP (arXiv:2103.00020): the states of all tokens after the final norm.

    The U-ViT of Bao et al. (arXiv:2209.12152) reads all 77 tokens of ViT-L/14, padding included: `keep_padding`.

    Args:
        source: folder or Hub name with the text tower and its tokenizer.
        revision: branch, tag or commit on the Hub; pin a commit in a recipe.
        max_tokens: tokens per caption, with start and end; default: all positions the model has, 77.
        keep_padding: treat padding as real tokens, with states and a mask of True.

    Raises:
        MissingExtraError: without the extra `text`.
        UserError: if the source cannot be loaded, or has fewer positions than `max_tokens`.
    """

    def __init__(
        self,
        source: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        max_tokens: int | None = None,
        keep_padding: bool = False,
    ):
        transformers = _transformers()
        model = _load(transformers.CLIPTextModel, "CLIP text model", source, revision)
        tokenizer = _load(transformers.CLIPTokenizer, "CLIP tokenizer", source, revision)
        positions = int(model.config.max_position_embeddings)
        if max_tokens is not None and max_tokens > positions:
            raise UserError(f"{source!r} has {positions} positions, so max_tokens cannot be {max_tokens}")
        super().__init__(model, tokenizer, max_tokens or positions, int(model.config.hidden_size), keep_padding)


class T5Encoder(_Transformer):
    """The encoder of T5 (arXiv:1910.10683): the states of all tokens after the final norm.

    Imagen and Simple Diffusion read T5-XXL v1.1 (width 4096); smaller ones of the same family serve smaller models.

    Args:
        source: folder or Hub name with the encoder and its tokenizer.
        revision: branch, tag or commit on the Hub; pin a commit in a recipe.
        max_tokens: tokens per caption, with the end token.
        keep_padding: treat padding as real tokens, with states and a mask of True.

    Raises:
        MissingExtraError: without the extra `text`.
        UserError: if the source cannot be loaded.
    """

    def __init__(
        self,
        source: str = "google/t5-v1_1-xxl",
        revision: str | None = None,
        max_tokens: int = 128,
        keep_padding: bool = False,
    ):
        transformers = _transformers()
        model = _load(transformers.T5EncoderModel, "T5 encoder", source, revision)
        tokenizer = _load(transformers.AutoTokenizer, "T5 tokenizer", source, revision)
        super().__init__(model, tokenizer, max_tokens, int(model.config.d_model), keep_padding)


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
        self.width, self.max_tokens = encoder.width, encoder.max_tokens
        self.folder = Path(folder) / encoder.fingerprint()[:16] if folder else None
        self.memory_captions = memory_captions
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> Self:
        self.encoder.to(device)
        self._device = device
        return self

    def fingerprint(self) -> str:
        return self.encoder.fingerprint()

    def null(self, count: int) -> tuple[Tensor, Tensor]:
        text, mask = self.encode([""])
        return text.expand(count, -1, -1), mask.expand(count, -1)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = {c: self._recall(c) for c in dict.fromkeys(captions)}
        missing = [c for c, tokens in found.items() if tokens is None]
        if missing:
            text, mask = self.encoder.encode(missing)
            for caption, states, real in zip(missing, text.cpu(), mask.cpu(), strict=True):
                found[caption] = self._keep(caption, states[real].clone())
        return self._pad([found[c] for c in captions])

    def _pad(self, tokens: list[Any]) -> tuple[Tensor, Tensor]:
        text = torch.zeros(len(tokens), self.max_tokens, self.width)
        mask = torch.zeros(len(tokens), self.max_tokens, dtype=torch.bool)
        for row, states in enumerate(tokens):
            text[row, : len(states)] = states
            mask[row, : len(states)] = True
        return text.to(self._device), mask.to(self._device)

    def _path(self, caption: str) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(caption.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _recall(self, caption: str) -> Tensor | None:
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

    def _keep(self, caption: str, tokens: Tensor) -> Tensor:
        self._remember(caption, tokens)
        path = self._path(caption)
        if path is not None:
            from safetensors.torch import save_file

            with atomic_path(path) as temporary:
                save_file({"text": tokens.contiguous()}, temporary)
        return tokens

    def _remember(self, caption: str, tokens: Tensor) -> None:
        self._memory[caption] = tokens
        while len(self._memory) > self.memory_captions:
            self._memory.popitem(last=False)
