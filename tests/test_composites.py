"""Models that hold a converted model: what was saved runs the conversion again, however it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SpeechEncoderDecoderModel,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_linear_attn import convert_model
from hf_linear_attn.variants.base import AttentionVariant
from tests.tiny import assert_bit_equal, base_model, causal_lm, token_batch

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """How often a variant ran, by the part of `model` that holds it."""
    runs: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, AttentionVariant):
            part = name.split(".")[0]

            def count(*_: Any, part: str = part) -> None:
                runs[part] = runs.get(part, 0) + 1

            handles.append(module.register_forward_hook(count))
    yield runs
    for handle in handles:
        handle.remove()


def run(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Float outputs of a forward, and how often variants ran."""
    with torch.no_grad(), counted(model.eval()) as runs:
        out = model(**batch)
    return [x for x in out.values() if isinstance(x, torch.Tensor) and x.is_floating_point()], runs


def decoder() -> PreTrainedModel:
    return causal_lm("bert", add_cross_attention=True)


def bert_to_bert(parts: str) -> PreTrainedModel:
    encoder, dec = base_model("bert"), decoder()
    if "encoder" in parts:
        convert_model(encoder, "performer")
    if "decoder" in parts:
        convert_model(dec, "linear")
    model = EncoderDecoderModel(encoder=encoder, decoder=dec)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model.eval()


def seq2seq_batch() -> dict[str, torch.Tensor]:
    return {**token_batch(), "decoder_input_ids": token_batch(length=9, seed=1)["input_ids"]}


PARTS = ("encoder", "decoder", "encoder+decoder")


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("auto", [EncoderDecoderModel, AutoModelForSeq2SeqLM], ids=lambda cls: cls.__name__)
def test_a_saved_encoder_decoder_runs_the_conversion_again(parts: str, auto: Any, tmp_path: Path) -> None:
    model = bert_to_bert(parts)
    expected, runs = run(model, seq2seq_batch())
    assert runs == dict.fromkeys(parts.split("+"), 2)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    outputs, runs = run(again, seq2seq_batch())
    assert runs == dict.fromkeys(parts.split("+"), 2)
    assert_bit_equal(outputs, expected)
    ids = token_batch()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("parts", PARTS)
def test_an_encoder_decoder_built_from_its_config_runs_the_conversion(parts: str, tmp_path: Path) -> None:
    model = bert_to_bert(parts)
    model.save_pretrained(tmp_path)
    for config in (model.config, EncoderDecoderConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        built = EncoderDecoderModel(config=config)
        built.load_state_dict(model.state_dict())
        assert run(built, seq2seq_batch())[1] == dict.fromkeys(parts.split("+"), 2)
        assert_bit_equal(run(built, seq2seq_batch())[0], run(model, seq2seq_batch())[0])


def test_a_callers_choice_reaches_the_parts(tmp_path: Path) -> None:
    bert_to_bert("encoder+decoder").save_pretrained(tmp_path)

    def parts_that_ran(**choice: Any) -> set[str]:
        return set(run(EncoderDecoderModel.from_pretrained(tmp_path, **choice), seq2seq_batch())[1])

    assert parts_that_ran(attn_implementation="sdpa") == set()
    assert parts_that_ran(attn_implementation={"encoder": "eager"}) == {"decoder"}
    model = EncoderDecoderModel.from_pretrained(tmp_path)
    model.set_attn_implementation({"decoder": "sdpa"})
    assert set(run(model, seq2seq_batch())[1]) == {"encoder"}


def vision_encoder_decoder() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    model = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**VISION)), decoder=convert_model(decoder(), "linear"))
    return model, {"pixel_values": PIXELS, "decoder_input_ids": token_batch()["input_ids"]}


def speech_encoder_decoder() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [5, 4]}
    audio = Wav2Vec2Config(**fields, **convolutions, num_feat_extract_layers=2, num_conv_pos_embedding_groups=2)
    model = SpeechEncoderDecoderModel(encoder=Wav2Vec2Model(audio), decoder=convert_model(decoder(), "linear"))
    sound = torch.linspace(-1, 1, 800).sin().reshape(2, 400)
    return model, {"input_values": sound, "decoder_input_ids": token_batch()["input_ids"]}


def dual_encoder() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    vision = CLIPVisionModel(CLIPVisionConfig(**VISION))
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=convert_model(base_model("bert"), "performer"))
    return model, {"pixel_values": PIXELS, **token_batch()}


