"""The four projections of MultiheadAttention, against softmax attention written out sample by sample, head by head."""

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_gradproj.layers.record import record
from avalanche_gradproj.layers.rules import units_of
from avalanche_gradproj.layers.select import cover

E, HEADS = 6, 2
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


def parameters_of(layer, pick):
    """Matrices [out, in (+ 1)] of the four projections, from values or gradients."""
    if layer.in_proj_weight is not None:
        weights = [pick(layer.in_proj_weight)[i * E : (i + 1) * E] for i in range(3)]
    else:
        weights = [pick(w) for w in (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)]
    weights.append(pick(layer.out_proj.weight))
    if layer.in_proj_bias is not None:
        biases = [pick(layer.in_proj_bias)[i * E : (i + 1) * E] for i in range(3)] + [pick(layer.out_proj.bias)]
        weights = [np.concatenate([w, b[:, None]], axis=1) for w, b in zip(weights, biases, strict=True)]
    return dict(zip(PARTS, weights, strict=True))


def affine(matrix, row):
    """W [a, 1] where W holds a bias, else W a."""
    return matrix @ np.append(row, 1.0) if matrix.shape[1] == len(row) + 1 else matrix @ row


def explicit_attention(matrices, query, key, value, allowed):
    """Attention in loops.

    Args:
        matrices: of the four projections.
        query: [samples, length, E] of numpy; key and value likewise.
        key: see query.
        value: see query.
        allowed: allowed(sample, head, target, source) -> bool.

    Returns:
        The rows that meet each projection, [length, samples, d] as lists, and the output [samples, length, E].
    """
    samples, length, _ = query.shape
    q, k, v = (
        np.array([[affine(matrices[part], row) for row in sample] for sample in x])
        for part, x in zip(PARTS[:3], (query, key, value), strict=True)
    )
    size = E // HEADS
    context = np.zeros((samples, length, E))
    for sample in range(samples):
        for head in range(HEADS):
            own = slice(head * size, (head + 1) * size)
            for target in range(length):
                scores = np.array(
                    [
                        q[sample, target, own] @ k[sample, source, own] / np.sqrt(size)
                        if allowed(sample, head, target, source)
                        else -np.inf
                        for source in range(key.shape[1])
                    ]
                )
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                for source in range(key.shape[1]):
                    context[sample, target, own] += weights[source] * v[sample, source, own]
    output = np.array([[affine(matrices["out_proj"], row) for row in sample] for sample in context])
    return dict(zip(PARTS, (query, key, value, context), strict=True)), output


def sequence_first(x):
    """[samples, length, d] -> rows [length * samples, d]: position after position, samples within."""
    return np.array([x[sample, at] for at in range(x.shape[1]) for sample in range(x.shape[0])])


def check(collect, layer, query, key, value, *, unbatched=False, need_weights=False, **masks):
    """Run attention on [samples, length, d] tensors in the layer's layout and compare with the loops."""
    units = units_of("att", layer)
    assert [unit.name for unit in units] == [f"att.{part}" for part in PARTS]
    laid_out = {}

    def layout(x):
        # The same tensor stays the same object: attention looks at identities.
        if id(x) not in laid_out:
            laid_out[id(x)] = x[0] if unbatched else x if layer.batch_first else x.transpose(0, 1).contiguous()
        return laid_out[id(x)]

    given = [layout(x) for x in (query, key, value)]
    found = collect(layer, units, lambda: layer(*given, need_weights=need_weights, **masks)[0])
    padding, forbidden = masks.get("key_padding_mask"), masks.get("attn_mask")

    def allowed(sample, head, target, source):
        if padding is not None and padding[sample, source]:
            return False
        if forbidden is None:
            return True
        return not (forbidden if forbidden.dim() == 2 else forbidden[sample * HEADS + head])[target, source]

    matrices = parameters_of(layer, lambda p: p.detach().numpy())
    seen, expected = explicit_attention(matrices, *(x.numpy() for x in (query, key, value)), allowed)
    output = found.output.detach()
    output = output[None] if unbatched else output if layer.batch_first else output.transpose(0, 1)
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-12)

    gradients = parameters_of(layer, lambda p: p.grad.numpy())
    bias = layer.in_proj_bias is not None
    for unit, part in zip(units, PARTS, strict=True):
        assert len(found.inputs[unit.name]) == len(found.gradients[unit.name]) == 1
        rows = found.rows(unit.name)[0].numpy()
        plain = sequence_first(seen[part])
        np.testing.assert_allclose(rows[:, : plain.shape[1]], plain, atol=1e-12)
        assert rows.shape[1] == unit.features == plain.shape[1] + bias
        assert (rows[:, plain.shape[1] :] == 1).all()
        np.testing.assert_array_equal(unit.weights()[0].numpy(), matrices[part])
        np.testing.assert_allclose(found.summed(unit.name)[0].numpy(), gradients[part], atol=1e-12)
        np.testing.assert_array_equal(unit.gradient()[0].numpy(), gradients[part])
    rows = found.rows("att.out_proj")[0].numpy()
    np.testing.assert_allclose(rows @ matrices["out_proj"].T, sequence_first(output.numpy()), atol=1e-12)


