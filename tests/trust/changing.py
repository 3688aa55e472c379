"""Everything else that a user does to a model: it is converted, trained, copied, saved, cast, adapted."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import peft
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from transformers import AutoModel, AutoModelForCausalLM

from hf_linear_attn import convert_model, redraw_features, revert_model
from hf_linear_attn.auto_config import IMPLEMENTATION
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.variants.base import AttentionVariant
from tests.tiny import FAMILIES, base_model, causal_families, causal_lm, is_causal, without_dropout
from tests.trust.asking import Asking
from tests.trust.reference import SINGLE, family_of, is_decoder
from tests.trust.user import LAYERS, Batch, lengths, seeds

APART = 64  # an adapter rounds more often than the weights that it is merged into
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])


class UserActions(Asking):
    """All that a user does, in any order."""

    @initialize(family=st.sampled_from(FAMILIES), decoder=st.booleans(), seed=seeds)
    def begin(self, family: str, decoder: bool, seed: int) -> None:
        self.decoder = is_causal(family) or (decoder and family in causal_families())
        torch.manual_seed(seed)
        build = causal_lm if self.decoder else base_model
        self.model: Any = build(family, num_hidden_layers=LAYERS, **without_dropout(family))
        self.family = family
        if seed % 4:
            self.convert([seed, seed + 1], [1, 2, seed % 3], seed % 3 or None, None, "auto", seed)

    # --- converting ------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.converted)
    @rule(
        kinds=st.lists(seeds, min_size=1, max_size=2),
        places=st.lists(st.integers(0, 2), min_size=LAYERS, max_size=LAYERS),
        steps=st.sampled_from([None, None, 0, 2]),
        longer=st.sampled_from([None, None, 192]),
        backend=st.sampled_from(["auto", "torch"]),
        seed=seeds,
    )
    def convert(
        self, kinds: list[int], places: list[int], steps: int | None, longer: int | None, backend: str, seed: int
    ) -> None:
        """Kind 0 is softmax, unless all layers are; then every layer is of the first kind."""
        kinds_: list[Any] = [None, *map(self.options_of, kinds)]
        layers = len(self.layers())
        mapping = {place: kinds_[kind % len(kinds_)] for place, kind in enumerate(places[:layers])}
        if not any(mapping.values()):
            mapping = dict.fromkeys(range(layers), kinds_[1])
        given: dict[str, Any] = {"backend": backend, "max_length": longer}
        if steps is not None:
            calibration = [Batch.draw([30, 17], "right", seed), Batch.draw([12], "left", seed + 1)]
            given["calibration"] = [{"input_ids": b.ids, "attention_mask": b.mask} for b in calibration]
            given["calibration_steps"] = steps
        with self.may_refuse("convert"):
            convert_model(self.model, mapping, **given)
            self.nudge(seed)
        self.changed()

    def nudge(self, seed: int) -> None:
        """Move what conversion added off its start, where much is 0 and nothing would show."""
        generator = torch.Generator().manual_seed(seed)
        seen = set()
        with torch.no_grad():
            for module in self.model.modules():
                for parameter in module.parameters() if isinstance(module, AttentionVariant) else ():
                    if parameter not in seen:
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.add_(0.05 * noise.to(parameter.dtype))
                        seen.add(parameter)

    @precondition(lambda self: self.converted)
    @rule(keep=st.booleans())
    def revert(self, keep: bool) -> None:
        own = {n: x.clone() for n, x in self.model.state_dict().items() if ".linear_attn." not in n}
        revert_model(self.model, keep_positions=keep)
        left = self.model.state_dict()
        assert left.keys() == own.keys()
        for name, x in left.items():
            assert torch.equal(x, own[name][: len(x)] if x.ndim else own[name]), name
        assert not any(isinstance(module, AttentionVariant) for module in self.model.modules())
        assert type(self.model).__module__.startswith("transformers.")
        self.changed()

    @precondition(lambda self: self.converted)
    @rule(to=st.sampled_from(["sdpa", IMPLEMENTATION, IMPLEMENTATION]))
    def switch(self, to: str) -> None:
        self.model.set_attn_implementation(to)

    @precondition(lambda self: self.converted)
    @rule(seed=seeds)
    def redraw(self, seed: int) -> None:
        with self.may_refuse("redraw"):
            redraw_features(self.model, seed)
        self.changed()

    @precondition(lambda self: len(self.layers()) > 1)
    @rule(place=st.integers(0, LAYERS - 1))
    def drop_a_layer(self, place: int) -> None:
        layers = self.layers()
        del layers[place % len(layers)]
        self.model.config.num_hidden_layers = len(layers)
        if getattr(self.model.config, "layer_types", None) is not None:
            self.model.config.layer_types = ["full_attention"] * len(layers)
        if not self.converted:
            for number, layer in enumerate(layers):
                for module in layer.modules():
                    if isinstance(getattr(module, "layer_idx", None), int):
                        module.layer_idx = number
        else:  # the config follows at the next call
            with torch.no_grad():
                self.call(Batch.draw([5], "left", 0), 5, plain=True)
        self.changed()

    # --- training ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.dtype in (torch.float32, torch.float64))
    @rule(
        row_lengths=lengths,
        where=st.sampled_from(["left", "right"]),
        seed=seeds,
        new_only=st.booleans(),
        recompute=st.booleans(),
    )
    def train(self, row_lengths: list[int], where: str, seed: int, new_only: bool, recompute: bool) -> None:
        """A step whose gradients are those of the rows one by one."""
        batch = Batch.draw(row_lengths, where, seed)
        generator = torch.Generator().manual_seed(seed)
        given: dict[str, Any] = {"use_cache": False} if is_decoder(self.model) else {}
        reference = self.reference()
        weights: list[torch.Tensor] = []

        def gradients(model: Any, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            if not weights:
                weights.extend(torch.randn(x.shape, generator=generator).double() for x in outputs)
            loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True))
            model.zero_grad()
            loss.backward()
            return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        self.model.train()
        if recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        output = self.call(batch, batch.ids.shape[1], plain=True, **given)
        ours = gradients(self.model, batch.real_outputs(output))
        if recompute:
            self.model.gradient_checkpointing_disable()
            self.model.disable_input_require_grads()
        self.model.eval()
        theirs = [
            gradients(model, [reference.row(model, ids) for ids in batch.rows()])
            for model in (reference.own, reference.exact)
        ]
        for name in ours.keys() | theirs[1].keys():
            own, exact = (x.get(name) for x in theirs)
            got = ours.get(name)
            if exact is None:
                assert got is None or not bool(got.any()), f"{name} has a gradient, and none row by row"
                continue
            got = torch.zeros_like(exact) if got is None else got
            noise = float((own.double() - exact).abs().max())
            allowed = 8 * noise + 256 * SINGLE * max(1.0, float(exact.abs().max()))
            off = float((got.double() - exact).abs().max())
            assert off <= allowed, f"gradient of {name} is off by {off:.3g}, allowed {allowed:.3g}"
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None and (".linear_attn." in name or not new_only):
                    parameter.sub_(0.01 * parameter.grad / parameter.grad.abs().max().clamp(min=1e-6))
        self.model.zero_grad()
        self.changed()

    # --- copies, files, weights -----------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["deepcopy", "pickle", "state_dict"]), seed=seeds)
    def copied(self, how: str, seed: int) -> None:
        """Go on with a copy; the original must stay what it is."""
        batch = Batch.draw([9, 4], "right", seed)
        with torch.no_grad():
            before = self.call(batch, 9, plain=False)
            original = self.model
            if how == "deepcopy":
                self.model = copy.deepcopy(self.model)
            elif how == "pickle":
                file = io.BytesIO()
                torch.save(self.model, file)
                file.seek(0)
                self.model = torch.load(file, weights_only=False)
            else:
                self.model.load_state_dict(copy.deepcopy(self.model.state_dict()), assign=True)
                self.model.tie_weights()
            assert torch.equal(self.call(batch, 9, plain=False), before)
        if original is not self.model:
            self.twins = [*self.twins[-1:], (original, batch, before)]

    @precondition(lambda self: self.twins)
    @rule()
    def ask_the_original(self) -> None:
        present = self.model
        for original, batch, before in self.twins:
            self.model = original
            with torch.no_grad():
                assert torch.equal(self.call(batch, 9, plain=False), before), "a copy changed its original"
        self.model = present

    @rule(shards=st.booleans(), overwrite=st.booleans(), seed=seeds)
    def save_and_load(self, shards: bool, overwrite: bool, seed: int) -> None:
        self.saves += not (overwrite and self.converted)  # upstream leaves weights of an earlier save
        folder = Path(self.folder.name) / f"model{self.saves}"
        implementation = self.model.config._attn_implementation
        self.model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
        again = (AutoModelForCausalLM if self.decoder else AutoModel).from_pretrained(folder)
        assert type(again) is type(self.model)
        assert again.dtype == self.model.dtype
        ours, theirs = self.model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            assert torch.equal(x, theirs[name]), name
        if self.converted:
            assert again.config._attn_implementation == IMPLEMENTATION
            assert again.config.linear_attn == self.model.config.linear_attn
        self.model = again.eval()
        self.model.set_attn_implementation(implementation)
        self.forward([13, 6], "left", seed, plain=False, mode="no_grad", embeds=False, autocast=False)

    @rule(by=st.integers(0, 9), multiple=st.sampled_from([None, 8]))
    def resize(self, by: int, multiple: int | None) -> None:
        self.model.resize_token_embeddings(self.vocabulary + by, pad_to_multiple_of=multiple)
        self.changed()

    @rule(dtype=dtypes)
    def cast(self, dtype: torch.dtype) -> None:
        rotary = {n: x.clone() for n, x in self.model.named_buffers() if n.endswith("inv_freq")}
        self.model.to(dtype)
        for name, x in rotary.items():  # which a cast rounds, and a cast back would not make exact
            self.model.get_buffer(name).data = x
        self.talks = []
        self.changed()

    @precondition(lambda self: self.model.dtype in (torch.float32, torch.float64))
    @rule(
        seed=seeds,
        on=st.sampled_from(["projections", "all-linear"]),
        then=st.sampled_from(["merge", "unload", "reload"]),
    )
    def adapter(self, seed: int, on: str, then: str) -> None:
        """An adapter with weights of its own, beside the same weights merged; then merged or taken off."""
        names: Any = list(get_patcher(family_of(self.model)).projection_names)
        generator = torch.Generator().manual_seed(seed)
        batch = Batch.draw([11, 5], "left", seed)
        with torch.no_grad():
            before = self.call(batch, 11, plain=False)
        original = {n: x.clone() for n, x in self.model.state_dict().items()}
        if then == "reload":
            self.model.save_pretrained(Path(self.folder.name) / "base")
        implementation = self.model.config._attn_implementation
        config = peft.LoraConfig(r=2, target_modules=names if on == "projections" else on)
        wrapped = peft.get_peft_model(self.model, config).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            merged = copy.deepcopy(wrapped).merge_and_unload()
            self.model, plain = merged, self.model
            self.version += 1
            exact = self.reference()
            self.model = wrapped.get_base_model()
            exact.check("adapter", batch.real_outputs(self.call(batch, 11, plain=False)), batch.rows(), factor=APART)
            if then == "reload":
                wrapped.save_pretrained(Path(self.folder.name) / "adapter")
                base = (AutoModelForCausalLM if self.decoder else AutoModel).from_pretrained(
                    Path(self.folder.name) / "base"
                )
                base.set_attn_implementation(implementation)
                again = peft.PeftModel.from_pretrained(base, Path(self.folder.name) / "adapter").eval()
                self.model = again.get_base_model()
                outputs = batch.real_outputs(self.call(batch, 11, plain=False))
                exact.check("adapter reloaded", outputs, batch.rows(), factor=APART)
            self.model = plain
            if then == "unload":
                self.model = wrapped.unload()
                assert torch.equal(self.call(batch, 11, plain=False), before)
                left = self.model.state_dict()
                assert left.keys() == original.keys()
                assert all(torch.equal(x, original[n]) for n, x in left.items())
            else:
                self.model = wrapped.merge_and_unload()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.changed()
