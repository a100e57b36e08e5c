"""Products by oneDNN: against plain ones in float64, for every layout of memory, and where they must not be taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from avalanche_gradproj.linalg import products
from avalanche_gradproj.linalg.products import product


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)


#: Layouts of a matrix [m, n] in memory.
LAYOUTS = {
    "rows": _numbers,
    "columns": lambda m, n: _numbers(n, m).T,
    "padded rows": lambda m, n: _numbers(m, n + 7)[:, 3 : 3 + n],
    "padded columns": lambda m, n: _numbers(n, m + 7)[:, 2 : 2 + m].T,
    "every other row": lambda m, n: _numbers(2 * m, n)[1::2],
    "later rows": lambda m, n: _numbers(m + 3, n)[3:],
    "every other number": lambda m, n: _numbers(m, 2 * n)[:, ::2],
}


class Counter:
    """Takes the place of the operation, and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[bool, bool]] = []
        kept = products._by_onednn

        def counting(x: Tensor, y: Tensor, plus: Tensor | None) -> Tensor:
            self.calls.append((y.is_contiguous() or y.T.is_contiguous(), plus is not None))
            return kept(x, y, plus)

        monkeypatch.setattr(products, "_has_onednn", lambda: True)
        monkeypatch.setattr(products, "_by_onednn", counting)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    if not products._has_onednn():
        pytest.skip("this torch has no oneDNN")
    return Counter(monkeypatch)


