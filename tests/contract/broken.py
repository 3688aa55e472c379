"""One sound variant (dense softmax attention) and copies of it, each broken in one way that has shipped.

`BROKEN` names, for every copy, the side to test and the law of the contract that must catch it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.registry import VariantSpec
from hf_linear_attn.variants.base import AttentionVariant, VariantConfig

REFUSAL = "Only one side is served; use 'linear' for the other."


@dataclass(frozen=True)
class DenseConfig(VariantConfig):
    gain: bool = False


class DenseAttention(AttentionVariant):
    """Softmax attention that keeps every law; it does not claim linear cost."""

    def __init__(self, config, context):
        super().__init__(config, context)
        if config.gain:
            self.gain = nn.Parameter(torch.empty(context.num_heads))
            self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(1.0)

    def init_state(self, batch_size, dtype, device):
        empty = torch.zeros(batch_size, self.context.num_heads, 0, self.context.head_dim, dtype=dtype, device=device)
        return {
            "key": empty,
            "value": empty,
            "real": torch.ones(batch_size, 0, dtype=torch.bool, device=device),
        }

    def next_state(self, key, value, real):
        return {"key": key, "value": value, "real": real}

    def offset(self, q_len, k_len):
        return k_len - q_len

    def logits(self, query, key, inputs):
        dtype = torch.promote_types(query.dtype, torch.float32)
        return query.to(dtype) @ key.to(dtype).transpose(-1, -2) * inputs.scaling

    def weights(self, logits, allowed):
        lowest = torch.finfo(logits.dtype).min
        return logits.masked_fill(~allowed, lowest).softmax(-1).masked_fill(~allowed, 0)

    def finish(self, output):
        return output * self.gain[:, None, None].to(output.dtype) if self.config.gain else output

    def forward(self, inputs, state=None):
        key, value, real = inputs.key, inputs.value, inputs.token_mask
        if real is None:
            real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        if state is not None:
            key, value = torch.cat([state["key"], key], 2), torch.cat([state["value"], value], 2)
            real = torch.cat([state["real"], real], 1)
            state = self.next_state(key, value, real)
        pads = ~real[:, None, :, None]
        key, value = key.masked_fill(pads, 0), value.masked_fill(pads, 0)
        q_len, k_len = inputs.query.shape[2], key.shape[2]
        allowed = real[:, None, None, :]
        if inputs.is_causal:
            square = torch.ones(q_len, k_len, dtype=torch.bool, device=key.device)
            allowed = allowed & square.tril(self.offset(q_len, k_len))
        query = inputs.query.masked_fill(pads[:, :, k_len - q_len :], 0)
        output = self.weights(self.logits(query, key, inputs), allowed).to(value.dtype) @ value
        return self.finish(output).to(inputs.query.dtype), state


class Future(DenseAttention):
    """The mask is one off."""

    def offset(self, q_len, k_len):
        return k_len - q_len + 1


class SequenceStabilizer(DenseAttention):
    """FAVOR+ as published: the stabilizer is the sequence's maximum, with an epsilon inside the features."""

    def weights(self, logits, allowed):
        features = (logits - logits.amax((-1, -2), keepdim=True)).exp() + 1e-2
        features = features.masked_fill(~allowed, 0)
        return features / features.sum(-1, keepdim=True).clamp(min=1e-6)


class PadBlind(DenseAttention):
    """Batches are assumed to be unpadded."""

    def forward(self, inputs, state=None):
        return super().forward(_replace(inputs, token_mask=None), state)


class PadsInDenominator(DenseAttention):
    """Keys and values are zeroed at pads, whose logit of 0 still counts."""

    def weights(self, logits, allowed):
        return super().weights(logits, torch.ones_like(allowed) if not self.context.is_causal else allowed)


class LeftAligned(DenseAttention):
    """Query row r sits at position r."""

    def offset(self, q_len, k_len):
        return 0


