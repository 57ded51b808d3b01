"""Text to vectors, offline: one interface, and encoders from hashed words to CLIP.

A `TextEncoder` gives one vector a text (`embed`), and a sequence of vectors a text (`tokens`, for models that attend to the
words of a prompt). Encoders are frozen, run on the CPU, touch no network, and give equal vectors for equal texts on every
machine. `fingerprint` names what the vectors depend on, for caches.

Axes: n texts, t tokens of a text, c channels.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from safetensors import safe_open
from torch import Tensor, nn

from core.checkpoint import read_weights
from core.layers import QuickGELU
from core.options import require_choice
from core.registry import nearest, register

# The release's three prompts; {a} is replaced by the article that fits the name.
CLIP_PROMPTS = ("a photo of {a} {name}.", "this is a photo of {a} {name}.", "an image of {a} {name}.")


class TextEncoder:
    """What every encoder offers. Subclasses set `dim` and `fingerprint` and give `embed`."""

    dim: int
    fingerprint: str

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n c"]:
        """One vector a text, float32 on the CPU."""
        raise NotImplementedError

    def tokens(self, texts: Sequence[str]) -> tuple[Float[Tensor, "n t c"], Bool[Tensor, "n t"]]:
        """Vectors of the words of each text, zero-padded, and True where a token is real. Default: one, the text's own."""
        vectors = self.embed(texts)
        return rearrange(vectors, "n c -> n 1 c"), torch.ones(len(texts), 1, dtype=torch.bool)


