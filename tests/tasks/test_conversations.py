from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import DataError
from autopeft.tasks import conversations
from autopeft.tasks.conversations import (
    Conversation,
    PlainText,
    Preference,
    PromptCompletion,
    Unusable,
    read_preference,
    read_row,
    read_rows,
    recognize,
    row_key,
)

ASKED = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def read(**values: Any) -> Any:
    return read_row(values, 3)


@pytest.mark.parametrize(
    ("names", "layout", "roles"),
    [
        (["messages", "tools", "id"], "messages", {"messages": "messages", "tools": "tools"}),
        (
            ["id", "conversations", "system"],
            "ShareGPT conversations",
            {"messages": "conversations", "system": "system"},
        ),
        (
            ["prompt", "completion"],
            "prompt and completion",
            {"prompt": "prompt", "completion": "completion"},
        ),
        (
            ["Question", "Answer"],
            "question and answer",
            {"instruction": "Question", "output": "Answer"},
        ),
        (
            ["instruction", "input", "output", "text"],
            "Alpaca instructions",
            {"instruction": "instruction", "input": "input", "output": "output"},
        ),
        (
            ["instruction", "context", "response", "category"],
            "instruction and response",
            {"instruction": "instruction", "input": "context", "output": "response"},
        ),
        (["text", "meta"], "plain text", {"text": "text"}),
        (
            ["prompt", "chosen", "rejected", "score"],
            "preference",
            {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        ),
    ],
)
def test_columns_tell_the_layout(names: list[str], layout: str, roles: dict[str, str]) -> None:
    found = recognize(names)
    assert found is not None
    assert found[0].name == layout
    assert found[1] == roles


def test_other_columns_are_no_layout() -> None:
    assert recognize(["sentence", "label"]) is None
    assert recognize(["prompt", "answer"]) is None


def test_messages_are_a_conversation() -> None:
    row = read(messages=[SYSTEM, ASKED, BLUE], tools=[TOOL])
    assert row == Conversation((SYSTEM, ASKED, BLUE), None, (TOOL,))
    assert row.learned == (2,)


def test_sharegpt_has_names_of_its_own() -> None:
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "What color is the sky?"},
        {"from": "gpt", "value": "It is blue."},
    ]
    assert read(messages=talk) == Conversation((SYSTEM, ASKED, BLUE))
    # Messages of both forms, as Arrow gives them where a table has both.
    mixed = [
        {"from": "human", "value": "What color is the sky?", "role": None, "content": None},
        {"from": None, "value": None, "role": "assistant", "content": "It is blue."},
    ]
    assert read(messages=mixed) == Conversation((ASKED, BLUE))


def test_sharegpt_calls_tools_in_messages_of_their_own() -> None:
    talk = [
        {"from": "human", "value": "What color is the sky?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
        {"from": "observation", "value": "blue"},
        {"from": "gpt", "value": "It is blue."},
    ]
    row = read(messages=talk, tools=json.dumps([TOOL]))
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    assert row.messages[1] == {"role": "assistant", "tool_calls": [call]}
    assert row.messages[2] == {"role": "tool", "content": "blue"}
    assert row.tools == (TOOL,)
    assert row.learned == (1, 3)


def test_tool_calls_have_arguments_by_name() -> None:
    def calling(function: dict[str, Any], **more: Any) -> Any:
        talk = [ASKED, {"role": "assistant", "tool_calls": [{"function": function, **more}]}]
        return read(messages=talk).messages[1]["tool_calls"][0]

    # OpenAI writes JSON text. Arrow adds the arguments of other tools, with None.
    as_text = calling({"name": "look", "arguments": '{"at": "sky", "unit": null}'}, id="1")
    assert as_text["function"]["arguments"] == {"at": "sky", "unit": None}
    assert as_text["id"] == "1"
    from_arrow = calling({"name": "look", "arguments": {"at": "sky", "unit": None}}, id=None)
    assert from_arrow == {
        "type": "function",
        "function": {"name": "look", "arguments": {"at": "sky"}},
    }
    earlier = {"role": "assistant", "function_call": {"name": "look", "arguments": "{}"}}
    message = read(messages=[ASKED, earlier]).messages[1]
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": {}}


def test_a_table_of_arrow_gives_the_messages_that_were_written() -> None:
    def called(name: str, **arguments: Any) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}

    talks = [
        [
            ASKED,
            called("look", at="sky"),
            {"role": "tool", "name": "look", "content": "blue"},
            BLUE,
        ],
        [SYSTEM, ASKED, called("add", a=1, b=2)],
        [ASKED, BLUE],
    ]
    table = Dataset.from_list([{"messages": talk} for talk in talks])
    found = read_rows({"messages": table["messages"][:]})
    assert [row.messages for row in found.rows] == [tuple(talk) for talk in talks]


