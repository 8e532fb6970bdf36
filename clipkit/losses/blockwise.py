"""clip_loss and siglip_loss in tiles: the same values and gradients in less memory and time; the B x G logits are never held.

A tile is the logits of some of this process's images with all texts. Legend: B batch (this process), G global batch,
D embed_dim, R rows of a tile. Gradients assume what training does: all processes weigh their losses alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkit.losses.clip import check_shapes
from clipkit.losses.gather import add_exp_of_processes, gather, rank, sum_to_owners

TILE_LOGITS = 2**22  # 16 MiB in fp32: two of them stay in a CPU's cache
TILE_LOGITS_GPU = 2**24  # 64 MiB: fewer, larger kernels
MIN_ROWS = 128  # with fewer, each product costs mostly the reading of all texts


def blockwise_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None, *,
                        group_ids: Tensor | None = None, block_size: int | None = None, bf16: bool = False) -> Tensor:
    """Give the value and the gradients of `clip_loss`, tile by tile, in four matrix products (the tiles are made twice).

    Args:
      image_features: (B, D), unit norm, any float type; sums are in fp32 (float64 stays). Row i matches text row i.
      text_features: (B, D), unit norm.
      logit_scale: Scalar > 0, 1/temperature (not its logarithm).
      logit_bias: Ignored: a constant cancels in the softmax.
      group_ids: (B,) integers; pairs of equal id are no negatives of each other and leave both softmaxes.
      block_size: Rows of a tile, >= 1; None = by the size of G.
      bf16: Inexact: the products round their factors to bfloat16 and add in fp32. A logit moves by at most
        logit_scale / 256 (two roundings of 2^-9), the value by twice that; measured at D = 512 and G = 2048, feature
        gradients by 0.2 to 0.7 % in norm (2 % where scale 100 leaves no loss), the value by 3e-6 to 2e-3 of itself.

    Returns:
      Scalar, nats, as `clip_loss`. It can be differentiated once.

    Raises:
      ValueError: the feature shapes differ, or the block size is below 1.
    """
    check_shapes(image_features, text_features)
    check_block_size(block_size)
    return _Clip.apply(image_features, text_features, logit_scale.reshape(()), group_ids, block_size,
                       bf16)  # pyright: ignore[reportReturnType]


def blockwise_siglip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None,
                          *, group_ids: Tensor | None = None, block_size: int | None = None, bf16: bool = False) -> Tensor:
    """Give the value and the gradients of `siglip_loss`, tile by tile, in three matrix products.

    The sigmoid needs no sums over all logits, so that the gradients are made with the value, if any is wanted.

    Args:
      image_features: (B, D), unit norm, any float type; sums are in fp32 (float64 stays). Row i matches text row i.
      text_features: (B, D), unit norm.
      logit_scale: Scalar > 0, 1/temperature (not its logarithm).
      logit_bias: Scalar added to every logit; None = 0.
      group_ids: (B,) integers; pairs of equal id are no negatives of each other and leave the sum.
      block_size: Rows of a tile, >= 1; None = by the size of G.
      bf16: Inexact, as in `blockwise_clip_loss`; measured, feature gradients move by 0.2 to 0.4 % in norm.

    Returns:
      Scalar, nats, as `siglip_loss`. It can be differentiated once.

    Raises:
      ValueError: the feature shapes differ, or the block size is below 1.
    """
    check_shapes(image_features, text_features)
    check_block_size(block_size)
    bias = None if logit_bias is None else logit_bias.reshape(())
    return _SigLip.apply(image_features, text_features, logit_scale.reshape(()), bias, group_ids, block_size, bf16,
                         torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Tiles:
    """The logits of this process's images with the texts of all, some rows at a time."""

    images: Tensor  # (B, D), fp32 or float64
    texts: Tensor  # (G, D), a factor
    logit_scale: Tensor
    logit_bias: Tensor | None
    group_ids: Tensor | None  # (G,)
    block_size: int  # R
    bf16: bool

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the rows of a tile, the tile (R, G), which may be written to, and in it the pairs' own logits (R,)."""
        buffer = self.images.new_empty(self.block_size, len(self.texts))  # (R, G)
        first = rank() * len(self.images)  # the column of this process's first pair
        for start in range(0, len(self.images), self.block_size):
            rows = slice(start, min(start + self.block_size, len(self.images)))
            tile = buffer[:rows.stop - start]
            multiply(factor(self.images[rows] * self.logit_scale, self.bf16), self.texts.T, out=tile)
            if self.logit_bias is not None:
                tile.add_(self.logit_bias)
            if self.group_ids is not None:
                same = self.group_ids[first + start:first + rows.stop, None] == self.group_ids  # (R, G)
                same.diagonal(first + start).fill_(False)
                tile.masked_fill_(same, -torch.inf)
            yield rows, tile, tile.diagonal(first + start)

    def add_gradients(self, rows: slice, tile: Tensor, image_grad: Tensor, text_grad: Tensor, scale_grad: Tensor) -> None:
        """Add what a tile of d loss / d logit gives: to (B, D) and (G, D), both without logit_scale, and to the scalar."""
        weights, images = factor(tile, self.bf16), self.images[rows]
        multiply(weights, self.texts, out=image_grad[rows])
        multiply(weights.T, factor(images, self.bf16), out=text_grad, add=True)
        scale_grad += (images * image_grad[rows]).sum()


