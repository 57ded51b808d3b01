"""Text encoders: equal texts, equal vectors; files of every form; the offline encoder; CLIP's tower and tokenizer by hand."""

import importlib.util
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.testing import assert_close

from core.text import CLIP_PROMPTS, CLIPText, EmbeddingTable, HashedText, WordLlamaText, clip_tokenizer, prompted, words

wheel = pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None, reason="the wheel wordllama (extra: text) is not installed"
)


@given(text=st.text(min_size=1), other=st.text(min_size=1))
def test_hashed_text_is_a_function_of_its_words(text, other):
    encoder = HashedText(16)
    a, b = encoder.embed([text, other])
    assert_close(a.norm(), torch.tensor(1.0))
    assert torch.equal(encoder.embed([other, text])[1], a)
    if (words(text) or [text]) == (words(other) or [other]):
        assert_close(a, b)


def test_hashed_vectors_are_the_same_everywhere_and_by_seed():
    vector = HashedText(4).embed(["bed"])[0]
    assert_close(vector, torch.tensor([0.4527, -0.0267, -0.1955, -0.8695]), atol=1e-4, rtol=0)
    assert not torch.allclose(HashedText(4, seed=1).embed(["bed"])[0], vector)
    pair = HashedText(64).embed(["night stand", "stand"])
    assert float(pair[0] @ pair[1]) > 0.5  # they share a word
    assert HashedText(4).embed([]).shape == (0, 4)


def test_prompts_average_unit_vectors():
    encoder = HashedText(32)
    ours = prompted(encoder, ["bed", "ottoman"])
    first = encoder.embed(["a photo of a bed.", "this is a photo of a bed.", "an image of a bed."]).mean(0)
    second = encoder.embed(["a photo of an ottoman.", "this is a photo of an ottoman.", "an image of an ottoman."]).mean(0)
    assert_close(ours, torch.stack([first, second]))
    assert float(ours.norm(dim=-1).max()) < 1  # averaged, not unit any more, as released
    assert_close(prompted(encoder, ["bed"], renormalise=True).norm(), torch.tensor(1.0))
    assert_close(prompted(encoder, ["bed"], ()), encoder.embed(["bed"]))
    assert len(CLIP_PROMPTS) == 3


@pytest.mark.parametrize("form", ["rows.npz", "named.npz", "rows.pt", "named.pth", "rows.safetensors", "named.safetensors"])
def test_tables_of_every_form(tmp_path, form):
    names, rows, path = ["bed", "night stand", "tv"], torch.randn(3, 5), tmp_path / form
    named = dict(zip(names, rows))
    if form.endswith("npz"):
        arrays = (
            {"names": np.array(names), "embeddings": rows.numpy()} if form[0] == "r" else {k: v.numpy() for k, v in named.items()}
        )
        np.savez(path, **arrays)
    elif form.endswith("safetensors"):
        if form[0] == "r":
            save_file({"embeddings": rows}, path, {"names": json.dumps(names)})
        else:
            save_file({k: v.clone() for k, v in named.items()}, path)
    else:
        torch.save({"names": names, "embeddings": rows} if form[0] == "r" else named, path)
    table = EmbeddingTable(str(path))
    assert table.dim == 5
    assert_close(table.embed(["TV", "night  stand"]), rows[[2, 1]])
    vectors, real = table.tokens(["bed"])
    assert_close(vectors, rows[None, :1])
    assert real.all()
    with pytest.raises(ValueError, match="no vector for 'night stnd'; nearest: night stand"):
        table.embed(["night stnd"])


def test_tables_refuse_what_they_cannot_read_safely(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"bed": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="without running code"):
        EmbeddingTable(str(tmp_path / "code.pt"))
    np.savez(tmp_path / "ragged.npz", bed=np.zeros(3), tv=np.zeros(4))
    with pytest.raises(ValueError, match="one vector a name, all of one width"):
        EmbeddingTable(str(tmp_path / "ragged.npz"))
    np.savez(tmp_path / "short.npz", names=np.array(["bed", "tv"]), embeddings=np.zeros((1, 4)))
    with pytest.raises(ValueError, match="2 names and needs as many rows"):
        EmbeddingTable(str(tmp_path / "short.npz"))
    with pytest.raises(ValueError, match="does not exist"):
        EmbeddingTable(str(tmp_path / "none.npz"))
    (tmp_path / "table.csv").write_text("bed,1\n")
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        EmbeddingTable(str(tmp_path / "table.csv"))


