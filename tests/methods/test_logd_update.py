"""LOGD's update against a quadratic program (paper) and against the formulas written out densely (official code)."""

from __future__ import annotations

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.linalg.gram import gram_matrix, principal_coefficients
from avalanche_gradproj.methods.logd import logd_update
from avalanche_gradproj.testing import no_host_round_trips

SHAPES = {
    "count": st.integers(1, 8),
    "size": st.integers(1, 25),
    "components": st.none() | st.integers(1, 9),
    "shift": st.sampled_from([-1.0, 0.0, 1.0, 30.0]),
    "seed": st.integers(0, 10**6),
}


def draw(count, size, shift, seed):
    """Gradients of the past around a common one, and one of the present, sometimes against it."""
    generator = np.random.default_rng(seed)
    common = shift * generator.normal(size=size)
    return generator.normal(size=size) + 0.3 * common * generator.choice([-1, 1]), common + generator.normal(
        size=(count, size)
    )


def directions(old, components):
    """Leading right singular vectors of the centred gradients, those that exist."""
    values, vectors = np.linalg.svd(old - old.mean(0), full_matrices=False)[1:]
    return vectors[: int((values > 1e-6 * np.abs(old).max()).sum())][:components]


def paper(gradient, old, components):
    """The quadratic program of the paper, given to a solver."""
    v, s = directions(old, components), old.mean(0)
    constraints = [*v]
    if np.linalg.norm(s - v.T @ (v @ s)) > 1e-6 * np.linalg.norm(s):
        constraints.append(s)
    if not constraints:
        return gradient
    c = np.stack(constraints, axis=1)
    return quadprog.solve_qp(np.eye(len(gradient)), gradient, c, np.zeros(c.shape[1]), len(v))[0]


def official(gradient, old, components, m):
    """The update of the official code, formula by formula."""
    v, s = directions(old, components), old.sum(0)
    if len(old) == 1:
        return gradient - min(s @ gradient / (s @ s), -m) * s
    p_g, p_s = gradient - v.T @ (v @ gradient), s - v.T @ (v @ s)
    if s @ p_g > 0 or np.linalg.norm(p_s) < 1e-6 * np.linalg.norm(s):
        return p_g
    ratio = (s @ p_g) / (s @ p_s)
    return p_g - min(ratio, -m) * s + ratio * v.T @ (v @ s)


def update(gradient, old, dtype=torch.float64, **kwargs):
    return logd_update(torch.tensor(gradient, dtype=dtype), torch.tensor(old, dtype=dtype), **kwargs).double().numpy()


@settings(max_examples=300, deadline=None)
@given(**SHAPES)
def test_paper_variant_solves_the_quadratic_program(count, size, components, shift, seed):
    gradient, old = draw(count, size, shift, seed)
    found = update(gradient, old, n_components=components)
    # Gram matrices square condition numbers: where nearly all is removed, half of the digits are left.
    np.testing.assert_allclose(found, paper(gradient, old, components), atol=1e-7 * np.linalg.norm(gradient))


@settings(max_examples=300, deadline=None)
@given(**SHAPES, margin=st.sampled_from([0.0, 0.5, 2.0]))
def test_official_variant_is_that_of_the_formulas(count, size, components, shift, seed, margin):
    gradient, old = draw(count, size, shift, seed)
    expected = official(gradient, old, components, margin)
    found = update(gradient, old, n_components=components, variant="official", margin=margin)
    np.testing.assert_allclose(found, expected, atol=1e-7 * max(np.linalg.norm(expected), np.linalg.norm(gradient)))


@pytest.mark.parametrize("seed", [0, 6, 11, 17, 61, 203, 435, 850, 1000])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_specific_gradients_that_fill_the_space_leave_nothing(seed, variant):
    """Of badly conditioned ones rounding leaves up to 1e-5 of the shared gradient, which is no direction."""
    gradient, old = draw(8, 7, 30.0, seed)
    assert np.linalg.norm(update(gradient, old, variant=variant)) < 1e-4 * np.linalg.norm(gradient)


