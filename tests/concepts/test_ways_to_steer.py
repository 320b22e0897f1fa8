"""Steering through everything that drives a model: pipelines, bridges, compiled models, two streams, sampling."""

import pytest
import torch

from interp.acts.direction import Direction, residual_norm
from interp.acts.resampling import placebo_directions
from interp.concepts.steering.conditions import when
from interp.concepts.steering.context import generate_ids, steer
from interp.concepts.steering.operations import ablate, add, latents
from interp.model.hooks import reading
from interp.model.loading import load_model
from sae.archs import ARCHS
from sae.config import SAEConfig

PROMPTS = [[1, 5, 9, 33, 71, 8, 40], [1, 17, 60]]
HOOK = "resid_post.1"


def direction(model, hook=HOOK, seed=0, norm=None):
    return Direction(
        vector=placebo_directions(32, 1, seed)[0], hook=model.hook_point(hook).name, method="", scale=1.0,
        norm=norm or residual_norm(model, hook), model=model.fingerprint,
    )  # fmt: skip


def compiled_before(hf):
    return torch.compile(hf, backend="eager")


def compiled_in_place(hf):
    hf.compile(backend="eager")
    return hf


@pytest.mark.parametrize("compile_", [compiled_before, compiled_in_place])
def test_a_model_compiled_before_is_steered_and_is_compiled_again_afterwards(build, compile_):
    torch.compiler.reset()
    model = load_model(build("llama", seed=4))
    ids, d = torch.tensor([PROMPTS[0]]), direction(model)
    with steer(model, add(d, 1.0)):
        expected = model.hf(ids).logits
    run = compile_(model.hf)
    plain = run(ids).logits
    with steer(run, add(d, 1.0)):
        assert torch.equal(run(ids).logits, expected)
    with steer(model, add(d, 0.5)), steer(run, add(d, 0.5)):
        assert torch.allclose(run(ids).logits, expected, atol=1e-4)
    assert torch.equal(run(ids).logits, plain) and not torch.equal(plain, expected)


def test_a_model_compiled_inside_is_steered_and_plain_afterwards(build):
    torch.compiler.reset()
    model = load_model(build("llama", seed=4))
    ids, d = torch.tensor([PROMPTS[0]]), direction(model)
    plain = model.hf(ids).logits
    with steer(model, add(d, 1.0)):
        expected = model.hf(ids).logits
        run = torch.compile(model.hf, backend="eager")
        assert torch.equal(run(ids).logits, expected)
    assert torch.allclose(run(ids).logits, plain, atol=1e-5)
    with steer(model, add(d, 1.0)):
        assert torch.equal(run(ids).logits, expected)


