"""ACT in training: ponder cost, segment memory over contiguous streams, and the phase for the halting head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlm_engine.models.act import ActMemory, ActModel, ActOutput
from rlm_training.active_tokens import ActiveTokens
from rlm_training.designs import Forward, Plan
from rlm_training.losses import token_cross_entropy
from rlm_training.micro import Micro
from rlm_training.schedule import PonderConfig


@dataclass
class Segment:
    """What a slice's rows remember: keys and values, their tokens' document numbers, and the documents begun."""

    memory: ActMemory
    documents: Tensor | None = None  # int64 [rows, remembered]
    begun: Tensor | None = None  # int64 [rows]


class Act:
    """One shared block, applied up to `budget` times; see `rlm_engine.models.act`."""

    masked, padding, all_used = True, None, True

    def __init__(
        self,
        model: ActModel,
        ponder: PonderConfig,
        compiled: bool = False,
        recompute: bool = False,
        skip_halted: bool = False,
    ):
        self.model, self._ponder = model, ponder
        self.cap, self.deepest = model.config.logit_softcap, model.config.max_steps
        self.segments: dict[int, Segment] = {}  # by the slice's number
        # One function of tensors, called once per recurrence: no new compilation when the budget grows.
        step: Any = torch.compile(model.dense_step, dynamic=False) if compiled else model.dense_step
        self._dense_step = step
        if ponder.fixed_halting:
            model.halt.requires_grad_(False)
        self._running_step = ActiveTokens(model, compiled) if skip_halted else None
        if recompute:
            self._dense_step = lambda *inputs: checkpoint(step, *inputs, use_reentrant=False)

    def head(self) -> Tensor:
        """Tied to the token table."""
        return self.model.embedding.weight

    def freeze_trunk(self) -> None:
        """From here on only the halting head learns."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith("halt."))

    def run(self, micro: Micro, plan: Plan) -> Forward:
        """Depth: recurrences used. Reads and writes the slice's segment memory."""
        segment = self.segments.get(micro.index) if plan.memory else None
        numbers = self._number_documents(micro.inputs, segment) if plan.memory else None
        out = self.model(
            micro.inputs,
            memory=None if segment is None else segment.memory,
            keep_memory=plan.memory,
            document_mask=_document_mask(micro, numbers, segment),
            max_steps=plan.budget,
            keep_states=plan.gate is not None,
            dense_step=self._dense_step if torch.is_grad_enabled() else None,  # held-out rows come in other shapes
            detach_halting=self._ponder.fixed_halting,
            running_step=self._running_step if torch.is_grad_enabled() and plan.gate is None else None,
        )
        if out.memory is not None and torch.is_grad_enabled():
            self.segments[micro.index] = _remember(out.memory, numbers, segment)
        return Forward(out.hidden, out.depth.float(), out)

    def auxiliary(self, forward: Forward, micro: Micro, losses: Tensor, plan: Plan) -> Tensor | None:
        """price * mean(N + R) over the batch's tokens (Graves 2016), and the halting head's target in its phase."""
        out: ActOutput = forward.extra
        ponder = ((out.depth.to(out.remainder.dtype) + out.remainder) * micro.real).sum()
        forward.statistics["ponder"] = ponder.detach()
        cost = plan.price * ponder
        if plan.gate is not None:
            cost = cost + self._ponder.gate_weight * self._gate_loss(forward, micro, plan, plan.gate)
        return cost

    def _gate_loss(self, forward: Forward, micro: Micro, plan: Plan, n: int) -> Tensor:
        """Cross-entropy of p_n against "stopping after n costs less than it saves", for tokens that went on.

        L_n is the loss of the output a token has when it stops at n: the halting-weighted mean of its states so far.
        """
        out: ActOutput = forward.extra
        with torch.no_grad():
            gain = self._loss_at(out, micro, n) - self._loss_at(out, micro, n + 1)
            go_on = torch.sigmoid(self._ponder.gate_sharpness * (gain - plan.price))
        probability = out.halting[n - 1].float().clamp(1e-6, 1 - 1e-6)
        entropy = -(1 - go_on) * probability.log() - go_on * (1 - probability).log()
        loss = (entropy * (out.depth > n) * (micro.counts > 0) * micro.real).sum()
        forward.statistics["gate_loss"] = loss.detach()
        return loss

    def _loss_at(self, out: ActOutput, micro: Micro, n: int) -> Tensor:
        y, left = torch.zeros_like(out.states[0]), torch.ones_like(out.halting[0])
        if self.model.config.rule == "act":
            for state, p in zip(out.states[: n - 1], out.halting[: n - 1], strict=True):
                y, left = y + p.to(state.dtype).unsqueeze(-1) * state, left - p
        y = y + left.to(y.dtype).unsqueeze(-1) * out.states[n - 1]
        hidden = self.model.final_norm(y).flatten(0, 1)
        losses = token_cross_entropy(hidden, self.head(), micro.targets.flatten(), cap=self.cap)
        return losses.view(micro.counts.shape)

    def _number_documents(self, inputs: Tensor, segment: Segment | None) -> Tensor | None:
        if not self._ponder.memory_documents:
            return None
        ends = (inputs == self.model.config.eos_token_id).long()
        before = ends.cumsum(1) - ends  # the end of a text belongs to it
        begun = 0 if segment is None or segment.begun is None else segment.begun[:, None]
        return torch.cat((before + begun, (before + ends)[:, -1:] + begun), dim=1)  # the last: the next token's number

    def state_dict(self) -> dict[str, Any]:
        """Segment memories as plain tensors, for the checkpoint."""
        return {
            str(index): {
                "keys": s.memory.keys,
                "values": s.memory.values,
                "start": s.memory.start,
                "documents": s.documents,
                "begun": s.begun,
            }
            for index, s in self.segments.items()
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore `state_dict`; slices of other processes may be among them and do no harm."""
        for index, s in state.items():
            keys, values = ([t.to(device) for t in s[name]] for name in ("keys", "values"))
            documents, begun = (None if s[name] is None else s[name].to(device) for name in ("documents", "begun"))
            self.segments[int(index)] = Segment(ActMemory(keys, values, s["start"]), documents, begun)


def _document_mask(micro: Micro, numbers: Tensor | None, segment: Segment | None) -> Tensor | None:
    """Boolean [rows, 1, tokens, remembered + tokens]; None where nothing is to be hidden."""
    queries = micro.documents if numbers is None else numbers[:, :-1]
    if queries is None:
        return None
    keys = queries
    if segment is not None and segment.documents is not None:
        keys = torch.cat((segment.documents, queries), dim=1)
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def _remember(memory: ActMemory, numbers: Tensor | None, segment: Segment | None) -> Segment:
    if numbers is None:
        return Segment(memory)
    documents = numbers[:, :-1]
    if segment is not None and segment.documents is not None:
        documents = torch.cat((segment.documents, documents), dim=1)
    return Segment(memory, documents[:, -memory.keys[0].shape[1] :], numbers[:, -1])
