"""What an encoder's tokens hold, by closed forms: effective rank, spread, and a linear read-out of classes.

Everything follows from sums over tokens in float64, so that tokens may come batch by batch and need not be
kept, and the same tokens give the same numbers.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SHRINKAGE = 1e-4
"""Share of each feature's variance that is added to the scatter within classes before it is inverted."""


def effective_rank(products: Float[Tensor, "D D"]) -> float:
    """The exponential of the entropy of X's singular values, scaled to sum 1; `products` is X'X.

    Between 1 (all features along one direction) and D (as much along each). Roy & Vetterli 2007; of
    pretrained features: RankMe, arXiv:2210.02885. NaN where a feature is not finite.
    """
    if not products.isfinite().all():
        return float("nan")
    singular = torch.linalg.eigvalsh(products.double()).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(share).sum().exp())


@dataclass
class TokenSums:
    """Sums over the tokens of slices of one size."""

    products: Float[Tensor, "D D"]
    at_place: Float[Tensor, "N D"]
    """Sum of the tokens at each of N places."""
    num_slices: int = 0

    @classmethod
    def zeros(cls, num_tokens: int, width: int, device: torch.device) -> "TokenSums":
        """Of no tokens yet."""
        return cls(_zeros(width, width, device=device), _zeros(num_tokens, width, device=device))

    def add(self, tokens: Float[Tensor, "B N D"]) -> None:
        """Take in the tokens of B slices."""
        tokens = tokens.double()
        features = tokens.flatten(0, 1)
        self.products += features.T @ features
        self.at_place += tokens.sum(0)
        self.num_slices += len(tokens)

    def spread(self) -> float:
        """Standard deviation between slices of the tokens at one place, as a share of their root mean square.

        0: the tokens do not depend on the image. 1: tokens at one place have nothing in common.
        """
        squares = self.products.trace()
        common = self.at_place.square().sum() / self.num_slices
        return float((1 - common / squares.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0).sqrt())


@dataclass
class ClassSums:
    """Sums over tokens, and over the tokens of each class, from which a linear read-out follows."""

    features: Float[Tensor, " D"]
    products: Float[Tensor, "D D"]
    weights: Float[Tensor, " K"]
    """How many tokens each class has; a token may be part of several."""
    by_class: Float[Tensor, "K D"]

    @classmethod
    def zeros(cls, width: int, num_classes: int, device: torch.device) -> "ClassSums":
        """Of no tokens yet."""
        return cls(
            features=_zeros(width, device=device),
            products=_zeros(width, width, device=device),
            weights=_zeros(num_classes, device=device),
            by_class=_zeros(num_classes, width, device=device),
        )

    def add(self, tokens: Float[Tensor, "N D"], fractions: Float[Tensor, "N K"]) -> None:
        """Take in N tokens; `fractions` is the share of each class in each token's patch."""
        tokens, fractions = tokens.double(), fractions.double()
        self.features += tokens.sum(0)
        self.products += tokens.T @ tokens
        self.weights += fractions.sum(0)
        self.by_class += fractions.T @ tokens


@dataclass(frozen=True)
class Discriminant:
    """A linear score for each class; the largest is the most likely class."""

    weight: Float[Tensor, "D K"]
    bias: Float[Tensor, " K"]

    def __call__(self, tokens: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens K"]:
        """Log-probability of each class, up to a constant for each token."""
        return tokens.double() @ self.weight + self.bias


def linear_discriminant(sums: ClassSums) -> Discriminant:
    """Linear discriminant analysis: Gaussian classes of one covariance, as frequent as in `sums`.

    One linear system, no iterations. Unlike least squares on class fractions it finds classes that few
    tokens have. A class without tokens is not predicted.
    """
    count = sums.weights.sum()
    mean, prior = sums.features / count, sums.weights / count
    means = sums.by_class / sums.weights.clamp(min=1e-9)[:, None] - mean
    means = torch.where(sums.weights[:, None] > 0, means, 0.0)
    total = sums.products / count - mean.outer(mean)
    within = total - (means.T * prior) @ means
    rounding = 1e-12 * sums.products.diag() / count + 1e-30  # constant features have no scatter at all
    within += torch.diag(SHRINKAGE * total.diag().clamp(min=0) + rounding)
    weight = torch.linalg.solve(within, means.T)
    offset = 0.5 * (means * weight.T).sum(1) + mean @ weight
    return Discriminant(weight, prior.clamp(min=1e-30).log() - offset)


def class_fractions(
    labels: Int[Tensor, "H W"], grid: tuple[int, int], num_classes: int
) -> Float[Tensor, "h w K"]:
    """The share of each class number in the patch of each token; the grid divides the slice evenly."""
    (height, width), (rows, columns) = labels.shape, grid
    assert height % rows == 0, f"{height} pixels in {rows} rows of patches"
    assert width % columns == 0, f"{width} pixels in {columns} columns of patches"
    patch_rows = torch.arange(height) // (height // rows)
    patch_columns = torch.arange(width) // (width // columns)
    patch = patch_rows[:, None] * columns + patch_columns
    counts = torch.bincount((patch * num_classes + labels).flatten(), minlength=rows * columns * num_classes)
    return counts.view(rows, columns, num_classes) / (height * width / (rows * columns))


def _zeros(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)
