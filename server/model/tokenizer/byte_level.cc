#include "model/tokenizer/byte_level.h"

#include <array>

#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

// Printable characters of Latin-1 stand for themselves, the other bytes for U+0100 and on, in
// order.
struct Alphabet {
  std::array<char16_t, 256> character{};
  std::array<int16_t, 0x144> byte{};  // by character, -1: none

  constexpr Alphabet() {
    for (int16_t& b : byte) b = -1;
    char16_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD);
      character[b] = printable ? static_cast<char16_t>(b) : next++;
      byte[character[b]] = static_cast<int16_t>(b);
    }
  }
};
constexpr Alphabet kAlphabet;

}  // namespace

void AppendByteCharacters(std::string_view bytes, std::string* text) {
  for (const char byte : bytes) {
    AppendCharacter(kAlphabet.character[static_cast<unsigned char>(byte)], text);
  }
}

std::string BytesOfCharacters(std::string_view piece) {
  std::string bytes;
  for (size_t at = 0; at < piece.size();) {
    const char32_t c = NextCharacter(piece, &at);
    if (c >= kAlphabet.byte.size() || kAlphabet.byte[c] < 0) return std::string(piece);
    bytes.push_back(static_cast<char>(kAlphabet.byte[c]));
  }
  return bytes;
}

}  // namespace gla
