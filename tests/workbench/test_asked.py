"""The ways to ask that are compared."""

import pytest

from grasp_lora.tasks.base import TASKS
from grasp_lora.workbench.asked import Way, ways_to_ask

ASKED = "Text: {context}\nQuestion: {question}\nAnswer:"
BARE = "{context}\n{question}"


@pytest.mark.parametrize("chat", [False, True])
def test_the_way_in_force_comes_first_and_each_way_once(chat):
    ways = ways_to_ask(TASKS["qa"], ASKED, chat, has_chat=True)
    within = " in the chat template"
    plain = {"the prompt": Way(ASKED, False), "the bare question": Way(BARE, False)}
    framed = {f"{name}{within}": Way(way.template, True) for name, way in plain.items()}
    assert list(ways) == [*(framed | plain if chat else plain | framed)]
    assert ways == plain | framed


def test_a_prompt_that_is_bare_already_is_compared_in_its_frames_alone():
    assert list(ways_to_ask(TASKS["qa"], BARE, False, has_chat=False)) == ["the prompt"]
    own = ways_to_ask(TASKS["text-to-text"], "{prompt}", False, has_chat=True)
    assert own == {
        "the prompt": Way("{prompt}", False),
        "the prompt in the chat template": Way("{prompt}", True),
    }


def test_the_bare_question_of_other_tasks_has_their_inputs():
    summary = ways_to_ask(TASKS["summarization"], "Sum up: {article}", False, has_chat=False)
    assert summary["the bare question"] == Way("{article}", False)
    free = ways_to_ask(TASKS["text-to-text"], "{b} and {a}:", False, has_chat=False)
    assert free["the bare question"] == Way("{b}\n{a}", False)
