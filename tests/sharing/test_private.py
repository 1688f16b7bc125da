"""What must not go out is found, and what only looks like it is not."""

import pytest
import torch
from safetensors.torch import save_file

from grasp_lora.sharing.private import found_in, notes_of_weights, without_paths

PATHS = [
    ("/home/ana/rows.jsonl", "…/rows.jsonl"),
    ('{"a": "/data/secret/model"}', '{"a": "…/model"}'),
    ("<td>/mnt/disk/a.txt</td>", "<td>…/a.txt</td>"),
    ("<td>&#34;/mnt/disk/a.txt&#34;</td>", "<td>&#34;…/a.txt&#34;</td>"),
    ("from `/tmp/x/y`, read", "from `…/y`, read"),
    ("path:/data/x/", "path:…/x"),
    ("file:///srv/x/y", "…/y"),
    (r"C:\Users\ana\x.txt", "…/x.txt"),
    (r"/home/\_ana/x", "…/x"),
    ("/数据/语言/a.txt", "…/a.txt"),
]
HARMLESS = [
    "precision/recall and/or both, 1/2/3, km/h",
    "https://arxiv.org/abs/2601.06702",
    "</p><br/></td>",
    "runs/demo/final, ./out, ~/rows.jsonl",
    "font: 1rem/1.5 system-ui; // a comment\n/* one */",
    "Q:\\n{question}\\nA:\\n",
    "/data",
    "owner/name",
]


@pytest.mark.parametrize(("text", "masked"), PATHS)
def test_absolute_paths_are_found_and_cut_to_their_last_name(text, masked):
    (found,) = found_in(text)
    assert found.startswith("the path ")
    assert without_paths(text) == masked
    assert not list(found_in(masked))
    assert not list(found_in(text, paths=False))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_path_stays(text):
    assert not list(found_in(text))
    assert without_paths(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "a1" * 17,
        "ghp_" + "a1" * 18,
        "sk-" + "a1" * 20,
        "AKIA" + "A1" * 8,
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_tokens_are_found_and_not_shown(text):
    assert list(found_in(f'"x": "{text}"')) == ["a token or key"]


def test_the_users_own_token_is_found_whatever_it_looks_like():
    assert list(found_in("my word", token="word")) == ["a token or key"]
    assert not list(found_in("my word", token=None))


def test_the_head_of_weights_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"from": "/home/ana/model"})
    assert list(found_in(notes_of_weights(file))) == ["the path /home/ana/model"]
