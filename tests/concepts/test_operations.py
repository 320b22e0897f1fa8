"""Each operation against a few lines of numpy, on the stream itself."""

import numpy as np
import pytest
import torch

from interp.acts.direction import Direction, DirectionError, residual_norm
from interp.acts.resampling import placebo_directions
from interp.concepts.steering.context import steer
from interp.concepts.steering.operations import (
    EVERYWHERE,
    ablate,
    add,
    as_operations,
    clamp,
    latents,
    loreft,
    low_rank,
    rotate,
)
from interp.model.hooks import reading
from sae.archs import ARCHS
from sae.archs.base import SAE
from sae.config import SAEConfig
from sae.normalize import Affine

IDS = torch.tensor([[5, 9, 33, 71, 8], [17, 60, 90, 12, 4], [44, 45, 46, 47, 48]])
HOOK = "blocks.1.hook_resid_post"


def direction(model, seed=0, vector=None, hook=HOOK, **more):
    given = placebo_directions(model.d_model, 1, seed)[0] if vector is None else vector
    return Direction(
        vector=given, hook=hook, method="", scale=1.0, norm=residual_norm(model, hook), model=model.fingerprint, **more
    )


def stream(model, *operations, hook=HOOK, ids=IDS):
    """Return the stream at a hook point, float64 numpy."""
    seen = []
    with steer(model, *operations), reading(model, hook, lambda name, value: seen.append(value.clone())):
        model.run(ids)
    return seen[0].double().numpy()


def unit(d):
    return d.vector.double().numpy()


def near(a, b):
    return np.allclose(a, b, atol=2e-5 * np.abs(b).max(), rtol=1e-5)


@pytest.fixture(scope="module")
def plain(llama):
    return stream(llama)


def test_an_addition_that_keeps_the_norm_turns_each_token_without_stretching_it(llama, plain):
    d = direction(llama)
    new = stream(llama, add(d, [0.7, 0.0, -0.4], keep_norm=True))
    expected = plain + np.array([0.7, 0.0, -0.4])[:, None, None] * d.norm * unit(d)
    expected *= np.linalg.norm(plain, axis=-1, keepdims=True) / np.linalg.norm(expected, axis=-1, keepdims=True)
    assert near(new, expected) and np.array_equal(new[1], plain[1]) and not near(new[0], plain[0])


def test_ablation_takes_a_span_out_and_leaves_its_complement(llama, plain):
    a, b = direction(llama), direction(llama, 1)
    both = a.vector + 0.5 * b.vector
    mixed = direction(llama, vector=both / both.norm())
    new = stream(llama, ablate([a, mixed, b]))  # three directions, two dimensions
    q = np.linalg.qr(np.stack([unit(a), unit(b)]).T)[0]
    assert near(new, plain - plain @ q @ q.T)
    assert np.abs(new @ q).max() < 1e-5 * np.abs(plain).max() < np.abs(plain @ q).max()
    again = stream(llama, ablate([a, b]), ablate([b, a]))
    assert near(again, new)


def test_ablation_with_a_strength_a_row_takes_that_share(llama, plain):
    a, b = direction(llama), direction(llama, 1)
    share = np.array([0.0, 0.5, 1.0])[:, None, None]
    one = stream(llama, ablate(a, [0.0, 0.5, 1.0]))
    assert near(one, plain - share * (plain @ unit(a))[..., None] * unit(a)) and np.array_equal(one[0], plain[0])
    q = np.linalg.qr(np.stack([unit(a), unit(b)]).T)[0]
    assert near(stream(llama, ablate([a, b], [0.0, 0.5, 1.0])), plain - share * (plain @ q @ q.T))


@pytest.mark.parametrize(("side", "sign"), [("positive", 1), ("negative", -1)])
def test_one_sided_ablation_touches_one_side_alone(llama, plain, side, sign):
    d = direction(llama)
    at = plain @ unit(d)
    hit = sign * at > 0
    new = stream(llama, ablate(d, side=side))
    assert 0 < hit.sum() < hit.size
    assert near(new @ unit(d), np.where(hit, 0, at)) and np.allclose(new[~hit], plain[~hit], atol=1e-6)


