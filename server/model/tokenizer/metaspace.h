// Metaspace: spaces as a visible character, which joins the word that follows.
#pragma once

#include <string>
#include <string_view>

#include "model/config_reader.h"

namespace gla {

struct Metaspace {
  // Which pieces without a leading space get one.
  enum class Prepend { kNever, kFirst, kAlways };

  std::string replacement;  // one character
  Prepend prepend = Prepend::kAlways;
  bool split = true;

  // The pre-tokenizer's work on one piece, before it is cut.
  std::string Replace(std::string_view piece, bool at_start) const;
  // The decoder's work on one token. The first one of a text gives no spaces.
  std::string Restore(std::string_view token, bool at_start) const;
};

// Reads the keys of a pre-tokenizer or decoder of this type.
Metaspace TakeMetaspace(ConfigReader& step);

}  // namespace gla
