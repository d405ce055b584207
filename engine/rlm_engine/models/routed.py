"""`routed` (rlm-90m with biases, rlm-198m without): a router sends a sequence 1, 3 or 5 times through a shared layer.

The depth-s state of a token depends only on earlier tokens, never on the router: the router merely picks which depth
the head reads. Published routers pool over the whole sequence, its future included (teacher forcing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlm_engine.config import RoutedConfig
from rlm_engine.models.encoder import PreNormBlock, masked_attention, masked_mean, running_mean, shifted_token_losses
from rlm_engine.models.layers import Attend, causal_mask, rotary_tables

if TYPE_CHECKING:
    from rlm_engine.backends.torch import Piece

ROUTER_DROPOUT = 0.1
SOFT_MASK = -1e4  # what rlm-198m adds where rlm-90m adds -inf
PSEUDO_LABEL_PERPLEXITIES = (20.0, 50.0)  # below: simple; between: medium; at or above: complex


@dataclass
class RoutedOutput:
    """What a dense forward returns.

    ``logits`` [batch, tokens, vocabulary]. ``router_logits`` [batch, 3], ``router_class`` and ``steps`` [batch]
    (int64), each with a token axis after the batch with prefix routing.
    With labels: ``loss`` = lm_loss + weight * router_loss (nats), ``sample_ppl`` and ``pseudo_labels`` [batch].
    ``states`` when asked for: h, the state after each pass run (rows that stopped keep theirs), and what the head
    reads, each [batch, tokens, d].
    """

    logits: Tensor
    router_logits: Tensor
    router_class: Tensor
    steps: Tensor
    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    router_loss: Tensor | None = None
    sample_ppl: Tensor | None = None
    pseudo_labels: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)


class SequenceRouter(nn.Module):
    """Pooled state -> Linear, tanh, Linear to half the width, GELU, Linear to the three classes."""

    def __init__(self, d_model: int, classes: int):
        super().__init__()
        self.pooler = nn.Linear(d_model, d_model)
        self.hidden = nn.Linear(d_model, d_model // 2)
        self.classes = nn.Linear(d_model // 2, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Class logits [..., 3] of pooled states [..., d]."""
        hidden = F.gelu(self.hidden(torch.tanh(self.pooler(pooled))))
        return self.classes(F.dropout(hidden, ROUTER_DROPOUT, self.training))


