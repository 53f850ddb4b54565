"""Decoders of masked autoencoding, thrown away after pretraining."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from samssl.models.attention import attend


class CrossAttentionDecoder(nn.Module):
    """Queries at chosen patches attend to visible tokens, block by block; queries do not see each other."""

    def __init__(self, width: int, dim: int, depth: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList([CrossAttentionBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        visible: Int[Tensor, "B N"],
        chosen: Int[Tensor, "B M"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B M outputs"]:
        """Predictions for the patches with raster indices `chosen`, from tokens at indices `visible`."""
        positions = sincos_positions(grid, len(self.mask_token)).to(tokens)
        memory = self.embed(tokens) + positions[visible]
        queries = self.mask_token + positions[chosen]
        for block in self.blocks:
            queries = block(queries, memory)
        return self.head(self.norm(queries))


class CrossAttentionBlock(nn.Module):
    """Pre-norm cross-attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_queries = nn.LayerNorm(dim, eps=1e-6)
        self.norm_memory = nn.LayerNorm(dim, eps=1e-6)
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, queries: Float[Tensor, "B M D"], memory: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B M D"]:
        """Queries after one look at `memory`."""
        q = self.to_q(self.norm_queries(queries)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.to_kv(self.norm_memory(memory)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        attended = attend(q * q.shape[-1] ** -0.5, k, v).transpose(1, 2).flatten(2)
        queries = queries + self.proj(attended)
        return queries + self.mlp(self.norm_mlp(queries))


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "N dim"]:
    """Fixed 2D sine-cosine positions in raster order, half of `dim` for rows and half for columns."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    frequencies = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
