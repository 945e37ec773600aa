from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_samples import CHATML, TEXT, chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from autopeft.errors import DataError
from autopeft.tasks import chat_turns
from autopeft.tasks.chat_encoding import (
    NO_TOKEN,
    NOTHING_LEFT,
    ONE_TOKEN,
    Encoded,
    encode_conversation,
    encode_preferences,
    encode_rows,
)
from autopeft.tasks.chat_turns import end_of_turn
from autopeft.tasks.conversations import (
    Conversation,
    PlainText,
    PromptCompletion,
    Row,
    read_preference,
    read_row,
)
from autopeft.tasks.data import IGNORED
from autopeft.tasks.encoding import TOO_LONG

LLAMA3 = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|start|>' + m.role + '<|head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|head|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\n' + m.content | trim + '<end_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'system' %}{{ m.content + '\n' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# The system prompt is in the last turn of the user, wherever that is.
MISTRAL_LATE = (
    "{{ bos_token }}{% set last = (messages | length) - 1 - messages[-1:][0].role.count('ant') %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.index0 == last and messages[0].role == 'system' %}{{ messages[0].content + '\n' }}"
    "{% endif %}{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An end-of-text token closes the conversation, not each turn.
PHI3 = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|eot|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A name, a colon and a text, without any special token.
NAMES = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are brief."}
TALK = (
    user("What color is the sky?"),
    assistant("It is blue."),
    user("And the sun?"),
    assistant("It is in the sky."),
)
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at something.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
TEMPLATES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "chatml": (CHATML, {"eos": "<|im_end|>"}),
    "llama3": (LLAMA3, {"eos": "<|eot|>", "starts": True}),
    "gemma": (GEMMA, {"starts": True}),
    "mistral": (MISTRAL, {"starts": True}),
    "qwen3": (QWEN3, {"bos": None, "eos": "<|im_end|>"}),
    "phi3": (PHI3, {}),
    "marked": (MARKED, {"eos": "<|im_end|>"}),
    "names": (NAMES, {}),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    template, options = TEMPLATES[name]
    return chat_tokenizer(template, **options)


def learned_texts(tokenizer: Any, row: Encoded) -> list[str]:
    """The text of each run of learned tokens."""
    is_learned = row.labels != IGNORED
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_learned, [False]])))
    return [tokenizer.decode(row.ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


def encoded(tokenizer: Any, row: Any, max_length: int = 10_000) -> Encoded:
    (found,) = encode_rows(tokenizer, [row], max_length).rows
    return found


# What is learned


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("chatml", ["It is blue.<|im_end|>\n", "It is in the sky.<|im_end|>\n"]),
        ("llama3", ["It is blue.<|eot|>", "It is in the sky.<|eot|>"]),
        ("gemma", ["It is blue.<end_turn>\n", "It is in the sky.<end_turn>\n"]),
        ("mistral", [" It is blue.</s>", " It is in the sky.</s>"]),
        ("phi3", ["It is blue.<|eot|>\n", "It is in the sky.<|eot|>\n</s>"]),
        ("marked", ["It is blue.<|im_end|>", "It is in the sky.<|im_end|>"]),
        ("names", [" It is blue.\n", " It is in the sky.\n"]),
    ],
)
def test_the_assistants_turns_are_learned_with_their_end(name: str, answers: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    row = encoded(tokenizer, Conversation(TALK))
    assert learned_texts(tokenizer, row) == answers
    assert row.ids.dtype == row.labels.dtype == np.int32
    assert row.n_cut == 0
    # The tokens are those of transformers, and what comes before the last answer is the prompt.
    whole = tokenizer.apply_chat_template(list(TALK), return_dict=False)
    assert row.ids.tolist() == whole
    prompt = tokenizer.apply_chat_template(
        list(TALK[:3]), add_generation_prompt=True, return_dict=False
    )
    assert row.ids[: row.prompt_length].tolist() == prompt


@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_only_the_completion_and_no_message_of_weight_0_is_learned(name: str) -> None:
    tokenizer = tokenizer_of(name)

    def learned(row: Conversation) -> list[str]:
        return [text.strip() for text in learned_texts(tokenizer, encoded(tokenizer, row))]

    blue, sky = "It is blue.<|im_end|>", "It is in the sky.<|im_end|>"
    assert learned(Conversation(TALK, n_prompt=3)) == [sky]
    assert learned(Conversation(TALK, n_prompt=1)) == [blue, sky]
    assert learned(Conversation((TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]))) == [sky]
    assert learned(Conversation((*TALK[:3], {**TALK[3], "weight": 0}))) == [blue]