def vision_language(family: str = "llama") -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    text = convert_model(causal_lm(family), "linear").config
    vision = CLIPVisionConfig(**VISION)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    model = LlavaForConditionalGeneration(config)
    ids = token_batch()["input_ids"]
    ids[:, :4] = 4
    return model, {"pixel_values": PIXELS, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


COMPOSITES = {
    "vision-encoder-decoder": vision_encoder_decoder,
    "speech-encoder-decoder": speech_encoder_decoder,
    "vision-text-dual-encoder": dual_encoder,
    **{f"llava-{family}": lambda family=family: vision_language(family) for family in ("llama", "qwen2", "mistral")},
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_kind_of_composite_reloads_converted(name: str, tmp_path: Path) -> None:
    model, batch = COMPOSITES[name]()
    expected, runs = run(model, batch)
    assert list(runs.values()) == [2]
    model.save_pretrained(tmp_path)
    for again in (type(model).from_pretrained(tmp_path), type(model)(AutoConfig.from_pretrained(tmp_path))):
        again.load_state_dict(model.state_dict())
        outputs, again_runs = run(again, batch)
        assert again_runs == runs
        assert_bit_equal(outputs, expected)


def test_a_part_converted_in_place_reloads_once_the_composite_holds_its_config(tmp_path: Path) -> None:
    model = EncoderDecoderModel(encoder=base_model("bert"), decoder=decoder())
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model.config.encoder = convert_model(model.encoder, "linear").config
    expected, runs = run(model, seq2seq_batch())
    model.save_pretrained(tmp_path)
    outputs, again = run(EncoderDecoderModel.from_pretrained(tmp_path), seq2seq_batch())
    assert again == runs == {"encoder": 2}
    assert_bit_equal(outputs, expected)


def test_a_composite_without_the_weights_of_its_part_is_refused(tmp_path: Path) -> None:
    """Transformers reports what it did not find and draws it anew: a method that was never calibrated or trained."""
    bert_to_bert("encoder").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    save_file(
        {name: x for name, x in held.items() if not name.endswith("layer.1.attention.self.linear_attn.omega")}, file
    )
    with pytest.raises(ValueError, match=r"LinearAttnBertModel: missing keys: encoder\.layer\.1\S+\.omega\."):
        EncoderDecoderModel.from_pretrained(tmp_path)


def test_layers_that_moved_in_a_part_are_described_or_refused(tmp_path: Path) -> None:
    """A composite saves the configs of its parts by itself: they know what moved from the next forward on."""
    encoder = convert_model(base_model("bert"), {0: "performer", 1: "linear"})
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder()).eval()
    encoder.encoder.layer = torch.nn.ModuleList(reversed(encoder.encoder.layer))
    model.save_pretrained(tmp_path / "early")
    with pytest.raises(ValueError, match="missing keys"):
        EncoderDecoderModel.from_pretrained(tmp_path / "early")
    expected, _ = run(model, seq2seq_batch())
    model.save_pretrained(tmp_path / "settled")
    outputs, _ = run(EncoderDecoderModel.from_pretrained(tmp_path / "settled"), seq2seq_batch())
    assert_bit_equal(outputs, expected)


def sub_config_keys() -> list[tuple[str, str]]:
    """(model type, key) of every config in Transformers that takes another model's config under `key`."""
    found = []
    for model_type, name in CONFIG_MAPPING_NAMES.items():
        config_class = None if model_type.startswith("linear_attn") else getattr(transformers, name)
        found += [(model_type, k) for k, v in getattr(config_class, "sub_configs", {}).items() if v is AutoConfig]
    return found


def test_no_composite_config_changes_what_a_converted_part_runs() -> None:
    upstream = base_model("llama").config
    converted = convert_model(base_model("llama"), "linear").config

    def held(model_type: str, key: str, config: Any) -> list[Any]:
        """What a composite makes of `config`: on construction, and after a trip through JSON."""
        composite_class: Any = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
        composite = composite_class(**{key: type(config).from_dict(config.to_dict())})
        stored = json.loads(composite.to_json_string())
        return [getattr(composite, key), getattr(composite_class.from_dict(stored), key)]

    tried = 0
    for model_type, key in sub_config_keys():
        try:
            fits = all(type(config) is type(upstream) for config in held(model_type, key, upstream))
        except Exception:  # no place for a text model, each composite says so in its own way
            continue
        if fits:
            tried += 1
            for config in held(model_type, key, converted):
                assert type(config) is type(converted), model_type
                assert config._attn_implementation == "linear_attn", model_type
                assert config.linear_attn == converted.linear_attn, model_type
    assert tried > 40


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["sdpa", "eager"])
def test_softmax_in_the_file_is_refused(field: str, value: str, tmp_path: Path) -> None:
    convert_model(base_model("bert"), "performer").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, field: value}))
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=rf"{field}='{value}'.*from_pretrained"):
            load(tmp_path)
    file.write_text(json.dumps({**config, field: None}))
    assert run(AutoModel.from_pretrained(tmp_path), token_batch())[1] == {"encoder": 2}


def test_softmax_in_a_composites_file_is_refused_for_its_part(tmp_path: Path) -> None:
    bert_to_bert("encoder").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["encoder"]["attn_implementation"] == "linear_attn"
    config["encoder"]["attn_implementation"] = "sdpa"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        EncoderDecoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
def test_a_callers_softmax_wins_and_is_not_saved(choice: str, tmp_path: Path) -> None:
    convert_model(base_model("bert"), "performer").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, attn_implementation=choice)
    for model in (
        AutoModel.from_pretrained(tmp_path, attn_implementation=choice),
        AutoModel.from_config(config),
        AutoModel.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation=choice),
    ):
        assert model.config._attn_implementation == choice
        assert run(model, token_batch())[1] == {}
        model.save_pretrained(tmp_path / "again")
        assert run(AutoModel.from_pretrained(tmp_path / "again"), token_batch())[1] == {"encoder": 2}