def test_a_direction_ablated_everywhere_is_nowhere_in_the_stream(model):
    d = direction(model)
    for layer in range(3):
        hook = f"blocks.{layer}.hook_resid_post"
        before, after = (stream(model, *ops, hook=hook) for ops in ((), (ablate(d, hooks=EVERYWHERE),)))
        left = np.abs(after @ unit(d)) / np.linalg.norm(after, axis=-1)
        assert left.max() < 2e-6 < np.abs(before @ unit(d)).max()


def test_a_clamp_sets_the_coordinate_and_nothing_else(llama, plain):
    d = direction(llama)
    values = [3.0, -1.0, 0.5]
    new = stream(llama, clamp(d, values))
    u = unit(d)
    assert np.allclose(new @ u, np.array(values)[:, None] * np.ones(5), atol=1e-4)
    assert near(new - (new @ u)[..., None] * u, plain - (plain @ u)[..., None] * u)
    half = stream(llama, clamp(d, 3.0, 0.5))
    assert near(half @ u, (plain @ u + 3.0) / 2)
    many = [direction(llama, s) for s in range(3)]
    rowed = stream(llama, clamp(many, 2.0))
    assert np.allclose([rowed[i] @ unit(many[i]) for i in range(3)], 2.0, atol=1e-4)


@pytest.mark.parametrize("side", ["min", "max"])
def test_a_one_sided_clamp_moves_only_what_lies_beyond_the_value(llama, plain, side):
    d = direction(llama)
    at = plain @ unit(d)
    value = float(np.median(at)) + 0.01
    new = stream(llama, clamp(d, value, side=side))
    assert near(new @ unit(d), np.maximum(at, value) if side == "min" else np.minimum(at, value))
    stays = at > value if side == "min" else at < value
    assert 0 < stays.sum() < stays.size and np.array_equal(new[stays], plain[stays])


def test_a_clamp_knows_the_class_means(llama):
    d = direction(llama, negative=-2.0, positive=4.0)
    for name, value in (("positive", 4.0), ("negative", -2.0)):
        assert np.allclose(stream(llama, clamp(d, name)) @ unit(d), value, atol=1e-4)
    with pytest.raises(DirectionError, match="no positive class mean"):
        clamp(direction(llama), "positive")


def angles_in_plane(h, a, b):
    """Return the angle of each row's part in the plane of two directions, from the first, and the rest of the row."""
    q1 = unit(a)
    q2 = unit(b) - (unit(b) @ q1) * q1
    q2 /= np.linalg.norm(q2)
    x, y = h @ q1, h @ q2
    return np.degrees(np.arctan2(y, x)), h - x[..., None] * q1 - y[..., None] * q2


def test_a_rotation_turns_the_part_in_the_plane_and_keeps_length_and_rest(llama, plain):
    a, b = direction(llama), direction(llama, 1)
    before, rest = angles_in_plane(plain, a, b)
    by, to = [30.0, 0.0, -100.0], [10.0, 90.0, 170.0]
    new, aimed = stream(llama, rotate(a, by, b)), stream(llama, rotate(a, to, b, to=True))
    for got, expected in (
        (new, before + np.array(by)[:, None]),
        (aimed, np.broadcast_to(np.array(to)[:, None], (3, 5))),
    ):
        after, kept = angles_in_plane(got, a, b)
        assert np.abs((after - expected + 180) % 360 - 180).max() < 0.01
        assert near(kept, rest) and np.allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(plain, axis=-1), rtol=1e-5)
    assert np.array_equal(new[1], plain[1])
    half, _ = angles_in_plane(stream(llama, rotate(a, 10.0, b, to=True, strength=0.5)), a, b)
    gap = (10 - before + 180) % 360 - 180
    assert np.abs((half - before - gap / 2 + 180) % 360 - 180).max() < 0.01


