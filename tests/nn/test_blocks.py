"""Attention, blocks and embeddings against straight-line references."""

import math

import pytest
import torch
from torch import Tensor, nn

from diffzoo.errors import UserError
from diffzoo.nn.attention import CrossAttention, ImageAttention, SelfAttention, TransformerBlock, to_image, to_tokens
from diffzoo.nn.convs import Downsample, ResBlock, Upsample
from diffzoo.nn.embeddings import CaptionTokens, Film, NoiseLevelEmbedding, sinusoid
from diffzoo.nn.norms import MapNorm, group_norm, map_norm, token_norm
from diffzoo.nn.time_dependent import TimeDependentLayerNorm, scaled_level


def randomised(module: nn.Module) -> nn.Module:
    """The module in float64 with all parameters random, so that nothing hides behind a zero or a one."""
    module = module.double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean() + 1e-6) * scale


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normal(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + layer.eps) * layer.weight + layer.bias


def attend(q: Tensor, k: Tensor, v: Tensor, block: SelfAttention | CrossAttention, seen: Tensor) -> Tensor:
    """One image: queries (n, c), keys and values (m, c); head by head, query by query."""
    d = q.shape[1] // block.heads
    rows = []
    for i in range(len(q)):
        heads = []
        for h in range(block.heads):
            at = slice(h * d, (h + 1) * d)
            query = rms(q[i, at], block.norm_q.weight)
            keys = torch.stack([rms(key, block.norm_k.weight) for key in k[seen][:, at]])
            heads.append(torch.softmax(keys @ query / math.sqrt(d), 0) @ v[seen][:, at])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ block.out.weight.T + block.out.bias


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + layer.bias


def self_attend(x: Tensor, block: SelfAttention) -> Tensor:
    q, k, v = linear(x, block.qkv).chunk(3, dim=1)
    return attend(q, k, v, block, torch.ones(len(x), dtype=torch.bool))


def test_self_attention() -> None:
    block, x = randomised(SelfAttention(12, heads=3)), torch.randn(2, 5, 12, dtype=torch.float64)
    expected = torch.stack([self_attend(image, block) for image in x])
    torch.testing.assert_close(block(x), expected)


def test_cross_attention_sees_what_the_mask_shows() -> None:
    block = randomised(CrossAttention(12, context=7, heads=3))
    x, context = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    visible = torch.tensor([[True, False, True, True], [True, False, False, False]])
    for i, got in enumerate(block(x, context, visible)):
        k, v = linear(context[i], block.kv).chunk(2, dim=1)
        torch.testing.assert_close(got, attend(linear(x[i], block.q), k, v, block, visible[i]))


def test_transformer_block_is_mlp_then_attention_then_captions() -> None:
    block = randomised(TransformerBlock(12, 6, heads=3, skip=True, context=7))
    x, skip, emb = (torch.randn(s, dtype=torch.float64) for s in ((5, 12), (5, 12), (6,)))
    context, visible = torch.randn(4, 7, dtype=torch.float64), torch.tensor([True, True, False, True])
    h = (normal(x, block.norm1) + normal(skip, block.norm_skip)) / math.sqrt(2)
    scale, shift = linear(silu(emb), block.mlp.film.linear).chunk(2)
    y = x + linear(silu(linear(h, block.mlp.linear1)) * (1 + scale) + shift, block.mlp.linear2)
    y = y + self_attend(normal(y, block.norm2), block.attention)
    k, v = linear(context, block.cross.kv).chunk(2, dim=1)
    y = y + attend(linear(normal(y, block.norm3), block.cross.q), k, v, block.cross, visible)
    got = block(*(t[None] for t in (x, emb, skip, context, visible)))
    torch.testing.assert_close(got[0], y)


