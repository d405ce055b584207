"""`blend` (rlm-48m): base layers, one shared layer applied again and again, and a router that blends the depths.

With h the last base layer's output, r_0 = h and r_k = Recursion(r_{k-1}), the head reads h + sum_k p_k r_k, where
p = softmax(router(mean of h)). p_0 only takes part in the normalisation, so every depth is always computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlm_engine.config import BlendConfig
from rlm_engine.models.encoder import PreNormBlock, masked_attention, masked_mean, running_mean, shifted_token_losses
from rlm_engine.models.layers import Attend

if TYPE_CHECKING:
    from rlm_engine.backends.torch import Piece

ROUTER_DROPOUT = 0.1  # fixed in the published model, whatever the configured rate


@dataclass
class BlendOutput:
    """What a dense forward returns.

    ``logits`` [batch, tokens, vocabulary]; ``router_probabilities`` [batch, R+1], or [batch, tokens, R+1] with prefix
    routing; ``loss`` (= ``lm_loss``, nats per token; there is no router loss) when labels were given.
    ``states`` when asked for: h, r_1, ..., r_R, and the blended sum, each [batch, tokens, d].
    """

    logits: Tensor
    router_probabilities: Tensor
    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)


class BlendModel(nn.Module):
    """The dense model: all tokens at once, learned positions 0..T-1, head tied to the token table."""

    def __init__(self, config: BlendConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        self.tokens = nn.Embedding(config.vocab_size, d)
        self.positions = nn.Embedding(config.context_length, d)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.n_layers))
        self.recursion = _block(config)
        self.router = nn.Linear(d, config.max_steps + 1)
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)

    def initialise(self, generator: torch.Generator | None = None) -> BlendModel:
        """Random weights as published: N(0, 0.02), but Xavier uniform over each packed q, k, v matrix; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, PreNormBlock):
                # the published initialisation passes over torch's packed matrix, which keeps torch's own (std 0.031)
                nn.init.xavier_uniform_(module.qkv.weight, generator=generator)
        return self

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token plus learned position: ids and positions [..., tokens] -> [..., tokens, d]."""
        return self.tokens(ids) + self.positions(positions)

    def blending_weights(self, pooled: Tensor) -> Tensor:
        """p over the depths 0..R of pooled states [..., d]: [..., R+1]."""
        return torch.softmax(self.router(pooled), dim=-1)

    def head(self, y: Tensor) -> Tensor:
        """Logits [..., vocabulary] of blended states [..., d]; tied, without bias."""
        return F.linear(self.norm(y), self.tokens.weight)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        routing: str = "sequence",
        max_steps: int | None = None,
        return_states: bool = False,
        with_logits: bool = True,
    ) -> BlendOutput:
        """Dense forward of input_ids [batch, tokens], tokens <= context_length (IndexError beyond, as published).

        ``labels`` [batch, tokens], -100 = no target, are shifted here. ``attention_mask`` is accepted and ignored,
        as published: padding is neither masked nor left out of the router's mean.
        ``routing``: "sequence" pools the router over all positions, the future included (teacher forcing as
        published); "prefix" pools over each position's own prefix, which is what generation sees.
        ``max_steps``: depths beyond it are left out of the sum (p is not renormalised).
        ``with_logits=False`` leaves the logits empty: training reads ``states[-1]`` and takes its loss in chunks.
        """
        config, rate = self.config, self.config.dropout if self.training else 0.0
        if routing not in ("sequence", "prefix"):
            raise ValueError(f"routing must be 'sequence' or 'prefix', got {routing!r}")
        if input_ids.shape[1] > config.context_length:
            raise IndexError(f"{input_ids.shape[1]} tokens do not fit the {config.context_length} learned positions")
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        attend = masked_attention(None, rate)
        h = F.dropout(self.embed(input_ids, positions), rate, self.training)
        for layer in self.layers:
            h = layer(h, attend)

        pooled = h.mean(dim=1) if routing == "sequence" else running_mean(h)
        p = self.blending_weights(F.dropout(pooled, ROUTER_DROPOUT, self.training))
        weights = p[:, None] if routing == "sequence" else p  # [batch, 1 or tokens, R+1]
        states, r, y = [h], h, h
        for k in range(1, min(config.max_steps, max_steps or config.max_steps) + 1):
            r = self.recursion(r, attend)
            y = y + weights[..., k : k + 1] * r
            states.append(r)
        logits = self.head(y) if with_logits else y.new_empty(0)
        output = BlendOutput(logits, p, states=[*states, y] if return_states else [])
        if labels is not None:
            output.loss = output.lm_loss = masked_mean(*shifted_token_losses(output.logits, labels))
        return output

    def pieces(self) -> dict[str, Piece]:
        """What decoding runs, over N flat tokens.

        embed(ids [N], positions [N]) -> [N, d]
        layer.0 .. layer.(n-1), recursion: (x [N, d], attend) -> [N, d]
        router(mean [N, d]) -> p [N, R+1]
        head(y [N, d]) -> logits [N, vocabulary]
        """
        pieces: dict[str, Piece] = {
            "embed": lambda ids, positions: (self.embed(ids, positions),),
            "recursion": _piece(self.recursion),
            "router": lambda mean: (self.blending_weights(mean),),
            "head": lambda y: (self.head(y),),
        }
        for n, layer in enumerate(self.layers):
            assert isinstance(layer, PreNormBlock)
            pieces[f"layer.{n}"] = _piece(layer)
        return pieces


def _block(config: BlendConfig) -> PreNormBlock:
    return PreNormBlock(
        config.d_model,
        config.n_heads,
        config.ffn,
        norm_eps=config.norm_eps,
        dropout=config.dropout,
        attention_out_dropout=config.dropout,
    )


def _piece(block: PreNormBlock) -> Piece:
    def run(x: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        return (block(x, attend),)

    return run