def test_tools_from_arrow_lose_what_other_tools_have() -> None:
    filled = {"type": "function", "function": {**TOOL["function"], "strict": None}}  # type: ignore[dict-item]
    assert read(messages=[ASKED, BLUE], tools=[filled]).tools == (TOOL,)
    assert read(messages=[ASKED, BLUE], tools=[]).tools is None


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "What color "}, {"type": "text", "text": "is the sky?"}]
    assert read(messages=[{"role": "user", "content": parts}, BLUE]).messages[0] == ASKED


def test_a_table_may_hold_messages_as_a_struct_of_lists() -> None:
    struct = {"role": ["user", "assistant"], "content": [ASKED["content"], BLUE["content"]]}
    assert read(messages=struct) == Conversation((ASKED, BLUE))


def test_json_text_of_messages_is_read() -> None:
    assert read(messages=json.dumps([ASKED, BLUE])) == Conversation((ASKED, BLUE))
    assert read(messages=str([ASKED, BLUE])) == Conversation((ASKED, BLUE))
    row = read(prompt=json.dumps([ASKED]), completion=json.dumps([BLUE]))
    assert row == Conversation((ASKED, BLUE), n_prompt=1)


def test_a_system_column_becomes_the_first_message() -> None:
    assert read(messages=[ASKED, BLUE], system="Be brief.").messages[0] == SYSTEM
    assert read(messages=[ASKED, BLUE], system=None).messages[0] == ASKED
    with pytest.raises(DataError, match="keep one of the two"):
        read(messages=[SYSTEM, ASKED, BLUE], system="Be long.")


def test_prompt_and_completion_are_text_or_messages() -> None:
    assert read(prompt="1 + 1 =", completion=" 2") == PromptCompletion("1 + 1 =", " 2")
    assert read(prompt=None, completion="Once") == PromptCompletion("", "Once")
    assert read(prompt=7, completion=49.0) == PromptCompletion("7", "49")
    assert read(prompt=np.int64(7), completion=np.float32(0.5)) == PromptCompletion("7", "0.5")
    row = read(prompt=[SYSTEM, ASKED], completion=[BLUE])
    assert row == Conversation((SYSTEM, ASKED, BLUE), n_prompt=2)


@pytest.mark.parametrize("row", [{"value": 3, "unit": "m"}, {"role": "CEO", "name": "Ann"}])
def test_json_that_a_model_shall_write_is_text(row: dict[str, Any]) -> None:
    written = json.dumps([row])
    assert read(prompt="List them.", completion=written) == PromptCompletion("List them.", written)


def test_an_instruction_is_a_turn_where_there_is_a_template() -> None:
    values = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    row = read_row(values, 1)
    assert isinstance(row, Conversation)
    assert row.n_prompt == 1
    assert row.messages[0]["content"] == "Translate.\n\nGuten Tag"
    plain = read_row(values, 1, has_template=False)
    assert plain == PromptCompletion("Translate.\n\nGuten Tag\n\n", "Good day")
    without = read_row({**values, "input": ""}, 1, has_template=False)
    assert without == PromptCompletion("Translate.\n\n", "Good day")
    told = read_row({**values, "system": "Be brief."}, 1, has_template=False)
    assert told == PromptCompletion("Be brief.\n\nTranslate.\n\nGuten Tag\n\n", "Good day")
    talk = read_row({**values, "system": "Be brief."}, 1)
    assert isinstance(talk, Conversation)
    assert talk.n_prompt == 2
    assert talk.messages[0] == SYSTEM


def test_the_examples_are_true() -> None:
    assert doctest.testmod(conversations).failed == 0


