# SPDX-License-Identifier: Apache-2.0
"""Finding the right tokenizer, saving and loading it again, and refusing what is not one."""

import copy
import json
import logging
import pickle
import shutil

import pytest
from tokenization_cases import DATA, GLM4, NAMES, as_lists, folder, golden, tokenizer
from transformers import AutoTokenizer

from optimum_chatglm_ov.tokenization import (
    ChatGLM1Tokenizer,
    ChatGLM2Tokenizer,
    ChatGLM3Tokenizer,
    ChatGLM4Tokenizer,
    ChatGLMTokenizer,
    TokenizerError,
)


SAVED = sorted(path for path in (DATA / "tokenizers").glob("saved_by_transformers_*/*"))
GLM4_RANKS = "tokenizers.glm-4-9b-chat"
SENTENCEPIECE = "models.chatglm3-6b"


def copy_of(name, target, *, without=(), config=None):
    """A copy of `folder(name)`, its tokenizer_config.json without some keys, or replaced by `config`."""
    shutil.copytree(folder(name), target)
    path = target / "tokenizer_config.json"
    if config is None:
        config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}), encoding="utf-8")
    return target


def assert_same(tok, name):
    """`tok` does what the tokenizer of `folder(name)` does."""
    expected = tokenizer(name)
    assert type(tok) is type(expected)
    assert tok.all_special_tokens == expected.all_special_tokens
    for case in golden(name)["encode"]:
        encoding = tok(case["text"])
        assert as_lists(encoding) == case["call"]
        assert tok.decode(encoding["input_ids"]) == case["decode"]
        assert tok.decode(encoding["input_ids"], skip_special_tokens=True) == case["decode_skip"]
    messages = [{"role": "user", "content": "你好 <|user|>"}]
    ids = [t.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for t in (tok, expected)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", NAMES)
def test_saved_tokenizer_loads_again(name, tmp_path):
    AutoTokenizer.from_pretrained(folder(name)).save_pretrained(tmp_path)
    if (folder(name) / "config.json").exists():  # an exported model beside it changes how AutoTokenizer decides
        shutil.copy(folder(name) / "config.json", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config
    assert str(folder(name)) not in json.dumps(config)
    assert_same(AutoTokenizer.from_pretrained(tmp_path), name)


@pytest.mark.parametrize("saved", SAVED, ids=lambda path: "-".join(path.parts[-2:]))
def test_tokenizer_saved_by_another_transformers(saved, tmp_path):
    target = tmp_path / "saved"
    shutil.copytree(saved, target)
    for vocab_file in folder(saved.name).glob("*.model"):
        shutil.copy(vocab_file, target)
    assert_same(AutoTokenizer.from_pretrained(target), saved.name)


@pytest.mark.parametrize("name", NAMES)
def test_added_tokens_are_saved(name, tmp_path):
    tok = AutoTokenizer.from_pretrained(folder(name))
    tok.add_tokens(["<extra>"])
    tok.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("a<extra>b") == tok.tokenize("a<extra>b")
    assert "<extra>" in tok.tokenize("a<extra>b")


@pytest.mark.parametrize("name", NAMES)
def test_copy_and_pickle(name):
    tok = tokenizer(name)
    for other in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok))):
        assert other("你好，世界！ <sop>") == tok("你好，世界！ <sop>")