def inputs(kind, kdim=E, vdim=E, samples=3):
    """Query, key and value [samples, length, d]; identical objects where the kind says so."""
    query = torch.randn(samples, 4, E)
    if kind == "self":
        return query, query, query
    key = torch.randn(samples, 5, kdim)
    return query, key, key if kind == "key is value" else torch.randn(samples, 5, vdim)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "key is value", "all differ"])
def test_packed(collect, kind, batch_first, bias, need_weights):
    layer = nn.MultiheadAttention(E, HEADS, bias=bias, batch_first=batch_first)
    check(collect, shaken(layer), *inputs(kind), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("kdim", "vdim", "kind"), [(3, 8, "all differ"), (7, 7, "key is value"), (E, 4, "all differ")])
def test_separate(collect, kdim, vdim, kind, batch_first, bias, need_weights):
    layer = nn.MultiheadAttention(E, HEADS, bias=bias, batch_first=batch_first, kdim=kdim, vdim=vdim)
    assert layer.in_proj_weight is None
    check(collect, shaken(layer), *inputs(kind, kdim, vdim), need_weights=need_weights)


@pytest.mark.parametrize("kind", ["self", "key is value", "all differ"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(collect, kind, batch_first):
    layer = shaken(nn.MultiheadAttention(E, HEADS, batch_first=batch_first))
    check(collect, layer, *inputs(kind, samples=1), unbatched=True)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks(collect, batch_first, need_weights):
    layer = shaken(nn.MultiheadAttention(E, HEADS, batch_first=batch_first))
    options = {"need_weights": need_weights}
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[0, 3] = padding[2, 2:] = True
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    each = torch.rand(3 * HEADS, 4, 4) < 0.4
    each[:, :, 0] = False
    check(collect, layer, *inputs("self"), attn_mask=causal, **options)
    check(collect, layer, *inputs("self"), key_padding_mask=padding, **options)
    check(collect, layer, *inputs("self"), attn_mask=causal, key_padding_mask=padding, **options)
    check(collect, layer, *inputs("self"), attn_mask=each, **options)


def shaken(layer):
    """Random biases too: attention starts with zeros there."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("kind", ["self", "key is value", "all differ"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_in_evaluation_without_gradients(kind, need_weights, collect):
    """Where attention alone would take its fused path."""
    layer = shaken(nn.MultiheadAttention(E, HEADS, batch_first=True)).eval()
    units = units_of("att", layer)
    query, key, value = inputs(kind)
    found = collect(layer, units, lambda: layer(query, key, value, need_weights=need_weights)[0])
    quiet = {}
    with torch.no_grad(), record(units, inputs=lambda unit, x: quiet.setdefault(unit.name, []).append(x)):
        output = layer(query, key, value, need_weights=need_weights)[0]
    torch.testing.assert_close(output, found.output.detach())
    assert list(found.inputs) == [unit.name for unit in units]
    for name, recorded in found.inputs.items():
        torch.testing.assert_close(quiet[name], recorded)


def test_packed_parts_share_the_parameter_and_do_not_overlap():
    layer = nn.MultiheadAttention(E, HEADS)
    units = units_of("att", layer)
    spans = [(unit.weight.name, unit.weight.start, unit.weight.stop) for unit in units]
    assert spans[:3] == [("att.in_proj_weight", 0, 6), ("att.in_proj_weight", 6, 12), ("att.in_proj_weight", 12, 18)]
    assert spans[3] == ("att.out_proj.weight", 0, 6)
    written = torch.randn(1, E, E + 1)
    before = layer.in_proj_weight.detach().clone()
    units[1].write_weights(written)
    assert torch.equal(layer.in_proj_weight[6:12], written[0, :, :E])
    assert torch.equal(layer.in_proj_bias[6:12], written[0, :, E])
    assert torch.equal(layer.in_proj_weight[:6], before[:6])
    assert torch.equal(layer.in_proj_weight[12:], before[12:])
    units[2].write_gradient(written)
    assert torch.equal(layer.in_proj_weight.grad[12:], written[0, :, :E])
    assert not layer.in_proj_weight.grad[:12].any()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_an_encoder_layer_the_fused_path_is_off(monkeypatch, norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(E, HEADS, 8, 0.1, batch_first=batch_first, norm_first=norm_first).eval()
    shaken(layer)
    fused = []
    original = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: fused.append(1) or original(*a))
    x = torch.randn(3, 4, E)
    units = cover(layer).units
    assert [unit.name for unit in units] == [*(f"self_attn.{part}" for part in PARTS), "linear1", "linear2"]
    recorded = {}
    with torch.no_grad():
        plain = layer(x)
        assert len(fused) == batch_first  # the test has power: alone, the layer is fused
        with record(units, inputs=lambda unit, x: recorded.setdefault(unit.name, []).append(x)):
            watched = layer(x)
        assert len(fused) == batch_first
        layer(x)
        assert len(fused) == 2 * batch_first
    torch.testing.assert_close(watched, plain, atol=1e-10, rtol=1e-10)
    assert {name: len(calls) for name, calls in recorded.items()} == {unit.name: 1 for unit in units}
    attended = layer.norm1(x) if norm_first else x
    rows = torch.cat(list(units[0].rows(recorded["self_attn.q_proj"][0])), dim=1)[0, :, :E]
    samples_first = attended if batch_first else attended.transpose(0, 1)
    torch.testing.assert_close(rows, torch.from_numpy(sequence_first(samples_first.detach().numpy())))