def test_a_rotation_towards_one_direction_closes_the_angle_to_it(llama, plain):
    d = direction(llama)

    def angle(h):
        return np.degrees(np.arccos(h @ unit(d) / np.linalg.norm(h, axis=-1)))

    assert np.allclose(angle(stream(llama, rotate(d, 20.0))), angle(plain) - 20, atol=0.01)
    aimed = stream(llama, rotate(d, [15.0, 60.0, 120.0], to=True))
    assert np.allclose(angle(aimed), np.array([15.0, 60.0, 120.0])[:, None], atol=0.01)
    assert np.allclose(np.linalg.norm(aimed, axis=-1), np.linalg.norm(plain, axis=-1), rtol=1e-5)
    with pytest.raises(ValueError, match="span no plane"):
        rotate(d, 5.0, d)


def test_a_low_rank_map_and_loreft_are_their_formulas(llama, plain):
    draw = torch.Generator().manual_seed(5)
    A, B, b = torch.randn(32, 2, generator=draw), torch.randn(2, 32, generator=draw), torch.randn(2, generator=draw)
    new = stream(llama, low_rank(A, B, HOOK, b, [1.0, 0.0, -0.5]))
    moved = (plain @ A.double().numpy() + b.double().numpy()) @ B.double().numpy()
    assert near(new, plain + np.array([1.0, 0.0, -0.5])[:, None, None] * moved) and np.array_equal(new[1], plain[1])
    overflowing = stream(llama, low_rank(1e30 * A, 1e30 * B, HOOK, strength=[0.0, 0.0, 1.0]))
    assert np.array_equal(overflowing[:2], plain[:2]) and not np.isfinite(overflowing[2]).all()
    R, W = torch.linalg.qr(torch.randn(32, 2, generator=draw)).Q.t().contiguous(), torch.randn(2, 32, generator=draw)
    r, w = R.double().numpy(), W.double().numpy()
    assert near(stream(llama, loreft(R, W, b, HOOK)), plain + (plain @ w.T + b.double().numpy() - plain @ r.T) @ r)
    with pytest.raises(ValueError, match="rank"):
        low_rank(A, B.t(), HOOK)
    with pytest.raises(ValueError, match="width 4"):
        stream(llama, low_rank(A[:4], B[:, :4], HOOK))


def planted_sae(arch, **more):
    """Return a random SAE with thresholds and biases that matter."""
    sae = ARCHS[arch](SAEConfig(arch=arch, d_in=32, d_sae=64, k=6, **more), seed=3)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in (*sae.parameters(), *sae.buffers()):
            p.add_(0.2 * torch.randn(p.shape, generator=draw))
        sae.cut.abs_()
    return sae


def edited(sae, plain, pairs, mode):
    """Return h + decode(c) - decode(a) from the dense code, in float64."""
    sae = sae.double()
    h = torch.from_numpy(plain)
    a = sae.encode(h)
    c = a.clone()
    for i, v in pairs.items():
        c[..., i] = {"set": v, "scale": v * a[..., i], "ablate": 0.0, "min": a[..., i].clamp_min(v)}[mode]
    delta = (sae.decode(c, h) - sae.decode(a, h)).detach()
    sae.float()
    return (h + delta).numpy(), delta.abs().numpy().max()


@pytest.mark.parametrize("arch", sorted(ARCHS))
@pytest.mark.parametrize("mode", ["set", "scale", "ablate", "min"])
def test_an_edit_of_latents_adds_the_decoders_difference(llama, plain, arch, mode):
    sae = planted_sae(arch)
    code = sae.encode(torch.from_numpy(plain).float())
    often = [int(i) for i in (code != 0).flatten(0, 1).float().mean(0).topk(2).indices]
    pairs = dict(zip([*often, 40], [2.5, 0.3, 1.0], strict=True))
    expected, size = edited(sae, plain, pairs, mode)
    new = stream(llama, latents(sae, pairs, HOOK, mode))
    assert size > 0.1 and near(new, expected)
    weighted = stream(llama, latents(sae, pairs, HOOK, mode, [0.0, 0.5, 1.0]))
    assert np.array_equal(weighted[0], plain[0]) and near(weighted[1], plain[1] + 0.5 * (expected - plain)[1])


