// UTF-8: checking, reading and repairing it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "model/tokenizer.h"

namespace gla {

// What stands at one place of a text.
struct Utf8Scan {
  enum Kind {
    kCharacter,   // a whole, valid character
    kInvalid,     // the longest beginning of a character that goes wrong before it is whole, or one
                  // byte that begins none
    kIncomplete,  // a beginning of a character, cut by the end of the text
  };
  Kind kind;
  size_t length;  // bytes, at least 1
};
// REQUIRES: at < text.size().
Utf8Scan ScanUtf8(std::string_view text, size_t at);

// What can be encoded: InvalidArgument that says the offset of the first byte that is not UTF-8, or
// that the text is larger than any request (so that its places fit 32 bits).
absl::Status CheckText(std::string_view text);

// The character at text[*at], which is moved behind it. REQUIRES: text is valid UTF-8.
char32_t NextCharacter(std::string_view text, size_t* at);
void AppendCharacter(char32_t character, std::string* text);

// Moves the beginning of `pending` to `out`, bytes that are not valid replaced as `bad_bytes` says.
// An incomplete character at the end stays in `pending`, unless this is the text's end.
void RepairUtf8(bool at_end, BadBytes bad_bytes, std::string* pending, std::string* out);

}  // namespace gla
