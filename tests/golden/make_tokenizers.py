"""Writes tokenizers/: a small tokenizer of each kind, and the ids that HuggingFace's libraries give for difficult text.

    python3 make_tokenizers.py        # needs tokenizers, transformers and sentencepiece

Vocabularies are trained on the text below. Expected ids and decoded texts are those of transformers' fast tokenizers
(which are the tokenizers library); those of SentencePiece's kind are compared with sentencepiece's own ids where both
split the text in the same way.
"""

import io
import json
import pathlib
import shutil

import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).parent / "tokenizers"

TRAINING = """\
The quick brown fox jumps over the lazy dog, and it's said that they're 12 or 13 years old. I've seen what she'll do; we'd
rather not. Der Fluß fließt schnell, über Brücken und Wälder. Le garçon a mangé des crêpes à l'été 1999. El niño comió.
Быстрая коричневая лиса прыгает через ленивую собаку. Η γρήγορη αλεπού πηδάει. 今日はとても良い天気です。我们在学习语言。
오늘 날씨가 좋다. مرحبا بالعالم. नमस्ते दुनिया। for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }  // 2024-05-17
	if x == 3.14159: return "hello world"    # a comment
Once upon a time there was a little girl who lived in a house near the forest. The little girl had a little dog.
The dog was happy and the girl was happy. Hello, world! Hello again! HELLO WORLD. 😀 👍 🎉 1234567890 00 000 100 2000
"""

SPECIALS = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>", "<|im_start|>", "<|im_end|>"]

# Each is encoded by itself, and all of them once more as one text.
TEXTS = [
    "The quick brown fox.",
    "",
    " ",
    "   ",
    "\n",
    " leading and trailing ",
    "two  spaces,   three    four\n\n\n  newlines \n \n and   ",
    "tabs\tand\t\ttabs \t mixed\n\tindented\r\nwindows\r\n\r\nlines\rold mac",
    "it's they're I'VE we'd she'll 'tis 'S 'LL don't'll o'clock ''s it\u2019s \u017f '\u017f x'\u017f",
    "1 12 123 1234 12345 1234567890123 3.14159 1,000,000 ½ ² ③ ٣٤٥ १२३ Ⅷ x1y22z333",
    "a1b2 c_3 __init__ i++ --x a->b ::std <=> !!?? ...... ((())) [[]] {}{} @#$%^&*~`|\\/",
    "Straße ÄÖÜ äöü éèê ñ ç œ Æ ﬁ ﬂ İ ı",
    "e\u0301 versus \u00e9, A\u030a \u212b \u00c5, o\u0323\u0302 \u1ed9, \u1112\u1161\u11ab \ud55c, \u0958 \u0915\u093c",
    "Zalgo: Z\u0335\u0321a\u0338\u0322l\u0336g\u0337o\u0334, lone mark \u0301 and \u0301\u0301x",
    "Русский текст, Ελληνικά, עברית, العربية, हिन्दी में, ไทยไม่มีช่องว่าง, 日本語の文章。中文标点,「引用」、한국어 문장",
    "😀👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ☕️ ☕︎ 🤷🏽‍♀️ ❤️‍🔥",
    "\u00a0no-break\u00a0space \u2003em\u2009thin\u200a \u3000wide\u3000 \u200bzero\u200bwidth \ufeffbom \u2028line\u2029para \u0085next",
    "\u0000nul \u0001\u001f\u007f control \u00ad soft\u00adhyphen",
    "\ufffd replacement, private \ue000 \U000f0000, noncharacter \uffff \U0010ffff, tag \U000e0041",
    "\U0001d54f\U0001d4d0 \U00010330\U00010331 \U00020000\U0002a6d6 𓀀 𒀀",
    "Hello<s>middle</s> after </s>x <unk> <|endoftext|>now<|im_start|>user\nhi<|im_end|>\n<|begin_of_text|>",
    "< s> <S> <|im_start |> <|endoftext| > <0x41> <0xF0> \u2581 \u2581\u2581a a\u2581b \u0120 \u010a Ġ",
    "x" * 300 + " " + "ab" * 150 + " " + "antidisestablishmentarianism" * 6,
    " " * 70 + "far" + "\n" * 20 + "\t" * 17 + "end",
    "http://example.org/a%20b?x=1&y=2#z user.name+tag@mail.example C:\\dir\\file.txt ~/home",
    "مرحبا\u200fبالعالم \u202bembedded\u202c \u2066isolate\u2069",
    "the end, with spaces   ",
]
TEXTS.append("\n".join(TEXTS))

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def write(directory, name, text):
    (ROOT / directory).mkdir(parents=True, exist_ok=True)
    (ROOT / directory / name).write_text(text, encoding="utf-8")


def special(content, **flags):
    return AddedToken(content, special=True, normalized=False, **flags)


def byte_level(pattern, specials, merges=130, normalizer=None, ignore_merges=False):
    """Byte-level BPE, trained on words that `pattern` makes; the special tokens come last."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([TRAINING], trainer)
    tokenizer.add_special_tokens([special(token) for token in specials])
    return tokenizer


def sentencepiece_model():
    """BPE with byte fallback and the options of LLaMA's tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING.splitlines()), model_writer=model, model_type="bpe", vocab_size=480,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )
    return model.getvalue()