def prompted(
    encoder: TextEncoder, names: Sequence[str], prompts: Sequence[str] = CLIP_PROMPTS, *, renormalise: bool = False
) -> Float[Tensor, "n c"]:
    """One vector a name: the mean over prompts of unit vectors, as the release makes them.

    Args:
        encoder: gives the vector of a prompt.
        names: what stands in the prompts.
        prompts: with `{name}` and, where wanted, `{a}`; empty for the bare name.
        renormalise: give the mean unit length again. The release does not, so that its vectors are a little shorter than 1.
    """
    if not names:
        return torch.zeros(0, encoder.dim)
    means = []
    for prompt in prompts or ("{name}",):
        texts = [prompt.format(name=name, a="an" if name[:1].lower() in tuple("aeiou") else "a") for name in names]
        means.append(F.normalize(encoder.embed(texts), dim=-1))
    mean = torch.stack(means).mean(dim=0)
    return F.normalize(mean, dim=-1) if renormalise else mean


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, in order."""
    return re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())


def _padded(sequences: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    longest = max([1, *(len(s) for s in sequences)])
    vectors, real = torch.zeros(len(sequences), longest, dim), torch.zeros(len(sequences), longest, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        vectors[i, : len(sequence)], real[i, : len(sequence)] = sequence, True
    return vectors, real


@register("text", paper="feature hashing; no training, no files")
class HashedText(TextEncoder):
    """Each word is a fixed random direction, a text the unit mean of its words. For tests: it knows no meaning.

    Args:
        dim: width of the vectors.
        seed: names the directions.
    """

    def __init__(self, dim: int = 256, seed: int = 0):
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim, self.seed = dim, seed
        self.fingerprint = f"hashed-{dim}-{seed}"

    def _word(self, word: str) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}\0{word}".encode()).digest()
        stream = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
        return F.normalize(torch.from_numpy(stream.standard_normal(self.dim).astype(np.float32)), dim=0)

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n c"]:
        vectors, real = self.tokens(texts)
        return F.normalize((vectors * real[..., None]).sum(dim=1), dim=-1)

    def tokens(self, texts: Sequence[str]) -> tuple[Float[Tensor, "n t c"], Bool[Tensor, "n t"]]:
        return _padded([torch.stack([self._word(w) for w in words(t) or [t]]) for t in texts], self.dim)


@register("text", paper="vectors made elsewhere, by name")
class EmbeddingTable(TextEncoder):
    """Vectors by name, from a file: whatever encoder made them, offline or elsewhere.

    Formats: `.npz` with arrays `names` (n) and `embeddings` (n, c), or one array a name; `.pt`/`.pth` (read with
    `weights_only=True`) with a dict of the same; `.safetensors` with one tensor a name, or `embeddings` and the names as a JSON list
    under `names` in the header.

    Args:
        path: the file. Names are compared in lower case, with single spaces.

    Raises:
        ValueError: if the file is missing, damaged or of another form, if two of its names are the same word, or if a value is
            not a finite real number; if a text is not in the table (nearest names are listed).
    """

    def __init__(self, path: str):
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"embedding file {path} does not exist")
        self.path = file
        self.table: dict[str, Tensor] = {}
        spelled: dict[str, str] = {}
        for name, vector in self._read(file).items():
            key = " ".join(name.lower().split())
            if key in spelled:
                raise ValueError(f"embedding file {path} names {key!r} twice, as {spelled[key]!r} and {name!r}; keep one of them")
            spelled[key], self.table[key] = name, self._vector(file, name, vector)
        widths = {tuple(v.shape) for v in self.table.values()}
        if not widths or len(widths) != 1 or len(next(iter(widths))) != 1:
            raise ValueError(
                f"{path} must hold one vector a name, all of one width; found {len(self.table)} names, shapes {sorted(widths)}"
            )
        self.dim = next(iter(widths))[0]
        self.fingerprint = f"table-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"

    @staticmethod
    def _vector(file: Path, name: str, value: Any) -> Tensor:
        """A value of the file as float32."""
        try:
            vector = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"embedding file {file}: {name!r} is no vector of numbers ({type(value).__name__})") from error
        if vector.is_complex():
            raise ValueError(f"embedding file {file}: {name!r} is complex; vectors must be real")
        vector = vector.float()
        if not bool(vector.isfinite().all()):
            raise ValueError(f"embedding file {file}: {name!r} holds values that are not finite in float32; make its vector again")
        return vector

    @classmethod
    def _read(cls, file: Path) -> dict[str, Any]:
        """Names and what stands for their vectors."""
        if file.suffix not in (".npz", ".pt", ".pth", ".safetensors"):
            raise ValueError(f"{file} must end in .npz, .pt, .pth or .safetensors")
        try:
            names, loaded = cls._load(file)
        except Exception as error:  # each library has its own for a damaged file
            said = (str(error).splitlines() or [""])[0]
            safely = " without running code in it" if file.suffix != ".safetensors" else ""
            raise ValueError(f"cannot read {file}{safely}: {type(error).__name__}: {said}") from error
        odd = next((n for n in (loaded if names is None else ()) if not isinstance(n, str)), None)
        if odd is not None:
            raise ValueError(f"embedding file {file} has the name {odd!r}; a name is a text")
        if names is None:
            return loaded
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"embedding file {file}: `names` must be a list of texts, got {str(names)[:80]}")
        rows = loaded.get("embeddings")
        if not hasattr(rows, "__len__") or not getattr(rows, "shape", (1,)) or len(rows) != len(names):  # type: ignore[arg-type]
            raise ValueError(f"{file} has {len(names)} names and needs as many rows under `embeddings`")
        twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
        if twice is not None:
            raise ValueError(f"embedding file {file} names {twice!r} twice; keep one of them")
        return dict(zip(names, rows))  # type: ignore[arg-type]

    @staticmethod
    def _load(file: Path) -> tuple[Any, dict[Any, Any]]:
        """The names, or None where each tensor has its own, and the tensors."""
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                loaded: dict[Any, Any] = {k: arrays[k] for k in arrays.files}
            return (loaded.pop("names").tolist() if "names" in loaded else None), loaded
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as handle:
                names = json.loads((handle.metadata() or {}).get("names", "null"))
                return names, {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118
        loaded = dict(torch.load(file, map_location="cpu", weights_only=True))
        return loaded.pop("names", None), loaded

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n c"]:
        keys = [" ".join(text.lower().split()) for text in texts]
        for key in keys:
            if key not in self.table:
                near = nearest(key, self.table) or sorted(self.table)[:3]
                raise ValueError(f"{self.path} has no vector for {key!r}; nearest: {', '.join(near)}")
        return torch.stack([self.table[key] for key in keys]) if keys else torch.zeros(0, self.dim)


def _digest(*files: Path) -> str:
    """A short hash of what files hold."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()[:16]


