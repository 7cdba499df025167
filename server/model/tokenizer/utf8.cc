#include "model/tokenizer/utf8.h"

#include "absl/strings/str_cat.h"

namespace gla {
namespace {

constexpr size_t kMaxTextBytes = size_t{64} << 20;

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// What the first byte of a character says: how many bytes follow, and the range of the next one
// (which keeps out overlong forms, surrogates and what is beyond U+10FFFF).
struct Lead {
  int more;
  unsigned char low, high;
};
Lead LeadOf(unsigned char byte) {
  if (byte < 0x80) return {0, 0, 0};
  if (byte < 0xC2) return {-1, 0, 0};
  if (byte < 0xE0) return {1, 0x80, 0xBF};
  if (byte == 0xE0) return {2, 0xA0, 0xBF};
  if (byte == 0xED) return {2, 0x80, 0x9F};
  if (byte < 0xF0) return {2, 0x80, 0xBF};
  if (byte == 0xF0) return {3, 0x90, 0xBF};
  if (byte < 0xF4) return {3, 0x80, 0xBF};
  if (byte == 0xF4) return {3, 0x80, 0x8F};
  return {-1, 0, 0};
}

}  // namespace

Utf8Scan ScanUtf8(std::string_view text, size_t at) {
  Lead lead = LeadOf(text[at]);
  if (lead.more < 0) return {Utf8Scan::kInvalid, 1};
  for (size_t length = 1;; ++length) {
    if (lead.more == 0) return {Utf8Scan::kCharacter, length};
    if (at + length == text.size()) return {Utf8Scan::kIncomplete, length};
    const unsigned char byte = text[at + length];
    if (byte < lead.low || byte > lead.high) return {Utf8Scan::kInvalid, length};
    lead = {lead.more - 1, 0x80, 0xBF};
  }
}

absl::Status CheckText(std::string_view text) {
  if (text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("text: expected at most ", kMaxTextBytes, " bytes, got ", text.size()));
  }
  for (size_t at = 0; at < text.size();) {
    const Utf8Scan scan = ScanUtf8(text, at);
    if (scan.kind != Utf8Scan::kCharacter) {
      return absl::InvalidArgumentError(absl::StrCat("text: expected UTF-8, got byte 0x",
                                                     absl::Hex(text[at] & 0xFF, absl::kZeroPad2),
                                                     " at offset ", at));
    }
    at += scan.length;
  }
  return absl::OkStatus();
}

char32_t NextCharacter(std::string_view text, size_t* at) {
  const unsigned char first = text[(*at)++];
  const int more = LeadOf(first).more;
  if (more <= 0) return first;
  char32_t character = first & (0x3F >> more);
  for (int i = 0; i < more; ++i) character = character << 6 | (text[(*at)++] & 0x3F);
  return character;
}

void AppendCharacter(char32_t character, std::string* text) {
  const auto tail = [&](int shift) {
    text->push_back(static_cast<char>(0x80 | (character >> shift & 0x3F)));
  };
  if (character < 0x80) {
    text->push_back(static_cast<char>(character));
  } else if (character < 0x800) {
    text->push_back(static_cast<char>(0xC0 | character >> 6));
    tail(0);
  } else if (character < 0x10000) {
    text->push_back(static_cast<char>(0xE0 | character >> 12));
    tail(6);
    tail(0);
  } else {
    text->push_back(static_cast<char>(0xF0 | character >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

void RepairUtf8(bool at_end, BadBytes bad_bytes, std::string* pending, std::string* out) {
  size_t at = 0;
  while (at < pending->size()) {
    const Utf8Scan scan = ScanUtf8(*pending, at);
    if (scan.kind == Utf8Scan::kIncomplete && !at_end) break;
    if (scan.kind == Utf8Scan::kCharacter) {
      out->append(*pending, at, scan.length);
    } else {
      const size_t times = bad_bytes == BadBytes::kEachByte ? scan.length : 1;
      for (size_t i = 0; i < times; ++i) out->append(kReplacement);
    }
    at += scan.length;
  }
  pending->erase(0, at);
}

}  // namespace gla