def _deviation(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("of_y", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_product_and_sum_agree_with_float64_for_every_layout(of_x: str, of_y: str, counter: Counter) -> None:
    x, y, z = LAYOUTS[of_x](90, 211), LAYOUTS[of_y](211, 150), _numbers(90, 150)
    before = [part.clone() for part in (x, y, z)]
    with torch.no_grad():
        alone, summed = product(x, y), product(x, y, plus=z)
    assert len(counter.calls) == 2
    assert _deviation(alone, x.double() @ y.double()) < 1e-6
    assert _deviation(summed, z.double() + x.double() @ y.double()) < 1e-6
    assert all(torch.equal(part, held) for part, held in zip((x, y, z), before, strict=True))
    assert alone.is_contiguous()
    assert summed.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_added_may_lie_anywhere(layout: str, counter: Counter) -> None:
    x, y, z = _numbers(90, 211), _numbers(211, 150), LAYOUTS[layout](90, 150)
    before = z.clone()
    with torch.no_grad():
        summed = product(x, y, plus=z)
    assert counter.calls
    assert _deviation(summed, z.double() + x.double() @ y.double()) < 1e-6
    assert torch.equal(z, before)


def test_the_operation_only_ever_meets_dense_second_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With others oneDNN takes code that is a thousand times slower."""
    if not products._has_onednn():
        pytest.skip("this torch has no oneDNN")
    seen: list[Tensor] = []

    class Operation:
        @staticmethod
        def default(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
            seen.append(weight)
            return x @ weight.T

        @staticmethod
        def binary(x: Tensor, plus: Tensor, weight: Tensor, *rest: object) -> Tensor:
            seen.append(weight)
            return plus + x @ weight.T

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Operation)
    with torch.no_grad():
        for make in LAYOUTS.values():
            product(_numbers(90, 211), make(211, 150))
            product(_numbers(90, 211), make(211, 150), plus=_numbers(90, 150))
    assert len(seen) == 2 * len(LAYOUTS)
    assert all(weight.is_contiguous() or weight.T.is_contiguous() for weight in seen)


def test_infinities_and_nans_come_through(counter: Counter) -> None:
    x, y = _numbers(90, 211), _numbers(211, 150)
    x[3, 5], x[7, 2] = torch.inf, torch.nan
    with torch.no_grad():
        result = product(x, y)
    assert counter.calls
    assert torch.isnan(result[7]).all()
    assert not torch.isfinite(result[3]).any()
    others = [row for row in range(90) if row not in (3, 7)]
    assert torch.isfinite(result[others]).all()


CASES = {
    "small": (_numbers(10, 20), _numbers(20, 30)),
    "float64": (_numbers(90, 211).double(), _numbers(211, 150).double()),
    "half": (_numbers(90, 211).bfloat16(), _numbers(211, 150).bfloat16()),
    "blocks": (_numbers(2, 90, 211), _numbers(2, 211, 150)),
    "empty": (_numbers(0, 211), _numbers(211, 150)),
    "no columns": (_numbers(90, 0), _numbers(0, 150)),
    "few rows": (_numbers(7, 1500), _numbers(1500, 400)),
    "few columns": (_numbers(1500, 400), _numbers(400, 7)),
}


@pytest.mark.parametrize("case", CASES)
def test_others_are_plain_products(case: str, counter: Counter) -> None:
    x, y = CASES[case]
    with torch.no_grad():
        assert torch.equal(product(x, y), x @ y)
        plus = torch.ones_like(x @ y)
        torch.testing.assert_close(product(x, y, plus=plus), plus + x @ y, rtol=1e-2, atol=0.1)
    assert not counter.calls


def test_what_does_not_fit_is_refused_as_a_plain_product_refuses_it(counter: Counter) -> None:
    x, y = _numbers(90, 211), _numbers(211, 150)
    for parts in ((x, y[1:]), (x, y, _numbers(90, 151)), (x, y, _numbers(89, 150)), (x, y, _numbers(90, 150).double())):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"size|shape|dtype"):
            product(*parts)
    assert not counter.calls


def test_one_row_for_all_and_negated_views_are_added_and_multiplied_plainly(counter: Counter) -> None:
    x, y, row = _numbers(90, 211), _numbers(211, 150), _numbers(150)
    torch.testing.assert_close(product(x, y, plus=row[None]), row + x @ y)
    negated = torch.complex(y, y).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(product(x, negated), -(x @ y))
    assert not counter.calls


@pytest.mark.parametrize("which", ["x", "y", "plus"])
def test_where_a_gradient_flows_the_product_is_plain_and_differentiable(which: str, counter: Counter) -> None:
    parts = {"x": _numbers(90, 211), "y": _numbers(211, 150), "plus": _numbers(90, 150)}
    parts[which].requires_grad_()
    product(**parts).sum().backward()
    expected = {"x": parts["y"].sum(1).expand(90, -1), "y": parts["x"].sum(0)[:, None].expand(-1, 150)}
    torch.testing.assert_close(parts[which].grad, expected.get(which, torch.ones(90, 150)).to(torch.float32))
    assert not counter.calls
    with torch.no_grad():
        product(**parts)
    assert len(counter.calls) == 1


def test_that_gradients_are_recorded_changes_nothing_for_constants(counter: Counter) -> None:
    with torch.enable_grad():
        assert not product(_numbers(90, 211), _numbers(211, 150)).requires_grad
    assert counter.calls


def test_not_where_onednn_is_turned_off(counter: Counter) -> None:
    x, y = _numbers(90, 211), _numbers(211, 150)
    with torch.no_grad():
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(product(x, y), x @ y)
        assert not counter.calls
        product(x, y)
    assert counter.calls


@pytest.mark.parametrize("case", ["large", "small", "blocks"])
def test_autocast_rounds_nothing(case: str, counter: Counter) -> None:
    x, y = (_numbers(90, 211), _numbers(211, 150)) if case == "large" else CASES[case]
    plus = torch.ones(*x.shape[:-1], y.shape[-1], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        alone, summed = product(x, y), product(x, y, plus=plus)
        assert torch.is_autocast_enabled("cpu")
    assert _deviation(alone, x.double() @ y.double()) < 1e-6
    assert _deviation(summed, 1 + x.double() @ y.double()) < 1e-6
    assert bool(counter.calls) == (case == "large")


@pytest.mark.parametrize("case", ["large", "small", "blocks"])
def test_what_is_added_may_be_weighted(case: str, counter: Counter) -> None:
    x, y = (_numbers(90, 211), _numbers(211, 150)) if case == "large" else CASES[case]
    plus = _numbers(*x.shape[:-1], y.shape[-1])
    with torch.no_grad():
        found = product(x, y, plus=plus, beta=0.3)
    assert _deviation(found, 0.3 * plus.double() + x.double() @ y.double()) < 1e-6


def test_forward_derivatives_and_subclasses_take_the_plain_product(counter: Counter) -> None:
    x, y, direction = _numbers(90, 211), _numbers(211, 150), _numbers(90, 211)
    found = torch.func.jvp(lambda x: product(x, y), (x,), (direction,))[1]
    torch.testing.assert_close(found, direction @ y)
    with torch.no_grad():
        assert type(product(x.as_subclass(Own), y)) is Own
        assert not counter.calls
        product(nn.Parameter(x), y)
    assert counter.calls


class Own(Tensor):
    pass


class Missing:
    def __getattr__(self, name: str) -> object:
        raise AttributeError(name)


def _wrong(x: Tensor, *rest: object) -> Tensor:
    return x.new_zeros(len(x), 10)


@pytest.mark.parametrize("kind", ["missing", "wrong numbers", "wrong arguments"])
def test_without_the_operation_all_products_are_plain(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        default = binary = staticmethod(_wrong)

    class Strict:
        @staticmethod
        def default(x: Tensor) -> Tensor:
            return x

        binary = default

    fake = {"missing": Missing(), "wrong numbers": Wrong, "wrong arguments": Strict}[kind]
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fake, raising=False)
    products._has_onednn.cache_clear()
    try:
        x, y = _numbers(90, 211), _numbers(211, 150)
        with torch.no_grad():
            assert torch.equal(product(x, y), x @ y)
        assert not products._has_onednn()
    finally:
        products._has_onednn.cache_clear()
