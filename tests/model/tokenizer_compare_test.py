"""The tokenizers against the Python packages that models are trained with.

Real vocabularies come with mistral-common; byte-level ones are trained here on a text of the tests.
Ids and decoded text must be identical on hard text. The helper gla-tokenize of the release build is
compared; $GLA_TOKENIZE names another one.
"""

import base64
import importlib.util
import json
import os
import pathlib
import random
import shutil
import subprocess

import pytest

sentencepiece = pytest.importorskip("sentencepiece", reason="needs tests/requirements.txt")
tokenizers = pytest.importorskip("tokenizers", reason="needs tests/requirements.txt")

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,  # noqa: E402
                        pre_tokenizers, processors, trainers)

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = os.environ.get("GLA_TOKENIZE", str(ROOT / "build/release/bin/gla-tokenize"))
BARD = ROOT / "deploy/models/bard-6m"
# Only the package's files are wanted, not its code.
MISTRAL = pathlib.Path(importlib.util.find_spec("mistral_common").origin).parent / "data"
CORPUS = ROOT / "tests/golden/reference/val_kjv.txt"

# As published with the models.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

SPACES = "\t\n\v\f\r \x85\xa0\u1680\u180e\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
HARD = [
    "", " ", "  ", "a", " a", "a ", "  a  b  ", "\n", "\n\n\n", " \n \n", "\r\n\r\n", "\t\tx",
    "\0", "a\0b\0\0", "".join(map(chr, range(32))), "\x7f\x80\x9f", SPACES, SPACES * 3,
    "x".join(SPACES), "x  ".join(SPACES), "\u180e\u180ex \u180e",
    "I'm you're he'd WE'LL they'Ve it'ſ 's'S ’s", "don't'''''t", "e\u0301a\u0308\u0323 \u0301x",
    "\u212b\ufb01\u00c5\ufdfa\u1e9b\u0323\u0130I\u0131\u03a3\u03c3\u03c2 \u01c5",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇫🇷 ☺️ 🫨", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff \ufffd\ufffe\uffff",
    "你好，世界！今日は東京タワー。한국어 텍스트", "שָׁלוֹם עֲלֵיכֶם السَّلَامُ عَلَيْكُمْ ١٢٣",
    "नमस्ते दुनिया ไทยภาษา ελληνικά Ελλάς", "1234567890" * 5, "1 22 333 4444 55555 ½ Ⅷ ② ௧௨",
    "3.14159,26-53/58 0x1F600", "▁▁ ▁x ▁", "▁", "Ġ Ċ Ġthe Â", "<0x41><0x0A> <0x>", "<s></s><unk>",
    "text <s> more</s> <s>", "</s></s>x", "<s>Hello", " <s> Hello", "[INST] hi [/INST]",
    "<|endoftext|>", "a<|endoftext|>b", "a <|endoftext|> <|endoftext|>  b", "<mask> x<mask>  y",
    "word wordy sword word,word", "\u200b\u200c\u200d\ufeff\u2060 \u202eabc\u202c", "\ufeffbom",
    "if (x[i] != 0) {\n\treturn -1;  // no\n}\n", "https://example.org/a?b=c&d=%20#e", "!!!???...",
    "Á" * 40, "a\u0300" * 40, "\u0344" * 9, "x" * 300, "ab " * 200, " " * 300, "\n" * 300,
]


def random_texts(count, seed=7):
    """Strings of characters from every part of Unicode, half of them near what people write."""
    rng = random.Random(seed)
    near = ("aeiou THE thes 's'll\n\n  \t.,;:-!?(){}0123456789éüñß" + SPACES + "你好的日本語한국"
            "שלוםعربيहिन्दी\u0301\u0308\u200d👩👍🏽🇩🇪▁<s>")
    texts = []
    for _ in range(count):
        length = rng.randrange(1, 40)
        everywhere = rng.random() < 0.5
        characters = []
        while len(characters) < length:
            code = rng.choice((0x80, 0x800, 0x3000, 0x10000, 0x110000))
            c = chr(rng.randrange(code)) if everywhere else rng.choice(near)
            if not 0xD800 <= ord(c) <= 0xDFFF:
                characters.append(c)
        texts.append("".join(characters))
    return texts


