"""Tests of others that are not run as they are, and why: the one list."""

# In every run.
EVERYWHERE = {"test_generation_tester_mixin_inheritance": "the source distribution lacks the generation mixin"}
# On converted models besides.
CONVERTED = {
    "test_capture_outputs_decorator": "asks for attention weights, which converted layers never form: refused by name",
    "test_config_attn_implementation_setter": "builds a config that says it is not converted: refused by name",
    "test_sdpa_can_dispatch_non_composite_models": "expects that a load dispatches to SDPA, not to what was converted",
    "test_model_weights_reload_no_missing_tied_weights": "loads a file without weights: an error, not a warning",
}
# On converted models these are told that the model forms no attention weights.
WITHOUT_ATTENTIONS = ("test_model_outputs_equivalence", "test_retain_grad_hidden_states_attentions")

# Of PEFT's tests, in every run.
_OTHER_FAMILY = "loads a model of a family that this package does not know"
PEFT_EVERYWHERE = {
    "test_prompt_tuning_text_tokenizer_kwargs": _OTHER_FAMILY,
    "test_prompt_tuning_trust_remote_code": _OTHER_FAMILY,
    "test_generate_adalora_no_dropout": _OTHER_FAMILY,
    "test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask": _OTHER_FAMILY,
    "test_lora_embed_scale_is_applied": _OTHER_FAMILY,
    "test_lora_embed_scale_is_applied_mixed_batch": _OTHER_FAMILY,
    "test_prefix_tuning_gemma4_works": _OTHER_FAMILY,
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped": _OTHER_FAMILY,
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped": _OTHER_FAMILY,
}
# On converted models these messages of an error end a test, and nothing else excuses it.
_KEYS = "hands over keys and values (prefix tuning), which converted layers do not keep: refused by name"
_OLD_NAME = "PEFT 0.21 looks for the cache under its name before Transformers 5.24"
PEFT_REFUSED = {
    "of keys and values that a converted layer cannot use": _KEYS,
    "Two caches were given": _KEYS,
    # Without the mask, and on unconverted models, such a generation goes on.
    "but the call needs": f"{_OLD_NAME}, and adds its prompt before every token: refused by the length of the mask",
    "Model does not support past key values": f"{_OLD_NAME}, and refuses unconverted models as well",
}
