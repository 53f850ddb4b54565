"""SAM's image encoder on all tokens or on visible tokens only, over `segment_anything`'s own parameters.

The function is `ImageEncoderViT.forward`, computed on the tokens that are visible and for any image
size: positions are interpolated inside the pass, and parameters keep SAM's shapes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor, nn

from samssl.masking import VisibleTokens, all_tokens
from samssl.models.attention import attend
from samssl.models.recompute import run_block


def encode_images(encoder: ImageEncoderViT, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
    """Image embeddings of normalised `images`: what `encoder(images)` gives at the size it was built for."""
    return encoder.neck(encode_all(encoder, images).permute(0, 3, 1, 2))


def encode_all(
    encoder: ImageEncoderViT,
    images: Float[Tensor, "B 3 H W"],
    hidden: Bool[Tensor, "B hw"] | None = None,
    mask_token: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "B h w D"]:
    """All tokens after the last block, before the neck; `mask_token` as in `encode_visible`."""
    visible = all_tokens(token_grid(encoder, images), window_size(encoder), images.device)
    tokens = encode_visible(encoder, images, visible, hidden, mask_token)
    raster = torch.empty_like(tokens).index_copy(1, visible.tokens[0], tokens)
    return raster.unflatten(1, visible.grid)


def encode_visible(
    encoder: ImageEncoderViT,
    images: Float[Tensor, "B 3 H W"],
    visible: VisibleTokens,
    hidden: Bool[Tensor, "B hw"] | None = None,
    mask_token: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "B N D"]:
    """The visible tokens after the last block, before the neck, in the order of `visible.tokens`.

    Among them `mask_token` takes the place of the patch embeddings that are `hidden` (SimMIM).
    """
    tokens = _embed(encoder, images, visible, hidden, mask_token)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        tokens = run_block(block, _run_block, tokens, visible)
    return tokens


def token_grid(encoder: ImageEncoderViT, images: Tensor) -> tuple[int, int]:
    """Token rows and columns (h, w) of `images` [B, C, H, W]."""
    patch = patch_side(encoder)
    height, width = images.shape[-2:]
    assert height % patch == 0, f"height {height} is not a multiple of the patch size {patch}"
    assert width % patch == 0, f"width {width} is not a multiple of the patch size {patch}"
    return height // patch, width // patch


def patch_side(encoder: ImageEncoderViT) -> int:
    """Side of one patch in pixels."""
    return int(encoder.patch_embed.proj.kernel_size[0])


def window_size(encoder: ImageEncoderViT) -> int:
    """Side in tokens of the attention windows, the same in every windowed block."""
    sizes = {block.window_size for block in encoder.blocks if isinstance(block, Block) and block.window_size}
    assert len(sizes) == 1, f"blocks with windows of {sizes} tokens"
    return sizes.pop()


def patchify(images: Float[Tensor, "B C H W"], patch: int) -> Float[Tensor, "B N CPP"]:
    """Patches in raster order, each flattened channel first as a convolution's weight is."""
    patches = images.unfold(2, patch, patch).unfold(3, patch, patch)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _run_block(block: Block, tokens: Tensor, visible: VisibleTokens) -> Tensor:
    attend_among = _attend_in_windows if block.window_size else _attend_globally
    tokens = tokens + attend_among(block.attn, block.norm1(tokens), visible)
    return tokens + block.mlp(block.norm2(tokens))


def _embed(
    encoder: ImageEncoderViT,
    images: Tensor,
    visible: VisibleTokens,
    hidden: Tensor | None,
    mask_token: Tensor | None,
) -> Tensor:
    projection = encoder.patch_embed.proj
    patches = patchify(images, patch_side(encoder))
    index = visible.tokens.expand(images.shape[0], -1)
    patches = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
    positions = _positions(encoder, visible.grid)
    at_tokens = F.embedding(visible.tokens, positions)  # plain indexing adds up gradients in any order
    embedded = F.linear(patches, projection.weight.flatten(1), projection.bias)
    if hidden is not None and mask_token is not None:
        embedded = embedded.where(~hidden.gather(1, index)[..., None], mask_token.to(embedded.dtype))
    return embedded + at_tokens


