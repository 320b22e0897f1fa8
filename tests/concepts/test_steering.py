import pytest
import torch

from interp.acts.direction import Direction, DirectionError, residual_norm
from interp.acts.resampling import placebo_directions
from interp.concepts.steering.context import POSITIONS, add, cached_equals_uncached, generate_ids, steer
from interp.model.hooks import reading
from interp.model.loading import load_model
from interp.model.tokens import pad_rows

PROMPTS = [[1, 5, 9, 33, 71, 8, 40], [1, 17, 60], [1, 90, 12, 4, 77]]
HOOK = "resid_post.1"
STRENGTH = 0.8


def direction(model, hook=HOOK, seed=0):
    return Direction(
        vector=placebo_directions(model.d_model, 1, seed)[0], hook=model.hook_point(hook).name, method="random",
        scale=1.0, norm=residual_norm(model, hook), model=model.fingerprint,
    )  # fmt: skip


def hooks_left(hf):
    """Count hooks of any kind on any module, and a shadowed generate."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in hf.modules() for kind in kinds) + ("generate" in vars(hf))


def logits(model, *rows):
    with torch.no_grad():
        return model.hf(torch.tensor(rows or [PROMPTS[0]]), use_cache=False).logits


def slow_generate(model, prompt, delta, positions, n):
    """Write n greedy tokens with one whole forward each and a hook of our own on block 1: the oracle."""
    ids, width = list(prompt), len(prompt)

    def hook(module, args, output):
        value = output if isinstance(output, torch.Tensor) else output[0]
        new = value.clone()
        for c, token in enumerate(ids):
            where = {
                "all": True, "prompt": c < width, "generated": c >= width, "from_last_prompt_token": c >= width - 1,
                "default": c >= width - 1, "last_prompt_token": c == width - 1,
            }[positions]  # fmt: skip
            if where and token not in (0, 1, 2):
                new[0, c] += delta
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = model.place(HOOK).module.register_forward_hook(hook)
    for _ in range(n):
        ids.append(int(logits(model, ids)[0, -1].argmax()))
        if ids[-1] == 2:
            break
    handle.remove()
    return ids[width:]


def padded(tokens, n=10):
    return [*tokens, *[0] * (n - len(tokens))]


def write(model, prompts, n=10, **options):
    """Return the new tokens of each prompt as lists of n."""
    return [padded(row, n) for row in generate_ids(model, prompts, n, **options).tolist()]


@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_generation_equals_one_whole_forward_a_token_with_the_vector_added_by_hand(llama, positions):
    d = direction(llama)
    for prompt in (PROMPTS[1], [6]):
        with steer(llama.hf, add(d, STRENGTH, positions)):
            got = write(llama, [prompt])[0]
        assert got == padded(slow_generate(llama, prompt, STRENGTH * d.norm * d.vector, positions, 10))


@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_cached_and_uncached_generation_are_steered_alike(llama, positions):
    operation = add(direction(llama), STRENGTH, positions)
    assert cached_equals_uncached(llama, operation, PROMPTS, 12)
    assert cached_equals_uncached(llama, operation, [[5], [1, 7]], 6)
    with steer(llama, operation):
        steered = write(llama, PROMPTS, 12)
    assert steered != write(llama, PROMPTS, 12), "steering that changes no token proves nothing"
    assert sum(len(set(row)) > 1 for row in steered) >= 2 and len({t for row in steered for t in row}) > 7


@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_a_left_padded_batch_with_a_strength_a_row_gives_the_single_prompts_tokens(llama, positions):
    d, strengths = direction(llama), [0.0, STRENGTH, -1.2]
    alone = []
    for prompt, strength in zip(PROMPTS, strengths, strict=True):
        with steer(llama, add(d, strength, positions)):
            alone += write(llama, [prompt])
    with steer(llama, add(d, strengths, positions)):
        assert write(llama, PROMPTS) == alone
        assert write(llama, PROMPTS, prefill_chunk_size=3) == alone
    assert len({tuple(row) for row in alone}) == 3


@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_a_static_cache_is_steered_as_a_growing_one(llama, positions):
    with steer(llama, add(direction(llama), [STRENGTH, -1.0, 0.5], positions)):
        assert write(llama, PROMPTS, 6, cache_implementation="static") == write(llama, PROMPTS, 6)


@pytest.mark.parametrize("positions", ["all", "from_last_prompt_token"])
def test_beams_and_returned_sequences_follow_their_prompts_strength(llama, positions):
    d, strengths = direction(llama), [STRENGTH, -1.2]
    options = {"num_beams": 3, "num_return_sequences": 2}
    with steer(llama, add(d, strengths, positions)):
        together = write(llama, PROMPTS[:2], 6, **options)
    assert len(together) == 4
    for i, (prompt, strength) in enumerate(zip(PROMPTS, strengths, strict=False)):
        with steer(llama, add(d, strength, positions)):
            assert together[2 * i : 2 * i + 2] == write(llama, [prompt], 6, **options)


def test_sampled_sequences_of_a_prompt_share_its_strength(llama):
    options = {"do_sample": True, "temperature": 8.0, "num_return_sequences": 6}
    torch.manual_seed(0)
    plain = write(llama, PROMPTS[:2], 1, **options)
    with steer(llama, add(direction(llama), [0.0, 5.0])):
        torch.manual_seed(0)
        steered = write(llama, PROMPTS[:2], 1, **options)
    assert steered[:6] == plain[:6] and steered[6:] != plain[6:]
    assert len({row[0] for row in plain}) > 4


def test_padded_logits_equal_single_ones_at_every_real_column(llama):
    d, strengths = direction(llama), [0.5, -0.5, 1.0]
    for side in ("left", "right"):
        batch = pad_rows(PROMPTS, side=side, special_ids=llama.special_ids)
        with steer(llama, add(d, strengths)):
            together = llama.logits(batch.ids, batch.mask)
        for i, (prompt, strength) in enumerate(zip(PROMPTS, strengths, strict=True)):
            with steer(llama, add(d, strength)):
                alone = logits(llama, prompt)[0]
            assert torch.allclose(together[i][batch.mask[i]], alone, atol=1e-5 * float(alone.abs().max()))


def test_strength_zero_and_the_end_of_the_context_leave_every_bit_as_it_was(model):
    before, count, d = logits(model), hooks_left(model.hf), direction(model)
    with steer(model.hf, add(d, 0.0)):
        assert torch.equal(logits(model), before) and hooks_left(model.hf) == count
    twice = logits(model, PROMPTS[0], PROMPTS[0])
    with steer(model, add(d, [0.0, 1.0])):
        both = logits(model, PROMPTS[0], PROMPTS[0])
    assert torch.equal(both[0], twice[0]) and not torch.equal(both[1], twice[1])
    with steer(model, add(d, 1.0)):
        assert not torch.equal(logits(model), before)
        generate_ids(model, PROMPTS, 2)
    assert torch.equal(logits(model), before) and hooks_left(model.hf) == count


def test_an_exception_inside_leaves_every_bit_as_it_was(model):
    before, count, d = logits(model), hooks_left(model.hf), direction(model)
    with pytest.raises(ZeroDivisionError), steer(model, add(d, 1.0)):
        logits(model)
        raise ZeroDivisionError
    assert torch.equal(logits(model), before) and hooks_left(model.hf) == count
    with pytest.raises(ValueError, match="2 rows"), steer(model, add(d, [1.0, 2.0])):
        logits(model)  # raises in the middle of the forward
    assert torch.equal(logits(model), before) and hooks_left(model.hf) == count


def test_negative_zeros_survive_a_strength_of_zero(build):
    hf = build("llama", seed=3)
    with torch.no_grad():
        hf.get_input_embeddings().weight[50:60] = -0.0
    model, seen = load_model(hf), []
    d = direction(model, "embed")
    with steer(model, add(d, [0.0, 1.0])), reading(model, "embed", lambda name, value: seen.append(value.clone())):
        model.run(torch.tensor([[50, 51, 52]] * 2))
    assert torch.signbit(seen[0][0]).all() and not torch.signbit(seen[0][1]).all()


def test_bos_eos_and_pads_are_never_steered(model):
    d, seen = direction(model), []
    ids = torch.tensor([[0, 0, 1, 5, 2, 6], [1, 7, 8, 9, 10, 11]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]).bool()
    for operations in ((), (add(d, 1.0),)):
        with steer(model, *operations), reading(model, HOOK, lambda name, value: seen.append(value.clone())):
            model.run(ids, mask)
    moved = (seen[0] != seen[1]).any(-1)
    assert moved.tolist() == [[False, False, False, True, False, True], [False] + [True] * 5]
    expected = (d.norm * d.vector).expand(7, -1)
    assert torch.allclose((seen[1] - seen[0])[moved], expected, atol=1e-5 * float(seen[1].abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_made_in_float32_at_least_and_cast_back(build, dtype):
    model, seen = load_model(build("llama", seed=2).to(dtype)), []
    d = direction(model)
    for operations in ((), (add(d, 0.37),)):
        with steer(model, *operations), reading(model, HOOK, lambda name, value: seen.append(value.clone())):
            model.run(torch.tensor([PROMPTS[0][1:]]))
    wide = torch.promote_types(dtype, torch.float32)
    step = (torch.tensor(0.37 * d.norm, dtype=torch.float64) * d.vector.double()).to(wide)
    assert seen[1].dtype == dtype and torch.equal(seen[1], (seen[0].to(wide) + step).to(dtype))


def test_nothing_is_changed_in_place(llama):
    kept = []
    handle = llama.place(HOOK).module.register_forward_hook(lambda module, args, out: kept.append(out))
    plain = logits(llama)
    with steer(llama, add(direction(llama), 1.0)):
        assert not torch.equal(logits(llama), plain)
    handle.remove()
    assert torch.equal(kept[0], kept[1]), "a hook registered earlier keeps the unsteered tensor, unharmed"


def test_gradients_flow_through_steering(llama):
    embeds = torch.randn(1, 4, 32, requires_grad=True)
    with steer(llama, add(direction(llama), 0.5)):
        llama.hf(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None and bool(embeds.grad.abs().sum() > 0)


def test_operations_add_up_and_contexts_nest(model):
    a, b, c = direction(model), direction(model, seed=1), direction(model, "resid_post.0", seed=2)
    with steer(model, add(a, 0.4), add(b, -0.3), add(c, 0.2)):
        together = logits(model)
    near = {"atol": 1e-5 * float(together.abs().max()), "rtol": 1e-4}
    with steer(model, add(c, 0.2)), steer(model, add(a, 0.4)), steer(model, add(b, -0.3)):
        assert torch.allclose(logits(model), together, **near)
    with steer(model, add(a, 0.4, "generated")):
        once = write(model, PROMPTS, 4)
        with steer(model.hf, add(b, 1.0, "generated")):  # the bare object, inside a context of its own
            assert write(model, PROMPTS, 4) != once
        assert write(model, PROMPTS, 4) == once


def test_a_direction_a_row_equals_each_direction_alone(model):
    many = [direction(model, seed=s) for s in range(3)]
    with steer(model, add(many, STRENGTH)):
        together = write(model, PROMPTS)
    for d, prompt, row in zip(many, PROMPTS, together, strict=True):
        with steer(model, add(d, STRENGTH)):
            assert write(model, [prompt]) == [row]


def test_a_direction_of_another_model_is_refused_unless_forced(build, llama):
    other = load_model(build("llama", seed=9))
    operation, before = add(direction(llama), 1.0), logits(other)
    with pytest.raises(DirectionError, match="force=True"), steer(other, operation):
        pass
    with steer(other, operation, force=True):
        forced = logits(other)
    moved = direction(llama).for_model(other, force=True)
    with steer(other, add(moved, 1.0)):
        assert torch.equal(logits(other), forced) and not torch.equal(forced, before)
    with pytest.raises(DirectionError, match="width"), steer(build("llama", hidden_size=64), operation, force=True):
        pass


def test_positions_that_need_a_prompt_say_so_in_a_plain_forward(llama):
    with steer(llama, add(direction(llama), 1.0, "generated")), pytest.raises(ValueError, match="prompt's width"):
        logits(llama)


@pytest.mark.parametrize(
    ("strength", "positions", "message"),
    [
        (float("nan"), "all", "finite"),
        ([1.0, float("inf")], "all", "finite"),
        ([], "all", "finite"),
        (1.0, "everywhere", "from_last_prompt_token"),
    ],
)
def test_operations_that_mean_nothing_are_refused(llama, strength, positions, message):
    with pytest.raises(ValueError, match=message):
        add(direction(llama), strength, positions)


def test_directions_that_do_not_fit_together_are_refused(llama):
    a, b = direction(llama), direction(llama, "resid_post.0")
    with pytest.raises(ValueError, match="one hook point"):
        add([a, b], 1.0)
    with pytest.raises(ValueError, match="2 directions and 3 strengths"):
        add([a, a], [1.0, 2.0, 3.0])
    alone = Direction(vector=a.vector, hook=a.hook, method="", scale=1.0, norm=None, model="")
    with pytest.raises(DirectionError, match="no unit"):
        add(alone, 1.0)