class BatchDependent(DenseAttention):
    """Normalized by the largest logit of the whole batch, as Nystromformer's pseudo-inverse is."""

    def logits(self, query, key, inputs):
        logits = super().logits(query, key, inputs)
        return logits / logits.abs().amax()


class Stateful(DenseAttention):
    """One long batch changes the module for good, as BigBird's fallback does."""

    longest = 0

    def forward(self, inputs, state=None):
        self.longest = max(self.longest, inputs.key.shape[2])
        return super().forward(_replace(inputs, scaling=inputs.scaling * (1 + self.longest)), state)


class NonDeterministic(DenseAttention):
    """Features are redrawn at every call, in eval mode too."""

    def finish(self, output):
        return output * (1 + 0.01 * torch.rand_like(output))


class ForgetsTheWindow(DenseAttention):
    """Decoding keeps the last eight keys."""

    def next_state(self, key, value, real):
        return {"key": key[:, :, -8:], "value": value[:, :, -8:], "real": real[:, -8:]}


class KeepsTheSequence(DenseAttention):
    """The state is a view: of every tensor it was cut from, all stays in memory."""

    def next_state(self, key, value, real):
        return super().next_state(torch.cat([key, key], 2)[:, :, : key.shape[2]], value, real)


_STATES = []


class KeepsItsStates(DenseAttention):
    """A record of states outlives them: every prompt stays in memory."""

    def next_state(self, key, value, real):
        state = super().next_state(key, value, real)
        _STATES.append(state["key"])
        return state


class StateInPlace(DenseAttention):
    """The state given is changed: a beam that continues from it twice is wrong."""

    def forward(self, inputs, state=None):
        output, new = super().forward(inputs, state)
        if state is not None:
            state["key"].mul_(2)
        return output, new


class StateNotBatchFirst(DenseAttention):
    """A cache that reorders dimension 0 reorders heads."""

    def init_state(self, batch_size, dtype, device):
        return _transposed(super().init_state(batch_size, dtype, device))

    def forward(self, inputs, state=None):
        output, new = super().forward(inputs, None if state is None else _transposed(state))
        return output, None if new is None else _transposed(new)


class Quadratic(DenseAttention):
    """The wrapper computes softmax anyway and claims linear cost."""


class MissingGradient(DenseAttention):
    """The new parameter is used, but detached."""

    def finish(self, output):
        return output * self.gain.detach()[:, None, None]


class UnusedParameter(DenseAttention):
    """A new parameter that no output depends on: distributed training stops at it."""

    def finish(self, output):
        return output


class Remembers(DenseAttention):
    """Keeps a call's tensors on the module: memory grows, and threads mix."""

    def forward(self, inputs, state=None):
        self.last_key = inputs.key
        return super().forward(inputs, state)


class NanWithoutKeys(DenseAttention):
    """Softmax over a row of -inf."""

    def weights(self, logits, allowed):
        return logits.masked_fill(~allowed, -torch.inf).softmax(-1)


class HeadMixing(DenseAttention):
    """Heads are split in the wrong order."""

    def finish(self, output):
        return 0.5 * (output + output.roll(1, 1))


class WrongLayout(DenseAttention):
    """`[B, T, H, D]` instead of `[B, H, T, D]`."""

    def finish(self, output):
        return output.transpose(1, 2)


class IgnoresScaling(DenseAttention):
    """The logit scale of the checkpoint is lost."""

    def logits(self, query, key, inputs):
        return super().logits(query, key, _replace(inputs, scaling=1.0))


class OverflowsHalf(DenseAttention):
    """The normalizer is summed in half precision."""

    def logits(self, query, key, inputs):
        return (query * 300) @ (key.transpose(-1, -2) * 300) / 300**2 * inputs.scaling


class LogitsInHalf(DenseAttention):
    """Logits are rounded to half precision before their softmax."""

    def logits(self, query, key, inputs):
        logits = query @ key.transpose(-1, -2) * inputs.scaling
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class SumsInHalf(DenseAttention):
    """Values are summed before they are divided by how many they are."""

    def finish(self, output):
        return output * 1024 / 1024


