"""What is given to be read: chats, specials, padding tokens, added words, and documents longer than the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.acts.capture import capture_acts, capture_batch
from interp.acts.documents import Documents, Pieces
from interp.model.loading import load_model
from sae.extras import MissingError

CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} w{{ 90 if m.role == 'user' else 91 }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %} w91{% endif %}"
)


def ids_of(acts, document=0):
    return acts.token_ids[acts.documents == document].tolist()


def adding_bos(tokenizer):
    """Make a tokenizer put BOS in front by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    assert tokenizer("w5")["input_ids"] == [1, 5]
    return tokenizer


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_chat_is_read_by_its_template_with_one_bos(build, make_words, adds_bos):
    tokenizer = adding_bos(make_words()) if adds_bos else make_words()
    tokenizer.chat_template = TEMPLATE
    model = load_model(build("llama"), tokenizer=tokenizer)
    acts = capture_acts(model, [CHAT, "w8"], "embed", exclude=("pad",))
    assert ids_of(acts) == [1, 90, 5, 6, 2, 91, 7, 2] and ids_of(acts, 1) == [1, 8]
    assert acts.texts == ("<s> w90 w5 w6 </s> w91 w7 </s>", "w8")
    # one chat is one document; its text, given as such, gets no second BOS
    alone = capture_acts(model, CHAT, "embed", exclude=("pad",), add_generation_prompt=True)
    assert ids_of(alone) == [1, 90, 5, 6, 2, 91, 7, 2, 91] and alone.n_documents == 1
    assert ids_of(capture_acts(model, acts.texts[0], "embed", exclude=("pad",))) == ids_of(acts)
    # a template without BOS is taken at its word
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    assert ids_of(capture_acts(model, [CHAT], "embed", exclude=("pad",)))[:2] == [90, 5]


def test_a_chat_needs_a_template_and_a_tokenizer(build, llama):
    with pytest.raises(ValueError, match=r"document 1 is a chat, .* has no chat template"):
        capture_acts(llama, ["w5", CHAT], "embed")
    with pytest.raises(MissingError):
        capture_acts(load_model(build("llama")), [CHAT], "embed")


@pytest.mark.parametrize("pad", ["</s>", None])
def test_a_real_eos_is_no_pad_though_they_share_an_id(build, make_words, pad):
    tokenizer = make_words(pad_token=pad)
    assert tokenizer.pad_token_id == (2 if pad else None)
    model = load_model(build("llama"), tokenizer=tokenizer)
    texts = ["w5 </s> w6 </s>", "w7 w8 w9 w10 w11 w12", "", "w4"]
    kept = capture_acts(model, texts, "resid_post.1", exclude=("pad", "bos"))
    assert [ids_of(kept, i) for i in range(4)] == [[5, 2, 6, 2], [7, 8, 9, 10, 11, 12], [], [4]]
    assert kept.is_special.tolist() == [i == 2 for i in kept.token_ids.tolist()]
    plain = capture_acts(model, texts, "resid_post.1")
    assert ids_of(plain) == [5, 6] and plain.positions[:2].tolist() == [1, 3]
    assert plain.removed["bos"] == pytest.approx(4 / 15) and plain.removed["special"] == pytest.approx(2 / 15)
    alone = capture_acts(model, [texts[0]], "resid_post.1", exclude=("pad", "bos"))
    assert (kept["resid_post.1"][:4] - alone["resid_post.1"]).abs().max() < 1e-5


def test_a_double_bos_is_there_only_if_the_user_gives_it(build, make_words):
    model = load_model(build("llama"), tokenizer=adding_bos(make_words()))
    assert [ids_of(capture_acts(model, [text], "embed", exclude=("pad",))) for text in ("w5", "<s> w5")] == [[1, 5]] * 2
    assert ids_of(capture_acts(model, ["<s> w5"], "embed", exclude=("pad",), add_bos=False)) == [1, 5]
    twice = capture_acts(model, ["<s> <s> w5", [1, 1, 6]], "embed", exclude=("pad",))
    assert ids_of(twice) == [1, 1, 5] and ids_of(twice, 1) == [1, 1, 6]
    assert capture_acts(model, ["<s> <s> w5"], "embed", exclude=("pad", "bos")).positions.tolist() == [2]


