"""`act`: one shared transformer block, up to `max_steps` recurrences per token, per-token adaptive halting.

Universal Transformer (Dehghani et al. 2018) with ACT halting (Graves 2016), made exactly cacheable: keys and values
carry no step information, so a halted token has one further key and value (projected from its final state) that
every deeper recurrence of later tokens sees. Sandwich RMSNorm, QK-norm, rotary positions, SwiGLU, input injection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlm_engine.config import ActConfig
from rlm_engine.decoding.halting import HaltingState, advance
from rlm_engine.models.layers import Attend, causal_mask, dense_attention, rms_norm, rotary_tables, rotate


class ActBlock(nn.Module):
    """The block every recurrence shares. Matrices are separate so that Muon orthogonalises each on its own."""

    def __init__(self, config: ActConfig):
        super().__init__()
        d, ffn = config.d_model, config.ffn
        self.n_heads = config.n_heads
        self.norm_eps = config.norm_eps
        self.wq = nn.Linear(d, d, bias=False)
        self.wk = nn.Linear(d, d, bias=False)
        self.wv = nn.Linear(d, d, bias=False)
        self.wo = nn.Linear(d, d, bias=False)
        self.w_gate = nn.Linear(d, ffn, bias=False)
        self.w_up = nn.Linear(d, ffn, bias=False)
        self.w_down = nn.Linear(ffn, d, bias=False)
        self.gain_attn_in = nn.Parameter(torch.ones(d))
        self.gain_attn_out = nn.Parameter(torch.ones(d))
        self.gain_mlp_in = nn.Parameter(torch.ones(d))
        self.gain_mlp_out = nn.Parameter(torch.ones(d))
        self.inject = nn.Parameter(torch.full((d,), 0.1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))

    def key_value(self, u: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., tokens, heads, head_dim] of normalised states u; free of step information."""
        k = rotate(rms_norm(self._heads(self.wk(u)), eps=self.norm_eps), cos, sin)
        return k, self._heads(self.wv(u))

    def query(self, u: Tensor, step: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries [..., tokens, heads, head_dim] of normalised states u at the recurrence with embedding ``step``."""
        return rotate(rms_norm(self._heads(self.wq(u + step)), eps=self.norm_eps), cos, sin)

    def after_attention(self, state: Tensor, attended: Tensor, initial: Tensor, step: Tensor) -> Tensor:
        """s' from what attention returned, [..., tokens, heads, head_dim]: both residual branches and the injection."""
        eps = self.norm_eps
        r = state + rms_norm(self.wo(attended.flatten(-2)), self.gain_attn_out, eps)
        z = rms_norm(r, self.gain_mlp_in, eps) + step
        out = self.w_down(F.silu(self.w_gate(z)) * self.w_up(z))
        return r + rms_norm(out, self.gain_mlp_out, eps) + self.inject * initial

    def forward(self, state: Tensor, attend: Attend, initial: Tensor, step: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One recurrence: state, initial [..., tokens, d]; step: the recurrence's embedding [d]. Returns s'."""
        u = rms_norm(state, self.gain_attn_in, self.norm_eps)
        k, v = self.key_value(u, cos, sin)
        return self.after_attention(state, attend(self.query(u, step, cos, sin), k, v), initial, step)


@dataclass
class ActMemory:
    """Detached keys and values of earlier tokens, one pair per recurrence [batch, tokens, heads, head_dim].

    Transformer-XL's segment memory (Dai et al. 2019), with rotated keys, so position is kept by distance.
    ``start`` is the position of the token that comes next.
    """

    keys: list[Tensor]
    values: list[Tensor]
    start: int


@dataclass
class ActOutput:
    """What a dense forward pass returns.

    ``hidden``: final normalised states [batch, tokens, d]; `ActModel.head` turns them into logits.
    ``depth``: recurrences used [batch, tokens] (int64); ``remainder``: the weight of the last one, carries gradient.
    ``halting``: halting probabilities per recurrence, [batch, tokens] each (zero where the token had stopped).
    ``states``: the recurrences' states when asked for. ``memory``: for the next segment when asked for.
    """

    hidden: Tensor
    depth: Tensor
    remainder: Tensor
    halting: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    memory: ActMemory | None = None

    @property
    def ponder_cost(self) -> Tensor:
        """mean(N + R), the cost Graves 2016 (section 2.1) adds to the loss; only R carries gradient."""
        return (self.depth.to(self.remainder.dtype) + self.remainder).mean()


class ActModel(nn.Module):
    """The dense model: all tokens, all recurrences, halting as masks and weights."""

    def __init__(self, config: ActConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.block = ActBlock(config)
        self.step_embedding = nn.Parameter(torch.zeros(config.max_steps, d))
        self.gain_in = nn.Parameter(torch.ones(d))
        self.gain_final = nn.Parameter(torch.ones(d))
        self.halt = nn.Linear(d, 1)

    def initialise(self, generator: torch.Generator | None = None) -> ActModel:
        """Random weights for training.

        Post-norm gains 1/sqrt(2 * recurrences) keep the residual stream's size over the recurrences; the halting
        bias -3 is the "deep start" without which training collapses to two recurrences and never recovers.
        """
        steps = self.config.max_steps
        with torch.no_grad():
            nn.init.normal_(self.embedding.weight, std=0.02, generator=generator)
            block = self.block
            for linear in (block.wq, block.wk, block.wv, block.wo, block.w_gate, block.w_up, block.w_down):
                nn.init.normal_(linear.weight, std=1.0 / math.sqrt(linear.in_features), generator=generator)
            for gain in (block.gain_attn_out, block.gain_mlp_out):
                gain.fill_(1.0 / math.sqrt(2 * steps))
            self.step_embedding.zero_()
            self.halt.weight.zero_()
            self.halt.bias.fill_(-3.0)
        return self

    def rotary(self, start: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables [tokens, head_dim/2] for positions start.. in like's device, float32 (float64 if like is)."""
        cos, sin = rotary_tables(np.arange(start, start + tokens), self.config.head_dim, self.config.rope_theta)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        device = like.device
        return torch.from_numpy(cos).to(device, dtype), torch.from_numpy(sin).to(device, dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """s_0 of token ids [...]: [..., d]."""
        return rms_norm(self.embedding(ids), self.gain_in, self.config.norm_eps)

    def halting_probability(self, state: Tensor) -> Tensor:
        """p_n of states [..., d]: [...], in float32 (float64 for a float64 model), whatever autocast says."""
        dtype = torch.float64 if self.halt.weight.dtype == torch.float64 else torch.float32
        with torch.autocast(state.device.type, enabled=False):
            x = rms_norm(state.to(dtype), eps=self.config.norm_eps)
            weight, bias = self.halt.weight.to(dtype), self.halt.bias.to(dtype)
            return torch.sigmoid(F.linear(x, weight, bias).squeeze(-1))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of final normalised states [..., d]; tied to the embedding, softly capped."""
        cap = self.config.logit_softcap
        return cap * torch.tanh(F.linear(hidden, self.embedding.weight) / cap)

    def final_norm(self, y: Tensor) -> Tensor:
        """The normalised state the head reads."""
        return rms_norm(y, self.gain_final, self.config.norm_eps)

    def dense_step(
        self,
        state: Tensor,
        initial: Tensor,
        step: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        frozen: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One recurrence of a whole batch: returns s', its halting probability, and this segment's keys and values.

        ``past``: remembered keys and values; ``mask``: see `dense_attention` (None: causal);
        ``frozen``: (halted [batch, tokens], keys, values) for kv="reuse". A function of tensors only, so that it can
        be compiled once and called for every recurrence.
        """
        written: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if frozen is not None:
                halted = frozen[0][..., None, None]
                k, v = torch.where(halted, frozen[1], k), torch.where(halted, frozen[2], v)
            written.extend((k, v))
            if past is not None:
                k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
            return dense_attention(q, k, v, mask)

        new = self.block(state, attend, initial, step, cos, sin)
        return new, self.halting_probability(new), written[0], written[1]

    def forward(
        self,
        ids: Tensor,
        *,
        memory: ActMemory | None = None,
        keep_memory: int = 0,
        window: int | None = None,
        document_mask: Tensor | None = None,
        max_steps: int | None = None,
        threshold: float | None = None,
        forced_depth: Tensor | None = None,
        keep_states: bool = False,
        dense_step: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
        running_step: Callable[..., tuple[Tensor, Tensor] | None] | None = None,
        detach_halting: bool = False,
    ) -> ActOutput:
        """Dense forward of ids [batch, tokens].

        ``memory``: earlier tokens' keys and values; ``keep_memory``: how many latest tokens to return as memory.
        ``window``: a token sees at most this many latest tokens, itself included (None: all there are).
        ``document_mask``: boolean, broadcastable to [batch, 1, tokens, remembered + tokens], True where allowed;
        it is combined with causality here. ``max_steps``: at most this many recurrences.
        ``threshold``: the halting threshold, default 1 - epsilon. ``dense_step``: a compiled `dense_step`.
        ``forced_depth``: int64 [batch, tokens], each >= 1; token t stops exactly at recurrence forced_depth[t] (or at
        the last one) instead of where its halting probabilities say. Its weights are the usual ones: each
        recurrence's probability, the remainder at the stop; a probability is cut to what is left of 1.
        ``running_step``: computes a recurrence for the tokens that still run, (state, initial, n from 0, running
        [batch, tokens], cos, sin, mask) -> (states of all tokens, p_n), or None where the dense one should; not with
        kv="reuse", memory or ``forced_depth``. ``detach_halting``: no gradient goes through halting probabilities.
        """
        config = self.config
        steps = min(config.max_steps, max_steps or config.max_steps)
        threshold = 1.0 - config.halt_epsilon if threshold is None else threshold
        if forced_depth is not None:
            threshold = math.inf
        run = dense_step or self.dense_step
        if config.kv == "reuse" or memory is not None or keep_memory or forced_depth is not None:
            running_step = None
        start = memory.start if memory is not None else 0
        remembered = memory.keys[0].shape[1] if memory is not None else 0
        initial = self.embed(ids)
        cos, sin = self.rotary(start, ids.shape[1], initial)
        mask = self._mask(ids.shape[1], remembered, window, document_mask, ids.device)

        state, y = initial, torch.zeros_like(initial)
        depth = torch.zeros(ids.shape, dtype=torch.int64, device=ids.device)
        remainder: Tensor | float = 0.0
        halting: HaltingState | None = None
        output = ActOutput(hidden=y, depth=depth, remainder=y)
        kept: list[tuple[Tensor, Tensor]] = []
        written: tuple[Tensor, Tensor] | None = None
        for n in range(steps):
            sparse = None
            if running_step is not None and halting is not None:
                sparse = running_step(state, initial, n, halting.running, cos, sin, mask)
            past = (memory.keys[n], memory.values[n]) if memory is not None else None
            frozen = None
            if config.kv == "reuse" and halting is not None and written is not None:
                frozen = (~halting.running, *written)
            if sparse is not None:
                new, p = sparse
            else:
                new, p, k, v = run(state, initial, self.step_embedding[n], cos, sin, past, mask, frozen)
                written = (k, v)
                kept.append(written)
            if halting is None:
                halting = HaltingState(torch.zeros_like(p), torch.ones_like(depth, dtype=torch.bool))
            if detach_halting:
                p = p.detach()
            if n + 1 < config.min_steps:
                p = p * 0.0
            running = halting.running
            last: Tensor | bool = n + 1 == steps
            if forced_depth is not None:
                # a token kept running past its own halt must not give more weight than there is
                p = torch.minimum(p, 1.0 - halting.cumulative)
                last = (forced_depth <= n + 1) | last
            weight, halting, stopped = advance(halting, p, last, threshold)
            remainder = remainder + stopped * weight
            depth = depth + running
            state = torch.where(running.unsqueeze(-1), new, state)
            y = self._accumulate(y, state, weight, stopped)
            output.halting.append(p * running)
            if keep_states:
                output.states.append(state)
        assert isinstance(remainder, Tensor) and halting is not None and written is not None
        output.hidden, output.depth, output.remainder = self.final_norm(y), depth, remainder
        if keep_memory:
            while len(kept) < config.max_steps:  # a shallower budget: deeper recurrences see the final state
                kept.append(written if config.kv == "reuse" else self._project(state, cos, sin))
            output.memory = self._remember(kept, memory, keep_memory, start + ids.shape[1])
        return output

    def _mask(
        self, tokens: int, remembered: int, window: int | None, documents: Tensor | None, device: torch.device
    ) -> Tensor | None:
        if window is not None and window >= tokens + remembered:
            window = None
        if documents is None and window is None and not remembered:
            return None
        mask = causal_mask(tokens, remembered + tokens, window, device)
        return mask if documents is None else mask & documents

    def _accumulate(self, y: Tensor, state: Tensor, weight: Tensor, stopped: Tensor) -> Tensor:
        if self.config.rule == "act":
            return y + weight.to(state.dtype).unsqueeze(-1) * state
        # rule "last": the state at the halt; the factor is 1 and only passes a gradient to the halting head
        straight_through = (1.0 + weight - weight.detach()).to(state.dtype)
        return torch.where(stopped.unsqueeze(-1), straight_through.unsqueeze(-1) * state, y)

    def _project(self, state: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        u = rms_norm(state, self.block.gain_attn_in, self.config.norm_eps)
        return self.block.key_value(u, cos, sin)

    @staticmethod
    def _remember(kept: list[tuple[Tensor, Tensor]], memory: ActMemory | None, keep: int, start: int) -> ActMemory:
        keys = [k for k, _ in kept]
        values = [v for _, v in kept]
        if memory is not None:
            keys = [torch.cat((old, k), dim=1) for old, k in zip(memory.keys, keys, strict=True)]
            values = [torch.cat((old, v), dim=1) for old, v in zip(memory.values, values, strict=True)]
        return ActMemory([k[:, -keep:].detach() for k in keys], [v[:, -keep:].detach() for v in values], start)

    def pieces(self) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
        """What decoding runs, over N flat tokens: embed, step, key_value, head.

        embed(ids [N]) -> s_0 [N, d]
        step(state, attend, initial, n [] int, cos, sin) -> s'_n [N, d], p_n [N]
        key_value(state, cos, sin) -> k, v [N, heads, head_dim]: what deeper recurrences see of a halted token
        head(y [N, d]) -> logits [N, vocabulary]
        """

        def step(
            state: Tensor, attend: Attend, initial: Tensor, n: Tensor, cos: Tensor, sin: Tensor
        ) -> tuple[Tensor, ...]:
            new = self.block(state, attend, initial, self.step_embedding[n], cos, sin)
            return new, self.halting_probability(new)

        return {
            "embed": lambda ids: (self.embed(ids),),
            "step": step,
            "key_value": self._project,
            "head": lambda y: (self.head(self.final_norm(y)),),
        }