RANDOM = random_texts(2000)
LONG = {"one letter": "a" * (1 << 20), "spaces": " " * (1 << 20), "newlines": "\n" * (1 << 20),
        "exclamations": "!" * (1 << 20), "digits": "7" * (1 << 20), "marks": "\u0301" * (1 << 18),
        "capitals": "A" * (1 << 20), "a book": CORPUS.read_text()}


class Ours:
    """A gla-tokenize process on a folder."""

    def __init__(self, folder):
        self.process = subprocess.Popen([TOOL, str(folder)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        if "decoded" in answer:
            answer["decoded"] = base64.b64decode(answer["decoded"]).decode("utf-8")
        return answer

    def encode(self, text, **options):
        data = base64.b64encode(text.encode("utf-8")).decode()
        return self.ask({"text": data, **options})

    def decode(self, ids, skip_special=False):
        return self.ask({"ids": ids, "skip_special": skip_special})["decoded"]

    def close(self):
        self.process.stdin.close()
        assert self.process.wait() == 0


def judge(ours, encode, decode, texts, **options):
    """Every text has the same ids, and they the same text."""
    for text in texts:
        answer = ours.encode(text, **options)
        want = encode(text)
        assert answer["ids"] == want, f"{text[:200]!r}: expected {want[:50]}, got {answer['ids'][:50]}"
        assert answer["decoded"] == decode(want), f"{text[:200]!r} decoded"


def judge_long(ours, encode, decode, names=("one letter", "a book")):
    for name in names:
        text = LONG[name]
        answer = ours.encode(text)
        assert answer["ids"] == encode(text), name
        assert answer["decoded"] == decode(answer["ids"]), name
        assert answer["seconds"] < 10, f"{name}: {answer['seconds']} s"


# ---- SentencePiece ------------------------------------------------------------------------------


def sentencepiece_folder(tmp_path, model, config):
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("model", [BARD / "tokenizer.model", MISTRAL / "tokenizer.model.v1",
                                   MISTRAL / "mistral_instruct_tokenizer_240323.model.v3"],
                         ids=["bard", "mistral-v1", "mistral-v3"])
def test_sentencepiece_is_the_package(tmp_path, model):
    package = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ours = Ours(sentencepiece_folder(tmp_path, model, {"add_bos_token": True}))
    info = ours.ask({})
    assert (info["vocab_size"], info["bos"], info["eos"]) == (len(package), 1, 2)
    # The package does not look for special tokens in a text.
    judge(ours, package.encode, package.decode, HARD + RANDOM, parse_special=False)
    judge_long(ours, package.encode, package.decode)
    assert ours.encode("Hi", add_special=True)["ids"] == [1] + package.encode("Hi")
    rng = random.Random(3)
    normal = [i for i in range(len(package)) if not package.is_control(i)]
    for _ in range(500):
        ids = [rng.choice(normal) if rng.random() < 0.5 else rng.randrange(3, 259)
               for _ in range(20)]
        assert ours.decode(ids, skip_special=True) == package.decode(ids)
    ours.close()


@pytest.mark.parametrize("model_type,rule", [("bpe", "nmt_nfkc"), ("unigram", "nmt_nfkc_cf"),
                                             ("unigram", "nfkc"), ("word", "identity"),
                                             ("char", "identity")])
def test_every_kind_of_sentencepiece_model(tmp_path, model_type, rule):
    sentencepiece.SentencePieceTrainer.train(
        input=str(CORPUS), model_prefix=str(tmp_path / "m"), model_type=model_type, vocab_size=600,
        normalization_rule_name=rule, hard_vocab_limit=False, user_defined_symbols=["<mask>", "<ma"],
        minloglevel=2)
    package = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = Ours(sentencepiece_folder(tmp_path, tmp_path / "m.model", {}))
    judge(ours, package.encode, package.decode, HARD + RANDOM[:500], parse_special=False)
    ours.close()


def test_text_between_special_tokens_is_encoded_on_its_own(tmp_path):
    model = BARD / "tokenizer.model"
    package = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ours = Ours(sentencepiece_folder(tmp_path, model, {}))
    assert ours.encode("ab<s>cd</s>")["ids"] == package.encode("ab") + [1] + package.encode("cd") + [2]
    assert ours.encode("ab<s>cd</s>", parse_special=False)["ids"] == package.encode("ab<s>cd</s>")
    ours.close()


# ---- tokenizer.json -----------------------------------------------------------------------------


def byte_fallback_json(package, **parts):
    """Mistral's SentencePiece model as Llama's tokenizer.json: its merges are all splits of each
    piece into two pieces, those of the better piece first."""
    vocab = {package.id_to_piece(i): i for i in range(len(package))}
    merges = []
    for piece, score in ((p, package.get_score(i)) for p, i in vocab.items()):
        local = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))
                 if piece[:cut] in vocab and piece[cut:] in vocab]
        local.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, pair) for pair in local]
    merges.sort(key=lambda merge: -merge[0])
    model = models.BPE(vocab, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True,
                       byte_fallback=True, dropout=None)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t in ("<unk>", "<s>", "</s>")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def byte_level_json(pre_tokenizer, normalizer=None, special=("<|endoftext|>",), size=3000):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # On the hard text too: then ids show where it is cut.
    tokenizer.train_from_iterator([CORPUS.read_text()] + HARD * 20, trainer)
    return tokenizer


