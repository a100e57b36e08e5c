"""grow_basis against the criterion in numpy, one column at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_gradproj.errors import ConfigurationError
from avalanche_gradproj.linalg.moments import RowStatistics
from avalanche_gradproj.linalg.subspace import Basis, grow_basis

SETTINGS = settings(deadline=None, max_examples=25)
CPU = torch.device("cpu")


def statistics_of(rows, *, folded):
    """Statistics of rows [blocks, n, d], in the form that is asked for."""
    rows = torch.as_tensor(rows)
    statistics = RowStatistics(rows.shape[0], rows.shape[2], keep_rows=not folded)
    statistics.update(rows)
    assert (statistics.moment is not None) == folded
    return statistics


def grow(rows, basis, threshold, *, folded, **options):
    return grow_basis(statistics_of(rows, folded=folded), basis, threshold, **options)


def criterion(R, M, threshold, rule, first):
    """One block: R [d, n] of numpy, M [d, r]; returns the extended basis."""
    energy = (R**2).sum()
    if energy == 0:
        return M
    if rule == "official" and first:
        directions, values, _ = np.linalg.svd(R, full_matrices=False)
        rank = int((np.cumsum(values**2 / (values**2).sum()) < threshold).sum())
        return directions[:, :rank]
    directions, values, _ = np.linalg.svd(R - M @ (M.T @ R), full_matrices=False)
    explained = ((M.T @ R) ** 2).sum() / energy
    for direction, value in zip(directions.T, values, strict=True):
        if explained >= threshold or M.shape[1] == len(M):
            break
        M = np.concatenate([M, direction[:, None]], axis=1)
        explained += value**2 / energy
    return M


def decaying_rows(generator, n, d, decay):
    """Rows [n, d] with a random decaying spectrum in random directions."""
    turned = np.linalg.qr(generator.normal(size=(d, d)))[0]
    return generator.normal(size=(n, d)) * decay ** np.arange(d) @ turned


def orthonormality(columns):
    columns = columns.double()
    return (columns.T @ columns - torch.eye(columns.shape[1])).norm().item()


@SETTINGS
@given(
    seed=st.integers(0, 10**6),
    decays=st.lists(st.sampled_from([0.3, 0.6, 0.8, 0.95]), min_size=1, max_size=3),
    threshold=st.floats(0.5, 0.995),
    rule=st.sampled_from(["paper", "official"]),
    few=st.booleans(),
)
def test_successive_experiences_follow_the_criterion(seed, decays, threshold, rule, few):
    generator = np.random.default_rng(seed)
    d, n = 12, (9 if few else 30)
    basis = Basis.empty(len(decays), d, torch.float64, CPU)
    expected = [np.zeros((d, 0)) for _ in decays]
    for experience in range(4):
        rows = np.stack([decaying_rows(generator, n, d, decay) for decay in decays])
        # "First" is a layer without a column: what the official code does where its first rank was 0 is another
        # matter, and stands in the docstring of grow_basis.
        first, share = all(M.shape[1] == 0 for M in expected), threshold + 0.001 * experience
        old = basis
        basis = grow(rows, old, share, folded=not few, rank_rule=rule)
        expected = [criterion(block.T, M, share, rule, first) for block, M in zip(rows, expected, strict=True)]
        assert list(basis.ranks) == [M.shape[1] for M in expected]
        assert basis.rank == max(basis.ranks)
        for block, (columns, M) in enumerate(zip(basis.per_block(), expected, strict=True)):
            np.testing.assert_allclose((columns @ columns.T).numpy(), M @ M.T, atol=1e-7)
            assert torch.equal(columns[:, : old.ranks[block]], old.per_block()[block])
            assert orthonormality(columns) < 1e-13
            assert not basis.columns[block, :, basis.ranks[block] :].any()


@pytest.mark.parametrize("folded", [False, True])
def test_official_rule_stops_one_short_in_the_first_experience_only(folded):
    energies = np.array([0.6, 0.3, 0.06, 0.04])
    rows = np.diag(np.sqrt(energies))[None]
    empty = Basis.empty(1, 4, torch.float64, CPU)
    assert [grow(rows, empty, t, folded=folded).ranks[0] for t in (0.5, 0.7, 0.92, 0.97)] == [1, 2, 3, 4]
    official = [grow(rows, empty, t, folded=folded, rank_rule="official") for t in (0.5, 0.7, 0.92, 0.97)]
    assert [basis.ranks[0] for basis in official] == [0, 1, 2, 3]
    # With columns (here the strongest direction) both rules count alike.
    for rule in ("paper", "official"):
        later = [grow(rows, official[1], t, folded=folded, rank_rule=rule).ranks[0] for t in (0.5, 0.7, 0.92)]
        assert later == [1, 2, 3]


def test_the_share_is_of_all_the_energy_not_of_the_residual():
    first = grow(np.diag([1.0, 0, 0, 0])[None], Basis.empty(1, 4, torch.float64, CPU), 1.0, folded=False)
    rows = np.diag(np.sqrt([0.9, 0.06, 0.03, 0.01]))[None]
    # 0.9 is explained: nothing for 0.9 - tiny, the next direction alone for 0.95.
    assert grow(rows, first, 0.8999, folded=False) is first
    assert grow(rows, first, 0.95, folded=False).ranks == (2,)
    assert grow(rows, first, 0.97, folded=False).ranks == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("already", [0, 4])
def test_spectra_over_ten_decades(folded, already, dtype):
    """Energies from 1 to 1e-10: every direction is found for itself, in its place, and no other."""
    d, count = 20, 11
    generator = np.random.default_rng(3)
    turned = np.linalg.qr(generator.normal(size=(d, d)))[0]
    mixed = np.linalg.qr(generator.normal(size=(40 if folded else 15, count)))[0]
    energies = np.logspace(0, -10, count)
    rows = ((mixed * np.sqrt(energies)) @ turned[:, :count].T)[None]
    basis = Basis.empty(1, d, dtype, CPU)
    if already:
        basis = Basis(torch.from_numpy(turned[None, :, :already].copy()).to(dtype), (already,))
    if already and dtype == torch.float32:
        # Old columns in float32 leak 1e-15 of the energy 1 into the residual: compare what stands above that.
        energies = energies[:9]
    grown = grow(rows, basis, 1.0, folded=folded).per_block()[0].double().numpy()
    if len(energies) == count:
        assert grown.shape == (d, count)
    for index in range(already, len(energies)):
        along = turned[:, index] @ grown[:, index]
        apart = np.linalg.norm(grown[:, index] - along * turned[:, index])
        assert apart < (1e-4 if dtype == torch.float64 else 2e-3), index
    if len(energies) == count:
        outside = turned[:, :count] - grown @ (grown.T @ turned[:, :count])
        assert np.abs(outside).max() < (1e-5 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("folded", [False, True])
def test_threshold_zero_adds_nothing(folded):
    basis = Basis.empty(1, 5, torch.float64, CPU)
    for rule in ("paper", "official"):
        assert grow(torch.randn(1, 5, 5), basis, 0.0, folded=folded, rank_rule=rule) is basis


@pytest.mark.parametrize("folded", [False, True])
def test_threshold_one_takes_the_directions_of_the_data_and_no_other(folded):
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(2, 300, 3)) @ generator.normal(size=(2, 3, 9))
    rows[1] = rows[1][:, :1] * rows[1][:1]  # the second block has one direction
    basis = grow(rows if folded else rows[:, :8], Basis.empty(2, 9, torch.float64, CPU), 1.0, folded=folded)
    assert basis.ranks == (3, 1)
    for block, columns in enumerate(basis.per_block()):
        outside = rows[block].T - columns.numpy() @ (columns.numpy().T @ rows[block].T)
        assert np.abs(outside).max() < 1e-6 * np.abs(rows[block]).max()


def test_rows_are_finer_than_their_moment():
    """An energy of 1e-15 is real in rows; in a second moment it could as well be rounding (d eps = 4e-15)."""
    rows = torch.zeros(1, 2, 20)
    rows[0, 0, 3], rows[0, 1, 7] = 1.0, 1e-15**0.5
    empty = Basis.empty(1, 20, torch.float64, CPU)
    assert grow(rows, empty, 1.0, folded=False).ranks == (2,)
    assert grow(rows, empty, 1.0, folded=True).ranks == (1,)


@pytest.mark.parametrize("folded", [False, True])
def test_rows_of_zeros_add_nothing(folded):
    rows = torch.zeros(2, 4, 5)
    empty = Basis.empty(2, 5, torch.float64, CPU)
    assert grow(rows, empty, 1.0, folded=folded) is empty
    rows[1] = torch.randn(4, 5)
    basis = grow(rows, empty, 1.0, folded=folded)
    assert basis.ranks == (0, 4)
    assert grow(torch.zeros(2, 4, 5), basis, 1.0, folded=folded) is basis


def test_no_statistics_add_nothing():
    empty = Basis.empty(1, 5, torch.float64, CPU)
    assert grow_basis(RowStatistics(1, 5), empty, 0.9) is empty


def test_an_update_without_rows_adds_nothing():
    empty = Basis.empty(1, 5, torch.float64, CPU)
    assert grow(torch.zeros(1, 0, 5), empty, 0.9, folded=False) is empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("rank", [3, 60])
def test_old_data_again_adds_nothing(dtype, folded, rank):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 60, rank, generator=generator) @ torch.randn(2, rank, 80, generator=generator)
    rows = rows.to(dtype)
    basis = grow(rows, Basis.empty(2, 80, dtype, CPU), 1.0, folded=folded)
    assert basis.ranks == (rank, rank)
    assert grow(rows, basis, 1.0, folded=folded) is basis
    assert grow(100 * rows[:, :10], basis, 1.0, folded=folded) is basis


@pytest.mark.parametrize("folded", [False, True])
def test_a_weak_new_direction_beside_strong_old_ones_is_found_in_float32(folded):
    """Energy 1e-8 is far above rounding (d eps^2 = 4e-13), so a threshold of 1 has to take it."""
    found = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        turned = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q
        old = (torch.randn(20, 5, generator=generator) @ turned[:, :5].T)[None]
        basis = grow(old, Basis.empty(1, 30, torch.float32, CPU), 1.0, folded=folded)
        new = (torch.randn(20, 1, generator=generator) @ turned[:, 5:6].T)[None]
        found.append(grow(old + 1e-4 * new, basis, 1.0, folded=folded).ranks[0])
    assert found == [6] * 40


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_more_than_d(folded, dtype):
    basis = Basis.empty(2, 6, dtype, CPU)
    for _ in range(5):
        basis = grow(torch.randn(2, 4, 6, dtype=dtype), basis, 1.0, folded=folded)
    assert basis.ranks == (6, 6)
    assert basis.columns.shape == (2, 6, 6)
    assert basis.free_share == 0.0
    assert max(orthonormality(columns) for columns in basis.per_block()) < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("folded", [False, True])
def test_orthonormal_after_a_hundred_experiences(dtype, folded):
    """Each experience brings two new directions beside much old energy: what makes orthogonality drift."""
    generator = torch.Generator().manual_seed(5)
    d = 201
    basis = Basis.empty(1, d, dtype, CPU)
    for experience in range(100):
        fresh = torch.randn(6, d, generator=generator) * 1e-2
        known = torch.randn(6, basis.rank, generator=generator) @ basis.columns[0].double().T
        old = basis
        threshold = 1.0 if dtype == torch.float64 else 0.9999
        basis = grow((fresh[:2].repeat(3, 1) + known).to(dtype)[None], basis, threshold, folded=folded)
        assert torch.equal(basis.columns[:, :, : old.rank], old.columns), experience
    assert 100 < basis.rank <= d
    assert basis.columns.dtype == dtype
    assert orthonormality(basis.columns[0]) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_free_share_and_blocks():
    basis = Basis(torch.zeros(2, 4, 3), (3, 1))
    assert basis.free_share == 0.5
    assert [tuple(columns.shape) for columns in basis.per_block()] == [(4, 3), (4, 1)]


def test_unknown_rule():
    with pytest.raises(ConfigurationError, match=r"rank_rule='best'.*'paper'.*'official'"):
        grow(torch.randn(1, 2, 3), Basis.empty(1, 3, torch.float64, CPU), 0.9, folded=False, rank_rule="best")
