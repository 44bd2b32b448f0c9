"""A DFlash draft in float64 NumPy, straight from the formulas, and tiny drafts to hold to it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.draft.config import DraftConfig
from specdec.draft.model import Draft
from specdec.draft.weights import DraftWeights
from specdec.kernels.array import Backend
from specdec.kernels.weight import Weight
from tests.drafts import draft_config, draft_tensors

MLX = Backend("reference", mx.float32, "test")
NUMPY = Backend("cpu", mx.float32, "test")
HIDDEN, VOCAB, BLOCK, TAPS = 48, 300, 6, 3
TARGET: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
}
SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 9,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_theta": None, "rope_parameters": YARN},
    "sliding": SLIDING,
    "sliding-bidirectional": {**SLIDING, "is_causal": False},
    "narrow-window": {**SLIDING, "sliding_window": 4, "is_causal": False},
    "narrow-causal-window": {**SLIDING, "sliding_window": 3},
    "window-of-one": {**SLIDING, "sliding_window": 1},
    "causal": {"dflash": {"causal": True}},
    "all": {
        **SLIDING,
        "rope_theta": None,
        "rope_parameters": YARN,
        "final_logit_softcapping": 3.0,
        "dflash": {"input_embedding_scale": 1.5, "output_multiplier": 0.7},
    },
}


class Reference:
    """Everything from scratch for every block: no cache, no masks, one head and row at a time."""

    def __init__(self, config: dict, tensors: dict, embedding: np.ndarray, head: np.ndarray):
        self.config, self.embedding, self.head = config, embedding, head
        self.tensors = {name: values.astype(np.float64) for name, values in tensors.items()}

    def get(self, name: str) -> np.ndarray:
        return self.tensors[f"{name}.weight"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * self.get(name)

    def rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        """One head's vector; pairs (i, i + d/2) as complex numbers."""
        dim = self.config["head_dim"]
        rope = self.config.get("rope_parameters") or {}
        theta: float = rope.get("rope_theta") or self.config["rope_theta"]
        scale, z = 1.0, x[: dim // 2] + 1j * x[dim // 2 :]
        for i in range(dim // 2):
            freq = theta ** (-2 * i / dim)
            if rope.get("rope_type") == "yarn":
                length, factor = rope["original_max_position_embeddings"], rope["factor"]
                low, high = (
                    dim * np.log(length / (2 * np.pi * turns)) / (2 * np.log(theta))
                    for turns in (32, 1)
                )
                low, high = max(np.floor(low), 0), min(np.ceil(high), dim - 1)
                ramp = min(max((i - low) / (high - low), 0), 1)
                freq = freq * (1 - ramp) + freq / factor * ramp
                scale = 0.1 * np.log(factor) + 1
            z[i] *= np.exp(1j * freq * position)
        return scale * np.concatenate([z.real, z.imag])

    def log_probs(self, taps: np.ndarray, bonus: int) -> np.ndarray:
        """[slots, vocab] after the tapped rows of all committed tokens."""
        config = self.config
        dflash = config["dflash_config"]
        block, dim = config["block_size"], config["head_dim"]
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        committed = len(taps)
        context = self.norm(taps @ self.get("fc").T, "hidden_norm")
        tokens = [bonus] + [dflash["mask_token_id"]] * (block - 1)
        x = self.embedding[tokens] * dflash.get("input_embedding_scale", 1.0)
        kinds = config.get("layer_types", ["full_attention"] * config["num_hidden_layers"])
        for i, kind in enumerate(kinds):
            at = f"layers.{i}"
            sliding = kind == "sliding_attention"
            window = config["sliding_window"] if sliding else committed + block
            causal = config.get("is_causal", dflash.get("causal", sliding))
            n = self.norm(x, f"{at}.input_layernorm")
            rows = np.concatenate([context, n])
            out = np.zeros((block, config["num_attention_heads"] * dim))
            for head in range(config["num_attention_heads"]):
                part = slice(head * dim, (head + 1) * dim)
                shared = slice(head // group * dim, (head // group + 1) * dim)
                q = n @ self.get(f"{at}.self_attn.q_proj")[part].T
                k = rows @ self.get(f"{at}.self_attn.k_proj")[shared].T
                v = rows @ self.get(f"{at}.self_attn.v_proj")[shared].T
                q, k = (
                    self.norm(q, f"{at}.self_attn.q_norm"),
                    self.norm(k, f"{at}.self_attn.k_norm"),
                )
                k = np.stack([self.rotate(row, position) for position, row in enumerate(k)])
                for row in range(block):
                    at_position = committed + row
                    query = self.rotate(q[row], at_position)
                    seen = [
                        position
                        for position in range(committed + block)
                        if not (causal and position > at_position)
                        and abs(at_position - position) < window
                    ]
                    scores = k[seen] @ query / np.sqrt(dim)
                    weights = np.exp(scores - scores.max())
                    out[row, part] = weights / weights.sum() @ v[seen]
            x = x + out @ self.get(f"{at}.self_attn.o_proj").T
            n = self.norm(x, f"{at}.post_attention_layernorm")
            gate = n @ self.get(f"{at}.mlp.gate_proj").T
            hidden = gate / (1 + np.exp(-gate)) * (n @ self.get(f"{at}.mlp.up_proj").T)
            x = x + hidden @ self.get(f"{at}.mlp.down_proj").T
        logits = self.norm(x[1:], "norm") @ self.head.T * dflash.get("output_multiplier", 1.0)
        cap = config.get("final_logit_softcapping")
        if cap:
            logits = cap * np.tanh(logits / cap)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def make_draft(
    case: str, seed: int = 0, backend: Backend = MLX, **changes: Any
) -> tuple[Draft, Reference]:
    """A random draft of one of the cases, and the reference with the same weights."""
    raw = draft_config(TARGET, block_size=BLOCK, **CASES[case], **changes)
    tensors = draft_tensors(raw, TAPS, seed)
    rng = np.random.default_rng(seed + 1)
    embedding = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    head = (rng.standard_normal((VOCAB, HIDDEN)) / np.sqrt(HIDDEN) * 2).astype(np.float32)
    config = DraftConfig.from_dict(raw)
    weights = load_weights(config, tensors, backend)
    lent = [Weight(mx.array(matrix)).on(backend) for matrix in (embedding, head)]
    draft = Draft(config, weights, lent[0], lent[1], backend)
    return draft, Reference(raw, tensors, embedding, head)


def load_weights(config: DraftConfig, tensors: dict, backend: Backend) -> DraftWeights:
    """Through a file: the loader is part of what is compared."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        arrays = {key: mx.array(values) for key, values in tensors.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        with Checkpoint.open(folder) as checkpoint:
            return DraftWeights.load(checkpoint, config, backend)