def expect(tokenizer):
    """Ids and decoded text of every text, by a fast tokenizer of transformers."""
    cases = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cases.append({"ids": ids, "decoded": None if decoded == text else decoded})
    return cases


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    expected = {}
    as_json = dict(ensure_ascii=False, indent=0)

    # GPT-2: the same vocabulary as vocab.json + merges.txt and as tokenizer.json.
    gpt2 = byte_level(None, ["<|endoftext|>"])
    definition = json.loads(gpt2.to_str())
    vocab = dict(definition["model"]["vocab"], **{"<|endoftext|>": len(definition["model"]["vocab"])})
    merges = "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in definition["model"]["merges"])
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write("gpt2_files", "vocab.json", json.dumps(vocab, **as_json))
    write("gpt2_files", "merges.txt", merges)
    write("gpt2_files", "tokenizer_config.json", json.dumps(config))
    write("gpt2_json", "tokenizer.json", json.dumps(definition, **as_json))
    write("gpt2_json", "tokenizer_config.json", json.dumps(config))
    expected["gpt2_json"] = expected["gpt2_files"] = expect(PreTrainedTokenizerFast(tokenizer_object=gpt2))

    # OPT: GPT-2's files with </s> in front of every text.
    opt = byte_level(None, ["</s>"])
    opt.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", opt.token_to_id("</s>"))])
    definition = json.loads(opt.to_str())
    vocab = dict(definition["model"]["vocab"], **{"</s>": opt.token_to_id("</s>")})
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    write("opt_files", "vocab.json", json.dumps(vocab, **as_json))
    write("opt_files", "merges.txt", merges)
    write("opt_files", "tokenizer_config.json", json.dumps(config))
    expected["opt_files"] = expect(PreTrainedTokenizerFast(tokenizer_object=opt))

    # LLaMA-3: its pattern, words of the vocabulary taken whole, <|begin_of_text|> in front.
    llama3 = byte_level(LLAMA3, ["<|begin_of_text|>", "<|endoftext|>"], ignore_merges=True)
    bos = ("<|begin_of_text|>", llama3.token_to_id("<|begin_of_text|>"))
    llama3.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[bos])]
    )
    write("llama3", "tokenizer.json", json.dumps(json.loads(llama3.to_str()), **as_json))
    write("llama3", "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"}))
    expected["llama3"] = expect(PreTrainedTokenizerFast(tokenizer_object=llama3))

    # Qwen2: single digits, NFC, no BOS.
    qwen2 = byte_level(QWEN2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizer=normalizers.NFC())
    write("qwen2", "tokenizer.json", json.dumps(json.loads(qwen2.to_str()), **as_json))
    write("qwen2", "tokenizer_config.json", json.dumps({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    expected["qwen2"] = expect(PreTrainedTokenizerFast(tokenizer_object=qwen2))

    # LLaMA-1 and 2: tokenizer.model, and tokenizer.json with Prepend or Metaspace.
    model = sentencepiece_model()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    write_model = lambda directory: (ROOT / directory).mkdir(parents=True) or (ROOT / directory / "tokenizer.model").write_bytes(model)
    for directory, legacy in (("sentencepiece_prepend", True), ("sentencepiece_metaspace", False)):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges_of(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if legacy:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        tokenizer.add_special_tokens([special(token) for token in ("<unk>", "<s>", "</s>")])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        write(directory + "_json", "tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), **as_json))
        write(directory + "_json", "tokenizer_config.json", json.dumps(config))
        write_model(directory + "_model")
        write(directory + "_model", "tokenizer_config.json", json.dumps(config))
        cases = expect(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
        expected[directory + "_json"] = expected[directory + "_model"] = cases
        agreed = 0
        for text, case in zip(TEXTS, cases):
            # Special tokens are plain text to sentencepiece, and Metaspace puts no second mark before a leading space.
            same_split = text and not any(token in text for token in ("<unk>", "<s>", "</s>"))
            if same_split and (legacy or not text.startswith(" ")):
                agreed += 1
                assert [1] + pieces.encode(text) == case["ids"], (directory, text, [1] + pieces.encode(text), case["ids"])
        print(directory, "equals sentencepiece's own ids in", agreed, "texts")

    for name, cases in expected.items():
        print(name, "whole page:", len(cases[-1]["ids"]), "ids; decoded otherwise:", sum(case["decoded"] is not None for case in cases))
    facts = {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__, "sentencepiece": sentencepiece.__version__}
    write("", "expected.json", json.dumps(dict(facts, texts=TEXTS, cases=expected), ensure_ascii=True, separators=(",", ":")) + "\n")


def merges_of(pieces):
    """Every way to write a piece as two, in the order in which sentencepiece merges: by score, that is by id."""
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = []
    for piece, rank in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and not pieces.is_byte(rank) and not pieces.is_control(rank) and not pieces.is_unknown(rank):
                merges.append((-pieces.get_score(rank), -len(left), vocab[left], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


if __name__ == "__main__":
    main()