def test_added_words_have_rows_and_added_specials_have_not(build, make_words):
    tokenizer = make_words()
    tokenizer.add_tokens(["newword"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    hf = build("llama")
    small = load_model(hf, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"document 0 has token id 98; .* resize_token_embeddings"):
        capture_acts(small, ["w5 newword <tool> w6"], "embed")
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = load_model(hf, tokenizer=tokenizer)
    acts = capture_acts(model, ["w5 newword <tool> w6"], "embed")
    assert ids_of(acts) == [5, 97, 6] and acts.positions.tolist() == [1, 2, 4]
    assert torch.equal(acts["embed"][1], hf.get_input_embeddings().weight[97].detach())
    whole = capture_acts(model, ["w5 newword <tool> w6"], "embed", exclude=("pad", "bos"))
    assert whole.is_special.tolist() == [False, False, True, False]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma3_text"])
def test_left_and_right_padding_give_the_same_rows(build, family):
    from interp.model.tokens import pad_rows

    model = load_model(build(family))
    rows = [[1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 13], [1, 14, 15, 16]]
    found = {}
    for side in ("left", "right"):
        batch = pad_rows(rows, side=side)
        value = capture_batch(model, batch.ids, batch.mask, "resid_post.2")["blocks.2.hook_resid_post"]
        found[side] = value[batch.mask]
    acts = capture_acts(model, rows, "resid_post.2", exclude=("pad",))["resid_post.2"]
    assert (found["left"] - found["right"]).abs().max() < 1e-5
    assert (found["right"] - acts).abs().max() < 1e-5
    assert (found["right"][:9] - found["right"][1:10]).abs().max() > 1e-2


@pytest.mark.parametrize("wrong", [[[5.5]], [torch.tensor([0.5])], [torch.tensor([[5, 6]])], [torch.tensor([True])]])
def test_what_is_no_row_of_ids_is_refused(build, wrong):
    with pytest.raises(ValueError, match=r"document 0 is .*one row of token ids"):
        capture_acts(load_model(build("llama")), wrong, "embed")


def windowed(model, row, width, step):
    """Slow twin: windows made by hand, one after the other; a token is read in the first that holds it."""
    front = row[:1] if row[0] == 1 else []
    rows, end = [], 0
    while end < len(row):
        new = min(len(row), width if end == 0 else end + step)
        window = row[:new] if end == 0 else [*front, *row[new - width + len(front) : new]]
        with torch.no_grad():
            hidden = model.hf.eval()(torch.tensor([window]), output_hidden_states=True).hidden_states[2][0]
        rows.append(hidden[len(window) - (new - end) :])
        end = new
    return torch.cat(rows)


@pytest.mark.parametrize(("width", "step"), [(8, None), (8, 1), (8, 7), (5, 2), (64, None)])
def test_long_documents_are_read_in_windows_each_token_once(llama, width, step):
    generator = torch.Generator().manual_seed(3)
    rows = [[1, *torch.randint(4, 97, (n,), generator=generator).tolist()] for n in (20, 2, 70, 7)]
    rows.append(torch.randint(4, 97, (19,), generator=generator).tolist())  # without BOS
    acts = capture_acts(llama, rows, "resid_post.1", exclude=("pad",), max_len=width, long="windows", stride=step)
    for i, row in enumerate(rows):
        assert ids_of(acts, i) == row and acts.positions[acts.documents == i].tolist() == list(range(len(row)))
        want = windowed(llama, row, width, step or width // 2)
        assert (acts["resid_post.1"][acts.documents == i] - want).abs().max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(2, 12), st.integers(1, 11), st.integers(1, 4), st.data())
def test_every_kept_token_has_one_row_and_at_least_the_context_promised(counts, limit, stride, size, data):
    stride = min(stride, limit - 1)
    ids = torch.cat([torch.zeros(0, dtype=torch.long), *(torch.arange(n) + 100 * i for i, n in enumerate(counts))])
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), dtype=torch.bool)
    documents = Documents(ids, torch.tensor(counts, dtype=torch.long))
    pieces = Pieces(documents, keep, limit, stride, front_id=100)  # the second document begins with BOS
    seen = torch.full((int(keep.sum()),), -1)
    for members in pieces.batches(size):
        batch = pieces.batch(members)
        assert batch.ids.shape[1] <= limit and len(batch.ids) <= size
        assert bool((seen[batch.at] == -1).all())
        seen[batch.at] = batch.ids.flatten()[batch.where]
        columns = batch.where % batch.ids.shape[1]
        positions = documents.positions[keep][batch.at]
        assert bool((columns >= torch.minimum(positions, torch.tensor(limit - stride))).all())
    assert torch.equal(seen, ids[keep])


def test_the_end_of_a_long_text_is_seen_with_all_the_context_there_is_room_for(llama):
    row = [1, *range(5, 25)]
    acts = capture_acts(llama, [row], "resid_post.2", max_len=8, long="windows", exclude=("pad",))
    last = capture_acts(llama, [[1, *row[-7:]]], "resid_post.2", exclude=("pad",))["resid_post.2"][-1]
    assert (acts["resid_post.2"][-1] - last).abs().max() < 1e-5


def test_long_is_refused_cut_or_windowed_as_told(llama):
    row = [1, *range(5, 15)]
    with pytest.raises(ValueError, match=r'document 0 has 11 tokens, .* takes 8; .*long="windows"'):
        capture_acts(llama, [row], "embed", max_len=8, long="error")
    cut = [capture_acts(llama, [row], "embed", max_len=8, long=long).token_ids.tolist() for long in ("cut", None)]
    assert cut == [row[1:8]] * 2
    assert len(capture_acts(llama, ["w5 " * 100], "embed", long="cut")) == 63  # n_ctx is 64
    assert len(capture_acts(llama, ["w5 " * 100], "embed", long="windows")) == 100
    windows = {"long": "windows", "max_len": 8}
    for wrong in ({"long": "stop"}, {**windows, "stride": 8}, {**windows, "stride": 0}):
        with pytest.raises(ValueError, match=r"must be|need one of 1 to 7"):
            capture_acts(llama, [row], "embed", **wrong)


def test_windows_go_through_a_bridge(build, words):
    hf, row = build("llama"), [1, *range(5, 25)]
    bridge = load_model(hf, tokenizer=words, backend="transformer_lens")
    one, two = (
        capture_acts(m, [row], "resid_post.1", max_len=8, long="windows")["resid_post.1"]
        for m in (bridge, load_model(hf, tokenizer=words))
    )
    assert one.shape == (20, 32) and (one - two).abs().max() < 1e-4