def test_a_text_is_learned_as_a_whole() -> None:
    assert read(text="Once upon a time") == PlainText("Once upon a time")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"messages": None}, "no messages"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": [ASKED]}, "no message of the assistant"),
        ({"messages": [ASKED, {**BLUE, "weight": 0}]}, "no message of the assistant"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": " "}]},
            "an empty message of the assistant",
        ),
        ({"prompt": "a", "completion": "  "}, "no completion"),
        ({"prompt": "a", "completion": float("nan")}, "no completion"),
        ({"prompt": [ASKED, BLUE], "completion": [ASKED]}, "no message of the assistant"),
        ({"instruction": "a", "output": None}, "no completion"),
        ({"instruction": None, "output": "a"}, "no instruction"),
        ({"text": " "}, "no text"),
    ],
)
def test_a_row_without_anything_to_learn_says_why(values: dict[str, Any], reason: str) -> None:
    assert read_row(values, 1) == Unusable(reason)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        # A list where text is meant, and text where a list is meant.
        ({"prompt": ["a", "b"], "completion": "c"}, "completion='completion': row 3 holds text"),
        ({"prompt": "a", "completion": ["b"]}, "holds a list, but 'prompt' text"),
        ({"prompt": "a", "completion": [BLUE]}, "give text in both, or messages in both"),
        ({"prompt": ["a"], "completion": ["b"]}, "item 1 is text where a message is meant"),
        ({"prompt": "a", "completion": {"b": 1}}, "holds a mapping where text is meant"),
        ({"prompt": "a", "completion": True}, "holds a truth value where text is meant"),
        ({"prompt": "a", "completion": b"b"}, "holds bytes where text is meant"),
        ({"text": [ASKED, BLUE]}, "holds a list where text is meant"),
        ({"text": json.dumps([ASKED, BLUE])}, "name that column as `messages`"),
        ({"instruction": ["a"], "output": "b"}, "holds a list where text is meant"),
        ({"instruction": "a", "output": str([BLUE])}, "written as text"),
        ({"messages": "What color is the sky?"}, "holds text where a list of messages is meant"),
        ({"messages": 3}, "holds a number where a list of messages is meant"),
        ({"messages": str([ASKED, BLUE])[:-9]}, "write the column with json.dumps"),
        ({"prompt": [ASKED], "completion": str([BLUE])[:-1]}, "no JSON"),
        # Messages that are none.
        ({"messages": ["Hello"]}, "item 1 is text where a message is meant"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "message 1 has the role 'narrator'"),
        ({"messages": [{"from": "narrator", "value": "a"}]}, "use one of system, developer, user"),
        ({"messages": [{"role": 1, "content": "a"}]}, "has the role 1"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"messages": [ASKED, {"role": "assistant"}]}, r"message 2 \(assistant\) has no content"),
        ({"messages": [{"role": "user", "content": None}]}, r"message 1 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "has a number as content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
            r"a part that is not text \('image'\)",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"a": 1}]}]}, "without a name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}]},
            "arguments that are no JSON",
        ),
        ({"messages": [{"from": "function_call", "value": "look"}]}, "its text is no JSON"),
        # What stands beside messages.
        ({"messages": [ASKED, BLUE], "tools": "look"}, "where a list of tools is meant"),
        ({"messages": [ASKED, BLUE], "tools": ["look"]}, r"holds text that is no tool \(look\)"),
        ({"messages": [ASKED, BLUE], "tools": [{"function": 1}]}, "a mapping that is no tool"),
        ({"messages": [ASKED, BLUE], "template_options": "x"}, "arguments of the chat template"),
        (
            {"prompt": "a", "completion": "b", "tools": [TOOL]},
            "has a value, but its prompt is text",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_names_row_and_remedy(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        read_row(values, 3)
    assert "row 3" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.remedy


def test_an_error_names_setting_and_column() -> None:
    with pytest.raises(DataError, match="prompt='ask': row 1 holds"):
        read_row({"prompt": {"a": 1}, "completion": "b"}, 1, {"prompt": "ask"})


# Preferences


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [ASKED], "chosen": [BLUE], "rejected": [GREEN]},
        {"chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"prompt": [ASKED], "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"prompt": "anything", "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"prompt": ASKED["content"], "chosen": [BLUE], "rejected": [GREEN]},
    ],
)
def test_both_answers_follow_one_prompt(values: dict[str, Any]) -> None:
    found = read_preference(values, 1)
    assert found == Preference(
        Conversation((ASKED, BLUE), n_prompt=1), Conversation((ASKED, GREEN), n_prompt=1)
    )