def _tokenizer(path: Path) -> Any:
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError("this encoder needs the `tokenizers` library: pip install 'ginrepro[text]'")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


@register("text", paper="WordLlama (github.com/dleemiller/WordLlama), l2_supercat, 256 wide")
class WordLlamaText(TextEncoder):
    """Token embeddings taken from language models and trained for similarity: a text is the mean of its tokens.

    The wheel `wordllama` (extra `text`) carries both files, 16 MB; they are read from its folder, because its own loader
    asks the network.

    Args:
        folder: holds `l2_supercat_256.safetensors` and `l2_supercat_tokenizer_config.json`; None looks into the installed wheel.

    Raises:
        ValueError: if the files are not there.
    """

    dim = 256

    def __init__(self, folder: str | None = None):
        weights, vocabulary = self._files(folder)
        with safe_open(str(weights), framework="pt") as handle:
            self.table = handle.get_tensor("embedding.weight").float()
        self.tokenizer = _tokenizer(vocabulary)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.fingerprint = f"wordllama-{_digest(weights, vocabulary)}"

    @staticmethod
    def _files(folder: str | None) -> tuple[Path, Path]:
        names = ("l2_supercat_256.safetensors", "l2_supercat_tokenizer_config.json")
        if folder is not None:
            found = [Path(folder) / name for name in names]
        else:
            spec = importlib.util.find_spec("wordllama")
            if spec is None or spec.origin is None:
                raise ValueError(
                    "WordLlamaText needs the wheel `wordllama`: pip install 'ginrepro[text]', or give its two files as folder="
                )
            home = Path(spec.origin).parent
            found = [home / "weights" / names[0], home / "tokenizers" / names[1]]
        missing = [str(path) for path in found if not path.is_file()]
        if missing:
            raise ValueError(f"WordLlamaText: {' and '.join(missing)} not found")
        return found[0], found[1]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n c"]:
        vectors, real = self.tokens(texts)
        return vectors.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp_min(1)

    def tokens(self, texts: Sequence[str]) -> tuple[Float[Tensor, "n t c"], Bool[Tensor, "n t"]]:
        return _padded([self.table[torch.tensor(ids, dtype=torch.int64)] for ids in self._ids(texts)], self.dim)


# --- CLIP -----------------------------------------------------------------------------------------------------------------


class _TextBlock(nn.Module):
    """CLIP's pre-norm block with causal attention, under CLIP's own parameter names."""

    def __init__(self, width: int, heads: int, activation: nn.Module):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.activation = activation
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, causal: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=causal, need_weights=False)[0]
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