@wheel
def test_wordllama_reads_its_files_as_its_own_code_does():
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer
    from wordllama.inference import WordLlamaInference

    encoder = WordLlamaText()
    weights, vocabulary = WordLlamaText._files(None)
    theirs = WordLlamaInference(load_file(weights)["embedding.weight"], Tokenizer.from_file(str(vocabulary)))
    texts = ["bed", "night stand", "a photo of a Refrigerator.", "shower curtain"]
    assert_close(encoder.embed(texts), torch.from_numpy(theirs.embed(texts)), atol=1e-5, rtol=1e-4)
    assert encoder.dim == 256


@wheel
def test_wordllama_knows_meaning():
    names = ["sofa", "couch", "refrigerator", "fridge", "ceiling"]
    vectors = F.normalize(WordLlamaText().embed(names), dim=-1)
    similarity = vectors @ vectors.T
    assert float(similarity[0, 1]) > float(similarity[0, [2, 3, 4]].max()) + 0.2
    assert float(similarity[2, 3]) > float(similarity[2, [0, 1, 4]].max()) + 0.2


@wheel
def test_wordllama_gives_a_vector_for_each_token_of_a_prompt():
    vectors, real = WordLlamaText().tokens(["bed", "night stand by the window"])
    assert vectors.shape[0] == 2
    assert vectors.shape[-1] == 256
    assert real.sum(1).tolist()[0] < real.sum(1).tolist()[1] == vectors.shape[1]
    assert float(vectors[~real].abs().sum()) == 0


def little_wordllama(folder, seed=0, letters="ab"):
    """Both files of an encoder of two tokens, of one size whatever the contents."""
    from tokenizers import Tokenizer, models

    folder.mkdir()
    torch.manual_seed(seed)
    save_file({"embedding.weight": torch.randn(3, 256)}, folder / "l2_supercat_256.safetensors")
    vocabulary = {**{letter: i for i, letter in enumerate(letters)}, "?": 2}
    Tokenizer(models.WordLevel(vocabulary, unk_token="?")).save(str(folder / "l2_supercat_tokenizer_config.json"))
    return WordLlamaText(str(folder))


@wheel
def test_wordllama_s_fingerprint_is_of_what_its_files_hold(tmp_path):
    """Vectors kept under it would else be those of other weights, or of another vocabulary, of the same size."""
    first, same = little_wordllama(tmp_path / "first"), little_wordllama(tmp_path / "same")
    weights, vocabulary = little_wordllama(tmp_path / "weights", seed=1), little_wordllama(tmp_path / "vocabulary", letters="ba")
    assert first.fingerprint == same.fingerprint
    assert len({e.fingerprint for e in (first, weights, vocabulary)}) == 3
    assert not torch.equal(first.embed(["a"]), vocabulary.embed(["a"]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"l2_supercat_256\.safetensors .*not found"):
        WordLlamaText(str(tmp_path))


# --- CLIP -----------------------------------------------------------------------------------------------------------------

MERGES = [("b", "e"), ("be", "d</w>"), ("l", "a"), ("m", "p</w>"), ("la", "mp</w>"), ("a", "n"), ("an", "d</w>")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "merges.txt").write_text("#version\n" + "\n".join(" ".join(m) for m in MERGES) + "\n")
    torch.manual_seed(0)
    size, width, context, dim = 512 + len(MERGES) + 2, 128, 9, 6
    state = {
        "token_embedding.weight": torch.randn(size, width) * 0.3,
        "positional_embedding": torch.randn(context, width) * 0.1,
        "ln_final.weight": torch.rand(width) + 0.5,
        "ln_final.bias": torch.randn(width) * 0.1,
        "text_projection": torch.randn(width, dim) * 0.1,
        "visual.conv1.weight": torch.ones(1),
    }
    for i in range(2):
        for name, shape in {
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,), "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,), "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,), "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }.items():  # fmt: skip
            state[f"transformer.resblocks.{i}.{name}"] = torch.randn(shape) * 0.1
    torch.save(state, folder / "clip.pt")
    return folder, state


