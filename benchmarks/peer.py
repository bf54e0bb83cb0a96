"""Our corrector and the same network in Hugging Face transformers (PyTorch): equal shapes, parameters and outputs.

Mixtral for mixtures of experts, Llama for dense models. Both get our parameters, so that a benchmark can first see
that the two compute the same, and then time them. Needs `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.measure import unpadded
from moe_jax import tree
from moe_jax.layers.attention import Attention
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.param import Rngs
from moe_jax.models.corrector import Corrector
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.routers import TopK


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model: `experts` 0 is dense, of `hidden` units; else `hidden` is an expert's."""

    d: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int = 512
    experts: int = 8
    k: int = 2
    vocab: int = 4096

    @property
    def active(self) -> int:
        """Parameters that a token multiplies with, without the embedding."""
        ffn = 3 * self.d * self.hidden * (self.k if self.experts else 1) + self.d * self.experts
        return self.layers * (4 * self.d * self.d + ffn) + self.d * self.vocab


MOE, DENSE = Shape(), Shape(hidden=1024, experts=0)  # of equal active parameters but for the gate


def ours(shape: Shape, *, block: int = 64, unroll: int = 4) -> Corrector:
    """Ours without the convolution, which transformers has not."""
    ffn: Any = partial(DenseFfn, hidden=shape.hidden)
    if shape.experts:
        ffn = partial(MoeFfn, num_experts=shape.experts, hidden=shape.hidden, router=partial(TopK, k=shape.k))
    return Corrector(
        d=shape.d,
        layers=shape.layers,
        vocab=shape.vocab,
        attention=partial(Attention, heads=shape.heads, block=block),
        ffn=ffn,
        conv_width=1,
        tied=False,
        unroll=unroll,
        rngs=Rngs(params=0),
    )


def theirs(shape: Shape, model: Corrector, experts: str = "grouped_mm") -> Any:
    """The transformers model with the parameters of ours; `experts` is its implementation of the expert layer."""
    try:
        import torch
        import transformers
    except ImportError as error:
        sys.exit(f"this benchmark needs torch and transformers: pip install -e '.[bench]' ({error})")

    common = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.d,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=None,
    )
    if shape.experts:
        config: Any = transformers.MixtralConfig(
            **common,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.k,
            sliding_window=None,
            experts_implementation=experts,
        )
        peer = transformers.MixtralForCausalLM(config)
    else:
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    table = {name: np.asarray(x) for name, x in tree.flatten(model).items()}
    ready = {name: torch.tensor(x) for name, x in _renamed(shape, table).items()}
    missing, unexpected = peer.load_state_dict(ready, strict=False)
    if missing or unexpected:
        raise ValueError(f"transformers names its parameters otherwise: without {missing}, too many {unexpected}")
    return peer.train(False)


def _renamed(shape: Shape, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our table under transformers' names; its matrices are (out, in). Our embedding is scaled by sqrt(d) at use."""
    out = {
        "model.embed_tokens.weight": ours["embedding"] * np.float32(shape.d**0.5),
        "model.norm.weight": ours["norm/scale"],
        "lm_head.weight": ours["output"].T,
    }
    for i in range(shape.layers):
        at, of = f"model.layers.{i}.", lambda name, i=i: ours[f"blocks/{name}"][i]
        out[at + "input_layernorm.weight"] = of("norm_attention/scale")
        out[at + "post_attention_layernorm.weight"] = of("norm_ffn/scale")
        for name in "qkvo":
            out[f"{at}self_attn.{name}_proj.weight"] = of(f"attention/{name}").T
        if shape.experts:
            gate, up, down = (of(f"ffn/experts/{name}").swapaxes(1, 2) for name in ("gate", "up", "down"))
            out[at + "mlp.gate.weight"] = of("ffn/router/gate").T
            out[at + "mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            out[at + "mlp.experts.down_proj"] = down
        else:
            for name in ("gate", "up", "down"):
                out[f"{at}mlp.{name}_proj.weight"] = of(f"ffn/{name}").T
    return out


def agree(shape: Shape, model: Corrector, peer: Any) -> float:
    """The largest difference of logits on a random text. Raises ValueError beyond rounding."""
    import torch

    tokens = np.random.default_rng(0).integers(3, shape.vocab, (2, 32))
    info = unpadded(*tokens.shape)
    mine = jax.jit(lambda m, t: m.logits(m(t, info)[0]))(model, tokens)
    with torch.no_grad():
        yours = peer(torch.from_numpy(tokens)).logits.numpy()
    worst = float(np.abs(np.asarray(mine) - yours).max())
    if not worst < 1e-3:
        raise ValueError(f"the two models differ by {worst}: they do not compute the same")
    return worst