@pytest.mark.parametrize("name", NAMES)
def test_loading_logs_nothing(name, caplog, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        tok = AutoTokenizer.from_pretrained(folder(name))
        tok("你好")
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_hub_id_with_revision_from_the_cache(tmp_path):
    """Layout of the Hub cache: a repository id and a revision are resolved by transformers itself."""
    repository = tmp_path / "models--THUDM--some-model"
    commit = "0123456789012345678901234567890123456789"
    copy_of("tokenizers.chatglm2-6b", repository / "snapshots" / commit / "inner")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1.0").write_text(commit)
    arguments = {"cache_dir": tmp_path, "local_files_only": True, "subfolder": "inner"}
    tok = ChatGLMTokenizer.from_pretrained("THUDM/some-model", revision="v1.0", **arguments)
    assert type(tok) is ChatGLM2Tokenizer
    assert as_lists(tok("你好")) == as_lists(tokenizer("tokenizers.chatglm2-6b")("你好"))
    with pytest.raises((OSError, ValueError)):
        ChatGLMTokenizer.from_pretrained("THUDM/some-model", revision="v2.0", **arguments)


# Which generation ------------------------------------------------------------------------------------------------


def test_vocabulary_alone_tells_chatglm_and_glm4():
    tok = ChatGLMTokenizer(str(folder("models.chatglm-6b") / "ice_text.model"))
    assert type(tok) is ChatGLM1Tokenizer
    tok = ChatGLMTokenizer(str(folder(GLM4_RANKS) / "tokenizer.model"))
    assert type(tok) is ChatGLM4Tokenizer
    assert tok("你好 <|user|>") == tokenizer(GLM4_RANKS)("你好 <|user|>")
    assert tok.all_special_tokens == tokenizer(GLM4_RANKS).all_special_tokens


@pytest.mark.parametrize(
    "config, folder_name",
    [
        ({"name_or_path": "THUDM/chatglm2-6b-32k"}, "a"),
        ({"name_or_path": "/home/me/codegeex2-6b"}, "a"),
        ({"name_or_path": "mine"}, "chatglm2-6b-mine"),
        ({"chatglm_generation": "chatglm2", "name_or_path": "THUDM/chatglm3-6b"}, "chatglm3-6b"),
    ],
)
def test_chatglm2_is_told_by(config, folder_name, tmp_path, caplog):
    config = {"tokenizer_class": "ChatGLMTokenizer", **config}
    path = copy_of("tokenizers.chatglm2-6b", tmp_path / folder_name, config=config)
    assert type(AutoTokenizer.from_pretrained(path)) is ChatGLM2Tokenizer
    assert not caplog.records


@pytest.mark.parametrize(
    "config",
    [
        {"name_or_path": "THUDM/chatglm3-6b-base"},
        {"chat_template": "{{ '<|assistant|>' }}"},
        {"added_tokens_decoder": {"704": {"content": "<|assistant|>", "special": True}}},
    ],
)
def test_chatglm3_is_told_by(config, tmp_path, caplog):
    config = {"tokenizer_class": "ChatGLMTokenizer", **config}
    path = copy_of("tokenizers.chatglm3-6b", tmp_path / "a", config=config)
    assert type(AutoTokenizer.from_pretrained(path)) is ChatGLM3Tokenizer
    assert not caplog.records


@pytest.mark.parametrize("key", ["_name_or_path", "original_name_or_path"])
def test_generation_is_told_by_the_model_config(key, tmp_path):
    path = copy_of("tokenizers.chatglm2-6b", tmp_path / "a", without=("name_or_path",))
    (path / "config.json").write_text(json.dumps({"model_type": "chatglm", key: "THUDM/chatglm2-6b"}))
    assert type(AutoTokenizer.from_pretrained(path)) is ChatGLM2Tokenizer


def test_generation_that_nothing_tells_is_logged(tmp_path, caplog):
    path = copy_of("tokenizers.chatglm2-6b", tmp_path / "a", without=("name_or_path",))
    assert type(AutoTokenizer.from_pretrained(path)) is ChatGLM3Tokenizer
    assert "ChatGLM3 is assumed" in caplog.text and 'chatglm_generation="chatglm2"' in caplog.text
    caplog.clear()
    assert type(AutoTokenizer.from_pretrained(path, chatglm_generation="chatglm2")) is ChatGLM2Tokenizer
    assert type(ChatGLM2Tokenizer.from_pretrained(path)) is ChatGLM2Tokenizer
    assert not caplog.records


def test_glm4_without_tokenizer_class_or_special_tokens(tmp_path):
    path = copy_of("models.glm-4-9b-chat", tmp_path / "a", config={"padding_side": "left"})
    assert_same(AutoTokenizer.from_pretrained(path), "models.glm-4-9b-chat")


@pytest.mark.parametrize("name", [SENTENCEPIECE, GLM4_RANKS])
def test_wrong_generation_is_refused(name):
    with pytest.raises(TokenizerError, match="is 'chatglm', but .*tokenizer.model is a vocabulary of"):
        AutoTokenizer.from_pretrained(folder(name), chatglm_generation="chatglm")
    with pytest.raises(TokenizerError, match="expected one of chatglm, chatglm2, chatglm3, glm4"):
        AutoTokenizer.from_pretrained(folder(name), chatglm_generation="chatglm5")


def test_class_of_another_generation_is_refused():
    with pytest.raises(TokenizerError, match="is a GLM-4 list of ranks"):
        ChatGLM3Tokenizer(str(folder(GLM4_RANKS) / "tokenizer.model"))
    with pytest.raises(TokenizerError, match="is a SentencePiece model; expected the list of ranks"):
        ChatGLM4Tokenizer(str(folder(SENTENCEPIECE) / "tokenizer.model"))
    with pytest.raises(TokenizerError, match="has no piece <n>"):
        ChatGLM1Tokenizer(str(folder(SENTENCEPIECE) / "tokenizer.model"))


# Options ---------------------------------------------------------------------------------------------------------


def test_pad_and_eos_token_can_be_set():
    tok = AutoTokenizer.from_pretrained(folder(SENTENCEPIECE))
    tok.pad_token = tok.eos_token
    assert (tok.pad_token, tok.pad_token_id) == ("</s>", 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_pad_token_id_can_be_set(name, tmp_path):
    tok, text = AutoTokenizer.from_pretrained(folder(name)), "a</s>b <unk> <eop> <pad> <|user|>"
    before = tok(text)["input_ids"]
    tok.pad_token_id = tok.eos_token_id
    assert (tok.pad_token, tok.pad_token_id) == (tok.eos_token, tok.eos_token_id)
    assert tok(["a", "a b c d"], padding=True)["input_ids"][0][0] == tok.eos_token_id
    tok.save_pretrained(tmp_path / "1")
    again = AutoTokenizer.from_pretrained(tmp_path / "1")
    again.save_pretrained(tmp_path / "2")
    for loaded in (tok, again, AutoTokenizer.from_pretrained(tmp_path / "2")):
        assert (loaded.pad_token, loaded.pad_token_id) == (tok.eos_token, tok.eos_token_id)
        assert loaded(text)["input_ids"] == before


@pytest.mark.parametrize("choice", ["pad_token", "bos_token"])
@pytest.mark.parametrize("way", ["add", "set", "load"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in GLM4])  # whose vocabulary has no such token
def test_a_chosen_token_stays_text(name, way, choice, tmp_path):
    text = "a</s>b <unk> </s> <eop> <image_2> <pad> <|user|>"
    before = tokenizer(name)(text, add_special_tokens=False)["input_ids"]
    tok = AutoTokenizer.from_pretrained(folder(name), **({choice: "</s>"} if way == "load" else {}))
    if way == "add":
        tok.add_special_tokens({choice: "</s>"})
    elif way == "set":
        setattr(tok, choice, "</s>")
    expected = tok.convert_tokens_to_ids("</s>")
    tok.save_pretrained(tmp_path)
    for loaded in (tok, AutoTokenizer.from_pretrained(tmp_path)):
        assert getattr(loaded, choice) == "</s>" and getattr(loaded, f"{choice}_id") == expected
        assert loaded(text, add_special_tokens=False)["input_ids"] == before
        assert loaded.tokenize("</s>") == tokenizer(name).tokenize("</s>") != ["</s>"]


@pytest.mark.parametrize("name", NAMES)
def test_a_new_pad_token_keeps_its_id(name, tmp_path):
    tok = AutoTokenizer.from_pretrained(folder(name))
    new = len(tok)
    assert tok.add_special_tokens({"pad_token": "[PAD]"}) == 1
    tok.save_pretrained(tmp_path)
    for loaded in (tok, AutoTokenizer.from_pretrained(tmp_path)):
        assert (loaded.pad_token, loaded.pad_token_id) == ("[PAD]", new)
        assert loaded("a [PAD] b", add_special_tokens=False)["input_ids"].count(new) == 1


@pytest.mark.parametrize("value", [5, ["</s>"], True])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_token_is_refused(name, value, tmp_path):
    config = json.loads((folder(name) / "tokenizer_config.json").read_text(encoding="utf-8"))
    path = copy_of(name, tmp_path / "a", config=config | {"pad_token": value})
    with pytest.raises(TokenizerError, match="`pad_token` is .*expected the text of a token"):
        AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", ["tokenizers.chatglm2-6b", SENTENCEPIECE])
def test_every_token_of_the_vocabulary_can_be_chosen(name, tmp_path):
    tok, text = AutoTokenizer.from_pretrained(folder(name)), "a</s>b <s> sop [MASK]"
    before = tok(text)["input_ids"]
    sop = tok.get_command("sop")
    tok.eos_token_id, tok.bos_token, tok.mask_token, tok.unk_token_id = sop, "<s>", "[MASK]", 0
    tok.save_pretrained(tmp_path)
    for loaded in (tok, AutoTokenizer.from_pretrained(tmp_path)):
        assert (loaded.eos_token, loaded.eos_token_id, loaded.bos_token_id) == ("sop", sop, 1)
        assert loaded.mask_token_id == loaded.get_command("[MASK]")
        assert loaded(text)["input_ids"] == before
    with pytest.raises(ValueError, match="`pad_token_id` is 99999; expected an id of the vocabulary"):
        tok.pad_token_id = 99999


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_as_plain_dictionaries(name, tmp_path):
    expected = tokenizer(name)
    path = copy_of(name, tmp_path / "a")
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "comment": "by hand"}
    for key in ("eos_token", "pad_token"):
        config[key] = {"content": getattr(expected, key), **token}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tok = AutoTokenizer.from_pretrained(path)
    assert (tok.eos_token_id, tok.pad_token_id) == (expected.eos_token_id, expected.pad_token_id)
    text = "a</s>b <unk> <eop> <pad> <|user|>"
    assert tok(text)["input_ids"] == expected(text)["input_ids"]
    tok.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"] == expected(text)["input_ids"]

    config["pad_token"] = {"text": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TokenizerError, match="`pad_token` is .*expected the text of a token"):
        AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in GLM4])  # which has a table of them