def split_then_bytes(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tekken_json():
    """Mistral's byte-level vocabulary as the tokenizer.json published with it: the rank of a token
    is its id, and its merges are all its splits."""
    table = {}  # GPT-2's alphabet
    following = 256
    for byte in range(256):
        printable = 33 <= byte <= 126 or (byte >= 161 and byte != 173)
        table[byte] = chr(byte if printable else following)
        following += not printable
    data = json.loads((MISTRAL / "tekken_240911.json").read_text())
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in data["vocab"][:30000]}
    spell = lambda token: "".join(table[b] for b in token)  # noqa: E731
    merges = []
    for token, rank in ranks.items():
        local = [(token[:cut], token[cut:]) for cut in range(1, len(token))
                 if token[:cut] in ranks and token[cut:] in ranks]
        local.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(rank, spell(a), spell(b)) for a, b in local]
    merges.sort(key=lambda merge: merge[0])
    vocab = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, [(a, b) for _, a, b in merges], ignore_merges=True))
    tokenizer.pre_tokenizer = split_then_bytes(TEKKEN)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def mistral():
    model = MISTRAL / "tokenizer.model.v1"
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def template(tokenizer, name):
    return processors.TemplateProcessing(single=f"{name} $A", pair=f"{name} $A $B",
                                         special_tokens=[(name, tokenizer.token_to_id(name))])


def llama_legacy():
    tokenizer = byte_fallback_json(mistral(), normalizer=normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))
    tokenizer.post_processor = template(tokenizer, "<s>")
    return tokenizer


def metaspace(scheme, split):
    return lambda: byte_fallback_json(mistral(), pre_tokenizer=pre_tokenizers.Metaspace(
        "▁", prepend_scheme=scheme, split=split))


def metaspace_decoder():
    tokenizer = metaspace("first", True)()
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="first")
    return tokenizer


def added_of_every_kind():
    tokenizer = byte_level_json(pre_tokenizers.ByteLevel(add_prefix_space=False),
                                normalizer=normalizers.Lowercase())
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    # Lower case: the package's later versions show a normalized token as it is found, not as it is
    # written in the file.
    tokenizer.add_tokens([AddedToken("word", single_word=True, normalized=True),
                          AddedToken("[inst]", normalized=True, rstrip=True),
                          AddedToken("[/INST]", normalized=False, lstrip=True),
                          AddedToken("  ", normalized=False), AddedToken("ab ", normalized=True),
                          AddedToken("ab ab", normalized=True)])
    return tokenizer