class NotSaved(DenseAttention):
    """Random features in a buffer that is not saved."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.register_buffer("features", torch.rand(context.head_dim), persistent=False)

    def finish(self, output):
        return output * self.features.to(output.dtype)


class NotReset(DenseAttention):
    """Filled in the constructor only: garbage after `from_pretrained`, which builds on the meta device."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.register_buffer("table", torch.ones(context.head_dim))

    def finish(self, output):
        return output * self.table.to(output.dtype)


class ChangesBetweenCalls(DenseAttention):
    """Every other call is different: recomputing in the backward gives another forward."""

    calls = 0

    def finish(self, output):
        self.calls += 1
        return output * (1 + self.calls % 2)


class GraphBreak(DenseAttention):
    """Reads a value back from the device."""

    def finish(self, output):
        return output * (2.0 if output.sum().item() == 0 else 1.0)


class ExportsAnotherForm(DenseAttention):
    """What a program computes is not what the layer does."""

    def finish(self, output):
        return output * (1 + int(is_exported()))


class FirstDerivativeAlone(DenseAttention):
    """Softmax expanded to first order: right gradients, which are constants where a second derivative is asked for."""

    def weights(self, logits, allowed):
        weights = super().weights(logits.detach(), allowed)
        change = (logits - logits.detach()).masked_fill(~allowed, 0)
        return weights * (1 + change - (weights * change).sum(-1, keepdim=True))


class DrawsWithoutAWord(DenseAttention):
    """Features are drawn anew that no option speaks of: no model would ask for it."""

    def redraw(self, seed):
        self.seed = seed

    def finish(self, output):
        return output * (1 + getattr(self, "seed", 0))


class ReadsPaddedQueries(DenseAttention):
    """Padded queries are taken as they are: nobody is to read what becomes of them."""

    def logits(self, query, key, inputs):
        return super().logits(inputs.query, key, inputs)


class LooksFirst(DenseAttention):
    """What is checked before the call has no answer where there is nothing."""

    def __call__(self, inputs, state=None):
        assert inputs.key.abs().amax() < 1e30
        return super().__call__(inputs, state)


class TakesTurns(DenseAttention):
    """A key of a group goes to every other head, not to heads side by side."""

    reads_groups = True

    def forward(self, inputs, state=None):
        times = inputs.query.shape[1] // inputs.key.shape[1]
        key, value = (x.repeat(1, times, 1, 1) for x in (inputs.key, inputs.value))
        return super().forward(replace(inputs, key=key, value=value), state)


class BuiltAnyway(DenseAttention):
    """Encoder-only by its spec, and built for a decoder without a word."""


@dataclass(frozen=True)
class LenientConfig(DenseConfig):
    """Unknown options are dropped."""

    @classmethod
    def from_dict(cls, options):
        known = {field.name for field in fields(cls)}
        return super().from_dict({name: value for name, value in options.items() if name in known})


def spec_of(module_class: type, **facts: Any) -> VariantSpec:
    """The spec of an unregistered variant: what a user would pass to `check_variant`."""
    known = {
        "key": module_class.__name__,
        "title": module_class.__name__,
        "paper": "",
        "cost": "n^2 d",
        "state": "kv",
        "config_class": DenseConfig,
        "linear_cost": False,
        "exact_limit": lambda length, is_causal: {},
    }
    return VariantSpec(module_class=module_class, **{**known, **facts})


def _replace(inputs, **changes):
    return type(inputs)(**{**vars(inputs), **changes})


def _transposed(state):
    return {name: x.transpose(0, 1) for name, x in state.items()}