def test_latents_read_through_a_layer_norm_are_written_in_the_tokens_own_scale(llama, plain):
    sae = planted_sae("topk", input_norm="layer_norm")
    expected, size = edited(sae, plain, {3: 2.0}, "set")
    assert size > 0.1 and near(stream(llama, latents(sae, {3: 2.0}, HOOK)), expected)


@pytest.mark.parametrize("arch", ["topk", "jumprelu", "gated"])
def test_an_sae_that_is_still_being_trained_is_edited_in_the_units_of_the_data(llama, plain, arch):
    sae, pairs = planted_sae(arch), {3: 2.0, 9: 1.0}
    shift = torch.full((32,), 0.0 if arch == "gated" else 0.5)
    affine = Affine(shift, 2.0 ** (torch.arange(32) % 3))
    sae.start(affine, affine, torch.zeros(32))
    assert not torch.equal(sae.W_dec, sae.dec)
    for turn in (sae.eval, sae.fold):
        turn()
        expected, size = edited(sae, plain, pairs, "set")
        assert size > 0.1 and near(stream(llama, latents(sae, pairs, HOOK)), expected)


def test_no_latent_no_change_and_unconcerned_decoder_rows_are_not_read(llama, plain):
    sae = planted_sae("jumprelu")
    assert np.array_equal(stream(llama, latents(sae, {}, HOOK)), plain)
    expected = stream(llama, latents(sae, {7: 3.0}, HOOK))
    with torch.no_grad():
        sae.dec[:7] = sae.dec[8:15] = float("nan")
        sae.enc[:7] = float("nan")
    assert np.array_equal(stream(llama, latents(sae, {7: 3.0}, HOOK)), expected)


def test_an_operation_keeps_the_sae_as_it_was_when_it_was_made_into_tensors(llama):
    sae = planted_sae("jumprelu")
    before = {name: p.clone() for name, p in sae.state_dict().items()}
    stream(llama, latents(sae, {7: 3.0}, HOOK))
    assert all(torch.equal(p, before[name]) for name, p in sae.state_dict().items())
    assert isinstance(sae, SAE) and len(sae.enc) == 64


def test_latents_that_cannot_be_edited_are_refused(llama):
    sae = planted_sae("topk")
    for bad in ({64: 1.0}, {-1: 1.0}, {3: float("nan")}):
        with pytest.raises(ValueError, match="latents are 0 to 63"):
            latents(sae, bad, HOOK)
    with pytest.raises(ValueError, match="name the hook point"):
        latents(sae, {1: 1.0})
    with pytest.raises(ValueError, match="latent: value"):
        latents(sae, [1], HOOK)
    with pytest.raises(ValueError, match="transcoder"):
        latents(ARCHS["topk"](SAEConfig(arch="topk", d_in=32, d_sae=64, k=6, d_out=32)), {1: 1.0}, HOOK)
    narrow = ARCHS["topk"](SAEConfig(arch="topk", d_in=16, d_sae=64, k=6, metadata={"hook_name": HOOK}))
    with pytest.raises(ValueError, match="width 16"), steer(llama, latents(narrow, {1: 1.0})):
        pass


def test_operations_at_many_hook_points_use_the_unit_of_each(llama):
    d = direction(llama)
    hooks = ["resid_post.0", "resid_post.1"]
    with_globs = stream(llama, add(d, 0.3, hooks="resid_post.[01]"), hook="resid_post.2")
    norms = [residual_norm(llama, h) for h in hooks]
    by_hand = [
        Direction(vector=d.vector, hook=llama.hook_point(h).name, method="", scale=1.0, norm=n, model=llama.fingerprint)
        for h, n in zip(hooks, norms, strict=True)
    ]
    assert near(with_globs, stream(llama, *[add(one, 0.3) for one in by_hand], hook="resid_post.2"))
    assert abs(norms[0] / norms[1] - 1) > 0.1