@pytest.mark.parametrize("components", [None, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 19])
def test_official_variant_in_float32(count, components):
    """To 1e-5 of the update's length, on gradients that have much in common, with and without conflict."""
    for sign in (-1.0, 1.0):
        generator = np.random.default_rng(count)
        common = generator.normal(size=4000)
        old = (common + generator.normal(size=(count, 4000))).astype(np.float32).astype(np.float64)
        gradient = (sign * common + generator.normal(size=4000)).astype(np.float32).astype(np.float64)
        expected = official(gradient, old, components, 0.5)
        found = update(gradient, old, torch.float32, n_components=components, variant="official")
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_all_directions_are_those_of_the_paper_not_fewer():
    """The two settings differ where they must: a test that cannot tell them apart proves nothing."""
    gradient, old = draw(6, 20, 1.0, 3)
    every, some = update(gradient, old), update(gradient, old, n_components=2)
    assert np.abs((old - old.mean(0)) @ every).max() < 1e-10
    assert np.abs((old - old.mean(0)) @ some).max() > 1e-2
    assert np.linalg.norm(every - some) > 1e-2
    np.testing.assert_array_equal(update(gradient, old, n_components=5), every)


@pytest.mark.parametrize("variant", ["paper", "official"])
class TestDegenerateCases:
    gradient = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    other = torch.tensor([0.5, 1.0, 0.0, -1.0], dtype=torch.float64)

    def test_no_old_experience(self, variant):
        found = logd_update(self.gradient, torch.empty(0, 4, dtype=torch.float64), variant=variant)
        assert torch.equal(found, self.gradient)

    def test_one_old_experience(self, variant):
        for old in (self.other, -self.other):
            ratio = float(old @ self.gradient / (old @ old))
            step = min(ratio, 0.0) if variant == "paper" else min(ratio, -0.5)
            found = logd_update(self.gradient, old[None], variant=variant)
            torch.testing.assert_close(found, self.gradient - step * old, rtol=1e-14, atol=0)

    def test_identical_gradients_have_no_specific_part(self, variant):
        for sign in (-1.0, 1.0):
            old = (sign * self.other).expand(5, 4)
            s = old.mean(0) if variant == "paper" else old.sum(0)
            ratio = float(s @ self.gradient / (s @ s))
            step = min(ratio, 0.0 if variant == "paper" else -0.5) if ratio < 0 else 0.0
            found = logd_update(self.gradient, old, variant=variant)
            torch.testing.assert_close(found, self.gradient - step * s, rtol=1e-12, atol=1e-14)

    def test_zero_gradients_constrain_nothing(self, variant):
        for count in (1, 3):
            found = logd_update(self.gradient, torch.zeros(count, 4, dtype=torch.float64), variant=variant)
            assert torch.equal(found, self.gradient)

    def test_a_zero_gradient_of_the_mini_batch(self, variant):
        old = torch.stack([self.gradient, self.other])
        found = logd_update(torch.zeros(4, dtype=torch.float64), old, variant=variant)
        # nothing conflicts, and nothing moves; the official margin moves along the sum
        expected = torch.zeros(4, dtype=torch.float64) if variant == "paper" else 0.5 * old.sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)

    def test_a_shared_gradient_among_the_specific_ones(self, variant):
        """g_1 = 3u, g_2 = u: mean 2u, specific +-u, so that only w orthogonal to u is left and s says no more."""
        u = self.other
        found = logd_update(self.gradient, torch.stack([3 * u, u]), variant=variant)
        expected = self.gradient - (self.gradient @ u) / (u @ u) * u
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)

    def test_more_old_experiences_than_parameters(self, variant):
        old = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = logd_update(self.gradient, old, variant=variant)
        assert found.abs().max() < 1e-12
        one = logd_update(self.gradient[:1], old[:, :1], variant=variant, n_components=3)
        assert one.abs().max() < 1e-12

    def test_a_block_that_is_not_finite_stays_and_spoils_no_other(self, variant):
        gradients = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        old = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        clean = logd_update(gradients, old, variant=variant, n_components=2)
        old[0, 1, 2] = torch.nan
        found = logd_update(gradients, old, variant=variant, n_components=2)
        assert torch.equal(found[0], gradients[0])
        assert torch.equal(found[1], clean[1])
        assert not torch.equal(clean[0], gradients[0])


