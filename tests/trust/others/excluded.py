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