ENCODER, DECODER = False, True
SOUND = spec_of(DenseAttention)
# (spec, side, options, law that must catch it, what the law says)
BROKEN = [
    (spec_of(Future), DECODER, {}, "causality", "tokens from 1 on changed"),
    (spec_of(SequenceStabilizer), DECODER, {}, "causality", "tokens from 20 on changed"),
    (spec_of(PadBlind), ENCODER, {}, "padding", "left padding"),
    (spec_of(PadBlind), DECODER, {}, "padding", "left padding"),
    (spec_of(PadsInDenominator), ENCODER, {}, "padding", "left padding"),
    (spec_of(LeftAligned), DECODER, {}, "right_alignment", "Tq=1 of 65"),
    (spec_of(BatchDependent), ENCODER, {}, "batch_invariance", "row 0 of 3"),
    (spec_of(Stateful), ENCODER, {}, "determinism", "two equal calls"),
    (spec_of(NonDeterministic), DECODER, {}, "determinism", "two equal calls"),
    (spec_of(Remembers), ENCODER, {}, "determinism", "changed the module: last_key"),
    (spec_of(ForgetsTheWindow), DECODER, {}, "decode", "chunks="),
    (spec_of(KeepsTheSequence), DECODER, {}, "state_memory", "padding=none"),
    (spec_of(KeepsItsStates), DECODER, {}, "state_memory", "kept after the state is gone: key"),
    (spec_of(StateInPlace), DECODER, {}, "decode", "changed the state in place"),
    (spec_of(StateNotBatchFirst), DECODER, {}, "state_is_batch_first", "for a batch of 3"),
    (spec_of(Quadratic, linear_cost=True), ENCODER, {}, "linear_memory", "2048, 2048"),
    (spec_of(MissingGradient), ENCODER, {"gain": True}, "gradients", "Jacobian mismatch"),
    (spec_of(UnusedParameter), ENCODER, {"gain": True}, "gradients", "gain gets no gradient"),
    (spec_of(FirstDerivativeAlone), DECODER, {}, "second_derivatives", "should be"),
    (spec_of(DrawsWithoutAWord), ENCODER, {}, "redraws", "draws_features is False, and the output changed"),
    (spec_of(ReadsPaddedQueries), ENCODER, {}, "padding_of_any_content", "not finite"),
    (spec_of(NanWithoutKeys), DECODER, {}, "fully_masked_rows", "not finite"),
    (spec_of(HeadMixing), ENCODER, {}, "head_permutation", "permuted heads"),
    (spec_of(LooksFirst), DECODER, {}, "calls_of_nothing", "amax"),
    (spec_of(TakesTurns), DECODER, {}, "keys_of_groups", "output"),
    (spec_of(WrongLayout), ENCODER, {}, "shapes_and_dtypes", "shape (2, 1, 4, 16)"),
    (spec_of(IgnoresScaling), ENCODER, {}, "exact_limit", "padding=none"),
    (spec_of(OverflowsHalf), ENCODER, {}, "low_precision", "torch.float16"),
    (spec_of(LogitsInHalf), ENCODER, {}, "half_precision", "keys x100 in torch.float16: output is off"),
    (spec_of(SumsInHalf), DECODER, {}, "half_precision", "values x500 in torch.float16: output is off by inf"),
    (spec_of(NotSaved), ENCODER, {}, "state_dict_round_trip", "differ after a reload"),
    (spec_of(NotReset), ENCODER, {}, "reset_parameters", "meta device leaves table"),
    (spec_of(ChangesBetweenCalls), ENCODER, {}, "gradient_checkpointing", "checkpointed"),
    (spec_of(GraphBreak), ENCODER, {}, "compile_full_graph", "data-dependent"),
    (spec_of(ExportsAnotherForm), ENCODER, {}, "export_any_length", "2 x 24, padding=right"),
    (spec_of(BuiltAnyway, decoder=False, refusal=REFUSAL), DECODER, {}, "refusal", "was built"),
    (
        spec_of(DenseAttention, config_class=LenientConfig),
        ENCODER,
        {},
        "options_survive_json",
        "unknown option",
    ),
]