def test_a_message_after_the_last_answer_is_context_only() -> None:
    tokenizer = tokenizer_of("chatml")
    row = encoded(tokenizer, Conversation(TALK[:3]))
    assert learned_texts(tokenizer, row) == ["It is blue.<|im_end|>\n"]
    assert tokenizer.decode(row.ids).endswith("And the sun?<|im_end|>\n")


def test_a_template_that_changes_earlier_turns_teaches_the_last_one_and_says_so() -> None:
    tokenizer = tokenizer_of("qwen3")
    found = encode_rows(tokenizer, [Conversation(TALK), Conversation(TALK[:2])], 10_000)
    thought = "<think>\n\n</think>\n\n"
    assert learned_texts(tokenizer, found.rows[0]) == [f"{thought}It is in the sky.<|im_end|>\n"]
    assert learned_texts(tokenizer, found.rows[1]) == [f"{thought}It is blue.<|im_end|>\n"]
    (note,) = found.notes
    assert note.startswith("1 of 3 assistant turns, in 1 of 2 conversations, add no loss")
    # What follows the last answer would change it, so it is left out.
    open_end = encoded(tokenizer, Conversation(TALK[:3]))
    assert open_end.ids.tolist() == found.rows[1].ids.tolist()


def test_a_system_prompt_that_moves_leaves_earlier_turns_out() -> None:
    tokenizer = chat_tokenizer(MISTRAL_LATE)
    found = encode_rows(tokenizer, [Conversation((SYSTEM, *TALK))], 10_000)
    assert learned_texts(tokenizer, found.rows[0]) == [" It is in the sky.</s>"]
    assert "1 of 2 assistant turns" in found.notes[0]
    found = encode_rows(tokenizer, [Conversation(TALK)], 10_000)
    assert len(learned_texts(tokenizer, found.rows[0])) == 2
    assert found.notes == ()


def test_marks_without_the_end_of_a_turn_are_not_used() -> None:
    tokenizer = chat_tokenizer(MARKED_WITHOUT_END, eos="<|im_end|>")
    texts = learned_texts(tokenizer, encoded(tokenizer, Conversation(TALK)))
    assert texts == ["It is blue.<|im_end|>\n", "It is in the sky.<|im_end|>\n"]


def test_a_template_without_an_end_token_is_told() -> None:
    (note,) = encode_rows(tokenizer_of("names"), [Conversation(TALK)], 10_000).notes
    assert "without an end token" in note
    assert encode_rows(tokenizer_of("gemma"), [Conversation(TALK)], 10_000).notes == ()


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot|>"),
        ("gemma", "<end_turn>"),
        ("mistral", "</s>"),
        ("names", None),
    ],
)
def test_the_end_of_a_turn_is_the_templates_own(name: str, end: str | None) -> None:
    tokenizer = tokenizer_of(name)
    wanted = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert end_of_turn(tokenizer) == wanted


def test_turns_that_call_tools_are_learned() -> None:
    tokenizer = chat_tokenizer(trl_template("qwen3"), bos=None, eos="<|im_end|>")
    call = {"name": "look", "arguments": {"at": "sky"}}
    talk = [
        *TALK[:3],
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n", "tool_calls": [call]},
        {"role": "tool", "content": "blue"},
        assistant("<think>\nok\n</think>\n\nBlue."),
    ]
    row = read_row({"messages": talk, "tools": [TOOL]}, 1)
    found = encode_rows(tokenizer, [row], 10_000)  # type: ignore[list-item]
    assert learned_texts(tokenizer, found.rows[0]) == [
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n'
        "</tool_call><|im_end|>\n",
        "<think>\nok\n</think>\n\nBlue.<|im_end|>\n",
    ]
    assert "1 of 3 assistant turns" in found.notes[0]


