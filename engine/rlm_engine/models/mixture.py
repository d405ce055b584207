"""`mixture` (mor): post-norm layers, each with its own router over 0..max_steps passes and one projection per pass.

The dense forward is for training and is what cached decoding is tested against. In the published model a row's
result depends on its batch-mates (see `MixtureModel.forward`); decoding treats every row alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlm_engine.backends.torch import Piece
from rlm_engine.config import MixtureConfig
from rlm_engine.decoding.mixture import embedding_inputs, step_inputs
from rlm_engine.errors import InputError, UsageError
from rlm_engine.models import layers
from rlm_engine.models.layers import Attend, causal_mask, rotate

COST_PER_PASS = 0.1  # what one pass of one row through one layer adds to the computation loss, as published


class MixtureLayer(nn.Module):
    """One layer: attention, feed-forward and norms shared by its passes, a projection per pass, a router."""

    def __init__(self, config: MixtureConfig):
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.wq = nn.Linear(d, d, bias=False)
        self.wk = nn.Linear(d, d, bias=False)
        self.wv = nn.Linear(d, d, bias=False)
        self.wo = nn.Linear(d, d)
        self.w_up = nn.Linear(d, config.ffn)
        self.w_down = nn.Linear(config.ffn, d)
        self.norm_attention = nn.LayerNorm(d, eps=config.norm_eps)
        self.norm_ffn = nn.LayerNorm(d, eps=config.norm_eps)
        self.step_projections = nn.ModuleList(nn.Linear(d, d) for _ in range(config.max_steps))
        self.router_in: nn.Linear | None = None
        self.router_out: nn.Linear | None = None
        if config.router == "adaptive":
            self.router_in = nn.Linear(d, d // 4)
            self.router_out = nn.Linear(d // 4, config.max_steps + 1)

    def step(
        self, x: Tensor, attend: Attend, step: int, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> Tensor:
        """Pass number `step` (from 0): [..., tokens, d] -> the same. cos, sin [tokens, head_dim/2]: rotary tables.

        The projection feeds only the attention; the residual is the unprojected state, as published.
        """
        projected = self.step_projections[step](x)
        q, k, v = (w(projected).unflatten(-1, (self.n_heads, -1)) for w in (self.wq, self.wk, self.wv))
        if cos is not None and sin is not None:
            # the tables stay float32 in half-precision models: rounded angles would misplace far tokens
            q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        attended = self.wo(attend(q, k, v).flatten(-2))
        x = self.norm_attention(x + self._drop(attended))
        hidden = self._drop(F.gelu(self.w_up(x)))
        return self.norm_ffn(x + self._drop(self.w_down(hidden)))

    def idle(self, x: Tensor) -> Tensor:
        """What the published batch loop does to a row that has stopped while a batch-mate goes on: both norms."""
        return self.norm_ffn(self.norm_attention(x))

    def route(self, pooled: Tensor) -> Tensor:
        """Router probabilities [..., max_steps + 1] of mean states [..., d]."""
        assert self.router_in is not None and self.router_out is not None, "a fixed router is never asked"
        return torch.softmax(self.router_out(self._drop(F.gelu(self.router_in(pooled)), 0.1)), dim=-1)

    def _drop(self, x: Tensor, rate: float | None = None) -> Tensor:
        return F.dropout(x, self.dropout if rate is None else rate, self.training)


@dataclass
class MixtureOutput:
    """What a dense forward returns.

    ``logits`` [batch, tokens, vocabulary]; ``steps`` int64 [batch, layers]; ``router_probabilities``
    [batch, layers, max_steps + 1] (one-hot for a fixed router); ``computation_loss``: 0.1 for each pass of each row
    through each layer. ``loss`` = ``lm_loss`` + weight * ``computation_loss``, None without labels.
    ``states``: the embedding's and each layer's output when asked for, then the normalised state the head reads.
    """

    logits: Tensor
    steps: Tensor
    router_probabilities: Tensor
    computation_loss: Tensor
    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)


class MixtureModel(nn.Module):
    """Mixture of recursions.

    ``router_gradient``: the published router is an argmax and so is never trained ("none"). "straight-through" (ours)
    runs every pass in training, mixes the states with weights one_hot + p - stop_gradient(p) (Bengio et al. 2013) and
    lets the language loss and the computation loss reach the router; it needs ``batch="rows"``.
    """

    def __init__(self, config: MixtureConfig, router_gradient: str = "none"):
        super().__init__()
        if router_gradient not in ("none", "straight-through"):
            raise UsageError(f"router_gradient must be 'none' or 'straight-through', got {router_gradient!r}")
        self.config = config
        self.router_gradient = router_gradient
        d = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d, padding_idx=config.padding_id)
        self.positions = nn.Embedding(config.context_length, d) if config.positions == "learned" else None
        self.norm_in = nn.LayerNorm(d, eps=config.norm_eps)
        self.layers: nn.ModuleList = nn.ModuleList(MixtureLayer(config) for _ in range(config.n_layers))
        self.norm_out = nn.LayerNorm(d, eps=config.norm_eps)
        self.head = nn.Linear(d, config.vocab_size, bias=False)

    def initialise(self, generator: torch.Generator | None = None) -> MixtureModel:
        """Random weights as the published trainer sets them: every matrix and both tables N(0, 0.02), biases 0.

        The padding row is random too; as it gets no gradient it stays so for ever, as published.
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.weight.normal_(0.0, 0.02, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
                if isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
        return self

    def embed(self, ids: Tensor, position: Tensor | None = None) -> Tensor:
        """Normalised embeddings [..., tokens, d] of ids [..., tokens].

        ``position``: int64 positions [tokens] (learned), a table [tokens, d] (sinusoidal), or None (rotary).
        """
        x = self.embedding(ids)
        if self.positions is not None and position is not None:
            x = x + self.positions(position)
        elif position is not None:
            x = x + position.to(x.dtype)
        rate = self.config.dropout
        return F.dropout(self.norm_in(F.dropout(x, rate, self.training)), rate, self.training)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        batch: str = "published",
        *,
        shift_labels: bool = False,
        computation_weight: float = 1e-4,
        max_steps: int | None = None,
        keep_states: bool = False,
        with_logits: bool = True,
    ) -> MixtureOutput:
        """Dense forward of ids [batch, tokens], at most context_length tokens (else InputError).

        ``labels`` [batch, tokens]: the token that follows each input, -100 where none counts (as the published
        trainer aligns them); ``shift_labels=True`` takes the inputs themselves as labels and shifts them here.
        ``attention_mask``: 0 hides a key; without it keys with the padding id are hidden. Hidden positions still
        enter the routers' means, as published. A position that sees no key gathers zero (the original: NaN).
        ``batch="published"``: while any row goes on, stopped rows pass both norms once per extra pass, so
        batch-mates change a row's result. ``batch="rows"``: every row as if alone. ``max_steps``: passes per layer
        at most.
        ``with_logits=False`` leaves the logits empty: training reads ``states[-1]`` and takes its loss in chunks.
        """
        config = self.config
        if batch not in ("published", "rows"):
            raise UsageError(f"batch must be 'published' or 'rows', got {batch!r}")
        straight_through = self.router_gradient == "straight-through" and self.training
        if straight_through and batch != "rows":
            raise UsageError("router_gradient 'straight-through' trains each row alone: use batch='rows'")
        tokens = input_ids.shape[1]
        if tokens > config.context_length:
            raise InputError(f"{tokens} tokens are more than the {config.context_length} this model can see")
        hidden = input_ids == config.padding_id if attention_mask is None else attention_mask == 0
        visible = causal_mask(tokens, tokens, device=input_ids.device) & ~hidden[:, None, None, :]
        positions = np.arange(tokens)
        x = self.embed(input_ids, *self._tensors(embedding_inputs(config, positions)))
        rotary = self._tensors(step_inputs(config, positions))
        states = [x]
        all_steps, all_probabilities, cost = [], [], x.new_zeros((), dtype=torch.float32)
        for module in self.layers:
            assert isinstance(module, MixtureLayer)
            probabilities = self._route(module, x)
            steps = probabilities.argmax(dim=-1)
            if max_steps is not None:
                steps = steps.clamp(max=max_steps)
            if straight_through:
                x, passes = self._every_pass(module, x, visible, rotary, steps, probabilities)
                cost = cost + COST_PER_PASS * passes
            else:
                x = self._chosen_passes(module, x, visible, rotary, steps, batch == "published")
                cost = cost + COST_PER_PASS * steps.sum()
            all_steps.append(steps)
            all_probabilities.append(probabilities)
            states.append(x)
        final = self.norm_out(x)
        output = MixtureOutput(
            logits=self.head(final) if with_logits else final.new_empty(0),
            steps=torch.stack(all_steps, dim=1),
            router_probabilities=torch.stack(all_probabilities, dim=1),
            computation_loss=cost,
            states=[*states, final] if keep_states else [],
        )
        if labels is not None:
            logits = output.logits
            if shift_labels:
                logits, labels = logits[:, :-1], labels[:, 1:]
            output.lm_loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
            output.loss = output.lm_loss + computation_weight * cost
        return output

    def _route(self, layer: MixtureLayer, x: Tensor) -> Tensor:
        if self.config.router == "fixed":
            row = torch.zeros(self.config.max_steps + 1, dtype=x.dtype, device=x.device)
            row[-1] = 1.0
            return row.expand(x.shape[0], -1)
        return layer.route(x.mean(dim=1))  # over all positions, padding and future included, as published

    def _chosen_passes(
        self, layer: MixtureLayer, x: Tensor, visible: Tensor, rotary: tuple[Tensor, ...], steps: Tensor, idle: bool
    ) -> Tensor:
        for s in range(int(steps.max())):
            going = (steps > s).nonzero().squeeze(-1)
            if len(going) == len(steps):
                x = layer.step(x, self._attention(visible), s, *rotary)
                continue
            new = layer.step(x[going], self._attention(visible[going]), s, *rotary)
            rest = layer.idle(x) if idle else x
            x = rest.index_put((going,), new.to(rest.dtype))
        return x

    def _every_pass(
        self,
        layer: MixtureLayer,
        x: Tensor,
        visible: Tensor,
        rotary: tuple[Tensor, ...],
        steps: Tensor,
        probabilities: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The chosen states, with a gradient to the router as if the states were mixed by its probabilities."""
        chosen = F.one_hot(steps, probabilities.shape[-1]).to(probabilities.dtype)
        weights = chosen + (probabilities - probabilities.detach())  # exactly one-hot in value
        out = weights[:, 0, None, None] * x
        for s in range(self.config.max_steps):
            x = layer.step(x, self._attention(visible), s, *rotary)
            out = out + weights[:, s + 1, None, None] * x
        counts = torch.arange(weights.shape[-1], dtype=torch.float32, device=x.device)
        return out, (weights.float() * counts).sum()

    def _attention(self, visible: Tensor) -> Attend:
        """Dense attention under a boolean mask [batch, 1, tokens, keys]; a query that sees nothing gathers zero."""
        blind = ~visible.any(dim=-1, keepdim=True)
        rate = self.config.dropout if self.training else 0.0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
            out = layers.dense_kernel(q, k, v, attn_mask=visible | blind, dropout_p=rate)
            return out.masked_fill(blind, 0.0).transpose(-2, -3)

        return attend

    def _tensors(self, arrays: tuple[np.ndarray, ...]) -> tuple[Tensor, ...]:
        like = self.norm_in.weight
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        tensors = (torch.from_numpy(a).to(like.device) for a in arrays)
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)

    def pieces(self) -> dict[str, Piece]:
        """What decoding runs over N flat tokens; call `eval()` first, dropout is not meant here.

        embed(ids [N], *embedding_inputs) -> states [N, d]
        layer.L.step.S(states [N, d], attend, *step_inputs) -> states [N, d]
        layer.L.router(mean states [N, d]) -> probabilities [N, max_steps + 1] (adaptive routers only)
        head(states [N, d]) -> logits [N, vocabulary]
        """
        pieces: dict[str, Piece] = {
            "embed": lambda ids, *position: (self.embed(ids, *position),),
            "head": lambda x: (self.head(self.norm_out(x)),),
        }
        for n, layer in enumerate(self.layers):
            assert isinstance(layer, MixtureLayer)
            for s in range(self.config.max_steps):
                pieces[f"layer.{n}.step.{s}"] = _step_piece(layer, s)
            if self.config.router == "adaptive":
                pieces[f"layer.{n}.router"] = _router_piece(layer)
        return pieces


def _step_piece(layer: MixtureLayer, step: int) -> Piece:
    def piece(x: Tensor, attend: Attend, *rotary: Tensor) -> tuple[Tensor, ...]:
        return (layer.step(x, attend, step, *rotary),)

    return piece


def _router_piece(layer: MixtureLayer) -> Piece:
    def piece(pooled: Tensor) -> tuple[Tensor, ...]:
        return (layer.route(pooled),)

    return piece