class _TextTower(nn.Module):
    """CLIP's text transformer: token and position embeddings, causal blocks, and the projection of the end token."""

    causal: Tensor

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, dim: int, activation: nn.Module):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        blocks = nn.ModuleList(_TextBlock(width, width // 64 or 1, activation) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, dim))
        self.register_buffer("causal", torch.full((context, context), float("-inf")).triu(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (n, t) -> projected states (n, t, dim)."""
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        blocks: Any = self.transformer["resblocks"]
        for block in blocks:
            x = block(x, self.causal[:length, :length])
        return self.ln_final(x) @ self.text_projection


def clip_tokenizer(vocabulary: Path) -> Any:
    """CLIP's byte-pair tokenizer from its merges file (`bpe_simple_vocab_16e6.txt.gz`), or from a `tokenizer.json`.

    Raises:
        ValueError: if the file is missing or the `tokenizers` library is.
    """
    if not vocabulary.is_file():
        raise ValueError(f"CLIP vocabulary {vocabulary} does not exist")
    if vocabulary.suffix == ".json":
        return _tokenizer(vocabulary)
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError("CLIP's tokenizer needs the `tokenizers` library: pip install 'ginrepro[text]'")
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    data = vocabulary.read_bytes()
    lines = (gzip.decompress(data) if vocabulary.suffix == ".gz" else data).decode().split("\n")
    pairs = [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1] if len(line.split()) == 2)]
    letters = _byte_letters()
    symbols = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in pairs]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    model = models.BPE(
        vocab={s: i for i, s in enumerate(symbols)}, merges=pairs, end_of_word_suffix="</w>", continuing_subword_prefix=""
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


@register("text", paper="CLIP (Radford et al. 2021), text tower")
class CLIPText(TextEncoder):
    """CLIP's text tower, from weights and vocabulary that you give.

    Args:
        weights: OpenAI's or open_clip's state dict with a text tower (other keys are left out), sizes read from it.
        vocabulary: the merges file of CLIP's tokenizer, plain or gzipped, or a `tokenizer.json`.
        batch: texts a forward pass.
        activation: of the blocks' MLPs, which no weight file tells: `quick_gelu` for OpenAI's weights and those that were trained
            from its code, `gelu` for others of open_clip (LAION's, for one).

    Raises:
        ValueError: if the weights have no text tower, or it is not complete, or there is no such activation.
        core.checkpoint.CheckpointError: if the weight file cannot be read safely.
    """

    def __init__(self, weights: str, vocabulary: str, batch: int = 64, activation: Literal["quick_gelu", "gelu"] = "quick_gelu"):
        require_choice("activation", activation, Literal["quick_gelu", "gelu"])
        state = {k.removeprefix("text."): v.float() for k, v in read_weights(Path(weights)).items()}
        if "token_embedding.weight" not in state or "text_projection" not in state:
            raise ValueError(f"{weights} has no CLIP text tower (no token_embedding.weight and text_projection)")
        size, width = state["token_embedding.weight"].shape
        layers = len({k.split(".")[2] for k in state if k.startswith("transformer.resblocks.")})
        context, self.dim = state["positional_embedding"].shape[0], state["text_projection"].shape[1]
        act = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.tower = _TextTower(size, context, width, layers, self.dim, act).eval().requires_grad_(False)
        wanted = self.tower.state_dict()
        missing = sorted(set(wanted) - set(state))
        if missing:
            raise ValueError(f"{weights} lacks {', '.join(missing[:4])} of CLIP's text tower ({len(missing)} in all)")
        self.tower.load_state_dict({k: state[k] for k in wanted})
        self.tokenizer, self.context, self.batch = clip_tokenizer(Path(vocabulary)), context, batch
        self.start, self.end = (self.tokenizer.token_to_id(t) for t in ("<|startoftext|>", "<|endoftext|>"))
        if self.start is None or self.end is None or self.end >= size:
            raise ValueError(f"{vocabulary} is no vocabulary of these weights: end token {self.end}, {size} embeddings")
        kind = "clip" if activation == "quick_gelu" else f"clip-{activation}"
        self.fingerprint = f"{kind}-{_digest(Path(weights), Path(vocabulary))}"

    def _states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected states (n, t, c) and the position of each end token."""
        bodies = [e.ids[: self.context - 2] for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        longest = max(len(body) for body in bodies) + 2
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, body in zip(ids, bodies):
            row[: len(body) + 2] = torch.tensor([self.start, *body, self.end])
        with torch.inference_mode():
            states = torch.cat([self.tower(part) for part in ids.split(self.batch)])
        return states.clone(), torch.tensor([len(body) + 1 for body in bodies])

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "n c"]:
        if not texts:
            return torch.zeros(0, self.dim)
        states, ends = self._states(texts)
        return states[torch.arange(len(texts)), ends]

    def tokens(self, texts: Sequence[str]) -> tuple[Float[Tensor, "n t c"], Bool[Tensor, "n t"]]:
        states, ends = self._states(texts)
        real = torch.arange(states.shape[1])[None, :] <= ends[:, None]
        return states * real[..., None], real