def _positions(encoder: ImageEncoderViT, grid: tuple[int, int]) -> Float[Tensor, "N D"]:
    """Absolute position embeddings in raster order, resized bicubically to `grid` where it is another."""
    assert encoder.pos_embed is not None
    positions = encoder.pos_embed.permute(0, 3, 1, 2)
    if positions.shape[-2:] != grid:
        positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
    return positions[0].flatten(1).T


def _attend_globally(attention: Attention, tokens: Tensor, visible: VisibleTokens) -> Tensor:
    attended = _attention(attention, attention.qkv(tokens), visible.rows, visible.columns, visible.grid)
    return attention.proj(attended)


def _attend_in_windows(attention: Attention, tokens: Tensor, visible: VisibleTokens) -> Tensor:
    """Attention inside each window, over its kept slots.

    SAM pads after the first norm, so a padding slot is a token of zeros and its q, k and v are what
    the qkv layer makes of zeros; it counts as a key, and what it attends to is thrown away.
    """
    batch, (_, num_windows, kept) = tokens.shape[0], visible.slots.shape
    qkv = attention.qkv(tokens)
    padding = attention.qkv(tokens.new_zeros(1, tokens.shape[-1])).to(qkv.dtype)
    place = (visible.real + num_windows * kept * torch.arange(batch, device=tokens.device)[:, None]).flatten()
    slotted = padding.expand(batch * num_windows * kept, -1).index_copy(0, place, qkv.flatten(0, 1))
    slots = visible.slots.expand(batch, -1, -1).flatten(0, 1)
    rows, columns = slots // visible.window, slots % visible.window
    present = None if visible.present is None else visible.present.flatten(0, 1)
    windows = slotted.unflatten(0, (batch * num_windows, kept))
    attended = _attention(attention, windows, rows, columns, (visible.window, visible.window), present)
    return attention.proj(attended.flatten(0, 1).index_select(0, place).view_as(tokens))


def _attention(
    attention: Attention,
    qkv: Float[Tensor, "S L CCC"],
    rows: Int[Tensor, "_ L"],
    columns: Int[Tensor, "_ L"],
    size: tuple[int, int],
    present: Bool[Tensor, "S L"] | None = None,
) -> Float[Tensor, "S L C"]:
    """SAM's attention among L tokens at (`rows`, `columns`) of a grid of `size`, S sequences at a time.

    The decomposed relative position `q . R_h[y_q - y_k + s - 1] + q . R_w[...]` is folded into the
    dot product: `[q * scale, rel_h, rel_w] . [k, onehot(y_k), onehot(x_k)]`.
    """
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    rel_h = _relative_scores(q, attention.rel_pos_h, rows, size[0])
    rel_w = _relative_scores(q, attention.rel_pos_w, columns, size[1])
    where = torch.cat([F.one_hot(rows, size[0]), F.one_hot(columns, size[1])], dim=-1)
    where = where.to(k.dtype)[:, None].expand(k.shape[0], k.shape[1], -1, -1)
    q = torch.cat([q * attention.scale, rel_h, rel_w], dim=-1)
    k = torch.cat([k, where], dim=-1)
    return attend(q, k, v, shown=present).transpose(1, 2).flatten(2)


def _relative_scores(
    q: Float[Tensor, "S heads L d"], relative: nn.Parameter, place: Int[Tensor, "_ L"], size: int
) -> Float[Tensor, "S heads L size"]:
    """`q . R[place - key + size - 1]` for each key place 0 .. size - 1; R is resized as SAM resizes it."""
    table = relative
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    scores = q @ table.to(q.dtype).T
    index = place[..., None] - torch.arange(size, device=place.device) + size - 1
    return scores.gather(-1, index[:, None].expand(q.shape[0], q.shape[1], -1, -1))