def test_answers_may_be_text() -> None:
    found = read_preference({"prompt": "The sky is", "chosen": " blue.", "rejected": " red."}, 1)
    assert found == Preference(
        PromptCompletion("The sky is", " blue."), PromptCompletion("The sky is", " red.")
    )


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("Sky: blue", "Sky: black"),
        ([SYSTEM, ASKED, BLUE], [SYSTEM, ASKED, GREEN]),
    ],
)
def test_an_implicit_prompt_is_the_one_that_trl_finds(chosen: Any, rejected: Any) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    theirs = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
    explicit = read_preference(theirs, 1)
    assert read_preference({"chosen": chosen, "rejected": rejected}, 1) == explicit


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "no chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"chosen": [ASKED, BLUE], "rejected": [ASKED, BLUE]}, "chosen and rejected are equal"),
        ({"chosen": "ab", "rejected": "abc"}, "one answer is the beginning of the other"),
    ],
)
def test_a_pair_without_a_choice_says_why(values: dict[str, Any], reason: str) -> None:
    assert read_preference(values, 1) == Unusable(reason)


def test_answers_of_two_kinds_are_refused() -> None:
    with pytest.raises(DataError, match="holds a list, but 'chosen' text"):
        read_preference({"chosen": "blue", "rejected": [GREEN]}, 1)


# Tables


def test_the_rows_of_a_table_are_counted() -> None:
    found = read_rows({"prompt": ["a", "b", "c", None], "completion": ["x", None, "", "y"]})
    assert found.rows == (PromptCompletion("a", "x"), PromptCompletion("", "y"))
    assert np.array_equal(found.source_rows, [0, 3])
    assert found.dropped == {"no completion": 2}


def test_the_error_of_a_table_names_the_row() -> None:
    with pytest.raises(DataError, match=r"messages='talk': row 2 of a\.jsonl, message 1 has"):
        read_rows(
            {"messages": [[ASKED, BLUE], [{"role": "narrator", "content": "a"}]]},
            {"messages": "talk"},
            source="a.jsonl",
        )


def test_rows_are_known_by_all_of_their_text() -> None:
    first = read(prompt="Same question", completion="one")
    assert row_key(first) == row_key(read(prompt="same  QUESTION", completion="One "))
    assert row_key(first) != row_key(read(prompt="Same question", completion="two"))
    blue, green = read(messages=[ASKED, BLUE]), read(messages=[ASKED, GREEN])
    assert row_key(blue) != row_key(green)
    assert row_key(blue) != row_key(read(messages=[ASKED, BLUE], tools=[TOOL]))
    pair = read_preference({"prompt": [ASKED], "chosen": [BLUE], "rejected": [GREEN]}, 1)
    turned = read_preference({"prompt": [ASKED], "chosen": [GREEN], "rejected": [BLUE]}, 1)
    assert not isinstance(pair, Unusable)
    assert not isinstance(turned, Unusable)
    assert row_key(pair) != row_key(turned)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "gpt", "[", "[{", '[{"role": "user"}]']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or the line of its error."""
    try:
        return function(*arguments)
    except DataError as error:
        return str(error)


@given(ANYTHING, ANYTHING, ANYTHING)
def test_whatever_a_row_holds_the_error_is_one_line(first: Any, second: Any, third: Any) -> None:
    for values in (
        {"messages": first, "tools": second, "system": third},
        {"prompt": first, "completion": second, "template_options": third},
        {"instruction": first, "output": second, "input": third},
        {"text": first},
    ):
        found = outcome(read_row, values, 1)
        known = Conversation | PromptCompletion | PlainText | Unusable
        assert isinstance(found, known) or "row 1" in found
    found = outcome(read_preference, {"prompt": first, "chosen": second, "rejected": third}, 1)
    assert isinstance(found, Preference | Unusable) or "row 1" in found