def unknown(fuse):
    def make():
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=fuse))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.train([str(CORPUS)], trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>"], show_progress=False))
        return tokenizer
    return make


CASES = {
    "llama legacy": llama_legacy,
    "llama always, whole": metaspace("always", False),
    "mistral first, words": metaspace("first", True),
    "never": metaspace("never", True),
    "metaspace decoder": metaspace_decoder,
    "gpt2": lambda: byte_level_json(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2 with prefix": lambda: byte_level_json(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt-neox, nfc": lambda: byte_level_json(pre_tokenizers.ByteLevel(add_prefix_space=False),
                                             normalizer=normalizers.NFC()),
    "llama 3": lambda: byte_level_json(split_then_bytes(LLAMA3)),
    "qwen 2": lambda: byte_level_json(split_then_bytes(QWEN2), normalizer=normalizers.NFC()),
    "digits": lambda: byte_level_json(pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    "runs of digits, nfkc": lambda: byte_level_json(pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False)]), normalizer=normalizers.NFKC()),
    "nfd": lambda: byte_level_json(split_then_bytes(r"\p{L}\p{M}*|\s+"),
                                   normalizer=normalizers.NFD()),
    "nfkd, replaced": lambda: byte_level_json(
        split_then_bytes(r"\W+"), normalizer=normalizers.Sequence(
            [normalizers.NFKD(), normalizers.Replace(Regex(r" {2,}|\t"), "_")])),
    "words": lambda: byte_level_json(split_then_bytes(r"\w+\b|[\w-]|\W\p{Han}"), size=1000),
    "tekken": tekken_json,
    "added tokens": added_of_every_kind,
    "unknown, fused": unknown(True),
    "unknown, one by one": unknown(False),
    **{f"split {behavior}{' inverted' * invert}": lambda behavior=behavior, invert=invert:
       byte_level_json(split_then_bytes(r"[aeiou]+|\s|e\b", behavior, invert), size=600)
       for behavior in ("removed", "isolated", "merged_with_previous", "merged_with_next",
                        "contiguous") for invert in (False, True)},
}
# Those of real use see all the random text; the rest a part of it.
MAIN = ("llama legacy", "mistral first, words", "gpt2", "llama 3", "qwen 2", "tekken")


@pytest.mark.parametrize("name", CASES)
def test_tokenizer_json_is_the_package(tmp_path, name):
    package = CASES[name]()
    package.save(str(tmp_path / "tokenizer.json"))
    package = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = Ours(tmp_path)
    assert ours.ask({})["vocab_size"] == package.get_vocab_size()

    def encode(text):
        return package.encode(text, add_special_tokens=False).ids

    def decode(ids):
        return package.decode(ids, skip_special_tokens=False)

    judge(ours, encode, decode, HARD + (RANDOM if name in MAIN or name == "words" else RANDOM[:400]))
    judge(ours, lambda text: package.encode(text).ids, decode, HARD[:10], add_special=True)
    package.encode_special_tokens = True
    judge(ours, encode, decode, HARD, parse_special=False)
    package.encode_special_tokens = False
    if name in MAIN:
        judge_long(ours, encode, decode)
    if name == "tekken":
        judge_long(ours, encode, decode, LONG)
    rng = random.Random(5)
    is_byte = [package.id_to_token(i) for i in range(package.get_vocab_size())]
    is_byte = [i for i, piece in enumerate(is_byte) if piece.startswith("<0x") and len(piece) == 6]
    for skip in (False, True):
        for _ in range(200):
            ids = [rng.randrange(package.get_vocab_size()) for _ in range(rng.randrange(30))]
            # Of a run of byte tokens with bad bytes in it the package shows nothing, see the test
            # of BadBytes in tokenizer_test.cc.
            ids = [i for i in ids if i not in is_byte]
            assert ours.decode(ids, skip) == package.decode(ids, skip_special_tokens=skip), ids
    ours.close()


def test_the_same_vocabulary_in_both_formats_gives_the_same_ids(tmp_path):
    llama_legacy().save(str(tmp_path / "tokenizer.json"))
    ours = Ours(tmp_path)
    package = mistral()
    judge(ours, package.encode, package.decode, [CORPUS.read_text()[:20000]])
    ours.close()
