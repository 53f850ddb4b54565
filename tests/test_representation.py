import math

import pytest
import torch
from torch import Tensor

from samssl.representation import ClassSums, TokenSums, class_fractions, effective_rank, linear_discriminant


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_rank_of_known_features() -> None:
    one_direction = drawn(50, 1) @ drawn(1, 8, seed=1)
    orthonormal = torch.linalg.qr(drawn(50, 8)).Q
    two_of_eight = torch.cat([orthonormal[:, :2], torch.zeros(50, 6)], dim=1)
    assert effective_rank(one_direction.T @ one_direction) == pytest.approx(1, abs=1e-4)
    assert effective_rank(orthonormal.T @ orthonormal) == pytest.approx(8)
    assert effective_rank(two_of_eight.T @ two_of_eight) == pytest.approx(2, abs=1e-4)


def test_effective_rank_weighs_singular_values_not_their_squares() -> None:
    shares = torch.tensor([0.75, 0.25])
    expected = math.exp(-sum(share * math.log(share) for share in shares.tolist()))
    assert effective_rank(torch.diag(shares.square())) == pytest.approx(expected)


def test_features_that_are_not_finite_have_no_rank() -> None:
    assert math.isnan(effective_rank(torch.full((3, 3), math.nan)))


def spread(tokens: Tensor) -> float:
    sums = TokenSums.zeros(tokens.shape[1], tokens.shape[2], tokens.device)
    for part in tokens.split(3):
        sums.add(part)
    return sums.spread()


def test_spread_ignores_what_every_slice_has_at_a_place() -> None:
    positions, content = 5 + drawn(1, 6, 4), drawn(200, 6, 4, seed=1)
    assert spread(positions.expand(200, -1, -1)) == pytest.approx(0, abs=1e-6)
    assert spread(content) == pytest.approx(1, abs=0.02)
    tokens = positions + content
    expected = (tokens.var(dim=0, correction=0).mean() / tokens.square().mean()).sqrt()
    assert spread(tokens) == pytest.approx(float(expected))


def accuracy(tokens: Tensor, classes: Tensor, test_tokens: Tensor, test_classes: Tensor) -> float:
    """Share of the tokens of the rarer classes 1 and 2 that is found."""
    sums = ClassSums.zeros(tokens.shape[1], 3, tokens.device)
    fractions = torch.nn.functional.one_hot(classes, 3).double()
    for part, truth in zip(tokens.split(100), fractions.split(100), strict=True):
        sums.add(part, truth)
    found = linear_discriminant(sums)(test_tokens).argmax(dim=-1)
    return float((found == test_classes)[test_classes > 0].double().mean())


def test_planted_features_are_found_and_shuffled_labels_are_not() -> None:
    """Classes 1 and 2 have one token in twenty each: least squares would call all of them background."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.multinomial(torch.tensor([0.9, 0.05, 0.05]), 4000, True, generator=generator)
    directions = 3 * drawn(3, 16, seed=1)
    tokens = 20 + 2 * drawn(4000, 16, seed=2) + directions[classes]
    shuffled = classes[torch.randperm(4000, generator=generator)]
    train, test = slice(0, 2000), slice(2000, 4000)
    assert accuracy(tokens[train], classes[train], tokens[test], classes[test]) > 0.9
    assert accuracy(tokens[train], shuffled[train], tokens[test], classes[test]) < 0.1


def test_discriminant_agrees_with_scikit_learn() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    classes = torch.arange(300) % 3
    tokens = 3 + drawn(300, 5) * torch.tensor([1, 2, 3, 4, 5]) + drawn(3, 5, seed=1)[classes]
    sums = ClassSums.zeros(5, 3, tokens.device)
    sums.add(tokens, torch.nn.functional.one_hot(classes, 3).double())
    ours = linear_discriminant(sums)(tokens).softmax(dim=-1)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(tokens, classes).predict_proba(tokens)
    assert (ours - torch.from_numpy(theirs)).abs().max() < 1e-3  # the shrinkage


def test_collapsed_features_and_absent_classes_give_the_most_frequent_class() -> None:
    sums = ClassSums.zeros(4, 3, torch.device("cpu"))
    tokens = torch.full((10, 4), 7.3)
    sums.add(tokens, torch.tensor([[0.7, 0.0, 0.3]]).expand(10, -1))
    assert linear_discriminant(sums)(tokens).argmax(dim=-1).tolist() == [0] * 10
    sums.add(drawn(10, 4).float(), torch.tensor([[0.4, 0.0, 0.6]]).expand(10, -1))
    found = linear_discriminant(sums)(100 * drawn(1000, 4, seed=1)).argmax(dim=-1)
    assert 1 not in found


def test_class_fractions_of_patches() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1], [0, 0, 0, 0], [0, 0, 2, 0]])
    fractions = class_fractions(labels, (2, 2), 3)
    assert fractions.tolist() == [[[0.75, 0, 0.25], [0, 1, 0]], [[1, 0, 0], [0.75, 0, 0.25]]]
