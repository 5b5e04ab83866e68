"""What decides a text besides the weights.   python -m pytest tests/test_generation_settings.py"""

from conftest import tiny_bart, tiny_model, tiny_tokenizer

import generation_settings
import models


def test_ignored_settings_of_usual_models():
    """Special tokens and defaults are none."""
    for kind in ("gpt2", "llama", "t5"):
        assert generation_settings.ignored_settings(tiny_model(kind)) == {}
    assert generation_settings.ignored_settings(tiny_bart()) == {}


def test_ignored_settings_that_change_texts():
    """Each that would change what model.generate writes, token 0 included, but no neutral value."""
    model = tiny_model("gpt2")
    settings = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[3]]}
    settings |= {"forced_bos_token_id": 0, "num_beams": 4, "suppress_tokens": [5]}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert generation_settings.ignored_settings(model) == settings
    for name in ("repetition_penalty", "num_beams"):
        setattr(model.generation_config, name, 1)
    found = generation_settings.ignored_settings(model)
    assert "repetition_penalty" not in found
    assert "num_beams" not in found


def test_load_model_names_what_is_ignored_once(tmp_path, capsys):
    """A model whose generation_config.json sets more than counts is named, one time."""
    model = tiny_model("gpt2")
    model.generation_config.repetition_penalty = 1.2
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for _ in range(2):
        models.load_model(str(tmp_path))
    out = capsys.readouterr().out
    assert out.count("sets repetition_penalty 1.2: that does not count here") == 1


def test_eos_token_ids_of_several():
    """The tokenizer's and those of the generation config end a text."""
    model = tiny_model("gpt2")
    model.generation_config.eos_token_id = [5, 7]
    assert generation_settings.eos_token_ids(model, tiny_tokenizer()) == {0, 5, 7}


def test_stream_seeds_of_equal_prompts():
    """The first of equal prompts has the seed that it has alone; none is there twice."""
    [alone] = generation_settings.stream_seeds(3, ["a"], range(2))
    seeds = generation_settings.stream_seeds(3, ["b", "a", "a"], range(2))
    assert seeds[1] == alone
    assert len({seed for of_prompt in seeds for seed in of_prompt}) == 6
