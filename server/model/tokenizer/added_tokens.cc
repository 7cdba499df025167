#include "model/tokenizer/added_tokens.h"

#include <unicode/uchar.h>

#include <algorithm>
#include <utility>

#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

uint64_t Edge(uint32_t node, char byte) {
  return uint64_t{node} << 8 | static_cast<unsigned char>(byte);
}

// What a regular expression's \w means (Unicode technical standard 18).
bool IsWordCharacter(char32_t c) {
  constexpr uint32_t kTypes = U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK;
  return u_hasBinaryProperty(c, UCHAR_ALPHABETIC) || (U_MASK(u_charType(c)) & kTypes) != 0 ||
         u_hasBinaryProperty(c, UCHAR_JOIN_CONTROL);
}

char32_t CharacterBefore(std::string_view text, size_t at, size_t* begin) {
  *begin = at - 1;
  while ((text[*begin] & 0xC0) == 0x80) --*begin;
  size_t end = *begin;
  return NextCharacter(text, &end);
}

bool WordTouches(std::string_view text, size_t begin, size_t end) {
  size_t ignored;
  if (begin > 0 && IsWordCharacter(CharacterBefore(text, begin, &ignored))) return true;
  return end < text.size() && IsWordCharacter(NextCharacter(text, &end));
}

size_t SpaceBegin(std::string_view text, size_t at, size_t limit) {
  size_t begin = at;
  while (at > limit && u_isUWhiteSpace(CharacterBefore(text, at, &begin))) at = begin;
  return at;
}

size_t SpaceEnd(std::string_view text, size_t at) {
  size_t end = at;
  while (at < text.size() && u_isUWhiteSpace(NextCharacter(text, &end))) at = end;
  return at;
}

}  // namespace

void AddedTokens::Add(AddedToken token, std::string_view pattern) {
  if (pattern.empty()) return;
  begins_[static_cast<unsigned char>(pattern[0])] = true;
  uint32_t node = 0;
  for (const char byte : pattern) {
    const auto [edge, is_new] = edges_.try_emplace(Edge(node, byte), ends_.size());
    if (is_new) ends_.push_back(-1);
    node = edge->second;
  }
  if (ends_[node] >= 0) return;
  ends_[node] = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(std::move(token));
}

const AddedToken* AddedTokens::Match(std::string_view text, size_t at, size_t* length) const {
  const AddedToken* longest = nullptr;
  uint32_t node = 0;
  for (size_t end = at; end < text.size();) {
    const auto edge = edges_.find(Edge(node, text[end]));
    if (edge == edges_.end()) break;
    node = edge->second;
    ++end;
    if (ends_[node] < 0) continue;
    longest = &tokens_[ends_[node]];
    *length = end - at;
  }
  return longest;
}

std::vector<Segment> AddedTokens::Split(std::string_view text, bool parse_special) const {
  std::vector<Segment> segments;
  size_t done = 0;  // what is before it lies in a segment
  for (size_t at = 0; at < text.size() && !tokens_.empty();) {
    size_t length = 0;
    const AddedToken* token =
        begins_[static_cast<unsigned char>(text[at])] ? Match(text, at, &length) : nullptr;
    if (token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at;
    size_t end = at + length;
    // A token that does not count here still hides shorter ones and those that overlap it.
    at = end;
    if (token->special && !parse_special) continue;
    if (token->single_word && WordTouches(text, begin, end)) continue;
    if (token->lstrip) begin = SpaceBegin(text, begin, done);
    if (token->rstrip) end = SpaceEnd(text, std::max(end, done));
    if (begin > done) segments.push_back({done, begin});
    segments.push_back({begin, end, token->id});
    done = end;
  }
  if (done < text.size()) segments.push_back({done, text.size()});
  return segments;
}

}  // namespace gla
