"""Text codec, streaming decoder, stop strings and chat templates, against tokenizers and transformers."""

from __future__ import annotations

import builtins
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hf_folders import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from coordinator.tokens import StopFinder, TextCodec
from protocol.errors import CheckpointInvalid, ConfigInvalid, RequestInvalid, TokenizerMissing

WORDS = ["Hello there, how are you?", "Grüße aus Köln", "数学 и физика", "🙂🙃 smile", "the end of the tale\n\n"]


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Like Llama 2: pieces with U+2581, bytes as <0xXX>, one leading space stripped."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "▁the", "▁end", "a", "b", "é", "数"]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("text", [*WORDS, "", " ", "<|user|> <s>"])
def test_encodes_and_decodes_as_transformers(folder: Path, text: str) -> None:
    codec, theirs = TextCodec.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert codec.encode(text) == theirs.encode(text)
    assert codec.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert codec.decode(codec.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert codec.decode([0, 1], skip_special_tokens=False) == "<s></s>"


def test_a_cut_or_padding_in_the_file_is_not_applied(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec.load(tmp_path)
    assert codec.decode(codec.encode(WORDS[0])) == WORDS[0]
    assert not codec.can_chat


def test_lone_surrogates_are_a_bad_request(folder: Path) -> None:
    with pytest.raises(RequestInvalid, match="Unicode"):
        TextCodec.load(folder).encode("a\ud800b")


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMissing, match=r"tokenizer\.json"):
        TextCodec.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointInvalid, match=name):
        TextCodec.load(tmp_path)


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_missing_packages_name_the_extra(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(f"no {name}", name=name)
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigInvalid, match=rf"{package}.*manyhands\[serve\]"):
        TextCodec.load(folder)


def codec_of(tokenizer: Tokenizer) -> TextCodec:
    return TextCodec(tokenizer, {}, None, datetime.now)


BYTE_LEVEL, BYTE_FALLBACK = codec_of(byte_level_tokenizer()), codec_of(byte_fallback_tokenizer())


TEXT_CHARS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581 ")  # U+2581 decodes to a space


def streamed(codec: TextCodec, ids: list[int]) -> list[str]:
    stream = codec.stream()
    return [*(stream.push(one) for one in ids), stream.finish()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=30))
def test_streamed_pieces_are_the_whole_decoding_byte_level(ids: list[int]) -> None:
    assert "".join(streamed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 265), st.integers(259, 265)), max_size=30))
def test_streamed_pieces_are_the_whole_decoding_byte_fallback(ids: list[int]) -> None:
    text, whole = "".join(streamed(BYTE_FALLBACK, ids)), BYTE_FALLBACK.decode(ids)
    # One bad byte turns its whole run of byte tokens into U+FFFD, characters already shown too.
    assert text == whole or ("\ufffd" in text and "\ufffd" in whole)


def test_garbage_without_end_is_shown_and_costs_no_more_and_more() -> None:
    stream = BYTE_LEVEL.stream()
    bad = BYTE_LEVEL._tokenizer.token_to_id("\u0143")  # byte 0xFF or the like: never the start of a character
    pieces = [stream.push(bad) for _ in range(200)]
    assert any(pieces) and len(stream._window) < 100
    assert "".join(pieces) + stream.finish() == BYTE_LEVEL.decode([bad] * 200)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK]), st.text(TEXT_CHARS, max_size=20))