def make_tiles(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None,
               group_ids: Tensor | None, block_size: int | None, bf16: bool) -> Tiles:
    """Gather the texts of all processes, once, and choose the rows of a tile."""
    dtype = torch.float32 if bf16 else torch.promote_types(torch.result_type(image_features, text_features), torch.float32)
    texts = gather(factor(text_features.to(dtype), bf16))  # (G, D)
    if block_size is None:
        block_size = max(MIN_ROWS, (TILE_LOGITS_GPU if texts.is_cuda else TILE_LOGITS) // len(texts))
    return Tiles(image_features.to(dtype), texts, logit_scale.to(dtype),
                 None if logit_bias is None else logit_bias.to(dtype), None if group_ids is None else gather(group_ids),
                 min(block_size, len(image_features)), bf16)


def check_block_size(block_size: int | None) -> None:
    """Raise ValueError unless a tile has a row or its size is left open."""
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; give a number of rows above 0, or None for a choice by size")


def factor(tensor: Tensor, bf16: bool) -> Tensor:
    """What `multiply` takes: the tensor, or it rounded to bfloat16, widened again where no product takes bfloat16 to fp32."""
    rounded = tensor.bfloat16() if bf16 else tensor
    return rounded if rounded.is_cuda else rounded.to(tensor.dtype)


def multiply(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """Write (or add) the matrix product of two factors to `out`. Autocast leaves products with `out` alone."""
    options: dict[str, Any] = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, left, right, out=out, **options)
    else:
        torch.mm(left, right, out=out, **options)


class _Clip(torch.autograd.Function):
    """Forward keeps the sums of both softmaxes; backward makes the tiles again.

    With p_ij and q_ij the softmaxes of row i and of column j, the gradient at logit ij is (p_ij + q_ij - 2 [i = j]) / 2B.
    A sum of exponentials is kept as its peak and exp(-peak) x sum: one logarithm would round away the loss of sure pairs.
    """

    @staticmethod
    def forward(ctx: Any, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, group_ids: Tensor | None,
                block_size: int | None, bf16: bool) -> Tensor:
        tiles = make_tiles(image_features, text_features, logit_scale, None, group_ids, block_size, bf16)
        num_rows, num_columns = len(tiles.images), len(tiles.texts)
        row_peaks, row_sums, own_logits = tiles.images.new_empty(3, num_rows)  # each (B,)
        peaks = tiles.images.new_full((num_columns,), torch.finfo(tiles.images.dtype).min)  # (G,), of the columns so far
        sums = torch.zeros_like(peaks)  # (G,)
        work = tiles.images.new_empty(tiles.block_size, num_columns)  # (R, G)
        for rows, tile, own in tiles:
            own_logits[rows] = own
            row_peaks[rows] = tile.amax(dim=1)
            row_sums[rows] = exp_difference(tile, row_peaks[rows, None], work).sum(dim=1)
            new_peaks = torch.maximum(peaks, tile.amax(dim=0))  # (G,)
            sums.mul_((peaks - new_peaks).exp_()).add_(tile.sub_(new_peaks).exp_().sum(dim=0))
            peaks = new_peaks
        peaks, sums = add_exp_of_processes(peaks, sums)
        own_columns = slice(rank() * num_rows, (rank() + 1) * num_rows)
        losses = ((row_peaks - own_logits) + row_sums.log()) + ((peaks[own_columns] - own_logits) + sums[own_columns].log())
        ctx.save_for_backward(tiles.images, tiles.texts, tiles.logit_scale, tiles.group_ids, row_peaks, row_sums, peaks, sums)
        ctx.block_size, ctx.bf16 = tiles.block_size, bf16
        return losses.mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, logit_scale, group_ids, row_peaks, row_sums, column_peaks, column_sums = ctx.saved_tensors
        tiles = Tiles(images, texts, logit_scale, None, group_ids, ctx.block_size, ctx.bf16)
        image_grad, text_grad = torch.empty_like(images), images.new_zeros(texts.shape)  # (B, D), (G, D)
        scale_grad = torch.zeros_like(logit_scale)
        work = images.new_empty(ctx.block_size, len(texts))  # (R, G)
        for rows, tile, own in tiles:
            of_rows = exp_difference(tile, row_peaks[rows, None], work).div_(row_sums[rows, None])  # (R, G)
            tile.sub_(column_peaks).exp_().div_(column_sums).add_(of_rows)
            own.sub_(2)
            tiles.add_gradients(rows, tile, image_grad, text_grad, scale_grad)
        weight = grad / (2 * len(images))
        text_grad = sum_to_owners(text_grad.mul_(weight * logit_scale))  # (B, D)
        return image_grad.mul_(weight * logit_scale), text_grad, weight * scale_grad, None, None, None


def exp_difference(tile: Tensor, shift: Tensor, work: Tensor) -> Tensor:
    """exp(tile - shift) in the first rows of `work`. (R, G)."""
    return torch.sub(tile, shift, out=work[:len(tile)]).exp_()


class _SigLip(torch.autograd.Function):
    """Forward makes the gradients too: that at logit l_ij is (sigmoid(l_ij) - [i = j]) / B."""

    @staticmethod
    def forward(ctx: Any, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None,
                group_ids: Tensor | None, block_size: int | None, bf16: bool, grad_enabled: bool) -> Tensor:
        tiles = make_tiles(image_features, text_features, logit_scale, logit_bias, group_ids, block_size, bf16)
        value, scale_grad, bias_grad = tiles.images.new_zeros(3)
        needs_grad = grad_enabled and any(ctx.needs_input_grad)
        if needs_grad:
            image_grad, text_grad = torch.empty_like(tiles.images), tiles.images.new_zeros(tiles.texts.shape)  # (B, D), (G, D)
        for rows, tile, own in tiles:
            own.neg_()  # a pair's loss is softplus(-logit); any other couple's is softplus(logit)
            value += F.softplus(tile, threshold=40).sum()  # log(1 + exp(40)) is 40 in float64, too
            if needs_grad:
                tile.sigmoid_()
                own.neg_()
                bias_grad += tile.sum()
                tiles.add_gradients(rows, tile, image_grad, text_grad, scale_grad)
        if needs_grad:
            text_grad = sum_to_owners(text_grad.mul_(tiles.logit_scale))  # (B, D)
            ctx.save_for_backward(image_grad.mul_(tiles.logit_scale), text_grad, scale_grad,
                                  None if logit_bias is None else bias_grad)
        return value / len(tiles.images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if one is None else one * (grad / len(ctx.saved_tensors[0])) for one in ctx.saved_tensors]
        return *gradients, None, None, None, None