def test_the_unit_is_the_unsteered_models_inside_another_context_too(build, monkeypatch):
    from interp.acts import direction as directions
    from interp.model.loading import load_model

    model = load_model(build("llama", seed=17))  # of which nothing has been measured
    d = direction(model, hook="blocks.0.hook_resid_post")
    with steer(model, add(d, 3.0)):
        inner = stream(model, add(d, 0.3, hooks="resid_post.1"))
    monkeypatch.setattr(directions, "_NORMS", {})  # measured again, outside
    assert near(inner, stream(model, add(d, 3.0), add(direction(model), 0.3)))


def test_a_plan_is_operations_in_any_nesting(llama):
    d = direction(llama)
    one, two, three = add(d, 0.1), ablate(d, 0.5), clamp(d, 2.0, 0.5)
    assert as_operations([one, (two, [three])]) == (one, two, three)
    assert np.array_equal(stream(llama, [one, [two, three]]), stream(llama, one, two, three))
    assert not near(stream(llama, three, two, one), stream(llama, one, two, three)), "the order counts"
    with pytest.raises(TypeError, match="no steering operation"):
        as_operations("add")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: ablate(d, 1.5), "between 0 and 1"),
        (lambda d: ablate(d, side="left"), "positive"),
        (lambda d: ablate([d, d], side="positive"), "one direction"),
        (lambda d: clamp(d, float("nan")), "finite"),
        (lambda d: clamp(d, 1.0, side="low"), "min"),
        (lambda d: clamp([d, d], [1.0, 2.0, 3.0]), "2 directions and 3 values"),
        (lambda d: rotate(d, [1.0, 2.0], strength=[1.0, 2.0, 3.0]), "2 angles and 3 strengths"),
        (lambda d: add([], 1.0), "one direction or more"),
        (lambda d: add(d, 1.0, positions=torch.ones(3)), "boolean"),
    ],
)
def test_operations_that_mean_nothing_are_refused(llama, make, message):
    with pytest.raises(ValueError, match=message):
        make(direction(llama))


@pytest.mark.parametrize(
    "make", [lambda d: ablate(d, hooks=EVERYWHERE), lambda d: clamp(d, 1.0), lambda d: rotate(d, 5.0)]
)
def test_every_operation_refuses_directions_of_another_model(llama, build, make):
    from interp.model.loading import load_model

    other = load_model(build("llama", seed=8))
    operation = make(direction(llama))
    with pytest.raises(DirectionError, match="force=True"), steer(other, operation):
        pass
    with steer(other, operation, force=True):
        other.run(IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_operation_computes_in_float32_at_least_and_gives_the_models_dtype(build, dtype):
    from interp.model.loading import load_model

    model = load_model(build("llama", seed=2).to(dtype))
    d, e, sae = direction(model), direction(model, 1), planted_sae("jumprelu")
    A = torch.full((32, 1), 0.1)
    seen = []
    for op in (
        ablate(d),
        clamp(d, 2.0),
        rotate(d, 9.0),
        rotate(d, 9.0, e),
        low_rank(A, A.t(), HOOK),
        latents(sae, {1: 9.0}, HOOK),
    ):
        for steps in ((), (op,)):
            with steer(model, *steps), reading(model, HOOK, lambda name, value: seen.append(value.clone())):
                model.run(IDS)
    assert all(value.dtype == dtype for value in seen)
    before, ablated = (value.double() for value in seen[:2])
    step = torch.finfo(dtype).eps * float(before.abs().max())
    exact = before - (before @ d.vector.double())[..., None] * d.vector.double()
    bound = step if dtype == torch.bfloat16 else 1e-6
    assert float((ablated - exact).abs().max()) <= bound