def test_no_piece_of_a_text_ends_inside_a_character(codec: TextCodec, text: str) -> None:
    pieces = streamed(codec, codec.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stops_are_found_however_the_pieces_fall(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    found = [finder.push(piece) for piece in pieces]
    text = "".join(one.text for one in found) + finder.finish()
    stopped = bool(found) and found[-1].stopped
    assert (text, stopped) == naive_stop("".join(pieces), stops)


def test_stop_finder_holds_back_only_what_may_stop() -> None:
    finder = StopFinder(["</s>", "User:"])
    shown = [finder.push(piece) for piece in ["a <", "b </", "s", "x Us", "er:", "more"]]
    assert [one.text for one in shown] == ["a ", "<b ", "", "</sx ", "", ""]
    assert [one.stopped for one in shown] == [False] * 4 + [True] * 2
    assert finder.finish() == ""
    with pytest.raises(RequestInvalid):
        StopFinder(["a", ""])


CHATML = """{%- if tools %}tools: {{ tools | tojson }}{% endif -%}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}{{ raise_exception('System comes first') }}{% endif %}
    {{- '<|im_start|>' + message['role'] ~ '\n' ~ message.content | trim ~ '<|im_end|>' ~ '\n' }}
    {%- if message.tool_calls is defined %}{{ message.tool_calls | tojson(indent=2) }}{% endif %}
    {%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
{%- endfor %}
{%- set ns = namespace(seen=0) %}
{%- for message in messages | selectattr('role', 'equalto', 'user') %}{% set ns.seen = ns.seen + 1 %}{% endfor %}
    {% generation %}{% set hidden = 1 %}{{ ns.seen * 2 }} {{ '%s|%5d' % ('x', 3) }}{% endgeneration %}
{{ bos_token }}{{ eos_token }}{{ pad_token }}
{{ 'ab'.replace('a', '<&>') }} {{ ['p', 'q'] | join('-') }} {{ [1] + [2] }}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Grüße <b>&"}],
    [
        {"role": "system", "content": "be brief "},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "x"},
    ],
    [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"ä": [1, None, 2.5]}}]}],
    [{"role": "assistant", "content": "a", "reasoning": "because", "tool_calls": None}],
]


def with_template(folder: Path, tmp_path: Path, template: Any, kind: str = "file") -> TextCodec:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if kind == "file":
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
    return TextCodec.load(tmp_path, now=lambda: datetime(2026, 1, 2))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("kind", ["file", "string", "list"])
def test_renders_byte_for_byte_as_transformers(
    folder: Path, tmp_path: Path, chat: list[dict[str, Any]], prompt: bool, kind: str
) -> None:
    template: Any = CHATML
    if kind == "list":
        template = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": CHATML}]
    codec = with_template(folder, tmp_path, template, kind)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert codec.can_chat
    assert codec.render_chat(chat, prompt) == expected
    ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
    assert codec.encode(expected, add_special_tokens=False) == ids


def test_templates_print_the_time_they_are_given(folder: Path, tmp_path: Path) -> None:
    codec = with_template(folder, tmp_path, "{{ strftime_now('%d %b %Y') }}")
    assert codec.render_chat([{"role": "user"}]) == "02 Jan 2026"


HOSTILE = [
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ [0] * 10**10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x | replace('x', 'xx') %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = 'x'.join([n.x, n.x]) %}{% endfor %}",
    "{% set n = namespace(x=2) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x ~ 'a' }}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{n.x|string}}",
    "{{ (['x' * 10**7] * 100) | tojson }}",
    "{{ 'x'.center(10**10) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'x' | indent(10**10, first=true) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**10) }}",
    "{% for i in range(10**4) %}{{ 'x' * 10**4 }}{% endfor %}",
    "{% for i in range(10**10) %}{% endfor %}",
    "{{ lipsum(10**6) }}",
    "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ namespace(__init__=1) }}",
    "{{ 1 // 0 }}",
    "{{ raise_exception('no such role') }}",
    "{{ nothing.at.all }}",
    "{{ messages | tojson(more=1) }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_end_in_a_named_refusal(folder: Path, tmp_path: Path, template: str) -> None:
    codec = with_template(folder, tmp_path, template)
    with pytest.raises(RequestInvalid, match=r"chat_template\.jinja"):
        codec.render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 | nofilter }}", "x" * (1 << 20) + "y"])
def test_broken_templates_are_named_when_used(folder: Path, tmp_path: Path, template: str) -> None:
    codec = with_template(folder, tmp_path, template)
    with pytest.raises(CheckpointInvalid, match=r"chat_template\.jinja"):
        codec.render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("template", [5, {"a": 1}])
def test_a_template_of_the_wrong_type_is_refused(folder: Path, tmp_path: Path, template: Any) -> None:
    with pytest.raises(CheckpointInvalid, match="chat_template"):
        with_template(folder, tmp_path, template, "string")


def test_no_template_and_no_messages_are_bad_requests(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match="template"):
        TextCodec.load(folder).render_chat([{"role": "user", "content": "hi"}])
    with pytest.raises(RequestInvalid, match="message"):
        with_template(folder, tmp_path, "x").render_chat([])


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None, "chat_template": "{{ bos_token }}!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextCodec.load(tmp_path).render_chat([{"role": "user"}]) == "<s>!"