def test_a_template_for_tools_is_used_with_tools() -> None:
    tokenizer = chat_tokenizer(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools" + CHATML}
    rows = [Conversation(TALK), Conversation(TALK, tools=(TOOL,))]
    plain, with_tools = encode_rows(tokenizer, rows, 10_000).rows
    assert tokenizer.decode(with_tools.ids) == "tools" + tokenizer.decode(plain.ids)


def test_tools_reach_the_template() -> None:
    tokenizer = tokenizer_of("llama3")
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    rows = [Conversation(TALK, tools=(tool,)), Conversation(TALK)]
    first, second = encode_rows(tokenizer, rows, 10_000).rows
    assert '"name": "look"' in tokenizer.decode(first.ids)
    assert "look" not in tokenizer.decode(second.ids)
    assert learned_texts(tokenizer, first) == learned_texts(tokenizer, second)


def test_options_reach_the_template() -> None:
    template = CHATML.replace("{% for", "{% if brief %}{{ 'brief ' }}{% endif %}{% for", 1)
    tokenizer = chat_tokenizer(template)
    row = encoded(tokenizer, Conversation(TALK, template_options={"brief": True}))
    assert tokenizer.decode(row.ids).startswith("brief <|im_start|>user")


def test_what_a_template_leaves_out_is_told() -> None:
    tokenizer = tokenizer_of("chatml")
    found = encode_rows(tokenizer, [Conversation(TALK, tools=(TOOL,)), Conversation(TALK)], 1_000)
    assert found.notes == (
        "in 1 of 2 conversations the chat template leaves out, or changes, what these say: tools",
    )
    rows = [Conversation((SYSTEM, *TALK)), Conversation(TALK)]
    silent = MISTRAL.replace("m.content + '\n'", "''")
    (note,) = encode_rows(chat_tokenizer(silent), rows, 1_000).notes
    assert note.endswith("what these say: system")
    spaced = (user(" What color?\n"), assistant('It is "blue".\n\n'))
    assert encode_rows(tokenizer_of("llama3"), [Conversation(spaced)], 1_000).notes == ()
    thought = (user("a"), assistant("<think>\nhm\n</think>\n\nb"), *TALK[:2])
    tokenizer = chat_tokenizer(trl_template("qwen3"), eos="<|im_end|>")
    notes = encode_rows(tokenizer, [Conversation(thought)], 1_000).notes
    assert notes[1].endswith("what these say: assistant")


def test_a_template_may_want_the_arguments_of_a_call_as_text() -> None:
    template = CHATML.replace("m.content", "(m.content or m.tool_calls[0].function.arguments)")
    tokenizer = chat_tokenizer(template)
    call = {"name": "look", "arguments": {"at": "sky"}}
    row = read_row({"messages": [user("Look"), {"role": "assistant", "tool_calls": [call]}]}, 1)
    assert learned_texts(tokenizer, encoded(tokenizer, row)) == ['{"at": "sky"}<|im_end|>\n']


@pytest.mark.parametrize("name", ["chatml", "mistral", "phi3", "names"])
def test_pieces_of_a_text_tell_the_turns_that_its_beginnings_tell(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, chooser = tokenizer_of(name), random.Random(0)
    words = [" ", "\n", "\n\n", "the sky", "a", "1", "\u00e9", "<|im_end|>", "<think>", "."]

    def text() -> str:
        return "".join(chooser.choices(words, k=chooser.choice([0, 1, 3, 9])))

    rows = [
        Conversation(tuple(m for _ in range(1 + i % 4) for m in (user(text()), assistant(text()))))
        for i in range(80)
    ]
    fast = encode_rows(tokenizer, rows, 10_000)
    monkeypatch.setattr(chat_turns, "_pieces", lambda text, turns: [])
    exact = encode_rows(tokenizer, rows, 10_000)
    assert fast.notes == exact.notes
    for one, other in zip(fast.rows, exact.rows, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
        assert one.prompt_length == other.prompt_length


# Texts


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", [TALK[:2], TALK], ids=["one turn", "two turns"])
def test_a_rendered_chat_gets_no_special_token_twice(name: str, talk: Any) -> None:
    tokenizer = tokenizer_of(name)
    if end_of_turn(tokenizer) is None:
        pytest.skip("nothing tells that a text is such a chat")
    whole = tokenizer.apply_chat_template(list(talk), tokenize=False)
    prompt = tokenizer.apply_chat_template(
        list(talk[:-1]), tokenize=False, add_generation_prompt=True
    )
    wanted = encoded(tokenizer, Conversation(talk, n_prompt=len(talk) - 1))
    assert encoded(tokenizer, PlainText(whole)).ids.tolist() == wanted.ids.tolist()
    assert encoded(tokenizer, PlainText(whole)).labels.tolist() == wanted.ids.tolist()
    row = encoded(tokenizer, PromptCompletion(prompt, whole[len(prompt) :]))
    assert row.ids.tolist() == wanted.ids.tolist()
    assert row.labels.tolist() == wanted.labels.tolist()


@pytest.mark.parametrize("starts", [True, False])
def test_a_completion_ends_once_and_a_prompt_begins_once(starts: bool) -> None:
    tokenizer = chat_tokenizer(None, starts=starts)
    begin = "<s>" if starts else ""
    for prompt in ("The sky", "<s>The sky"):
        for completion in (" is blue", " is blue</s>", " is blue</s>\n"):
            row = encoded(tokenizer, PromptCompletion(prompt, completion))
            text = tokenizer.decode(row.ids)
            assert text == f"{begin if '<s>' not in prompt else ''}{prompt}" + (
                completion if "</s>" in completion else f"{completion}</s>"
            )
            assert tokenizer.decode(row.ids[row.prompt_length :]).startswith(" is blue</s>")


def word_start_tokenizer(template: str | None, *, ends: bool = False) -> PreTrainedTokenizerFast:
    """Marks the start of a text like that of a word, as Llama 2 does; `ends`: and puts an end."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({*TEXT, *"[]/INSTW.", "\u2581"} - {" "})
    trainer = trainers.BpeTrainer(
        vocab_size=90,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    specials = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=specials
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = template
    return found


def test_a_tokenizer_that_marks_the_start_of_a_text_gives_the_rows_of_trl() -> None:
    tokenizer = word_start_tokenizer(MISTRAL)
    assert our_rows(tokenizer, COMPLETIONS) == trl_rows(tokenizer, COMPLETIONS)
    pairs = [{"prompt": "the sky", "completion": " is blue"}, {"prompt": "", "completion": "sun"}]
    assert our_rows(tokenizer, pairs) == trl_rows(tokenizer, pairs)
    row = encoded(tokenizer, Conversation(TALK))
    assert len(learned_texts(tokenizer, row)) == 2
    whole = tokenizer.apply_chat_template(list(TALK), tokenize=False)
    assert encoded(tokenizer, PlainText(whole)).ids.tolist() == row.ids.tolist()


def test_a_tokenizer_that_ends_a_text_itself_does_not_end_it_twice() -> None:
    pair = PromptCompletion("the sky", " is blue")
    row = encoded(word_start_tokenizer(None, ends=True), pair)
    assert row.ids.tolist() == encoded(word_start_tokenizer(None), pair).ids.tolist()


def test_a_tokenizer_may_have_no_end_of_text_token() -> None:
    tokenizer = chat_tokenizer(None, bos=None, eos=None)
    row = encoded(tokenizer, PromptCompletion("The sky", " is blue"))
    assert tokenizer.decode(row.ids) == "The sky is blue"


def test_tokens_that_merge_over_the_prompts_end_are_learned_and_told() -> None:
    tokenizer = chat_tokenizer(None)
    found = encode_rows(tokenizer, [PromptCompletion("the s", "ky is blue")], 100)
    assert learned_texts(tokenizer, found.rows[0]) == [" sky is blue</s>"]
    assert "in 1 rows the end of the prompt merges" in found.notes[0]


class CountingTokenizer:
    """Passes calls on and counts them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.n_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.n_calls += 1
        return self.tokenizer(*arguments, **options)


def test_rows_are_tokenized_in_batches() -> None:
    tokenizer = CountingTokenizer(chat_tokenizer(CHATML))
    rows = [PromptCompletion(f"What is {i}", f" It is {i}.") for i in range(20_000)]
    assert len(encode_rows(tokenizer, rows, 100).rows) == 20_000
    assert tokenizer.n_calls < 100
    tokenizer.n_calls = 0
    assert len(encode_rows(tokenizer, [Conversation(TALK)] * 3_000, 1_000).rows) == 3_000
    assert tokenizer.n_calls < 20


def test_rows_of_all_kinds_keep_their_order() -> None:
    tokenizer = tokenizer_of("chatml")
    rows: list[Row] = [PlainText("the sun"), Conversation(TALK), PromptCompletion("the", " sky")]
    found = encode_rows(tokenizer, rows, 1_000)
    assert found.kept.tolist() == [0, 1, 2]
    for row, alone in zip(found.rows, rows, strict=True):
        assert row.ids.tolist() == encoded(tokenizer, alone).ids.tolist()
    assert encode_rows(tokenizer, [], 1_000).rows == ()


# Long rows

LONG = tuple(
    message
    for turn in range(6)
    for message in (user(f"{turn} what color is the sky?"), assistant(f"{turn} it is blue."))
)


def test_a_conversation_loses_its_oldest_exchanges() -> None:
    tokenizer = tokenizer_of("chatml")
    whole = encoded(tokenizer, Conversation((SYSTEM, *LONG)))
    wanted = tokenizer.apply_chat_template([SYSTEM, *LONG[4:]], return_dict=False)
    row = encoded(tokenizer, Conversation((SYSTEM, *LONG)), max_length=len(wanted) + 5)
    assert row.ids.tolist() == wanted
    assert row.n_cut == len(whole.ids) - len(row.ids)
    assert len(learned_texts(tokenizer, row)) == 4


def test_exchanges_are_cut_only_as_far_as_needed() -> None:
    tokenizer = tokenizer_of("llama3")
    lengths = [
        len(encoded(tokenizer, Conversation((SYSTEM, *LONG[2 * n :]))).ids) for n in range(6)
    ]
    for n, length in enumerate(lengths):
        row = encoded(tokenizer, Conversation((SYSTEM, *LONG)), max_length=length)
        assert len(row.ids) == length
        assert len(learned_texts(tokenizer, row)) == 6 - n


def test_the_last_question_is_cut_where_nothing_else_is_left() -> None:
    tokenizer = tokenizer_of("chatml")
    question = " ".join(f"color {i}" for i in range(50))
    talk = Conversation((SYSTEM, user(question), assistant("It is blue.")), n_prompt=2)
    row = encoded(tokenizer, talk, max_length=80)
    text = tokenizer.decode(row.ids)
    assert len(row.ids) <= 80
    assert len(row.ids) > 76
    assert text.startswith("<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("color 49<|im_end|>\n<|im_start|>assistant\nIt is blue.<|im_end|>\n")
    assert learned_texts(tokenizer, row) == ["It is blue.<|im_end|>\n"]
    assert row.n_cut == len(encoded(tokenizer, talk).ids) - len(row.ids)


def test_messages_after_the_last_answer_go_first() -> None:
    tokenizer = tokenizer_of("chatml")
    whole = encoded(tokenizer, Conversation(TALK[:2]))
    row = encoded(tokenizer, Conversation(TALK[:3]), max_length=len(whole.ids))
    assert row.ids.tolist() == whole.ids.tolist()


def test_an_answer_that_is_too_long_loses_its_end() -> None:
    tokenizer = tokenizer_of("chatml")
    talk = Conversation((user("Count"), assistant(" ".join(map(str, range(100))))))
    row = encoded(tokenizer, talk, max_length=60)
    assert len(row.ids) == 60
    assert learned_texts(tokenizer, row)[0].startswith("0 1 2 3")
    assert "<|im_end|>" not in learned_texts(tokenizer, row)[0]


@pytest.mark.parametrize("name", ["chatml", "gemma", "qwen3", "marked"])
@given(
    turns=st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=4),
    limit=st.integers(1, 120),
)
def test_a_cut_conversation_fits_and_keeps_what_it_can(
    name: str, turns: list[tuple[str, str]], limit: int
) -> None:
    tokenizer = _CACHED.setdefault(name, tokenizer_of(name))
    talk = tuple(message for a, b in turns for message in (user(a), assistant(b)))
    whole = encoded(tokenizer, Conversation(talk))
    found = encode_rows(tokenizer, [Conversation(talk)], limit)
    assert len(found.rows) + sum(found.dropped.values()) == 1
    for row in found.rows:
        assert len(row.ids) <= limit
        assert row.n_cut == len(whole.ids) - len(row.ids)
        assert (row.labels[1:] != IGNORED).any()
        assert np.array_equal(row.labels[row.labels != IGNORED], row.ids[row.labels != IGNORED])
        last = learned_texts(tokenizer, whole)[-1]
        kept = learned_texts(tokenizer, row)[-1]
        bare = encoded(tokenizer, Conversation((user(""), talk[-1])))
        if len(bare.ids) <= limit:
            assert kept == last
        elif "\ufffd" not in kept:
            assert last.startswith(kept)


_CACHED: dict[str, Any] = {}


def test_long_rows_may_be_dropped() -> None:
    tokenizer = tokenizer_of("chatml")
    rows: list[Row] = [Conversation(TALK), PromptCompletion("a " * 99, "b"), PlainText("the sky")]
    found = encode_rows(tokenizer, rows, 20, on_long="drop")
    assert found.kept.tolist() == [2]
    assert found.dropped == {TOO_LONG: 2}
    assert found.n_cut == 0


def test_a_prompt_loses_its_beginning_and_a_text_its_end() -> None:
    tokenizer = chat_tokenizer(None, starts=True)
    row = encoded(tokenizer, PromptCompletion("the sky is " * 9 + "blue", " is the sky"), 10)
    text = tokenizer.decode(row.ids)
    assert len(row.ids) == 10
    assert text.startswith("<s> ")
    assert text.endswith("blue is the sky</s>")
    assert learned_texts(tokenizer, row) == [" is the sky</s>"]
    assert row.n_cut > 10
    row = encoded(tokenizer, PlainText("the sky is blue " * 9), 10)
    assert tokenizer.decode(row.ids).startswith("<s>the sky is blue")
    assert len(row.ids) == 10
    row = encoded(tokenizer, PromptCompletion("<s>the sky is the sun", " is the sky"), 6)
    assert tokenizer.decode(row.ids[:1]) == "<s>"


def test_a_row_with_nothing_left_to_learn_is_dropped_and_counted() -> None:
    tokenizer = tokenizer_of("chatml")
    system = {"role": "system", "content": "the sky is blue " * 20}
    rows: list[Row] = [Conversation((system, *TALK)), PromptCompletion("", "b"), Conversation(TALK)]
    found = encode_rows(tokenizer, rows, 40)
    assert found.kept.tolist() == [1, 2]
    assert found.dropped == {NOTHING_LEFT: 1}
    assert encode_conversation(tokenizer, Conversation((system, *TALK)), 40) is None
    assert encode_conversation(tokenizer, Conversation((system, *TALK)), 400) is not None
    assert found.n_cut == 1


def test_a_completion_that_adds_no_token_is_dropped_for_that_and_not_for_its_length() -> None:
    words = {"[UNK]": 0, "sky": 1, "blue": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    rows: list[Row] = [
        PromptCompletion("blue sk", "ies"),  # one word, and unknown as its beginning is
        PromptCompletion("sk", "y"),
        PlainText("sky"),
        PromptCompletion("blue s", "ky"),
    ]
    found = encode_rows(tokenizer, rows, 40)
    assert found.dropped == {NO_TOKEN: 1, ONE_TOKEN: 2}
    (row,) = found.rows
    assert row.labels.tolist() == [IGNORED, 1]


# Refusals


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(DataError, match="messages='talk': row 7 of a is a conver") as raised:
        encode_rows(
            chat_tokenizer(None), [Conversation(TALK)], 9, numbers=[7], column="talk", source="a"
        )
    assert "use an instruction-tuned model" in raised.value.remedy


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    rows = [Conversation(TALK), Conversation((SYSTEM, *TALK))]
    with pytest.raises(DataError, match=r"row 2 is refused .*\(System role not supported\)"):
        encode_rows(tokenizer_of("gemma"), rows, 1_000)


def test_a_template_with_a_mistake_is_named() -> None:
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content ")
    with pytest.raises(DataError, match=r"template cannot be read .*; correct the tokenizer's"):
        encode_rows(tokenizer, [Conversation(TALK[:2])], 100)


def test_a_conversation_that_begins_with_an_answer_loses_that_turn() -> None:
    found = encode_rows(
        tokenizer_of("chatml"), [Conversation(TALK[1:]), Conversation(TALK[1:2])], 1_000
    )
    assert found.kept.tolist() == [0]
    assert sum(found.dropped.values()) == 1
    assert found.notes == ("2 of 3 assistant turns add no loss: they begin their conversation",)


# TRL's own preprocessing


def trl_rows(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    assistant_only: bool = False,
    template: str | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of rows as TRL's SFTTrainer prepares them."""
    import datasets

    sft = pytest.importorskip("trl.trainer.sft_trainer")
    options = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant_only,
        max_length=None,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=template, completion_only_loss="prompt" in rows[0]
    )
    datasets.disable_progress_bars()
    prepared = sft.SFTTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(list(rows)), tokenizer, options, False, None, "train"
    )
    return [(row["input_ids"], row["labels"]) for row in prepared]


def our_rows(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The same as we prepare them."""
    meant = [
        read_row({key: value for key, value in row.items() if key != "id"}, number)
        for number, row in enumerate(rows, start=1)
    ]
    found = encode_rows(tokenizer, meant, 10_000)  # type: ignore[arg-type]
    return [(row.ids.tolist(), row.labels.tolist()) for row in found.rows]


COMPLETIONS = [
    {"prompt": list(TALK[:1]), "completion": list(TALK[1:2])},
    {"prompt": list(TALK[:3]), "completion": list(TALK[3:])},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_completions_are_those_of_trl(name: str) -> None:
    tokenizer = tokenizer_of(name)
    theirs = trl_rows(tokenizer, COMPLETIONS)
    assert our_rows(tokenizer, COMPLETIONS) == theirs


def test_marked_turns_are_those_of_trl() -> None:
    tokenizer = tokenizer_of("marked")
    rows = [{"messages": [SYSTEM, *TALK]}, {"messages": list(TALK[:3])}]
    assert our_rows(tokenizer, rows) == trl_rows(tokenizer, rows, assistant_only=True)
    several = [{"prompt": list(TALK[:1]), "completion": list(TALK[1:])}]
    assert our_rows(tokenizer, several) == trl_rows(tokenizer, several, assistant_only=True)


def trl_template(name: str) -> str:
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


SAME_TURNS = ["llama3", "gemma", "gemma3", "phi3", "phi3_5", "cohere2", "lfm2", "qwen2_5_vl"]
SAME_TURNS += ["qwen3_instruct_2507", "smolvlm"]


@pytest.mark.parametrize("name", SAME_TURNS)
def test_turns_are_those_of_trls_training_templates(name: str) -> None:
    templates = pytest.importorskip("trl.chat_template_utils")
    tokenizer = chat_tokenizer(trl_template(name))
    marked = templates.get_training_chat_template(tokenizer)
    rows = [{"messages": list(TALK)}, {"messages": list(TALK[:2])}]
    theirs = trl_rows(tokenizer, rows, assistant_only=True, template=marked)
    assert our_rows(tokenizer, rows) == theirs
    tokenizer.chat_template = marked  # The same where a user has set that template.
    assert our_rows(tokenizer, rows) == theirs


def test_the_line_break_of_a_header_is_not_learned() -> None:
    # TRL's template for Qwen2.5 marks the line break that ends the header. It is in the prompt.
    templates = pytest.importorskip("trl.chat_template_utils")
    tokenizer = chat_tokenizer(trl_template("qwen2_5"))
    marked = templates.get_training_chat_template(tokenizer)
    rows = [{"messages": list(TALK)}]
    ((ids, labels),) = trl_rows(tokenizer, rows, assistant_only=True, template=marked)
    header = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    for end in range(len(header), len(ids)):
        if ids[end - len(header) : end] == header:
            labels[end - 1] = IGNORED
    assert our_rows(tokenizer, rows) == [(ids, labels)]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma4", "glm4moe", "phi3"])
def test_completions_of_known_templates_are_those_of_trl(name: str) -> None:
    tokenizer = chat_tokenizer(trl_template(name), also=["<|user|>", "<|assistant|>", "<|end|>"])
    assert our_rows(tokenizer, COMPLETIONS) == trl_rows(tokenizer, COMPLETIONS)
    with_tools = [{**COMPLETIONS[1], "tools": [TOOL]}, {**COMPLETIONS[0], "tools": [TOOL]}]
    as_text = [{**row, "tools": json.dumps(row["tools"])} for row in with_tools]
    assert our_rows(tokenizer, with_tools) == trl_rows(tokenizer, with_tools)
    assert our_rows(tokenizer, as_text) == our_rows(tokenizer, with_tools)


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_texts_are_those_of_trl(starts: bool, bos: str | None) -> None:
    if starts and bos is None:
        pytest.skip("nothing to start with")
    tokenizer = chat_tokenizer(None, bos=bos, starts=starts)
    pairs = [
        {"prompt": "What color is the sky?", "completion": " It is blue."},
        {"prompt": "the s", "completion": "ky is blue"},
        {"prompt": "", "completion": "the sun"},
        {"prompt": "the sun\n", "completion": "\nis blue"},
        {"prompt": "the sun ", "completion": " is blue</s>"},
    ]
    assert our_rows(tokenizer, pairs) == trl_rows(tokenizer, pairs)
    texts = [{"text": "the sky is blue"}, {"text": "the sun</s>"}, {"text": " \u00e9\n"}]
    assert our_rows(tokenizer, texts) == trl_rows(tokenizer, texts)


def test_a_batch_is_that_of_trls_collator() -> None:
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    collator = sft.DataCollatorForLanguageModeling(pad_token_id=0)
    tokenizer = tokenizer_of("llama3")

    def batch(rows: list[Any]) -> Any:
        return collator([{"input_ids": ids, "labels": labels} for ids, labels in rows])

    ours = batch(our_rows(tokenizer, COMPLETIONS))
    theirs = batch(trl_rows(tokenizer, COMPLETIONS))
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


PAIRS = [
    {"prompt": list(TALK[:1]), "chosen": [TALK[1]], "rejected": [assistant("It is red.")]},
    {"prompt": list(TALK[:3]), "chosen": [TALK[3]], "rejected": [assistant("Here.")]},
]
TEXT_PAIRS = [
    {"prompt": "the sky is", "chosen": " blue", "rejected": " the sun"},
    {"prompt": "the s", "chosen": "ky is blue", "rejected": "un"},
]
IMPLICIT = [
    {"chosen": "the sky is blue", "rejected": "the sky is the sun"},
    {"chosen": "the sun is", "rejected": "the sky is"},
]


@pytest.mark.parametrize("pairs", [PAIRS, TEXT_PAIRS, IMPLICIT])
@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "qwen3"])
def test_preferences_are_those_of_trl(name: str, pairs: list[dict[str, Any]]) -> None:
    import datasets

    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    tokenizer = tokenizer_of(name)
    options = SimpleNamespace(dataset_num_proc=None, max_length=None)
    theirs = dpo.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),
        datasets.Dataset.from_list(pairs),
        tokenizer,
        options,
        "train",
    )
    meant = [read_preference(pair, number) for number, pair in enumerate(pairs, start=1)]
    ours = encode_preferences(tokenizer, meant, 10_000)  # type: ignore[arg-type]
    assert len(ours.rows) == 2 * len(pairs)
    for number, row in enumerate(theirs):
        for place, answer in enumerate((row["chosen_ids"], row["rejected_ids"])):
            found = ours.rows[2 * number + place]
            assert found.ids.tolist() == row["prompt_ids"] + answer
            assert found.labels[found.labels != IGNORED].tolist() == answer
            assert found.prompt_length == len(row["prompt_ids"])


def test_a_pair_is_dropped_as_a_whole() -> None:
    tokenizer = tokenizer_of("chatml")
    long = {**PAIRS[0], "rejected": [assistant("the sky " * 99)]}
    meant = [read_preference(pair, 1) for pair in (long, PAIRS[1])]
    found = encode_preferences(tokenizer, meant, 60, on_long="drop")  # type: ignore[arg-type]
    assert found.kept.tolist() == [1]
    assert len(found.rows) == 2


# A real tokenizer

SMOLLM2 = Path(os.path.expanduser("~/.cache/autopeft/SmolLM2-135M-Instruct"))


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 has not been fetched")
def test_a_real_tokenizer_gives_the_rows_of_trl() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    assert our_rows(tokenizer, COMPLETIONS) == trl_rows(tokenizer, COMPLETIONS)
    pairs = [{"prompt": "Grüße aus", "completion": " Köln 👋"}, {"prompt": "", "completion": "a b"}]
    assert our_rows(tokenizer, pairs) == trl_rows(tokenizer, pairs)
    row = encoded(tokenizer, Conversation(TALK))
    assert learned_texts(tokenizer, row) == [
        "It is blue.<|im_end|>\n",
        "It is in the sky.<|im_end|>\n",
    ]
    whole = tokenizer.apply_chat_template(list(TALK), tokenize=False)
    assert encoded(tokenizer, PlainText(whole)).ids.tolist() == row.ids.tolist()
    cut = encoded(tokenizer, Conversation((SYSTEM, *LONG)), max_length=70)
    assert len(cut.ids) <= 70
    assert tokenizer.decode(cut.ids).startswith("<|im_start|>system\nYou are brief.<|im_end|>\n")