def test_more_special_tokens_as_plain_dictionaries(name, tmp_path):
    path = copy_of(name, tmp_path / "a")
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["additional_special_tokens"] = [{"content": "<extra>", "special": True}]
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tok = AutoTokenizer.from_pretrained(path)
    assert "<extra>" in tok.tokenize("a<extra>b")


def test_repeated_default_tokens_are_not_matched_in_text():
    """tokenizer_config.json of a fine-tuned checkpoint often has them."""
    tok = AutoTokenizer.from_pretrained(folder(SENTENCEPIECE), eos_token="</s>", pad_token="<unk>", unk_token="<unk>")
    assert tok("</s><unk>") == tokenizer(SENTENCEPIECE)("</s><unk>")


def test_chatglm_text_options():
    tok = AutoTokenizer.from_pretrained(folder("models.chatglm-6b"), remove_space=True, do_lower_case=True)
    assert tok.tokenize("  A \n b ") == tokenizer("models.chatglm-6b").tokenize("a b")


# Bad files -------------------------------------------------------------------------------------------------------


def test_missing_vocabulary(tmp_path):
    path = copy_of(SENTENCEPIECE, tmp_path / "a")
    (path / "tokenizer.model").unlink()
    with pytest.raises(
        TokenizerError, match=r"a has no vocabulary file; expected tokenizer.model .* or ice_text.model"
    ):
        AutoTokenizer.from_pretrained(path)
    with pytest.raises(TokenizerError, match="no such vocabulary file"):
        ChatGLMTokenizer(str(path / "tokenizer.model"))


