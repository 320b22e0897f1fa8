"""The same exactness on trained weights, where activations are large and rounding would show."""

import pytest
import torch

from interp.acts.capture import capture_acts
from interp.model.hooks import editing, reading
from interp.model.loading import load_model

pytestmark = pytest.mark.shared
STORIES = ["Once upon a time, there was a little girl named Lily.", "The dog ran to the park.", "She was happy"]


@pytest.fixture(scope="module")
def stories(shared_data):
    torch.set_num_threads(1)
    return load_model(shared_data / "models" / "stories260K", device="cpu")


def test_trained_residuals_are_exact_and_pads_do_not_matter(stories):
    acts = capture_acts(stories, STORIES, "resid_post.*", exclude=("pad",))
    for document, text in enumerate(STORIES):
        batch = stories.tokenize(text)
        with torch.no_grad():
            out = stories.hf(batch.ids, output_hidden_states=True)
        for layer in range(stories.n_layers - 1):
            mine = acts[f"resid_post.{layer}"][acts.documents == document]
            assert (mine - out.hidden_states[layer + 1][0]).abs().max() < 1e-4
        kept = {}
        with reading(stories, "resid_post.*", lambda name, value, kept=kept: kept.update({name: value.clone()})):
            stories.run(batch.ids)
        for layer in range(stories.n_layers - 1):
            assert torch.equal(kept[f"blocks.{layer}.hook_resid_post"], out.hidden_states[layer + 1])
        with torch.no_grad():
            assert torch.equal(stories.unembed(kept[f"blocks.{stories.n_layers - 1}.hook_resid_post"]), out.logits)


def test_trained_values_agree_through_a_bridge(stories, shared_data):
    bridged = load_model(shared_data / "models" / "stories260K", device="cpu", backend="transformer_lens")
    one, two = (capture_acts(m, STORIES, "*") for m in (stories, bridged))
    assert one.hooks == two.hooks and one.token_ids.tolist() == two.token_ids.tolist()
    for name in one.hooks:
        scale = one[name].abs().max()
        assert (one[name] - two[name]).abs().max() < 1e-5 * max(1.0, float(scale)), name


def test_generated_english_is_edited_alike_with_and_without_cache(stories):
    vector = torch.randn(stories.d_model, generator=torch.Generator().manual_seed(4))
    prompts = ["Once upon a time", "The big dog"]
    plain = stories.generate(prompts, max_new_tokens=12)
    assert all(any(c.isalpha() for c in text) for text in plain)
    with editing(stories, {"resid_post.2": lambda v, c: v + 2 * vector * (c.mask & ~c.special)[..., None]}):
        cached = stories.generate(prompts, max_new_tokens=12)
        assert cached == stories.generate(prompts, max_new_tokens=12, use_cache=False) != plain
    assert stories.generate(prompts, max_new_tokens=12) == plain
