// The tokens of tokenizer.json by id and by spelling.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "model/tokenizer/tokenizer_config.h"

namespace gla {

// Const; any thread may use it.
class Vocabulary {
 public:
  // `vocab` is {spelling: id}; `added` may repeat its tokens with the same ids and add new ones.
  // Ids are distinct and nearly dense; every error names the token.
  static absl::StatusOr<Vocabulary> Make(const nlohmann::json& vocab,
                                         const std::vector<AddedToken>& added);
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;

  int size() const { return static_cast<int>(pieces_.size()); }  // ids are below it
  int32_t Find(std::string_view piece) const;                    // -1: none
  // The model's own tokens only, not those added beside it.
  int32_t FindInModel(std::string_view piece) const;
  // Empty where no token has the id. REQUIRES: 0 <= id < size().
  const std::string& Piece(int32_t id) const { return pieces_[id]; }

 private:
  Vocabulary() = default;

  std::vector<std::string> pieces_;  // never resized: ids_ points into it
  absl::flat_hash_map<absl::string_view, int32_t> ids_;
  std::vector<bool> is_added_only_;
};

}  // namespace gla