def grouped(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    parts = x.unflatten(0, (layer.num_groups, -1))
    mean, var = parts.mean((1, 2, 3), keepdim=True), parts.var((1, 2, 3), correction=0, keepdim=True)
    normed = ((parts - mean) / torch.sqrt(var + layer.eps)).flatten(0, 1)
    return normed * layer.weight[:, None, None] + layer.bias[:, None, None]


def convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    padded = torch.zeros(x.shape[0], x.shape[1] + 2, x.shape[2] + 2, dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)
    return torch.einsum("ihwyx,oiyx->ohw", windows, layer.weight) + layer.bias[:, None, None]


@pytest.mark.parametrize("skip", [False, True])
def test_res_block(skip: bool) -> None:
    block = randomised(ResBlock(8, 6, skip=skip))
    x, s, emb = (torch.randn(shape, dtype=torch.float64) for shape in ((8, 4, 4), (8, 4, 4), (6,)))
    h = grouped(x, block.norm1)
    if skip:
        h = (h + grouped(s, block.norm_skip)) / math.sqrt(2)
    h = grouped(convolve(silu(h), block.conv1), block.norm2)
    scale, shift = linear(silu(emb), block.film.linear).chunk(2)
    h = silu(h * (1 + scale[:, None, None]) + shift[:, None, None])
    got = block(x[None], emb[None], s[None] if skip else None)
    torch.testing.assert_close(got[0], x + convolve(h, block.conv2))


def test_resampling() -> None:
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    down, up = randomised(Downsample(3, 5)), randomised(Upsample(5, 3))
    pooled = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    low = torch.einsum("bchw,oc->bohw", pooled, down.conv.weight[:, :, 0, 0]) + down.conv.bias[:, None, None]
    torch.testing.assert_close(down(x), low)
    projected = torch.einsum("bchw,oc->bohw", low, up.conv.weight[:, :, 0, 0]) + up.conv.bias[:, None, None]
    torch.testing.assert_close(up(low), torch.kron(projected, torch.ones(2, 2, dtype=torch.float64)))


@pytest.mark.parametrize(
    "block", [ResBlock(8, 6), TransformerBlock(8, 6, heads=2, context=5)], ids=lambda b: type(b).__name__
)
def test_blocks_start_as_the_identity(block: nn.Module) -> None:
    x = torch.randn(2, 8, 4, 4) if isinstance(block, ResBlock) else torch.randn(2, 16, 8)
    extra = () if isinstance(block, ResBlock) else (None, torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(block(x, torch.randn(2, 6), *extra), x, rtol=0, atol=0)
    torch.testing.assert_close(ImageAttention(8, 2)(torch.ones(1, 8, 2, 2)), torch.ones(1, 8, 2, 2))


def test_tokens_and_back() -> None:
    x = torch.randn(2, 3, 4, 6)
    tokens = to_tokens(x)
    assert tokens.shape == (2, 24, 3)
    torch.testing.assert_close(tokens[:, 7], x[:, :, 1, 1])
    torch.testing.assert_close(to_image(tokens, 4), x)
    last = torch.randn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    assert to_tokens(last).data_ptr() == last.data_ptr()
    assert to_tokens(last).is_contiguous()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="10 channels does not divide into 4 attention heads"):
        SelfAttention(10, 4)


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (512, 32), (96, 16), (48, 8), (8, 2), (3, 1), (6, 1)])
def test_groups(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def time_dependent(x: Tensor, norm: TimeDependentLayerNorm, tau: float) -> Tensor:
    """Channels last, `(n, c)`."""
    values = []
    for p in (norm.weight, norm.bias):
        gate = 1 / (1 + torch.exp(-((1 + p.slope) * tau + p.shift)))
        values.append(p.low + gate * (p.high - p.low))
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * values[0] + values[1]


def test_norm_of_maps_is_over_the_channels_of_a_position() -> None:
    norm = randomised(map_norm("td_ln", 6))
    assert isinstance(norm, MapNorm)
    x, tau = torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.tensor([-0.7, 0.9], dtype=torch.float64)
    got = norm(x, tau)
    torch.testing.assert_close(got, norm.norm(x.permute(0, 2, 3, 1).contiguous(), tau).permute(0, 3, 1, 2))
    for image, maps, level in zip(x, got, (-0.7, 0.9), strict=True):
        torch.testing.assert_close(maps.flatten(1).T, time_dependent(image.flatten(1).T, norm.norm, level))
    last = torch.randn(2, 6, 3, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert norm(last, tau).is_contiguous(memory_format=torch.channels_last)


def test_res_block_with_a_time_dependent_norm() -> None:
    block = randomised(ResBlock(8, 6, skip=True, norm="td_ln"))
    x, s, emb = (torch.randn(shape, dtype=torch.float64) for shape in ((8, 4, 4), (8, 4, 4), (6,)))

    def norm(maps: Tensor, layer: MapNorm) -> Tensor:
        return time_dependent(maps.flatten(1).T, layer.norm, 0.4).T.unflatten(1, (4, 4))

    h = (norm(x, block.norm1) + norm(s, block.norm_skip)) / math.sqrt(2)
    h = norm(convolve(silu(h), block.conv1), block.norm2)
    scale, shift = linear(silu(emb), block.film.linear).chunk(2)
    h = silu(h * (1 + scale[:, None, None]) + shift[:, None, None])
    got = block(x[None], emb[None], s[None], torch.tensor([0.4], dtype=torch.float64))
    torch.testing.assert_close(got[0], x + convolve(h, block.conv2))


def test_standard_norms_ignore_the_noise_level() -> None:
    x = torch.randn(2, 8, 3, 3)
    for norm in (map_norm("standard", 8), token_norm("standard", 3)):
        assert torch.equal(norm(x, torch.tensor([0.1, 0.2])), norm(x))


def test_scaled_level() -> None:
    level = torch.tensor([-10, 5, 10, 20])
    torch.testing.assert_close(scaled_level(level, -10, 10), torch.tensor([-1.0, 0.5, 1.0, 2.0]))
    assert scaled_level(level.bfloat16(), -10, 10).dtype == torch.float32
    assert scaled_level(level.double(), -10, 10).dtype == torch.float64


def test_sinusoid() -> None:
    got = sinusoid(torch.tensor([0.0, 1.0, 250.0]), 6)
    for row, position in zip(got, (0.0, 1.0, 250.0), strict=True):
        angles = [position, position * 1e-2, position * 1e-4]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=2e-5)


def test_noise_level_is_read_linearly_over_its_range() -> None:
    wide, narrow = NoiseLevelEmbedding(8, (-10.0, 10.0)), NoiseLevelEmbedding(8, (0.0, 1.0))
    narrow.load_state_dict(wide.state_dict())
    level = torch.tensor([-12.0, -10.0, 0.0, 3.0, 10.0])
    torch.testing.assert_close(wide(level), narrow((level + 10) / 20), rtol=1e-4, atol=1e-4)
    expected = wide.linear2(silu(wide.linear1(sinusoid((level + 10) * 50, 8))))
    torch.testing.assert_close(wide(level), expected)


def test_class_vector_is_added() -> None:
    embedding = NoiseLevelEmbedding(8, (-10.0, 10.0), class_rows=4)
    level, label = torch.tensor([1.0, 1.0]), torch.tensor([3, 0])
    difference = embedding(level, label).diff(dim=0)
    torch.testing.assert_close(difference[0], embedding.classes.weight[0] - embedding.classes.weight[3])


def test_film_starts_as_the_identity() -> None:
    scale, shift = Film(4, 6)(torch.randn(3, 4))
    torch.testing.assert_close(scale, torch.ones(3, 6))
    torch.testing.assert_close(shift, torch.zeros(3, 6))


def test_hidden_caption_is_the_learned_null_token() -> None:
    caption = CaptionTokens(5, 8)
    tokens, visible = caption(torch.randn(2, 3, 5), torch.tensor([[True, True, False], [False] * 3]))
    assert tokens.shape == (2, 4, 8)
    torch.testing.assert_close(tokens[:, 0], caption.null.expand(2, 8))
    assert visible.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert caption(torch.randn(1, 3, 5))[1].all()
