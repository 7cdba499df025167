// Text to token ids and back, from the tokenizer files of a checkpoint folder.
//
// `tokenizer.json` (Hugging Face; BPE with byte fallback as Llama and Mistral, or byte-level as
// GPT-2, GPT-NeoX and Qwen) or, where there is none, `tokenizer.model` (SentencePiece), with
// `tokenizer_config.json` for begin, end and added tokens. The files are hostile input. Const after
// Load(); any thread may use it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace gla {

// How decoded bytes that are not valid UTF-8 come out, each as the tokenizer's Python package does
// it. A bad sequence is the longest beginning of a character that goes wrong before it is whole, or
// one byte that begins none: E4 BD 41 is one bad sequence of two bytes, then "A".
enum class BadBytes {
  kEachByte,      // U+FFFD for every byte of a bad sequence: byte-fallback tokens
  kEachSequence,  // U+FFFD for every bad sequence: byte-level tokens
};

class Tokenizer {
 public:
  // NotFound when the folder has no tokenizer; InvalidArgument when one is malformed or of a kind
  // that is not supported, by name.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& folder);
  virtual ~Tokenizer() = default;

  virtual int vocab_size() const = 0;    // ids are in [0, vocab_size())
  virtual int bos_token_id() const = 0;  // -1: none
  virtual int eos_token_id() const = 0;  // -1: none
  virtual bool adds_bos() const = 0;     // add_bos_token, or the post-processor's template
  virtual bool adds_eos() const = 0;

  // `text` is any bytes; invalid UTF-8 is InvalidArgument saying the byte offset. Special tokens in
  // the text are recognised when `parse_special`. With `add_special` the begin and end tokens are
  // added as the tokenizer's configuration says.
  virtual absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special,
                                                      bool parse_special = true) const = 0;
  // The text of `ids`. With `skip_special` special tokens give no text. Bytes that are no valid
  // UTF-8 come out as U+FFFD, see bad_bytes(). An id out of range is InvalidArgument.
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids, bool skip_special = true) const;
  // The token as the vocabulary spells it ("<0x0A>", "▁the"); empty when out of range.
  virtual std::string Piece(int32_t id) const = 0;
  virtual bool IsSpecial(int32_t id) const = 0;

  // The bytes that token `id` adds after `previous` tokens were decoded (a leading space is dropped
  // only at the start of a text); may be a part of a character.
  virtual std::string TokenBytes(int32_t id, bool at_start, bool skip_special) const = 0;
  // Whether a text that was at its start is not any more after token `id`.
  virtual bool BeginsText(int32_t id, bool skip_special) const;
  virtual BadBytes bad_bytes() const = 0;
};

// Decodes one stream token by token: the pieces returned, concatenated, are Decode() of all its
// ids, and no piece ends inside a character.
class StreamDecoder {
 public:
  // `at_start` is false when the stream continues a text (generation after a prompt): then the
  // first token keeps its leading space.
  StreamDecoder(const Tokenizer& tokenizer, bool at_start, bool skip_special = true);
  std::string Add(int32_t id);  // the whole characters that are complete now; may be empty
  std::string Finish();         // what is left; an incomplete character comes out as U+FFFD

 private:
  const Tokenizer* tokenizer_;
  bool at_start_;
  bool skip_special_;
  std::string pending_;  // at most 3 bytes: the beginning of a character
};

}  // namespace gla