BAD_FILES = {
    "empty": (lambda content: b"", "it is empty"),
    "truncated": (lambda content: content[: len(content) // 2], "is not a complete SentencePiece model|is truncated"),
    "garbage": (lambda content: b"\x89PNG\r\n" + content, r"it begins with b'\\x89PNG"),
    "Git LFS pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("damage", BAD_FILES)
@pytest.mark.parametrize("name", ["models.chatglm-6b", SENTENCEPIECE])
def test_damaged_sentencepiece_model(name, damage, tmp_path):
    path = copy_of(name, tmp_path / "a")
    (vocab_file,) = path.glob("*.model")
    change, message = BAD_FILES[damage]
    vocab_file.write_bytes(change(vocab_file.read_bytes()))
    with pytest.raises(TokenizerError, match=message) as error:
        AutoTokenizer.from_pretrained(path)
    assert str(vocab_file) in str(error.value)
    assert "ownload" in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content[: len(content) // 2], r"line \d+: found .* expected a base64 token"),
        (lambda content: content + b"not base64! 7\n", r"line \d+: found b'not base64! 7"),
        (lambda content: content + b"bm90IGEgcmFuaw== seven\n", r"line \d+: found .* seven"),
        (lambda content: content.replace(b" 100\n", b" 101\n"), "lines are missing or repeated"),
        (lambda content: b"".join(content.splitlines(keepends=True)[:100]), "is truncated"),
    ],
    ids=["cut in a line", "no base64", "no rank", "repeated rank", "cut between lines"],
)
def test_damaged_ranks(change, message, tmp_path):
    path = copy_of(GLM4[0], tmp_path / "a")
    vocab_file = path / "tokenizer.model"
    vocab_file.write_bytes(change(vocab_file.read_bytes()))
    with pytest.raises(TokenizerError, match=message) as error:
        AutoTokenizer.from_pretrained(path)
    assert str(vocab_file) in str(error.value)
