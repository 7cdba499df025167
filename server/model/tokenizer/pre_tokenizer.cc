#include "model/tokenizer/pre_tokenizer.h"

#include <unicode/uchar.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/tokenizer/byte_level.h"
#include "model/tokenizer/json_steps.h"
#include "model/tokenizer/metaspace.h"
#include "model/tokenizer/utf8.h"

namespace gla {
namespace {

// GPT-2's own pattern, which "ByteLevel" stands for.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// What becomes of the matches when a piece is cut at them.
enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct Stretch {
  Range range;
  bool is_match;
};

// The whole piece as matches and what lies between them.
std::vector<Stretch> Stretches(std::string_view piece, const std::vector<Range>& matches,
                               bool invert) {
  std::vector<Stretch> stretches;
  size_t done = 0;
  for (const Range& match : matches) {
    if (match.begin > done) stretches.push_back({{done, match.begin}, invert});
    stretches.push_back({match, !invert});
    done = match.end;
  }
  if (done < piece.size()) stretches.push_back({{done, piece.size()}, invert});
  return stretches;
}

void Cut(std::string_view piece, const std::vector<Range>& matches, bool invert, Behavior behavior,
         Pieces* out) {
  std::vector<Stretch> stretches = Stretches(piece, matches, invert);
  // Matches join with what stands before them; for those that join with what follows, backwards.
  const bool backwards = behavior == Behavior::kMergedWithNext;
  if (backwards) std::reverse(stretches.begin(), stretches.end());
  std::vector<Range> ranges;
  bool after_match = false;
  for (const Stretch& stretch : stretches) {
    const bool is_merged = behavior == Behavior::kMergedWithPrevious || backwards;
    const bool joins = is_merged
                           ? stretch.is_match && !after_match
                           : behavior == Behavior::kContiguous && stretch.is_match == after_match;
    after_match = stretch.is_match;
    if (behavior == Behavior::kRemoved && stretch.is_match) continue;
    if (joins && !ranges.empty()) {
      ranges.back().begin = std::min(ranges.back().begin, stretch.range.begin);
      ranges.back().end = std::max(ranges.back().end, stretch.range.end);
    } else {
      ranges.push_back(stretch.range);
    }
  }
  if (backwards) std::reverse(ranges.begin(), ranges.end());
  for (const Range& range : ranges) out->Add(piece.substr(range.begin, range.end - range.begin));
}

Behavior TakeBehavior(ConfigReader& step) {
  constexpr std::pair<std::string_view, Behavior> kNames[] = {
      {"Removed", Behavior::kRemoved},
      {"Isolated", Behavior::kIsolated},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext},
      {"Contiguous", Behavior::kContiguous}};
  const std::string name = TakeText(step, "behavior");
  for (const auto& [known, behavior] : kNames) {
    if (name == known) return behavior;
  }
  step.Fail("behavior", "Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
  return Behavior::kIsolated;
}

// Runs of digits, or every digit, of any script.
std::vector<Range> FindDigits(std::string_view piece) {
  constexpr uint32_t kNumbers = U_GC_ND_MASK | U_GC_NL_MASK | U_GC_NO_MASK;
  std::vector<Range> ranges;
  for (size_t at = 0; at < piece.size();) {
    const size_t begin = at;
    if ((U_MASK(u_charType(NextCharacter(piece, &at))) & kNumbers) != 0) {
      ranges.push_back({begin, at});
    }
  }
  return ranges;
}

absl::Status SplitWith(const Regex& pattern, bool invert, Behavior behavior, std::string_view piece,
                       WorkBudget& budget, Pieces* out) {
  GLA_ASSIGN_OR_RETURN(const std::vector<Range> matches, pattern.FindAll(piece, budget));
  Cut(piece, matches, invert, behavior, out);
  return absl::OkStatus();
}

// `pattern` is null when the piece is not cut.
absl::Status ByteLevel(const Regex* pattern, bool add_prefix_space, std::string_view piece,
                       WorkBudget& budget, Pieces* out) {
  std::string text(piece);
  if (add_prefix_space && !text.starts_with(' ')) text.insert(0, 1, ' ');
  Pieces cut;
  if (pattern == nullptr) {
    cut.Add(text);
  } else {
    GLA_RETURN_IF_ERROR(SplitWith(*pattern, false, Behavior::kIsolated, text, budget, &cut));
  }
  size_t begin = 0;
  for (const size_t end : cut.ends) {
    AppendByteCharacters(std::string_view(cut.text).substr(begin, end - begin), &out->text);
    out->ends.push_back(out->text.size());
    begin = end;
  }
  return absl::OkStatus();
}

void ApplyMetaspace(const Metaspace& metaspace, std::string_view piece, bool at_start,
                    Pieces* out) {
  const std::string text = metaspace.Replace(piece, at_start);
  const std::vector<Range> spaces =
      metaspace.split ? FindLiteral(text, metaspace.replacement) : std::vector<Range>();
  Cut(text, spaces, false, Behavior::kMergedWithNext, out);
}

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::Parse(const nlohmann::json& value) {
  PreTokenizer pre_tokenizer;
  std::vector<Step>& steps = pre_tokenizer.steps_;
  const auto parse = [&steps](const std::string& type, ConfigReader& step) -> absl::Status {
    if (type == "ByteLevel") {
      const bool add_prefix_space = step.Bool("add_prefix_space", true);
      step.Bool("trim_offsets", true);  // of the places in the text only
      std::shared_ptr<const Regex> pattern;
      if (step.Bool("use_regex", true)) {
        GLA_ASSIGN_OR_RETURN(Regex compiled, Regex::Compile(kGpt2Pattern));
        pattern = std::make_shared<const Regex>(std::move(compiled));
      }
      steps.push_back([=](const Input& in, Pieces* out) {
        return ByteLevel(pattern.get(), add_prefix_space, in.piece, in.budget, out);
      });
    } else if (type == "Split") {
      GLA_ASSIGN_OR_RETURN(Regex compiled, TakePattern(step, "pattern"));
      auto pattern = std::make_shared<const Regex>(std::move(compiled));
      const Behavior behavior = TakeBehavior(step);
      const bool invert = step.Bool("invert", false);
      steps.push_back([=](const Input& in, Pieces* out) {
        return SplitWith(*pattern, invert, behavior, in.piece, in.budget, out);
      });
    } else if (type == "Digits") {
      const bool each = step.Bool("individual_digits", false);
      steps.push_back([=](const Input& in, Pieces* out) {
        Cut(in.piece, FindDigits(in.piece), false,
            each ? Behavior::kIsolated : Behavior::kContiguous, out);
        return absl::OkStatus();
      });
    } else if (type == "Metaspace") {
      const Metaspace metaspace = TakeMetaspace(step);
      steps.push_back([=](const Input& in, Pieces* out) {
        ApplyMetaspace(metaspace, in.piece, in.at_start, out);
        return absl::OkStatus();
      });
    } else {
      return UnknownStep("Sequence, ByteLevel, Split, Digits, Metaspace");
    }
    return absl::OkStatus();
  };
  GLA_RETURN_IF_ERROR(ForEachStep(value, "pre_tokenizer", "pretokenizers", parse));
  return pre_tokenizer;
}

absl::StatusOr<Pieces> PreTokenizer::Apply(std::string_view text, bool at_start,
                                           WorkBudget& budget) const {
  Pieces pieces;
  pieces.Add(text);
  for (const Step& step : steps_) {
    Pieces next;
    size_t begin = 0;
    for (const size_t end : pieces.ends) {
      const std::string_view piece = std::string_view(pieces.text).substr(begin, end - begin);
      GLA_RETURN_IF_ERROR(step({piece, at_start && begin == 0, budget}, &next));
      GLA_RETURN_IF_ERROR(CheckGrowth(next.text.size(), text.size()));
      begin = end;
    }
    pieces = std::move(next);
  }
  return pieces;
}

}  // namespace gla
