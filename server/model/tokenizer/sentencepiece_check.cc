#include "model/tokenizer/sentencepiece_check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/strict_json.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

constexpr size_t kMaxPieces = 1 << 20;
constexpr size_t kMaxPieceBytes = 512;
constexpr float kMaxScore = 1e9f;
// The library keeps so many user-defined symbols, and so many normalization rules, that begin at
// one place of the text.
constexpr size_t kMaxNestedSymbols = 63;
constexpr int kMaxNestedRules = 31;
constexpr size_t kMaxRuleDepth = 256;
constexpr size_t kMaxReplacement = 64;  // bytes that one rule puts for its characters

// Kinds of pieces.
constexpr uint64_t kUserDefined = 4;
constexpr uint64_t kLastKind = 6;

absl::Status Malformed(std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("not a SentencePiece model: ", std::string(what)));
}

// One field of a protocol buffer message.
struct Field {
  uint32_t number;
  uint64_t value;          // of a varint or fixed-size field
  std::string_view bytes;  // of a length-delimited field
  bool has_bytes;
};

bool ReadVarint(std::string_view message, size_t* at, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 64 && *at < message.size(); shift += 7) {
    const unsigned char byte = message[(*at)++];
    *value |= uint64_t{byte & 0x7Fu} << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

absl::Status ForEachField(std::string_view message,
                          const std::function<absl::Status(const Field&)>& visit) {
  for (size_t at = 0; at < message.size();) {
    uint64_t tag;
    Field field{};
    if (!ReadVarint(message, &at, &tag) || tag >> 3 == 0 || tag >> 3 > UINT32_MAX) {
      return Malformed("broken field");
    }
    field.number = static_cast<uint32_t>(tag >> 3);
    const int wire = tag & 7;
    if (wire == 0) {
      if (!ReadVarint(message, &at, &field.value)) return Malformed("broken number");
    } else if (wire == 2) {
      uint64_t length;
      if (!ReadVarint(message, &at, &length) || length > message.size() - at) {
        return Malformed("field longer than the file");
      }
      field.bytes = message.substr(at, length);
      field.has_bytes = true;
      at += length;
    } else if (wire == 1 || wire == 5) {
      const size_t length = wire == 1 ? 8 : 4;
      if (length > message.size() - at) return Malformed("field longer than the file");
      std::memcpy(&field.value, message.data() + at, length);
      at += length;
    } else {
      return Malformed("unknown kind of field");
    }
    GLA_RETURN_IF_ERROR(visit(field));
  }
  return absl::OkStatus();
}

absl::Status CheckPiece(std::string_view message, SentencePieceModel* model) {
  std::string_view piece;
  float score = 0;
  uint64_t kind = 1;
  GLA_RETURN_IF_ERROR(ForEachField(message, [&](const Field& field) {
    if (field.number == 1 && field.has_bytes) piece = field.bytes;
    if (field.number == 2) {
      const uint32_t bits = static_cast<uint32_t>(field.value);
      std::memcpy(&score, &bits, sizeof(score));
    }
    if (field.number == 3) kind = field.value;
    return absl::OkStatus();
  }));
  if (piece.empty() || piece.size() > kMaxPieceBytes || piece.find('\0') != piece.npos ||
      !CheckText(piece).ok()) {
    return Malformed(absl::StrCat("piece ", QuoteForMessage(piece), ": expected 1 to ",
                                  kMaxPieceBytes, " bytes of UTF-8 without NUL"));
  }
  if (!(std::fabs(score) <= kMaxScore) || kind < 1 || kind > kLastKind) {
    return Malformed(absl::StrCat("piece ", QuoteForMessage(piece),
                                  ": expected a finite score and a kind from 1 to ", kLastKind,
                                  ", got ", score, " and ", kind));
  }
  if (kind == kUserDefined) model->user_defined.push_back(piece);
  return absl::OkStatus();
}

absl::Status CheckNesting(std::vector<std::string_view> symbols) {
  std::sort(symbols.begin(), symbols.end());
  std::vector<std::string_view> prefixes;  // of the current symbol, among the symbols
  for (const std::string_view symbol : symbols) {
    while (!prefixes.empty() && !symbol.starts_with(prefixes.back())) prefixes.pop_back();
    prefixes.push_back(symbol);
    if (prefixes.size() > kMaxNestedSymbols) {
      return Malformed(absl::StrCat("more than ", kMaxNestedSymbols,
                                    " user-defined symbols begin each other, such as ",
                                    QuoteForMessage(symbol)));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckNormalizer(std::string_view message, bool is_denormalizer,
                             SentencePieceModel* model) {
  return ForEachField(message, [&](const Field& field) -> absl::Status {
    if (field.number == 3) model->add_dummy_prefix = field.value != 0;
    if (field.number == 4) model->remove_extra_whitespaces = field.value != 0;
    if (field.number != 2 || field.bytes.empty()) return absl::OkStatus();
    if (is_denormalizer) {
      return absl::InvalidArgumentError(
          "SentencePiece denormalizer: not supported (text could not be decoded as it grows)");
    }
    return CheckCharsMap(field.bytes);
  });
}

// The trie of a charsmap, in the layout of the darts-clone library: a node is an index; its unit
// says where its children are.
class RuleTrie {
 public:
  RuleTrie(std::string_view units, std::string_view texts)
      : units_(units), texts_(texts), nested_(size(), kUnseen) {}

  size_t size() const { return units_.size() / 4; }

  // The most rules that begin at one place, by the way down from `node`; negative on an error.
  int Nested(size_t node, size_t depth) {
    if (depth > kMaxRuleDepth || nested_[node] == kOpen) return -1;
    if (nested_[node] != kUnseen) return nested_[node];
    nested_[node] = kOpen;
    const size_t children = node ^ Offset(node);
    if ((children | 0xFF) >= size()) return -1;
    int most = 0;
    for (size_t label = 0; label < 256; ++label) {
      const size_t child = children ^ label;
      if ((Unit(child) & 0x800000FFu) != label) continue;
      const bool has_value = (Unit(child) >> 8 & 1) != 0;
      if (has_value && !HasText(child)) return -1;
      const int below = Nested(child, depth + 1);
      if (below < 0) return -1;
      most = std::max(most, below + (has_value ? 1 : 0));
    }
    if (most > kMaxNestedRules) return -1;
    return nested_[node] = static_cast<int16_t>(most);
  }

 private:
  static constexpr int16_t kUnseen = -1, kOpen = -2;

  uint32_t Unit(size_t node) const {
    uint32_t unit;
    std::memcpy(&unit, units_.data() + 4 * node, 4);
    return unit;
  }
  size_t Offset(size_t node) const {
    const uint32_t unit = Unit(node);
    return size_t{unit >> 10} << ((unit & (1u << 9)) >> 6);
  }
  bool HasText(size_t node) const {
    const size_t value_at = node ^ Offset(node);
    if (value_at >= size()) return false;
    const size_t at = Unit(value_at) & 0x7FFFFFFFu;
    if (at >= texts_.size()) return false;
    const size_t end = texts_.find('\0', at);
    return end != texts_.npos && end - at <= kMaxReplacement &&
           CheckText(texts_.substr(at, end - at)).ok();
  }

  const std::string_view units_, texts_;
  std::vector<int16_t> nested_;
};

}  // namespace

absl::Status CheckCharsMap(std::string_view blob) {
  uint32_t trie_bytes = 0;
  if (blob.size() > 4) std::memcpy(&trie_bytes, blob.data(), 4);
  if (trie_bytes < 1024 || trie_bytes % 4 != 0 || trie_bytes >= blob.size() - 4) {
    return Malformed("normalization rules: wrong size");
  }
  RuleTrie trie(blob.substr(4, trie_bytes), blob.substr(4 + trie_bytes));
  if (trie.Nested(0, 0) < 0) return Malformed("normalization rules: broken");
  return absl::OkStatus();
}

absl::StatusOr<SentencePieceModel> CheckSentencePieceModel(std::string_view file) {
  SentencePieceModel model;
  SentencePieceModel ignored;
  size_t num_pieces = 0;
  GLA_RETURN_IF_ERROR(ForEachField(file, [&](const Field& field) -> absl::Status {
    if (!field.has_bytes) return Malformed("expected messages only");
    if (field.number == 1) {
      if (++num_pieces > kMaxPieces) return Malformed("too many pieces");
      return CheckPiece(field.bytes, &model);
    }
    if (field.number == 3) return CheckNormalizer(field.bytes, false, &model);
    if (field.number == 5) return CheckNormalizer(field.bytes, true, &ignored);
    return absl::OkStatus();
  }));
  if (num_pieces == 0) return Malformed("no pieces");
  GLA_RETURN_IF_ERROR(CheckNesting(model.user_defined));
  return model;
}

}  // namespace gla
