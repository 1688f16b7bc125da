"""Lines on the examples of a run and the prompts of given adapters."""

from grasp_lora.report.data_words import different_prompts_line, prompt_line, prompt_lines

BARE = {"name": "the bare question", "settings": ["data.target.prompt: x", "data.chat: false"]}
FACTS = {"used": "the prompt", "rows": ["a", "b"], "losses": {"the prompt": 2.45, "bare": 1.79}}


def test_losses_of_prompts_are_told_and_the_settings_of_a_better_one():
    (alone,) = prompt_lines("source", FACTS | {"better": None})
    assert alone == "adapters.source, loss of 2 train answers: the prompt 2.450, bare 1.790"
    _, advice = prompt_lines("target", FACTS | {"better": BARE | {"gain": 0.66, "error": 0.1}})
    assert advice == (
        "adapters.target knows the bare question better than the prompt, by 0.660 nats (standard "
        "error 0.100); to ask so, write data.target.prompt: x and data.chat: false"
    )


def test_adapters_that_know_different_prompts_are_told():
    same, other = FACTS | {"better": None}, FACTS | {"better": BARE}
    assert different_prompts_line({"source": same, "target": same}) is None
    assert different_prompts_line({"source": other, "target": other}) is None
    line = different_prompts_line({"source": same, "target": other})
    assert line is not None
    assert "(adapters.source the prompt, adapters.target the bare question)" in line


def test_a_prompt_is_one_line_with_what_a_chat_puts_around_it():
    assert prompt_line({"template": 'a "b"\n{c}'}).endswith(r'examples: "a \"b\"\n{c}"')
    framed = prompt_line({"template": "{c}", "before": "<u>", "between": "</u>\n"})
    assert framed.endswith(r'"{c}", in a chat between "<u>" and "</u>\n"')