def ids_by_hand(word):
    """Byte-pair encoding of one lower-case ASCII word: merge the best-ranked pair until none is left."""
    order = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    vocabulary = [chr(b) for b in order] + [chr(256 + i) for i in range(256 - len(order))]
    vocabulary += [v + "</w>" for v in vocabulary] + ["".join(m) for m in MERGES]
    parts = [*word[:-1], word[-1] + "</w>"]
    while True:
        ranked = [(MERGES.index(p), i) for i, p in enumerate(itertools.pairwise(parts)) if p in MERGES]
        if not ranked:
            return [vocabulary.index(p) for p in parts]
        _, i = min(ranked)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


def test_clip_tokenizer_by_hand(clip):
    tokenizer = clip_tokenizer(clip[0] / "merges.txt")
    for text, split in (("Bed and  LAMP.", ["bed", "and", "lamp", "."]), ("lamp's 42", ["lamp", "'s", "4", "2"])):
        assert tokenizer.encode(text).ids == [i for word in split for i in ids_by_hand(word)]


def embed_by_hand(state, ids, activation=lambda h: h * torch.sigmoid(1.702 * h)):
    """CLIP's text tower, one text, token by token: causal attention in loops."""
    x = [state["token_embedding.weight"][t] + state["positional_embedding"][p] for p, t in enumerate(ids)]

    def norm(v, name):
        return (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    for i in range(2):
        block = f"transformer.resblocks.{i}"
        qkv = [state[f"{block}.attn.in_proj_weight"] @ norm(v, f"{block}.ln_1") + state[f"{block}.attn.in_proj_bias"] for v in x]
        mixed = []
        for n in range(len(x)):
            heads = []
            for head in range(2):
                cut = [slice(s * 128 + head * 64, s * 128 + head * 64 + 64) for s in range(3)]
                weights = torch.stack([qkv[n][cut[0]] @ qkv[m][cut[1]] / math.sqrt(64) for m in range(n + 1)]).softmax(0)
                heads.append(sum(w * qkv[m][cut[2]] for m, w in enumerate(weights)))
            mixed.append(state[f"{block}.attn.out_proj.weight"] @ torch.cat(heads) + state[f"{block}.attn.out_proj.bias"])
        x = [a + b for a, b in zip(x, mixed)]
        hidden = [state[f"{block}.mlp.c_fc.weight"] @ norm(v, f"{block}.ln_2") + state[f"{block}.mlp.c_fc.bias"] for v in x]
        x = [v + state[f"{block}.mlp.c_proj.weight"] @ activation(h) + state[f"{block}.mlp.c_proj.bias"] for v, h in zip(x, hidden)]
    return norm(x[-1], "ln_final") @ state["text_projection"]


def test_clip_text_by_hand(clip):
    folder, state = clip
    encoder = CLIPText(str(folder / "clip.pt"), str(folder / "merges.txt"))
    start = 512 + len(MERGES)
    texts = {"bed": ids_by_hand("bed"), "bed and lamp": ids_by_hand("bed") + ids_by_hand("and") + ids_by_hand("lamp")}
    expected = torch.stack([embed_by_hand(state, [start, *ids, start + 1]) for ids in texts.values()])
    assert_close(encoder.embed(list(texts)), expected, atol=1e-5, rtol=1e-4)
    exact = CLIPText(str(folder / "clip.pt"), str(folder / "merges.txt"), activation="gelu")
    by_erf = embed_by_hand(state, [start, *ids_by_hand("bed"), start + 1], lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2)
    assert_close(exact.embed(["bed"])[0], by_erf, atol=1e-5, rtol=1e-4)
    assert (by_erf - expected[0]).abs().max() > 1e-3
    assert exact.fingerprint != encoder.fingerprint
    assert encoder.embed(["lamp " * 40]).shape == (1, 6)  # cut to the context
    vectors, real = encoder.tokens(list(texts))
    assert real.sum(1).tolist() == [3, 5]
    assert_close(vectors[1, 4], expected[1], atol=1e-5, rtol=1e-4)


def test_clip_s_fingerprint_is_of_weights_and_vocabulary(clip, tmp_path):
    folder, state = clip
    merges = (folder / "merges.txt").read_text().replace("b e\n", "a e\n").replace("be d</w>", "ae d</w>")
    (tmp_path / "merges.txt").write_text(merges)
    torch.save({**state, "text_projection": state["text_projection"] + 1}, tmp_path / "clip.pt")
    pairs = [(w / "clip.pt", m / "merges.txt") for w in (folder, tmp_path) for m in (folder, tmp_path)]
    assert len({CLIPText(str(w), str(m)).fingerprint for w, m in pairs}) == 4


def test_clip_text_says_what_is_missing(clip, tmp_path):
    folder, state = clip
    with pytest.raises(ValueError, match=r"CLIP vocabulary .* does not exist"):
        CLIPText(str(folder / "clip.pt"), str(tmp_path / "bpe.txt"))
    torch.save({k: v for k, v in state.items() if k != "ln_final.bias"}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"lacks ln_final\.bias"):
        CLIPText(str(tmp_path / "short.pt"), str(folder / "merges.txt"))
    torch.save({"visual.conv1.weight": torch.ones(1)}, tmp_path / "image.pt")
    with pytest.raises(ValueError, match="no CLIP text tower"):
        CLIPText(str(tmp_path / "image.pt"), str(folder / "merges.txt"))
    torch.save({**state, "token_embedding.weight": state["token_embedding.weight"][:100]}, tmp_path / "small.pt")
    with pytest.raises(ValueError, match="is no vocabulary of these weights"):
        CLIPText(str(tmp_path / "small.pt"), str(folder / "merges.txt"))


def test_a_damaged_or_odd_embedding_file_is_one_error_that_names_it(tmp_path):
    one = torch.ones(3)
    arrays = {
        "complex": {"bed": np.ones(3, np.complex64)},
        "nan": {"bed": np.array([np.nan, 1.0])},
        "beyond": {"bed": np.array([1e300, 1.0])},
        "nodim": {"names": np.array("bed"), "embeddings": np.ones((1, 3))},
        "texts": {"names": np.array(["bed"]), "embeddings": np.array(["x"])},
        "scalar": {"names": np.array(["bed"]), "embeddings": np.ones(())},
        "same": {"names": np.array(["bed", "Bed "]), "embeddings": np.eye(2)},
        "twice": {"names": np.array(["bed", "bed"]), "embeddings": np.eye(2)},
        "flat": {"names": np.array(["bed", "sofa"]), "embeddings": np.ones(2)},
    }
    for stem, held in arrays.items():
        np.savez(tmp_path / f"{stem}.npz", **held)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "same.npz").read_bytes()[:200])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "damaged.safetensors").write_bytes(b"garbage!" * 4)
    for stem, held in {"key": {1: one}, "name": {"names": ["bed", 3], "embeddings": torch.eye(2)}, "word": {"bed": "abc"}}.items():
        torch.save(held, tmp_path / f"{stem}.pt")
    for stem, names in (("split", "bed,sofa"), ("object", '{"a": 1, "b": 2}'), ("number", "3")):
        save_file({"embeddings": torch.ones(2, 3)}, str(tmp_path / f"{stem}.safetensors"), metadata={"names": names})
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(arrays) + 9
    for file in files:
        with pytest.raises(ValueError, match=file.name):
            EmbeddingTable(str(file))
    torch.save({"bed": one.to(torch.bfloat16)}, tmp_path / "half.pt")
    assert EmbeddingTable(str(tmp_path / "half.pt")).embed(["Bed"]).dtype == torch.float32