@settings(max_examples=60, deadline=None)
@given(
    **{name: SHAPES[name] for name in ("count", "components", "seed")},
    batch=st.lists(st.integers(1, 3), max_size=2),
    variant=st.sampled_from(["paper", "official"]),
)
def test_batches_equal_one_by_one(count, components, seed, batch, variant):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(*batch, 12, dtype=torch.float64, generator=generator)
    old = torch.randn(*batch, count, 12, dtype=torch.float64, generator=generator)
    found = logd_update(gradient, old, n_components=components, variant=variant)
    assert found.shape == gradient.shape
    for one, g, g_k in zip(found.view(-1, 12), gradient.view(-1, 12), old.view(-1, count, 12), strict=True):
        expected = logd_update(g, g_k, n_components=components, variant=variant)
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("on_device", [False, True], ids=["eigh", "squaring"])
def test_principal_directions(on_device):
    """Both ways give the leading right singular vectors, also of spectra over six decades and of low rank."""
    generator = np.random.default_rng(0)
    data = generator.normal(size=(3, 8, 40))
    data[1] = np.diag(10.0 ** -np.arange(8)) @ data[1]
    data[2, 2:] = data[2, :1] + data[2, 1:2]
    rows = torch.tensor(data)
    gram = gram_matrix(rows)
    floor = 1e-12 * gram.diagonal(dim1=1, dim2=2).amax(1)
    basis = (rows.mT @ principal_coefficients(gram, 3, floor, on_device=on_device)).numpy()
    for index, expected_rank in enumerate((3, 3, 2)):
        vectors = np.linalg.svd(data[index])[2][:expected_rank]
        np.testing.assert_allclose(basis[index] @ basis[index].T, vectors.T @ vectors, atol=1e-6)


def test_equal_singular_values_by_squaring():
    """Any orthonormal basis of the common space will do: here of all of it."""
    gram = torch.eye(4, dtype=torch.float64)[None]
    basis = principal_coefficients(gram, 4, torch.zeros(1, dtype=torch.float64), on_device=True)[0]
    torch.testing.assert_close(basis @ basis.T, gram[0], rtol=0, atol=1e-12)


def test_gram_matrix_sums_in_float64_over_several_chunks():
    rows = torch.full((2, 10_000), 0.1, dtype=torch.float32)
    rows[1, 5000:] *= -1
    exact = float(rows[0, 0].double() ** 2) * 10_000
    assert gram_matrix(rows)[0, 0] == pytest.approx(exact, rel=1e-13)
    assert abs(gram_matrix(rows)[0, 1]) < 1e-10


def test_no_host_round_trip():
    gradient, old = torch.randn(3, 9), torch.randn(3, 5, 9)
    with no_host_round_trips():
        for variant in ("paper", "official"):
            for components in (None, 2):
                logd_update(gradient, old, n_components=components, variant=variant)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_components": 0}, "n_components=0"),
        ({"n_components": True}, "n_components=True"),
        ({"variant": "both"}, "variant='both'"),
        ({"margin": -1.0}, "margin=-1.0"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"old_gradients": torch.zeros(3, 5)}, "(3, 5)"),
        ({"old_gradients": torch.zeros(4)}, "(4,)"),
    ],
)
def test_bad_arguments(change, named):
    arguments = {"gradient": torch.zeros(4), "old_gradients": torch.zeros(3, 4), **change}
    with pytest.raises(ConfigurationError) as error:
        logd_update(arguments.pop("gradient"), arguments.pop("old_gradients"), **arguments)
    assert named in str(error.value)