class RoutedModel(nn.Module):
    """The dense model: all tokens at once, rotary positions, one routing decision per row (or per prefix)."""

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        self.tokens = nn.Embedding(config.vocab_size, d, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.n_layers))
        self.recursion = _block(config)
        self.router = SequenceRouter(d, len(config.steps))
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.unembedding = nn.Linear(d, config.vocab_size, bias=False)  # never tied to the token table
        self._rotary: tuple[Tensor, Tensor] | None = None

    def initialise(self, generator: torch.Generator | None = None) -> RoutedModel:
        """Random weights as published: N(0, 0.02), biases 0, the padding row of the token table 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens.weight, std=0.02, generator=generator)
        with torch.no_grad():
            self.tokens.weight[self.config.pad_token_id].zero_()
        return self

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., vocabulary] of states [..., d]."""
        return self.unembedding(self.norm(x))

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
    ) -> RoutedOutput:
        """Dense forward of input_ids [batch, tokens] of any length.

        ``labels`` [batch, tokens], -100 = no target, are shifted here. ``attention_mask`` is accepted and ignored,
        as published: tokens whose id is pad_token_id are hidden as keys and left out of the router's mean.
        ``routing``: "sequence" decides once per row from all its positions (teacher forcing as published);
        "prefix" decides at each position from its own prefix, which is what generation sees.
        ``max_steps``: at most this many passes, whatever the class.
        ``with_logits=False`` leaves the logits empty: training reads ``states[-1]`` and takes its loss in chunks.
        """
        config = self.config
        pads = input_ids == config.pad_token_id
        attend = self._dense_attend(pads)
        cos, sin = self._tables(input_ids.shape[1], input_ids.device)
        h = self.tokens(input_ids)
        for layer in self.layers:
            h = layer(h, attend(None), cos, sin)

        if routing == "sequence":
            real = (~pads)[..., None].to(h.dtype)
            pooled = (h * real).sum(1) / real.sum(1).clamp(min=1)
        elif routing == "prefix":
            pooled = running_mean(h, ~pads)
        else:
            raise ValueError(f"routing must be 'sequence' or 'prefix', got {routing!r}")
        router_logits = self.router(pooled)
        router_class = router_logits.argmax(-1)
        steps = torch.tensor(config.steps, device=h.device)[router_class]
        if max_steps is not None:
            steps = steps.clamp(max=max_steps)

        states = [h]
        recur = self._recur_rows if routing == "sequence" else self._recur_positions
        x = recur(h, steps, attend, cos, sin, states)
        logits = self.head(x) if with_logits else x.new_empty(0)
        output = RoutedOutput(logits, router_logits, router_class, steps)
        if return_states:
            output.states = [*states, x]
        if labels is not None:
            self._losses(output, labels, ~pads)
        return output

    def _recur_rows(
        self, x: Tensor, steps: Tensor, attend: _DenseAttend, cos: Tensor, sin: Tensor, states: list[Tensor]
    ) -> Tensor:
        # The published model runs every row to the deepest row's depth and throws the surplus away.
        for s in range(int(steps.max())):
            active = (steps > s).nonzero().squeeze(1)
            if len(active) == len(steps):
                x = self.recursion(x, attend(None), cos, sin)
            else:
                x = x.index_copy(0, active, self.recursion(x[active], attend(active), cos, sin))
            states.append(x)
        return x

    def _recur_positions(
        self, x: Tensor, steps: Tensor, attend: _DenseAttend, cos: Tensor, sin: Tensor, states: list[Tensor]
    ) -> Tensor:
        chosen = x
        for s in range(int(steps.max())):
            x = self.recursion(x, attend(None), cos, sin)
            chosen = torch.where((steps > s)[..., None], x, chosen)
            states.append(x)
        return chosen

    def _losses(self, output: RoutedOutput, labels: Tensor, real: Tensor) -> None:
        """LM loss plus the router's: cross entropy against a label made of the row's own perplexity.

        With prefix routing every real position is asked for its row's label; the mean is over those positions.
        """
        losses, valid = shifted_token_losses(output.logits, labels)
        output.lm_loss = masked_mean(losses, valid)
        with torch.no_grad():
            row_loss = losses.sum(1) / valid.sum(1).clamp(min=1)
            output.sample_ppl, output.pseudo_labels = self.pseudo_labels(row_loss)
        logits = output.router_logits
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if wide.dim() == 2:
            output.router_loss = F.cross_entropy(wide, output.pseudo_labels)
        else:
            targets = output.pseudo_labels[:, None].expand(real.shape)
            each = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
            output.router_loss = masked_mean(each * real.flatten(), real)
        output.loss = output.lm_loss + self.config.router_loss_weight * output.router_loss

    def pseudo_labels(self, row_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Perplexity and router class [batch] that rows of these mean losses (nats) teach the router."""
        if not self.config.biases:
            row_loss = row_loss.clamp(max=20.0)  # rlm-198m keeps exp() finite
        perplexity = row_loss.exp()
        low, high = PSEUDO_LABEL_PERPLEXITIES
        return perplexity, (perplexity >= low).long() + (perplexity >= high).long()

    def _dense_attend(self, pads: Tensor) -> _DenseAttend:
        """Attention under the design's mask; call it with the active rows' indices, None for all."""
        rate = self.config.attention_dropout if self.training else 0.0
        if not bool(pads.any()):
            return lambda rows: masked_attention(None, rate)
        causal = causal_mask(pads.shape[1], pads.shape[1], device=pads.device)
        visible = causal & ~pads[:, None, :]  # [batch, query, key]
        blind = ~visible.any(-1)
        if not self.config.biases and bool(blind.any()):
            return lambda rows: _soft_masked_attention(causal, pads if rows is None else pads[rows], rate)
        # A row of the softmax that sees nothing is NaN in the published rlm-90m, and poisons all that follow.
        mask = (visible | blind[..., None])[:, None]

        def attend(rows: Tensor | None) -> Attend:
            if rows is None:
                return masked_attention(mask, rate, blind)
            return masked_attention(mask[rows], rate, blind[rows])

        return attend

    def _tables(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables [tokens, head_dim/2]: float32 at least, however coarse the weights are."""
        dtype = torch.float64 if self.norm.weight.dtype == torch.float64 else torch.float32
        kept = self._rotary
        if kept is None or len(kept[0]) < tokens or kept[0].device != device or kept[0].dtype != dtype:
            length = max(tokens, self.config.context_length)
            cos, sin = rotary_tables(np.arange(length), self.config.head_dim, self.config.rope_theta)
            kept = (torch.from_numpy(cos).to(device, dtype), torch.from_numpy(sin).to(device, dtype))
            self._rotary = kept
        return kept[0][:tokens], kept[1][:tokens]

    def pieces(self) -> dict[str, Piece]:
        """What decoding runs, over N flat tokens.

        embed(ids [N]) -> [N, d]
        layer.0 .. layer.(n-1), recursion: (x [N, d], attend, cos, sin [N, head_dim/2]) -> [N, d]
        router(mean [N, d]) -> class logits [N, 3]
        head(x [N, d]) -> logits [N, vocabulary]
        """
        pieces: dict[str, Piece] = {
            "embed": lambda ids: (self.tokens(ids),),
            "recursion": _piece(self.recursion),
            "router": lambda mean: (self.router(mean),),
            "head": lambda x: (self.head(x),),
        }
        for n, layer in enumerate(self.layers):
            assert isinstance(layer, PreNormBlock)
            pieces[f"layer.{n}"] = _piece(layer)
        return pieces


class _DenseAttend(Protocol):
    def __call__(self, rows: Tensor | None) -> Attend: ...


def _soft_masked_attention(causal: Tensor, pads: Tensor, dropout: float) -> Attend:
    """rlm-198m's mask, for batches in which some query sees padding only.

    -1e4 is added once for a future key and once for a padding key, and the scores are clamped to +-1e4. Wherever a
    query sees a real key the masked weights underflow to 0. Where it sees none every score ends up near -1e4, so it
    attends to the whole row, future included; such queries are padding themselves and hidden from everybody else.
    (Float32 has steps of 1/1024 at 1e4: these rows are only reproducible to about 1e-3.)
    """
    bias = torch.zeros(pads.shape[0], 1, *causal.shape, device=pads.device)
    bias = bias.masked_fill(~causal, SOFT_MASK) + SOFT_MASK * pads[:, None, None, :]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = (scores.to(torch.promote_types(scores.dtype, bias.dtype)) + bias).clamp(SOFT_MASK, -SOFT_MASK)
        weights = F.dropout(torch.softmax(scores, dim=-1), dropout, dropout > 0)
        return (weights.to(v.dtype) @ v).transpose(1, 2)

    return attend


def _block(config: RoutedConfig) -> PreNormBlock:
    return PreNormBlock(
        config.d_model,
        config.n_heads,
        config.ffn,
        norm_eps=config.norm_eps,
        biases=config.biases,
        dropout=config.hidden_dropout,
    )


def _piece(block: PreNormBlock) -> Piece:
    def run(x: Tensor, attend: Attend, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return (block(x, attend, cos, sin),)

    return run
