"""Text to ids and back, streaming, end tokens and the sandboxed chat template."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from specdec.errors import CheckpointError, PromptError
from specdec.tokenizer import Detokenizer, Tokenizer

TEXT = ["def f(x):\n    return x + 1\n", "Grüße, 世界! 🙂🙃", "the quick brown fox " * 20]
CHAT = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, **config):
    """A small byte-level tokenizer with two special tokens and one added token with a space."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("a b ü", special=False)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, eos_token="<|im_end|>", chat_template=CHAT)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.open(folder)


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.add(token) for token in ids] + [detokenizer.finish()]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_round_trip_and_streaming_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special=False)
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == text
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    # No piece carries half a character.
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 450), max_size=60))
def test_streaming_any_ids_equals_the_librarys_own_decoding(tokenizer, ids):
    """Invalid UTF-8, special tokens, added tokens and ids above the vocabulary included."""
    expected = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == expected


def test_a_character_is_never_split(tokenizer):
    ids = tokenizer.encode("🦜", add_special=False)
    assert len(ids) > 1
    assert stream(tokenizer, ids) == [""] * (len(ids) - 1) + ["🦜", ""]
    assert stream(tokenizer, ids[:-1])[-1] == "\ufffd"


def test_streaming_does_not_slow_down_with_length(tokenizer):
    ids = tokenizer.encode("x = 1\n", add_special=False) * 20_000
    detokenizer = tokenizer.detokenizer()

    def seconds(part):
        start = time.perf_counter()
        for token in part:
            detokenizer.add(token)
        return time.perf_counter() - start

    parts = [seconds(ids[start : start + 4000]) for start in range(0, len(ids), 4000)]
    assert min(parts[-5:]) < 5 * min(parts[:5])


def test_every_token_has_its_bytes(tokenizer):
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id("a b ü")) == "a b ü".encode()
    size = tokenizer.backend.get_vocab_size()
    assert tokenizer.token_bytes(size) == b""
    single = {tokenizer.token_bytes(token) for token in range(size)}
    assert {bytes([byte]) for byte in range(256)} <= single


def test_missing_and_broken_tokenizer_json(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.open(tmp_path)


def test_other_decoders_are_refused(tmp_path):
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="decoder is none; only ByteLevel"):
        Tokenizer.open(tmp_path)
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="decoder is Metaspace"):
        Tokenizer.open(tmp_path)


def test_truncation_left_in_the_file_does_not_cut_prompts(tmp_path):
    backend = write_tokenizer(tmp_path)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    opened = Tokenizer.open(tmp_path)
    assert "".join(stream(opened, opened.encode(TEXT[2]))) == TEXT[2]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"config.json": {"eos_token_id": 7}}, [7]),
        ({"config.json": {"text_config": {"eos_token_id": 8}}}, [8]),
        ({"generation_config.json": {"eos_token_id": [9, 7]}, "config.json": {}}, [7, 9]),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, [1]),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}}, [1]),
        ({"config.json": {"eos_token_id": 3}, "tokenizer_config.json": {"eos_token": None}}, [3]),
    ],
)
def test_end_tokens_from_every_file(tmp_path, files, expected):
    write_tokenizer(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert list(Tokenizer.open(tmp_path).eos_ids) == expected


@pytest.mark.parametrize("value", ["7", [1.5], -1, True])
def test_a_wrong_end_token_is_named(tmp_path, value):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id"):
        _ = Tokenizer.open(tmp_path).eos_ids


def test_an_end_token_outside_the_vocabulary_is_named(tmp_path):
    write_tokenizer(tmp_path, eos_token="</nope>")
    with pytest.raises(CheckpointError, match="eos_token '</nope>' is not in"):
        _ = Tokenizer.open(tmp_path).eos_ids


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_broken_companion_file_is_named(tmp_path, name):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text("[1")
    with pytest.raises(CheckpointError, match=name):
        _ = Tokenizer.open(tmp_path).eos_ids


MESSAGES = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi"}]
RENDERED = (
    "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def test_the_template_renders_and_encodes(tokenizer):
    assert tokenizer.has_template
    text = tokenizer.apply_template(MESSAGES)
    assert text == RENDERED
    ids = tokenizer.encode(text, add_special=False)
    assert ids[0] == tokenizer.backend.token_to_id("<|im_start|>")
    assert "".join(stream(tokenizer, ids)) == text


def test_named_templates_and_the_jinja_file(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT}]
    write_tokenizer(tmp_path, chat_template=named)
    assert Tokenizer.open(tmp_path).apply_template(MESSAGES) == RENDERED
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.open(tmp_path).apply_template(MESSAGES) == "from the file"
    (tmp_path / "chat_template.jinja").unlink()
    write_tokenizer(tmp_path, chat_template=named[:1])
    with pytest.raises(CheckpointError, match="no 'default' entry, only 'tool_use'"):
        Tokenizer.open(tmp_path)


def render(folder, template, **config):
    write_tokenizer(folder, chat_template=template, **config)
    return Tokenizer.open(folder).apply_template(MESSAGES)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "hi"}'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% generation %}{{ bos_token }}!{% endgeneration %}", "<s>!"),
        ("{% if tools %}tools{% else %}none{% endif %}", "none"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if enable_thinking is defined and enable_thinking %}a{% endif %}b", "b"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
    ],
)
def test_what_published_templates_use(tmp_path, template, expected):
    assert render(tmp_path, template, bos_token="<s>") == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{% set x = cycler.__init__.__globals__.os.popen('id').read() %}{{ x }}",
    ],
)
def test_a_template_that_leaves_the_sandbox_is_refused(tmp_path, template):
    with pytest.raises(PromptError, match="tried to leave its sandbox"):
        render(tmp_path, template)


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].nope.deeper }}", "nope"),
        ("{{ range(10000000) | list }}", "Range too big"),
    ],
)
def test_a_failing_template_is_a_prompt_error(tmp_path, template, word):
    with pytest.raises(PromptError, match=word):
        render(tmp_path, template)


def test_a_template_that_does_not_parse_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="does not parse at line 1"):
        render(tmp_path, "{% for %}")


def test_no_template(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    assert not tokenizer.has_template
    with pytest.raises(PromptError, match="no chat template"):
        tokenizer.apply_template(MESSAGES)