def test_a_pipeline_is_steered(llama, tokenizer):
    from transformers import pipeline

    pipe = pipeline("text-generation", model=llama.hf, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    text = "w3 w4 good1"
    plain = pipe(text, **options)
    ids = [tokenizer(text)["input_ids"]]
    with steer(llama.hf, add(direction(llama), 1.5)):
        steered = pipe(text, **options)
        tokens = generate_ids(llama, ids, 6)
    assert steered[0]["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert steered != plain and pipe(text, **options) == plain


@pytest.mark.parametrize("positions", ["default", "prompt", "all"])
def test_a_bridge_is_steered_as_its_model_is_in_its_own_loop_too(build, positions):
    native = load_model(build("llama", seed=6))
    model = load_model(build("llama", seed=6), backend="transformer_lens")
    ids = torch.tensor([[7, 5, 9, 33, 71]])
    options = {"max_new_tokens": 6, "do_sample": False}
    with steer(native, add(direction(native), 1.5, positions)):
        expected = native.hf.generate(ids, **options, pad_token_id=0)
    plain = native.hf.generate(ids, **options, pad_token_id=0)
    quiet = {**options, "verbose": False, "return_type": "tokens", "eos_token_id": 2}
    operation = add(direction(model), 1.5, positions)
    with steer(model, operation):
        assert torch.equal(model.hf.generate(ids, **options, pad_token_id=0), expected)
        for cache in (True, False):
            got = model.bridge.generate(ids, use_past_kv_cache=cache, **quiet)
            assert torch.equal(got, expected[:, : got.shape[1]])
        with steer(model.bridge, add(direction(model, seed=1), 4.0)):  # found again, not loaded anew
            assert not torch.equal(model.bridge.generate(ids, **quiet), expected)
    assert not torch.equal(plain, expected) and "generate" not in vars(model.bridge)
    assert torch.equal(model.bridge.generate(ids, **quiet), plain)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = T5Config(
            vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=3, tie_word_embeddings=False,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
        for p in model.parameters():
            if p.ndim > 1:
                p.data = torch.randn_like(p) * (1.0 if p.shape[0] == 100 else 0.25)
    return load_model(model.eval())


def test_both_streams_of_an_encoder_decoder_are_steered_alike_in_every_way():
    model = t5()
    ids = torch.tensor([[5, 9, 33, 71], [17, 60, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = [1.0, -0.7]

    def plan(rows):
        e = direction(model, "encoder.resid_post.0", 0, 60.0)
        d = direction(model, "decoder.resid_post.0", 1, 60.0)
        return [add(e, rows), add(d, rows), ablate(d, hooks="decoder.mlp_out.*", when=when(e, 0.0))]

    def write(ids, mask, **options):
        return model.hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=7, do_sample=False, **options)

    def filled(row):
        return torch.nn.functional.pad(row, (0, 8 - len(row)))

    def single(i, **options):
        with steer(model, plan([rows[i]])):
            real = mask[i : i + 1].bool()
            return [filled(row) for row in write(ids[i : i + 1][real][None], mask[i : i + 1][real][None], **options)]

    for options in ({}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}):
        with steer(model, plan(rows)):
            together = [filled(row) for row in write(ids, mask, **options)]
        assert all(
            torch.equal(a, b) for a, b in zip(together, single(0, **options) + single(1, **options), strict=True)
        )
    plain = [filled(row) for row in write(ids, mask)]
    with steer(model, plan(rows)):
        steered = [filled(row) for row in write(ids, mask)]
    assert not any(torch.equal(a, b) for a, b in zip(plain, steered, strict=True))
    assert len({int(t) for row in steered for t in row}) > 3


def test_draws_do_not_depend_on_the_strength(llama):
    options = {"do_sample": True, "temperature": 2.0}
    torch.manual_seed(3)
    plain = generate_ids(llama, PROMPTS, 6, **options)
    torch.manual_seed(3)
    with steer(llama, add(direction(llama), [0.0, 1.5])):
        steered = generate_ids(llama, PROMPTS, 6, **options)
        drawn = torch.rand(3)
    assert torch.equal(plain[0], steered[0]) and not torch.equal(plain[1], steered[1])
    torch.manual_seed(3)
    generate_ids(llama, PROMPTS, 6, **options)
    assert torch.equal(torch.rand(3), drawn)


def test_embeddings_given_instead_of_ids_are_steered(llama):
    ids = torch.tensor([PROMPTS[0][1:]])
    embeds = llama.hf.get_input_embeddings()(ids).detach()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with steer(llama, add(direction(llama), 1.5)):
        by_ids = llama.hf.generate(ids, **options)[:, ids.shape[1] :]
        assert torch.equal(llama.hf.generate(inputs_embeds=embeds, **options), by_ids)
    assert not torch.equal(llama.hf.generate(inputs_embeds=embeds, **options), by_ids)


def test_gradients_reach_the_stream_through_every_kind(llama):
    from interp.concepts.steering.operations import clamp, low_rank, rotate

    sae = ARCHS["jumprelu"](SAEConfig(arch="jumprelu", d_in=32, d_sae=64, k=6), seed=4)
    d, A = direction(llama), torch.ones(32, 1)
    plan = [add(d, 0.1, keep_norm=True), ablate(d), clamp(d, 1.0), rotate(d, 5.0), low_rank(A, A.t(), HOOK)]
    embeds = torch.randn(1, 4, 32, requires_grad=True)
    with steer(llama, plan, latents(sae, {3: 2.0}, HOOK)):
        llama.hf(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None and bool(embeds.grad.abs().sum() > 0) and bool(embeds.grad.isfinite().all())


def test_a_generator_of_tokens_is_followed_from_its_first_step(build):
    model = load_model(build("llama", seed=6), backend="transformer_lens")
    ids, seen = torch.tensor([[7, 5, 9, 33, 71]]), []
    options = {"max_new_tokens": 3, "do_sample": False, "return_type": "tokens", "eos_token_id": 2, "verbose": False}
    with (
        steer(model, add(direction(model), 1.5)),
        reading(model, HOOK, lambda name, value: seen.append(value.clone()), stop=False),
    ):
        list(model.bridge.generate_stream(ids, **options))
    steered, seen = seen, []
    with reading(model, HOOK, lambda name, value: seen.append(value.clone()), stop=False):
        model.bridge.original_model(ids)
    moved = (steered[0] != seen[0]).any(-1)
    assert moved.tolist() == [[False, False, False, False, True]] and "generate_stream" not in vars(model.bridge)
