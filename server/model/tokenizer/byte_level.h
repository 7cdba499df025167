// The byte-level alphabet of GPT-2: every byte is a printable character.
#pragma once

#include <string>
#include <string_view>

namespace gla {

// Each byte of `bytes` as its character.
void AppendByteCharacters(std::string_view bytes, std::string* text);

// The bytes that `piece`, valid UTF-8, stands for; `piece` itself when one of its characters stands
// for no byte.
std::string BytesOfCharacters(std::string_view piece);

}  // namespace gla
