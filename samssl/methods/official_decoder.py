"""The official MAE's decoder (arXiv:2111.06377): self-attention over all tokens, by lightly's module.

Imported only where it is chosen: the rest of the package runs without lightly.
"""

from jaxtyping import Float, Int
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from torch import Tensor, nn

from samssl.methods.targets import take


class SelfAttentionDecoder(nn.Module):
    """Visible tokens and mask tokens attend to each other on the whole grid, which must be square."""

    def __init__(self, width: int, dim: int, depth: int, heads: int, outputs: int, num_patches: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=num_patches, embed_dim=dim, depth=depth, num_heads=heads, num_prefix_tokens=0
        )
        self.head = nn.Linear(dim, outputs)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        visible: Int[Tensor, "B N"],
        chosen: Int[Tensor, "B M"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B M outputs"]:
        """Predictions for the patches with raster indices `chosen`, from tokens at indices `visible`."""
        embedded = self.embed(tokens)
        batch, count = len(embedded), grid[0] * grid[1]
        sequence = self.decoder.mask_token.to(embedded.dtype).expand(batch, count, -1)
        place = visible.expand(batch, -1)[..., None].expand_as(embedded)
        decoded = self.decoder.decode(self.decoder.add_pos_embed(sequence.scatter(1, place, embedded)))
        return self.head(take(decoded, chosen))
