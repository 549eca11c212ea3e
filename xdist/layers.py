"""Transformer layers of BERT and its kin for CPUs that compute in bfloat16: one autograd function for each layer.

The arithmetic is that of the checkpoint's own modules (Vaswani et al. 2017, 1706.03762; post-norm, exact GELU), in far fewer
operations: on a CPU each costs tens of microseconds to start, and the passes over activations between the matrix products
cost more than the products. Queries, keys and values are one product; scale and mask are part of another; activations
stay bfloat16 from layer to layer; normalisation, softmax and the sums inside products are float32. `Packed` is the same without
gradient: weights are converted once, and activation and residual are part of the products.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

KIN = ("bert", "roberta", "xlm-roberta", "camembert")
BF16 = torch.bfloat16

_norm, _norm_backward = torch.ops.aten.native_layer_norm, torch.ops.aten.native_layer_norm_backward
_gelu_backward, _softmax_backward = torch.ops.aten.gelu_backward, torch.ops.aten._softmax_backward_data


def fits(body: Any) -> bool:
    """Whether a transformer's layers are of the kind that this module computes."""
    config = body.config
    return config.model_type in KIN and config.hidden_act == "gelu" and not config.is_decoder


def hidden(body: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Token ids and mask (batch, length) to the last layer's output (batch, length, width), bfloat16."""
    heads = body.config.num_attention_heads
    states, shut = _first(body, ids, mask)
    for layer in body.encoder.layer:
        states = Layer.apply(states, shut, heads, layer.output.LayerNorm.eps, *_weights(layer))
    return states


def _first(body: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the first layer gets: states (batch, length, width), and what is added to logits (batch * heads, 1, length)."""
    shut = (1 - mask[:, None]).to(BF16) * torch.finfo(BF16).min
    return body.embeddings(input_ids=ids).to(BF16), shut.repeat_interleave(body.config.num_attention_heads, 0)


def _weights(layer: Any) -> list[Tensor]:
    """A layer's parameters in the order in which `Layer` takes them."""
    attention, mixed, wide, narrow = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    modules = (attention.query, attention.key, attention.value, mixed.dense, mixed.LayerNorm, wide.dense, narrow.dense, narrow.LayerNorm)
    return [tensor for module in modules for tensor in (module.weight, module.bias)]


class Layer(torch.autograd.Function):
    """Self-attention and feed-forward network, each with residual and layer norm."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shut: Tensor, heads: int, eps: float, *weights: Tensor) -> Tensor:
        """`states` (batch, length, width) and `shut` (batch * heads, 1, length), bfloat16; weights float32."""
        batch, length, width = states.shape
        w_qkv, b_qkv, wo, bo, norm_1, shift_1, wi, bi, wd, bd, norm_2, shift_2 = _converted(weights, heads)
        x = states.reshape(-1, width)
        qkv, p, context = _attend(linear(x, w_qkv, b_qkv), shut, heads)
        a = linear(context, wo, bo).add_(x)
        y, mean_1, scale_1 = _norm(a, [width], norm_1, shift_1, eps)
        h = linear(y, wi, bi)
        u = gelu(h)
        o = linear(u, wd, bd).add_(y)
        z, mean_2, scale_2 = _norm(o, [width], norm_2, shift_2, eps)
        norms = (a, mean_1, scale_1, norm_1, shift_1, o, mean_2, scale_2, norm_2, shift_2)
        ctx.save_for_backward(x, qkv, p, context, y, h, u, w_qkv, wo, wi, wd, *norms)
        ctx.sizes = batch, heads, _scale(width, heads)
        return z.view(batch, length, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states and weights; weights' in float32."""
        x, qkv, p, context, y, h, u, w_qkv, wo, wi, wd, a, mean_1, scale_1, norm_1, shift_1, o, mean_2, scale_2, norm_2, shift_2 = (
            ctx.saved_tensors
        )
        batch, heads, scale = ctx.sizes
        width = x.shape[1]
        q, k, v = qkv
        d_o, d_norm_2, d_shift_2 = _norm_backward(gradient.reshape(-1, width), o, [width], mean_2, scale_2, norm_2, shift_2, [True] * 3)
        d_h = _gelu_backward(d_o @ wd, h)
        d_y = (d_h @ wi).add_(d_o)
        d_a, d_norm_1, d_shift_1 = _norm_backward(d_y, a, [width], mean_1, scale_1, norm_1, shift_1, [True] * 3)
        (d_context,) = _split_heads(d_a @ wo, batch, heads, 1)
        kind = _softmax_type(p.shape[-1])
        d_logits = _softmax_backward(torch.bmm(d_context, v.mT).to(kind), p.to(kind), -1, kind).to(BF16)
        d_qkv = torch.empty_like(qkv)
        torch.bmm(d_logits, k, out=d_qkv[0])
        torch.bmm(d_logits.mT, q, out=d_qkv[1])
        torch.bmm(p.mT, d_context, out=d_qkv[2])
        d_projected = _join_heads(d_qkv, batch)
        d_x = (d_projected @ w_qkv).add_(d_a)
        d_weight, d_bias = _linear_gradients(d_projected, x)
        d_weight[:width] *= scale
        d_bias[:width] *= scale
        d_attention = [part for each in zip(d_weight.split(width), d_bias.split(width), strict=True) for part in each]
        return (
            d_x.view_as(gradient), None, None, None,
            *d_attention, *_linear_gradients(d_a, context), d_norm_1, d_shift_1,
            *_linear_gradients(d_h, y), *_linear_gradients(d_o, u), d_norm_2, d_shift_2,
        )  # fmt: skip


class Packed:
    """All layers for passes without gradient, with the weights as they are now."""

    def __init__(self, body: Any):
        self.body, self.heads = body, body.config.num_attention_heads
        with torch.no_grad():
            self.layers = [self._layer(layer) for layer in body.encoder.layer]

    def _layer(self, layer: Any) -> tuple[Any, ...]:
        converted = _converted(_weights(layer), self.heads)
        # Laid out as oneDNN's kernels read them, which is otherwise done for each product anew.
        laid_out = (torch.ops.mkldnn._reorder_linear_weight(each) if each.dim() == 2 else each for each in converted)
        return (*laid_out, layer.output.LayerNorm.eps)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As the function of this name."""
        product = torch.ops.mkldnn._linear_pointwise
        states, shut = _first(self.body, ids, mask)
        x, shape = states.view(-1, states.shape[-1]), states.shape[-1:]
        for w_qkv, b_qkv, wo, bo, norm_1, shift_1, wi, bi, wd, bd, norm_2, shift_2, eps in self.layers:
            context = _attend(product(x, w_qkv, b_qkv, "none", [], ""), shut, self.heads)[2]
            y = _norm(product.binary(context, x, wo, bo, "add"), shape, norm_1, shift_1, eps)[0]
            u = product(y, wi, bi, "gelu", [], "none")
            x = _norm(product.binary(u, y, wd, bd, "add"), shape, norm_2, shift_2, eps)[0]
        return x.view_as(states)


def _converted(weights: Sequence[Tensor], heads: int) -> tuple[Tensor, ...]:
    """A layer's parameters as its products take them: bfloat16, queries' scaled and joined with keys' and values'; norms' as they are."""
    wq, bq, wk, bk, wv, bv, wo, bo, norm_1, shift_1, wi, bi, wd, bd, norm_2, shift_2 = weights
    scale = _scale(len(wq), heads)
    w_qkv, b_qkv = torch.cat([wq * scale, wk, wv]).to(BF16), torch.cat([bq * scale, bk, bv]).to(BF16)
    wo, bo, wi, bi, wd, bd = (weight.to(BF16) for weight in (wo, bo, wi, bi, wd, bd))
    return w_qkv, b_qkv, wo, bo, norm_1, shift_1, wi, bi, wd, bd, norm_2, shift_2


def _scale(width: int, heads: int) -> float:
    return float((width // heads) ** -0.5)


def _attend(projected: Tensor, shut: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(batch * length, 3 * width) to heads' queries, keys and values, attention's weights, and the context (batch * length, width)."""
    batch = len(shut) // heads
    q, k, v = qkv = _split_heads(projected, batch, heads, 3)
    p = torch.softmax(torch.baddbmm(shut, q, k.mT), -1, dtype=_softmax_type(shut.shape[-1])).to(BF16)
    return qkv, p, _join_heads(torch.bmm(p, v)[None], batch)


def _softmax_type(length: int) -> torch.dtype:
    """What a softmax over so many logits computes in: torch's bfloat16 kernel is slow on rows that do not fill its vector registers."""
    return torch.float32 if length % 32 else BF16


def _split_heads(joined: Tensor, batch: int, heads: int, parts: int) -> Tensor:
    """(batch * length, parts * width) to (parts, batch * heads, length, width / heads)."""
    split = joined.view(batch, len(joined) // batch, parts, heads, -1).permute(2, 0, 3, 1, 4)
    return split.reshape(parts, batch * heads, -1, split.shape[-1])


def _join_heads(split: Tensor, batch: int) -> Tensor:
    """The inverse of `_split_heads`."""
    parts, rows, length, size = split.shape
    return split.view(parts, batch, -1, length, size).permute(1, 3, 0, 2, 4).reshape(batch * length, parts * (rows // batch) * size)


def _linear_gradients(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias of a linear layer, float32, from its output's gradient and its input. The wider of the two is the one
    that the product transposes: so it is a third faster."""
    weight = gradient.mT @ x if gradient.shape[1] >= x.shape[1] else (x.mT @ gradient).mT
    return weight.float(), gradient.sum(0).float()
